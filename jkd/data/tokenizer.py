"""Text to numbers and back: bytes as they are, or a tokenizer.json; and whether two models mean the same by a number."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jkd.errors import InputError


class Tokenizer(Protocol):
    """What text data and reports need of a tokenizer."""

    @property
    def size(self) -> int:
        """One more than the largest number; what a model's embedding has beyond is padding."""
        ...

    @property
    def begin(self) -> int | None:
        """The token before a document, if it has one."""
        ...

    @property
    def end(self) -> int | None:
        """The token after a document, if it has one."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly where every number means the same: tokens, how they are merged, which are special."""
        ...

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """int32 ``[tokens]``; with ``special`` as the tokenizer's own template has it (``[CLS] … [SEP]``)."""
        ...

    def encode_all(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]: ...

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text; with ``special`` special tokens stand in it by their names."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes it as ``transformers`` reads it."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
    """A number for each byte of UTF-8, and 256 for the end of a document. Nothing to train or to download."""

    size = 257
    begin = None
    end = 256

    @property
    def fingerprint(self) -> str:
        return _fingerprint({byte: bytes([byte]).hex() for byte in range(256)} | {self.end: "end"}, [], [self.end])

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        return np.append(tokens, np.int32(self.end)) if special else tokens

    def encode_all(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
        return [self.encode(text, special=special) for text in texts]

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        end = _END.encode() if special else b""
        return b"".join(bytes([token]) if token < 256 else end for token in tokens).decode(errors="replace")

    def save(self, directory: str | Path) -> None:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Fast

        vocab = {letter: byte for byte, letter in enumerate(_letters())}
        fast = Fast(models.BPE(vocab, []))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_special_tokens([AddedToken(_END, normalized=False)])
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        fast.save(str(directory / _FILE))
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END, "clean_up_tokenization_spaces": False}
        (directory / _CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


_END = "<|end|>"
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


def _letters() -> list[str]:
    """A printable letter for each byte, as the byte-level files of others have it: itself, or one from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte if byte in plain else 256 + others.index(byte)) for byte in range(256)]


@dataclasses.dataclass(frozen=True)
class File:
    """The tokenizer.json of a directory as published with models, or any such file.

    Args:
        path: the directory or the file. What its tokenizer_config.json says of the tokens around a document is heeded.

    Raises:
        InputError: when it is first used: no such file, or one that ``tokenizers`` cannot read.
    """

    path: str | Path

    @functools.cached_property
    def _file(self) -> Path:
        path = Path(self.path)
        return path / _FILE if path.is_dir() else path

    @functools.cached_property
    def _fast(self) -> Any:
        from tokenizers import Tokenizer as Fast

        if not self._file.exists():
            hint = ""
            if (self._file.parent / "tokenizer.model").exists():
                hint = "; the tokenizer.model there must be converted first (transformers.AutoTokenizer does, then save_pretrained)"
            raise InputError(f"{self._file}: no such file{hint}")
        try:
            fast = Fast.from_file(str(self._file))
        except Exception as error:  # tokenizers raises nothing more exact
            raise InputError(f"{self._file}: no tokenizer ({error})") from error
        fast.no_truncation()
        fast.no_padding()
        return fast

    @functools.cached_property
    def size(self) -> int:
        return max(self._fast.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def begin(self) -> int | None:
        return self._around("bos_token", "cls_token", 0)

    @functools.cached_property
    def end(self) -> int | None:
        return self._around("eos_token", "sep_token", -1)

    def _around(self, name: str, encoders: str, place: int) -> int | None:
        """The token that tokenizer_config.json names (encoders have another name for theirs), else what the template of
        tokenizer.json itself puts there: BERT's own files name none."""
        config = self._file.parent / _CONFIG
        named = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
        token = named.get(name) or named.get(encoders)
        if token is not None:
            return self._fast.token_to_id(token["content"] if isinstance(token, dict) else token)
        written = self._fast.encode("a", add_special_tokens=True)
        added = written.special_tokens_mask
        return written.ids[place] if len(set(added)) == 2 and added[place] else None

    @functools.cached_property
    def fingerprint(self) -> str:
        model = json.loads(self._fast.to_str())
        tokens = {number: token for token, number in self._fast.get_vocab(with_added_tokens=True).items()}
        rules = model["model"].get("merges", [])
        if isinstance(model["model"].get("vocab"), list):  # unigrams: what is merged follows from their scores
            rules = [score for _, score in model["model"]["vocab"]]
        return _fingerprint(tokens, rules, [one["id"] for one in model["added_tokens"] if one["special"]])

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        return np.asarray(self._fast.encode(text, add_special_tokens=special).ids, np.int32)

    def encode_all(self, texts: Sequence[str], *, special: bool = False) -> list[np.ndarray]:
        return [np.asarray(one.ids, np.int32) for one in self._fast.encode_batch(list(texts), add_special_tokens=special)]

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        return self._fast.decode([int(token) for token in tokens], skip_special_tokens=not special)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in (_FILE, _CONFIG, "special_tokens_map.json", "chat_template.jinja"):
            source = self._file if name == _FILE else self._file.parent / name
            if source.exists() and source.resolve() != (directory / name).resolve():
                shutil.copyfile(source, directory / name)


def _fingerprint(tokens: dict[int, str], rules: Sequence[Any], special: Sequence[int]) -> str:
    said = json.dumps([sorted(tokens.items()), rules, sorted(special)], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(said.encode()).hexdigest()


def check_same(**fingerprints: str | None) -> None:
    """Raises InputError where two of those that are known differ: ``check_same(student=…, teacher=…)``."""
    known = {name: fingerprint for name, fingerprint in fingerprints.items() if fingerprint is not None}
    for name, fingerprint in known.items():
        first, other = next(iter(known.items()))
        if fingerprint != other:
            raise InputError(
                f"the tokenizers of {first} ({other[:8]}) and {name} ({fingerprint[:8]}) differ, so their token numbers mean "
                "different things; give both one vocabulary, or use a recipe for two of them (recipes.ULD) with teacher_tokens"
            )
