"""Tokenizers: three vocabularies with one interface.

    world     RWKV World, 65536 ids (tokens are 1..65529); uses the package pyrwkv-tokenizer
    bytes     id = byte + 1, 257 ids
    a path    a Hugging Face tokenizer.json; uses the package tokenizers

The first two have an id for every byte, so they also encode bytes that are not text: `encode_bytes`, `decode_bytes`.
The packages are imported when a tokenizer is made, so `--help` and training on binidx do not wait for them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from rwkv_peft.errors import ConfigError, DataError

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Shown for unknown ids and for bytes that are not UTF-8."""

_INVALID_BYTES = re.compile("([\udc80-\udcff]+)")
"""`surrogateescape` turns each byte that is not UTF-8 into one of these code points."""

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]")
"""Names of the end-of-document token in common vocabularies. The first one that exists is used."""


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    spec: str
    """The argument with which `load_tokenizer` makes this tokenizer again."""
    vocab_size: int
    """The largest id plus 1."""
    eod: int
    """The end-of-document id. It decodes to an empty string."""
    identity: dict[str, str]
    """`name`, for people, and `sha256` of the vocabulary. Two tokenizers are the same if their sha256 is."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without eod. `text` must not contain lone surrogates."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Never raises: unknown ids and incomplete UTF-8 become U+FFFD."""


def same_tokenizer(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Return whether two identities belong to tokenizers that give the same ids for the same text."""
    return a["sha256"] == b["sha256"]


def load_tokenizer(spec: str) -> Tokenizer:
    """Return the tokenizer for a value of `--tokenizer`: `world`, `bytes` or the path of a tokenizer.json.

    Raises:
        ConfigError: `spec` is neither of these names nor a file.
        DataError: the file is not a tokenizer.json, or has no end-of-document token.
    """
    if spec == "world":
        return WorldTokenizer()
    if spec == "bytes":
        return BytesTokenizer()
    if Path(spec).is_file():
        return JsonTokenizer(Path(spec))
    raise ConfigError("tokenizer", found=repr(spec), expected="world, bytes or the path of a tokenizer.json")


class WorldTokenizer:
    """RWKV World: greedy longest match in a trie of 65529 byte strings. Ids 1..256 are single bytes, 0 is eod."""

    spec = "world"
    vocab_size = 65536
    eod = 0

    def __init__(self) -> None:
        from pyrwkv_tokenizer import RWKVTokenizer

        self._trie = RWKVTokenizer()
        self._vocabulary = Path(self._trie.vocab_filepath).read_bytes()
        self.identity = {"name": "rwkv-world", "sha256": hashlib.sha256(self._vocabulary).hexdigest()}

    def encode(self, text: str) -> list[int]:
        return self._trie.encode(text)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes, without eod. Bytes that are not UTF-8 get their own id each."""
        # The package encodes only text. The pieces alternate: text, invalid bytes, text, ...
        pieces = _INVALID_BYTES.split(data.decode("utf-8", errors="surrogateescape"))
        ids = self.encode(pieces[0])
        for invalid, text in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += [ord(code) - 0xDC00 + 1 for code in invalid]
            ids += self.encode(text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`. Never raises: an unknown id becomes U+FFFD in UTF-8."""
        # The package's own decode panics (not an `Exception`) on unknown ids and incomplete UTF-8.
        return _join_bytes(self._table, ids)

    @cached_property
    def _table(self) -> list[bytes]:
        """The bytes of each id. The vocabulary file has lines `id literal length`, sorted by id."""
        table = [b""]  # id 0, eod
        for line in self._vocabulary.decode("utf-8").splitlines():
            token = ast.literal_eval(line[line.index(" ") + 1 : line.rindex(" ")])
            table.append(token.encode("utf-8") if isinstance(token, str) else token)
        return table


class BytesTokenizer:
    """One id per byte of UTF-8: id = byte + 1, and 0 is eod."""

    spec = "bytes"
    vocab_size = 257
    eod = 0
    identity: Mapping[str, str] = {"name": "bytes", "sha256": hashlib.sha256(b"id = byte + 1, eod = 0").hexdigest()}
    _table = (b"", *(bytes([byte]) for byte in range(256)))

    def encode(self, text: str) -> list[int]:
        return self.encode_bytes(text.encode("utf-8"))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes, without eod."""
        return [byte + 1 for byte in data]

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`. Never raises: an unknown id becomes U+FFFD in UTF-8."""
        return _join_bytes(self._table, ids)


class JsonTokenizer:
    """A Hugging Face tokenizer.json. As in that library, text that spells a special token becomes this token."""

    def __init__(self, path: Path) -> None:
        self.spec = str(path)
        self._tokenizer, content = _read_tokenizer_json(path)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.eod = _find_eod(path, vocabulary)
        self._known = frozenset(vocabulary.values())
        self.vocab_size = max(self._known) + 1  # a count would be too small if ids are missing
        self.identity = {"name": path.name, "sha256": hashlib.sha256(content).hexdigest()}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        runs = groupby((int(i) for i in ids if i != self.eod), key=self._known.__contains__)
        return "".join(self._decode_run(list(run), known) for known, run in runs)

    def _decode_run(self, ids: list[int], known: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if known else UNKNOWN * len(ids)


def _join_bytes(table: Sequence[bytes], ids: Iterable[int]) -> bytes:
    unknown = UNKNOWN.encode("utf-8")
    return b"".join(table[i] if 0 <= i < len(table) else unknown for i in ids)


def _read_tokenizer_json(path: Path) -> tuple[Any, bytes]:
    """Return the `tokenizers.Tokenizer` in `path`, and its content as canonical JSON.

    Truncation and padding are removed from both: they are for batches of sentences and would silently cut documents.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = HuggingFaceTokenizer.from_str(text)
    except Exception as error:  # the package raises plain Exception
        raise DataError(str(path), "not a Hugging Face tokenizer.json", found=error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    content = {key: value for key, value in json.loads(text).items() if key not in ("truncation", "padding")}
    return tokenizer, json.dumps(content, sort_keys=True).encode("utf-8")


def _find_eod(path: Path, vocabulary: Mapping[str, int]) -> int:
    for name in EOD_NAMES:
        if name in vocabulary:
            return vocabulary[name]
    raise DataError(
        str(path),
        "no end-of-document token in the vocabulary",
        expected="one of " + " ".join(EOD_NAMES),
        hint="Add one, for example with Tokenizer.add_special_tokens.",
    )
