"""Decompresses gzip and Zstandard streams, recognized by their first bytes.

A damaged stream yields the part that can be read and then ends. Afterwards, `damage_of` returns the damage.
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
    """Return a decompressing stream, or `stream` itself if it is not compressed.

    Raises:
        DataError: zstandard is not installed.
    """
    magic = stream.peek(4)[:4]
    if magic.startswith(GZIP):
        return io.BufferedReader(_Gzip(stream), 2**20)
    if magic == ZSTANDARD:
        if find_spec("zstandard") is None:
            raise DataError(path, "reading .zst needs the package zstandard", hint="Run: pip install zstandard")
        return io.BufferedReader(_Zstandard(stream), 2**20)
    return stream


def damage_of(stream: io.BufferedReader) -> BadRecord | None:
    """Return why a stream from `decompressed` ended early; None if it did not."""
    return getattr(stream.raw, "damage", None)


class _Decompressor(io.RawIOBase):
    damage: BadRecord | None = None

    def readable(self) -> bool:
        return True

    def _set_damage(self, error: Exception) -> None:
        self.damage = BadRecord("damaged or incomplete", found=error, hint="Copy the file again.")


class _Gzip(_Decompressor):
    def __init__(self, stream: io.BufferedReader) -> None:
        self._file = gzip.GzipFile(fileobj=stream)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.damage is None:
            try:
                # Not readinto, which drops what it has read before the damage.
                data = self._file.read1(len(buffer))
                buffer[: len(data)] = data
                return len(data)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self._set_damage(error)
        return 0


class _Zstandard(_Decompressor):
    """The package's own stream readers do not notice that a stream is incomplete."""

    def __init__(self, stream: io.BufferedReader) -> None:
        import zstandard

        self._zstandard, self._stream = zstandard, stream
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._in_frame = False
        self._rest = b""  # compressed bytes of the next frame
        self._ready = memoryview(b"")  # decompressed bytes that have not been read

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if not self._decompress_more():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress_more(self) -> bool:
        """Return False at the end of the last frame, or at damage."""
        if self.damage is not None:
            return False
        data = self._rest or self._stream.read(_READ)
        if not data:
            if self._in_frame:
                self._set_damage(EOFError("unexpected end of the compressed data"))
            return False
        try:
            self._ready = memoryview(self._frame.decompress(data))
        except self._zstandard.ZstdError as error:
            self._set_damage(error)
            return False
        self._rest, self._in_frame = b"", True
        if self._frame.eof:
            self._rest, self._in_frame = self._frame.unused_data, False
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        return True
