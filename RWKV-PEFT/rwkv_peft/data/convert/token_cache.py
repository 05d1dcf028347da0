"""The cache of tokens that runs make from JSON and text, by content and settings.

    ROOT/KEY/data.bin ...     a complete pair; the folder appears at once, by a rename
    ROOT/.KEY.HOST-PID.tmp/   a pair in the making; if its process is killed, the next conversion deletes it
    ROOT/KEY.lock             locked by the process that converts
    ROOT/hashes.json          content hashes of large files

ROOT is `$XDG_CACHE_HOME/rwkv_peft/data`, or `~/.cache/rwkv_peft/data`. It can be deleted at any time when no run is
starting. KEY is a hash of the content of all files, their name suffixes, the tokenizer, the `RecordFormat`, and the
converter's own source files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rwkv_peft.console import note
from rwkv_peft.data import tokenizer
from rwkv_peft.data.binidx.reader import META_VERSION, BinidxReader
from rwkv_peft.data.convert import decompress, encode, jinja_template, json_stream, record_text, sources
from rwkv_peft.data.convert.conversion import Summary, convert
from rwkv_peft.data.convert.file_hashes import FileHashes, file_stamp
from rwkv_peft.data.convert.record_text import RecordFormat
from rwkv_peft.data.convert.sources import STDIN, find_sources, format_suffix
from rwkv_peft.data.tokenizer import Tokenizer, same_tokenizer
from rwkv_peft.errors import DataError
from rwkv_peft.files import LockHeld, file_lock, remove_leftovers, temporary_path

_CONVERTER = (sources, decompress, json_stream, record_text, jinja_template, encode, tokenizer)
"""Modules that decide which tokens a text becomes. If one of them changes, pairs are made again."""

_HINT = "Set XDG_CACHE_HOME to a folder with free space, or convert with rwkv-peft convert and train on its pair."


def cache_root() -> Path:
    """Return the folder of the cache.

    Raises:
        DataError: the user has no home folder, as in some containers.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise DataError("~/.cache", "there is no home folder for the token cache", hint=_HINT) from error
    return caches / "rwkv_peft" / "data"


class TokenCache:
    """Pairs by content and settings. A missing or damaged pair is made again."""

    def __init__(self, root: Path, tokenizer: Tokenizer, record_format: RecordFormat) -> None:
        self._root, self._tokenizer, self._format = root, tokenizer, record_format
        self._hashes = FileHashes(root / "hashes.json")

    def pair(self, source: str) -> str:
        """Return the prefix of the pair for a file, folder or glob pattern.

        If several processes ask at the same time, one converts and the others wait.

        Raises:
            DataError: a file cannot be read, changes while it is read, or has an invalid record; or the cache cannot
                be written.
        """
        paths = _regular_files(source)
        try:
            stamps = [file_stamp(path) for path in paths]
            folder = self._root / self._key(paths)
        except OSError as error:
            raise DataError(str(error.filename or source), "cannot be read", found=error.strerror) from error
        if not self._is_complete(folder):
            with self._writing(), _locked(folder, source):
                if not self._is_complete(folder):  # another process may have made it in the meantime
                    self._make(folder, source, paths, stamps)
        return str(folder / "data")

    def _key(self, paths: Sequence[str]) -> str:
        form = self._format
        facts = {
            "format": META_VERSION,
            "converter": [hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() for module in _CONVERTER],
            "tokenizer": self._tokenizer.identity["sha256"],
            "layout": [form.text_key, form.fields, form.template],
            "files": [[format_suffix(path), self._hashes.of(path)] for path in paths],
        }
        return hashlib.sha256(json.dumps(facts).encode("utf-8")).hexdigest()[:32]

    def _is_complete(self, folder: Path) -> bool:
        if not folder.exists():
            return False
        try:
            meta = BinidxReader(folder / "data").meta
        except DataError:
            return False
        return meta is not None and same_tokenizer(meta.tokenizer, self._tokenizer.identity)

    def _make(self, folder: Path, source: str, paths: Sequence[str], stamps: Sequence[list[int]]) -> None:
        temporary = temporary_path(folder)
        _remove_all_leftovers(self._root)
        remove_leftovers(self._root, folder.name, locked=True)
        try:
            summary = convert(paths, str(temporary / "data"), self._tokenizer, self._format)
            for path, stamp in zip(paths, stamps, strict=True):
                if file_stamp(path) != stamp:
                    raise DataError(path, "changed while it was read", hint="Start again when the file is complete.")
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        note(f"{source}: {_short(summary)}, cached in {folder}")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Report OSErrors as errors of the cache: the inputs have just been read without one."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            yield
        except (OSError, DataError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            what = "the tokens of --data_file cannot be cached here"
            raise DataError(str(self._root), what, found=cause.strerror, hint=_HINT) from error


def _regular_files(source: str) -> list[str]:
    paths = find_sources([source])
    for path in paths:
        if path == STDIN or not Path(path).is_file():
            hint = "Convert it with rwkv-peft convert (tools/json2binidx.py) and train on its pair."
            raise DataError(path, "cannot be read twice", expected="a regular file", hint=hint)
    return paths


def _short(summary: Summary) -> str:
    tokens = int(summary.lengths.sum(dtype="int64"))
    text = f"{len(summary.lengths):,} documents, {tokens:,} tokens"
    if summary.answer_tokens is not None:
        text += f" ({summary.answer_tokens / tokens:.1%} in answers, which are in the loss)"
    return f"{text}, tokenized in {summary.seconds:.1f} s"


@contextmanager
def _locked(folder: Path, source: str) -> Iterator[None]:
    """Let only one process at a time make `folder`."""
    lock = folder.with_name(folder.name + ".lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(lock, wait=False))
        except LockHeld:
            note(f"waiting for another process that tokenizes {source}")
            stack.enter_context(file_lock(lock, wait=True))
        yield


def _remove_all_leftovers(root: Path) -> None:
    """Delete what killed conversions of any data left in the cache. Their locks are free."""
    for lock in root.glob("*.lock"):
        with suppress(LockHeld), file_lock(lock, wait=False):
            remove_leftovers(root, lock.stem, locked=True)
