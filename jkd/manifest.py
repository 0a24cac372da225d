"""Which files a checkpoint is made of, and whether they still are what was written.

After everything of a checkpoint is on disk, each process (host) writes ``manifest-<host>-of-<hosts>.json`` with the size and the
checksum of the files that it wrote, and then the checkpoint counts as finished. The checksum is BLAKE2b with 128 bits: unlike a
CRC it leaves nothing to chance for any damage, it is fast on every processor (about 1 GB/s a core, with or without SHA
instructions, and files are read in parallel), it is in the standard library, and ``b2sum -l 128 FILE`` checks one by hand.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from etils import epath

NAME = re.compile(r"manifest-(\d+)-of-(\d+)\.json")
# The parts of a path that orbax (ocdbt.process_3, process_3) and jkd (meta-3.json) name after the host that writes there.
_OWNER = re.compile(r"(?:ocdbt\.process_|process_|meta-)(\d+)(?:\.json)?")
_BLOCK = 8 << 20
_READERS = 8


def write(place: epath.Path, *, host: int, hosts: int, **facts: object) -> None:
    """Writes this host's manifest of the checkpoint at ``place``; ``facts`` (JSON) are kept in it.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    owned = sorted(_files(place, host, hosts))
    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip(owned, pool.map(lambda path: _measure(place / path), owned), strict=True))
    body = {"host": host, "hosts": hosts, "files": found, **facts}
    # Under another name first: a manifest cut short by a kill must not look like one.
    unfinished = place / f"unfinished-{host}"
    unfinished.write_bytes(_encode(body))
    unfinished.replace(place / name(host, hosts))


def read(place: epath.Path, host: int, hosts: int) -> dict:
    """What the manifest of one host says.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read.
    """
    raw = (place / name(host, hosts)).read_bytes()
    try:
        body = json.loads(raw)["manifest"]
        good = _encode(body) == raw  # the exact bytes: not even a changed space passes
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{name(host, hosts)} does not match its checksum")
    return body


def hosts(place: epath.Path) -> int:
    """How many hosts wrote the checkpoint, if all of their manifests are there; else 0 (not finished, or not there)."""
    try:
        found = [match for path in place.iterdir() if (match := NAME.fullmatch(path.name))]
    except (FileNotFoundError, NotADirectoryError):
        return 0
    present: dict[int, set[int]] = {}
    for match in found:
        present.setdefault(int(match[2]), set()).add(int(match[1]))
    return max((count for count, which in present.items() if which >= set(range(count))), default=0)


def problem(place: epath.Path, *, host: int = 0, hosts_now: int = 1) -> str:
    """The first thing that is wrong with a finished checkpoint, naming the file; empty where nothing is.

    With several hosts each checks the manifests of every ``hosts_now``-th host that wrote, and the files that they list.
    """
    written_by = hosts(place)
    if not written_by:
        return "a manifest is missing"
    for writer in range(host, written_by, hosts_now):
        try:
            listed = read(place, writer, written_by)["files"]
        except (ValueError, OSError) as error:
            return str(error)
        with ThreadPoolExecutor(_READERS) as pool:
            for wrong in pool.map(lambda item: _compare(place, *item), listed.items()):
                if wrong:
                    return wrong
    return ""


def _files(folder: epath.Path, host: int, hosts: int, prefix: str = "", owner: int = 0) -> Iterator[str]:
    """Paths of the files of a checkpoint that a host wrote: host 0 where neither the name nor a folder's tells whose it is."""
    for path in folder.iterdir():  # names alone: what epath's walk yields differs from store to store
        match = _OWNER.fullmatch(path.name)
        whose = int(match[1]) if match and int(match[1]) < hosts else owner
        if match and whose != host or not prefix and (NAME.fullmatch(path.name) or path.name.startswith("unfinished-")):
            continue
        if path.is_dir():
            yield from _files(path, host, hosts, f"{prefix}{path.name}/", whose)
        elif whose == host:
            yield prefix + path.name


def name(host: int, hosts: int) -> str:
    return f"manifest-{host}-of-{hosts}.json"


def _encode(body: Mapping[str, object]) -> bytes:
    text = json.dumps(body, sort_keys=True)
    checksum = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return (json.dumps({"checksum": checksum, "manifest": body}, sort_keys=True, indent=1) + "\n").encode()


def _measure(path: epath.Path) -> dict[str, object]:
    digest, size = hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _compare(place: epath.Path, path: str, listed: Mapping[str, object]) -> str:
    """What is wrong with one file; empty where nothing is."""
    try:
        size = (place / path).stat().length
        if size != listed["bytes"]:
            return f"{path} has {size} bytes, its manifest says {listed['bytes']}"
        if _measure(place / path) != dict(listed):
            return f"{path} does not match its checksum"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return ""
