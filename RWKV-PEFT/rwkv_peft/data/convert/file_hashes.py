"""Hashes of the content of files. Those of large files are remembered, so that an unchanged one is not read again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

REMEMBER_FROM = 2**25
"""Bytes from which a hash is remembered: a smaller file is read in some 30 ms."""

_SETTLED = 2.0
"""Seconds after which a change must show in a file's times, whatever the file system's resolution."""


def identity(path: str) -> list[int]:
    """What changes when a file does. The time of change (ctime) is one that `touch` and `cp -p` cannot set."""
    stat = os.stat(path)
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


class FileHashes:
    """Content hashes, with a file that remembers those of large files by path and `identity`.

    Args:
        memory: the JSON file. Where it cannot be read or written, files are hashed each time.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory

    def of(self, path: str) -> str:
        """Hex digest of the file's bytes.

        Raises:
            OSError: it cannot be read.
        """
        before, name = identity(path), os.path.abspath(path)
        known = self._read()
        if known.get(name, [None])[0] == before:
            return known[name][1]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        # A file that changed a moment ago may change again without another time.
        settled = time.time_ns() - max(before[3:]) > _SETTLED * 1e9
        if before[2] >= REMEMBER_FROM and settled and identity(path) == before:
            kept = {other: entry for other, entry in known.items() if Path(other).exists()}
            self._write(kept | {name: (before, digest)})
        return digest

    def _read(self) -> Mapping[str, tuple[list[int], str]]:
        try:
            known = json.loads(self._memory.read_bytes())
            return {name: (entry[0], str(entry[1])) for name, entry in known.items()}
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
            return {}

    def _write(self, known: Mapping[str, tuple[list[int], str]]) -> None:
        temporary = self._memory.with_name(f"{self._memory.name}.{os.getpid()}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(known))
            temporary.replace(self._memory)
