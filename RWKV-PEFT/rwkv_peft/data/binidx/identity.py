"""The identity of a run's data: equal content has an equal identity, under any file name."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from rwkv_peft.data.rows.sampling import Samples

SAMPLED_TOKENS = 256
"""Tokens of a pair that its identity depends on, evenly spaced."""


def identity_of(samples: Samples) -> dict[str, Any]:
    """Return a pair's sizes and hashes of its document bounds, some tokens and their loss mask, ready for JSON."""
    reader = samples.reader
    tokens = len(reader.tokens)
    positions = np.linspace(0, max(tokens - 1, 0), min(SAMPLED_TOKENS, tokens)).astype(np.int64)
    trained = np.concatenate([samples.mask.trained(position, position + 1) for position in positions.tolist()])
    return {
        "documents": len(reader),
        "tokens": tokens,
        "bounds": hashlib.sha256(np.ascontiguousarray(reader.bounds)).hexdigest(),
        "sample": hashlib.sha256(np.ascontiguousarray(reader.tokens[positions])).hexdigest(),
        "mask": samples.mask.name,
        "trains": hashlib.sha256(trained.astype(np.uint8)).hexdigest(),
    }
