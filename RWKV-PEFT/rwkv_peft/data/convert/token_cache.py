"""Tokens of JSON that runs train on, made once for a content and settings.

    ROOT/KEY/data.bin ...   a whole pair; the folder appears at once, by a rename
    ROOT/KEY.part/          one that is being made, or was when its process was killed; the next conversion removes it
    ROOT/KEY.lock           locked by the process that converts; the kernel drops the lock with its owner
    ROOT/hashes.json        content hashes of large files

ROOT is `$XDG_CACHE_HOME/rwkv_peft/data`, else `~/.cache/rwkv_peft/data`. It may be deleted whenever no run starts. KEY
is a hash of the bytes of all files, of how their names end, of the tokenizer, of `Layout`, and of the converter's own
sources.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rwkv_peft.data import tokenizer
from rwkv_peft.data.binidx.reader import META_VERSION, BinidxReader
from rwkv_peft.data.convert import decompress, encode, json_stream, records, sources, templates
from rwkv_peft.data.convert.conversion import Summary, convert
from rwkv_peft.data.convert.file_hashes import FileHashes, identity
from rwkv_peft.data.convert.records import Layout
from rwkv_peft.data.convert.sources import STDIN, find_sources, reading_hint
from rwkv_peft.data.tokenizer import Tokenizer, same_tokenizer
from rwkv_peft.errors import DataError

_SHAPING = (sources, decompress, json_stream, records, templates, encode, tokenizer)
"""Modules of which a change may change tokens: another release of them makes new pairs."""

_WAY_OUT = "Set XDG_CACHE_HOME to a folder with room, or convert with tools/json2binidx.py and train on its pair."


def cache_root() -> Path:
    """Where the pairs are kept.

    Raises:
        DataError: the user has no home, as in some containers.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise DataError("~/.cache", "no home folder to keep tokens in", hint=_WAY_OUT) from error
    return caches / "rwkv_peft" / "data"


class TokenCache:
    """Pairs by content and settings, each made where it is missing or damaged."""

    def __init__(self, root: Path, tokenizer: Tokenizer, layout: Layout) -> None:
        self._root, self._tokenizer, self._layout = root, tokenizer, layout
        self._hashes = FileHashes(root / "hashes.json")

    def pair(self, source: str) -> str:
        """Prefix of the pair of a file, folder or glob. Of several processes one converts, and the others wait for it.

        Raises:
            DataError: a file cannot be read, changes meanwhile or holds a bad record; the cache cannot be written.
        """
        paths = _regular_files(source)
        try:
            before = [identity(path) for path in paths]
            folder = self._root / self._key(paths)
        except OSError as error:
            raise DataError(str(error.filename or source), "cannot be read", found=error.strerror) from error
        if not self._is_whole(folder):
            with self._writing(), _locked(folder, source):
                if not self._is_whole(folder):  # another process made it while this one waited
                    self._make(folder, source, paths, before)
        return str(folder / "data")

    def _key(self, paths: Sequence[str]) -> str:
        layout = self._layout
        facts = {
            "format": META_VERSION,
            "converter": [hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() for module in _SHAPING],
            "tokenizer": self._tokenizer.identity["sha256"],
            "layout": [layout.text_key, layout.fields, layout.template],
            "files": [[reading_hint(path), self._hashes.of(path)] for path in paths],
        }
        return hashlib.sha256(json.dumps(facts).encode("utf-8")).hexdigest()[:32]

    def _is_whole(self, folder: Path) -> bool:
        if not folder.exists():
            return False
        try:
            meta = BinidxReader(folder / "data").meta
        except DataError:
            return False
        return meta is not None and same_tokenizer(meta.tokenizer, self._tokenizer.identity)

    def _make(self, folder: Path, source: str, paths: Sequence[str], before: Sequence[list[int]]) -> None:
        part = _part(folder)
        _remove_leftovers(self._root)
        shutil.rmtree(part, ignore_errors=True)
        try:
            summary = convert(paths, str(part / "data"), self._tokenizer, self._layout)
            for path, known in zip(paths, before, strict=True):
                if identity(path) != known:
                    raise DataError(path, "changed while it was read", hint="Start again when it stays as it is.")
            if folder.exists():
                shutil.rmtree(folder)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        sys.stderr.write(f"note: {source}: {_in_short(summary)}, kept in {folder}\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The inputs were read a moment ago, so what fails now is the cache."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            yield
        except (OSError, DataError) as error:
            problem = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(problem, OSError):
                raise
            what = "the tokens of --data_file cannot be kept here"
            raise DataError(str(self._root), what, found=problem.strerror, hint=_WAY_OUT) from error


def _regular_files(source: str) -> list[str]:
    paths = find_sources([source])
    for path in paths:
        if path == STDIN or not Path(path).is_file():
            hint = "Convert it with tools/json2binidx.py, and train on its pair."
            raise DataError(path, "can be read only once", expected="a file", hint=hint)
    return paths


def _in_short(summary: Summary) -> str:
    tokens = int(summary.lengths.sum(dtype="int64"))
    text = f"{len(summary.lengths):,} documents, {tokens:,} tokens"
    if summary.answer_tokens is not None:
        text += f" ({summary.answer_tokens / tokens:.1%} in answers, which train)"
    return f"{text}, tokenised in {summary.seconds:.1f} s"


def _part(folder: Path) -> Path:
    return folder.with_name(folder.name + ".part")


@contextmanager
def _locked(folder: Path, source: str) -> Iterator[None]:
    """Let one process at a time make `folder`."""
    with open(_lock_of(folder), "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not {"RANK", "LOCAL_RANK"} & set(os.environ):  # the other processes of a run need not all say so
                sys.stderr.write(f"note: waiting for another process, which tokenises {source}\n")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _remove_leftovers(root: Path) -> None:
    """What conversions of other data left that were killed: their locks are free."""
    for part in root.glob("*.part"):
        with open(_lock_of(part.with_suffix("")), "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(part, ignore_errors=True)
