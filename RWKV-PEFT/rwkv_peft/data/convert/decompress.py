"""gzip and Zstandard streams, known by their first bytes.

A damaged stream gives what can be read of it and then ends; `damage_of` says afterwards whether it ended well.
"""

from __future__ import annotations

import gzip
import io
import zlib
from importlib.util import find_spec

from rwkv_peft.errors import BadRecord, DataError

GZIP = b"\x1f\x8b"
ZSTANDARD = b"\x28\xb5\x2f\xfd"
_READ = 2**16


def decompressed(path: str, stream: io.BufferedReader) -> io.BufferedReader:
    """`stream` itself where it is not compressed.

    Raises:
        DataError: zstandard is not installed.
    """
    magic = stream.peek(4)[:4]
    if magic.startswith(GZIP):
        return io.BufferedReader(_Gzip(stream), 2**20)
    if magic == ZSTANDARD:
        if find_spec("zstandard") is None:
            raise DataError(path, "Zstandard needs the package zstandard", hint="pip install zstandard")
        return io.BufferedReader(_Zstandard(stream), 2**20)
    return stream


def damage_of(stream: io.BufferedReader) -> BadRecord | None:
    """What ended a stream of `decompressed` before its time."""
    return getattr(stream.raw, "damage", None)


class _Decompressor(io.RawIOBase):
    damage: BadRecord | None = None

    def readable(self) -> bool:
        return True

    def _ended_by(self, error: Exception) -> None:
        self.damage = BadRecord("damaged or cut off", found=error, hint="Copy the file again.")


class _Gzip(_Decompressor):
    def __init__(self, stream: io.BufferedReader) -> None:
        self._file = gzip.GzipFile(fileobj=stream)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.damage is None:
            try:
                # Not readinto, which forgets what it has when it meets the damage.
                data = self._file.read1(len(buffer))
                buffer[: len(data)] = data
                return len(data)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self._ended_by(error)
        return 0


class _Zstandard(_Decompressor):
    """The package's own stream readers take a stream that was cut off for one that ends."""

    def __init__(self, stream: io.BufferedReader) -> None:
        import zstandard

        self._zstandard, self._stream = zstandard, stream
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._rest = b""  # compressed, of the next frame
        self._ready = memoryview(b"")

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if not self._decompress_more():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress_more(self) -> bool:
        """False at the end of the last frame, or at damage."""
        if self.damage is not None:
            return False
        data = self._rest or self._stream.read(_READ)
        if not data:
            if self._begun:
                self._ended_by(EOFError("the compressed data ends in the middle"))
            return False
        try:
            self._ready = memoryview(self._frame.decompress(data))
        except self._zstandard.ZstdError as error:
            self._ended_by(error)
            return False
        self._rest, self._begun = b"", True
        if self._frame.eof:
            self._rest, self._begun = self._frame.unused_data, False
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        return True
