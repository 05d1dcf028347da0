"""What tells the data of a run from others, whatever its files are called."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from rwkv_peft.data.rows.sampling import Samples

SAMPLED_TOKENS = 256
"""Tokens that the identity of a pair keeps."""


def identity_of(samples: Samples) -> dict[str, Any]:
    """Sizes, document bounds, some tokens of a pair and which of them train, as JSON has it."""
    reader = samples.reader
    tokens = len(reader.tokens)
    places = np.linspace(0, max(tokens - 1, 0), min(SAMPLED_TOKENS, tokens)).astype(np.int64)
    trains = np.concatenate([samples.mask.trains(place, place + 1) for place in places.tolist()])
    return {
        "documents": len(reader),
        "tokens": tokens,
        "bounds": hashlib.sha256(np.ascontiguousarray(reader.bounds)).hexdigest(),
        "sample": hashlib.sha256(np.ascontiguousarray(reader.tokens[places])).hexdigest(),
        "mask": samples.mask.name,
        "trains": hashlib.sha256(trains.astype(np.uint8)).hexdigest(),
    }
