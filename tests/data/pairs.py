"""Binidx files for tests: by our writer, and assembled by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class IdsOnly:
    """Replaces a tokenizer if only the size of the vocabulary matters."""

    vocab_size: int = 65536
    spec: str = "ids"
    eod: int = 0
    identity: Mapping[str, str] = field(default_factory=lambda: {"name": "ids", "sha256": "0" * 64})


def index_bytes(
    sizes, *, code=8, itemsize=2, marks=None, pointers=None, magic=b"MMIDIDX\x00\x00", version=1, items=None
) -> bytes:
    """Return an .idx built field by field, as Megatron's `MMapIndexedDataset.Index` writes it."""
    if pointers is None:
        pointers = [sum(sizes[:i]) * itemsize for i in range(len(sizes))]
    if marks is None:
        marks = list(range(len(sizes) + 1))
    return b"".join(
        (
            magic,
            struct.pack("<Q", version),
            struct.pack("<B", code),
            struct.pack("<Q", len(sizes) if items is None else items),
            struct.pack("<Q", len(marks)),
            struct.pack(f"<{len(sizes)}i", *sizes),
            struct.pack(f"<{len(pointers)}q", *pointers),
            struct.pack(f"<{len(marks)}q", *marks),
        )
    )


def write_files(prefix: Path, index: bytes, tokens: bytes) -> str:
    """Write an index and tokens to `prefix`, which has no suffix, and return it as a string."""
    prefix.with_suffix(".idx").write_bytes(index)
    prefix.with_suffix(".bin").write_bytes(tokens)
    return str(prefix)


def write_mask(prefix: str, mask: bytes) -> str:
    """Add a mask to a pair and its sidecar, and return the prefix."""
    Path(prefix + ".mask.bin").write_bytes(mask)
    meta = Path(prefix + ".meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"mask": True}))
    return prefix
