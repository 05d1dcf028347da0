"""Content hashes of files. Those of large files are stored, so that an unchanged file is not read again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rwkv_peft.errors import DataError
from rwkv_peft.files import atomic_write

STORE_FROM = 2**25
"""File size in bytes from which the hash is stored. A smaller file is read in about 30 ms."""

_TIME_RESOLUTION = 2.0
"""Seconds. Two changes further apart than this have different times on every file system."""


def file_stamp(path: str) -> list[int]:
    """Return values that change when a file changes. ctime is included because `touch` and `cp -p` cannot set it."""
    stat = os.stat(path)
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


class FileHashes:
    """Content hashes, with a JSON file that stores those of large files by path and `file_stamp`.

    Args:
        store: the JSON file. If it cannot be read or written, files are hashed each time.
    """

    def __init__(self, store: Path) -> None:
        self._store = store

    def of(self, path: str) -> str:
        """Return the hex digest of a file's bytes.

        Raises:
            OSError: the file cannot be read.
        """
        before, name = file_stamp(path), os.path.abspath(path)
        known = self._read()
        if known.get(name, [None])[0] == before:
            return known[name][1]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        # A file that has just changed may change again within the resolution of its times.
        settled = time.time_ns() - max(before[3:]) > _TIME_RESOLUTION * 1e9
        if before[2] >= STORE_FROM and settled and file_stamp(path) == before:
            existing = {other: entry for other, entry in known.items() if Path(other).exists()}
            self._write(existing | {name: (before, digest)})
        return digest

    def _read(self) -> Mapping[str, tuple[list[int], str]]:
        try:
            known = json.loads(self._store.read_bytes())
            return {name: (entry[0], str(entry[1])) for name, entry in known.items()}
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
            return {}

    def _write(self, known: Mapping[str, tuple[list[int], str]]) -> None:
        with suppress(DataError), atomic_write(self._store, error_type=DataError) as temporary:
            temporary.write_text(json.dumps(known))
