"""The mask companion of a pair: PREFIX.mask.bin, one uint8 for each token of PREFIX.bin, in the same order.

mask[i] is 1 where predicting token i trains, and 0 where it does not. There is no header: its size says that it
belongs to the pair, and `"mask"` in PREFIX.meta.json says whether there must be one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rwkv_peft.errors import DataError

CHECK_ALL_UP_TO = 2**27
"""Masks of at most this many tokens are read through when they are opened; longer ones where they are used."""

_CHECK_CHUNK = 2**22
_REMAKE = "It was cut off or comes from another run: copy it again, or remake the pair with tools/json2binidx.py."


def map_mask(path: Path, tokens: int, promised: bool | None) -> np.ndarray | None:
    """(tokens,) uint8, read-only, mapped; None where the pair has no mask.

    Args:
        promised: what the sidecar says of a mask; None where no sidecar says anything.
    Raises:
        DataError: the file contradicts the sidecar, has another size, or (when short) a value other than 0 and 1.
    """
    if not path.exists():
        if promised:
            hint = "Copy it too, or remake the pair: without it, everything would train."
            raise DataError(str(path), "no such file, though the .meta.json says that the pair has a mask", hint=hint)
        return None
    if promised is False:
        hint = "Delete it, if it is left over from an older pair."
        raise DataError(str(path), "belongs to no pair: the .meta.json says that there is no mask", hint=hint)
    try:
        found = path.stat().st_size
        if found != tokens:
            what = f"does not belong to its .bin ({tokens} tokens, one byte for each)"
            raise DataError(str(path), what, found=f"{found} bytes", expected=tokens, hint=_REMAKE)
        mask = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise DataError(str(path), "cannot be read", found=error.strerror) from error
    if tokens <= CHECK_ALL_UP_TO:
        check_mask(path, mask, 0, tokens)
    return mask


def check_mask(path: Path, mask: np.ndarray, start: int, stop: int) -> None:
    """Raise DataError for the first of mask[start:stop] that is neither 0 nor 1."""
    for first in range(start, stop, _CHECK_CHUNK):
        values = mask[first : min(first + _CHECK_CHUNK, stop)]
        if values.max() > 1:
            place = first + int(np.argmax(values > 1))
            raise DataError(
                str(path), f"bad value at token {place}", found=mask[place], expected="0 or 1", hint=_REMAKE
            )
