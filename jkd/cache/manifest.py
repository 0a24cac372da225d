"""What a cache says of itself: ``cache.json`` (whose answers, how coded), one JSON for each finished shard, ``manifest.json`` at last.

A shard is ``shard-<host>-<number>`` with three files: ``.array_record`` (the answers), ``.index.npy`` (which example lies where) and
``.json`` (examples, sizes, checksums), written last: a shard without it was being written when its writer was killed, and counts
as not there. `seal` lists the shards in ``manifest.json``; without that a cache is not finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jkd.cache.codec import Codec
from jkd.cache.dense import Dense
from jkd.cache.keys import KEY_BYTES
from jkd.cache.sampled import Sampled
from jkd.cache.topk import TopK
from jkd.errors import InputError, MissingExtra

FORMAT = 1
DATA, INDEX, LISTED = ".array_record", ".index.npy", ".json"
CODECS: dict[str, Any] = {kind.__name__: kind for kind in (TopK, Sampled, Dense)}
# An example's key, the record that holds it, and where its key and payload lie in that record.
ENTRY = np.dtype([("key", "u1", (KEY_BYTES,)), ("record", "<u4"), ("start", "<u4"), ("size", "<u4")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Whose answers a cache holds, and of what.

    Args:
        codec: how they are coded.
        inputs: names of the arrays that an example's key is the hash of.
        teacher: any text that another teacher does not have: a name and a checksum of the weights, a revision, a date.
        tokenizer: fingerprint of the vocabulary that ``tokens`` are numbers of, or None.
    """

    codec: Codec
    inputs: tuple[str, ...]
    teacher: str
    tokenizer: str | None = None

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self.codec, name) for name in self.codec.__dataclass_fields__}  # type: ignore[attr-defined]
        codec = {"kind": type(self.codec).__name__, **fields}
        facts = {"format": FORMAT, "codec": codec, "inputs": sorted(self.inputs), "teacher": self.teacher}
        return json.loads(json.dumps(facts | {"tokenizer": self.tokenizer}))

    def check(self, found: Facts, folder: Path) -> None:
        """Raises InputError: a cache holds something else than this."""
        wanted, there = self.to_json(), found.to_json()
        for name in wanted:
            if wanted[name] != there[name]:
                raise InputError(
                    f"cache {folder} has {name} {json.dumps(there[name])}, not {json.dumps(wanted[name])}: its answers are of "
                    "another kind; give another folder, or delete this one"
                )


def read_facts(folder: Path) -> Facts:
    """What ``cache.json`` says.

    Raises:
        InputError: it is not there, is damaged, or is of a later version.
    """
    told = read_json(folder / "cache.json", f"there is no cache in {folder}; `jkd cache CONFIG` or jkd.cache.Writer makes one")
    try:
        if told["format"] != FORMAT:
            raise InputError(f"cache {folder} has format {told['format']}; this version of jkd reads {FORMAT}")
        fields = dict(told["codec"])
        codec = CODECS[fields.pop("kind")](**fields)
        return Facts(codec=codec, inputs=tuple(told["inputs"]), teacher=told["teacher"], tokenizer=told["tokenizer"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'cache.json'} is damaged ({error!r})") from error


def shards(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished shards by name, and what their JSON says; their files have the sizes it gives.

    Raises:
        InputError: a file of theirs is missing or was cut.
    """
    names = sorted(path.name.removesuffix(LISTED) for path in folder.glob(f"shard-*{LISTED}"))
    found = {name: read_json(folder / (name + LISTED), f"{folder / name}{LISTED} went away") for name in names}
    for name, listed in found.items():
        check_sizes(folder, name, listed)
    return found


def seal(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Finishes a cache: lists its shards in ``manifest.json``, which is returned. Call it when every writer is closed.

    A single `Writer` does so when it is closed. A sealed cache may be added to, and sealed again.

    Raises:
        InputError: there is no cache, or a shard of it is damaged.
    """
    folder = Path(folder)
    facts, found = read_facts(folder), shards(folder)
    body = {**facts.to_json(), "examples": sum(listed["examples"] for listed in found.values()), "shards": found}
    write_json(folder / "manifest.json", {"checksum": _checksum(body), "manifest": body})
    return body


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `seal` wrote; every shard's files are there in full size.

    Raises:
        InputError: the cache is not finished, or a file is missing, cut or damaged; the message names it.
    """
    read_facts(folder)
    whole = read_json(
        folder / "manifest.json",
        f"cache {folder} is not finished: fill it again by the same command (what is there is kept), or, after writers of your "
        "own, call jkd.cache.seal",
    )
    body = whole.get("manifest")
    if body is None or whole.get("checksum") != _checksum(body):
        raise InputError(f"{folder / 'manifest.json'} does not match its checksum; jkd.cache.seal writes it anew")
    for name, listed in body["shards"].items():
        check_sizes(folder, name, listed)
    return body


def measure(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            found.update(block)
    return {"bytes": path.stat().st_size, "blake2b": found.hexdigest()}


def check_sizes(folder: Path, name: str, listed: Mapping[str, Any]) -> None:
    for suffix in (DATA, INDEX):
        path = folder / (name + suffix)
        if not path.exists():
            raise InputError(f"cache {folder}: {path.name} is missing")
        size, wanted = path.stat().st_size, listed[suffix]["bytes"]
        if size != wanted:
            raise InputError(f"cache {folder}: {path.name} has {size} bytes, its manifest says {wanted}")


def verify(folder: str | os.PathLike[str]) -> int:
    """Reads every byte of a finished cache, compares every checksum, and returns how many examples there are.

    Training does this for what it reads as it reads it; for everything at once it takes about two seconds a gigabyte.

    Raises:
        InputError: names the file that is damaged.
    """
    folder = Path(folder)
    body = read_manifest(folder)
    for name, listed in body["shards"].items():
        for suffix in (DATA, INDEX):
            if measure(folder / (name + suffix)) != listed[suffix]:
                raise InputError(f"cache {folder}: {name}{suffix} does not match its checksum")
    return body["examples"]


def read_json(path: Path, absent: str) -> dict[str, Any]:
    try:
        told = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(absent) from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error})") from error
    return told


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is there whole or not at all, whenever the process is killed."""
    whole = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    whole.write_text(json.dumps(value, indent=1) + "\n")
    whole.replace(path)


def array_record() -> ModuleType:
    """The container's own library; loaded where a shard is written or read."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise MissingExtra("a cache's shards need the package array-record: pip install array-record") from error
    return array_record_module


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _checksum(body: Mapping[str, Any]) -> str:
    return digest(json.dumps(body, sort_keys=True))
