"""The loss-mask file of a pair: PREFIX.mask.bin, one uint8 for each token of PREFIX.bin, in the same order.

mask[i] is 1 if predicting token i is trained, and 0 if it is not. The file has no header. Its size shows whether it
belongs to the pair, and `"mask"` in PREFIX.meta.json says whether the pair has one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rwkv_peft.errors import DataError

CHECK_ALL_UP_TO = 2**27
"""Masks of at most this many tokens are checked when they are opened; longer ones when they are used."""

_CHECK_CHUNK = 2**22
_REMAKE = "It is incomplete or belongs to another pair: copy it again, or convert again with rwkv-peft convert."


def map_mask(path: Path, tokens: int, expected: bool | None) -> np.ndarray | None:
    """Memory-map a mask.

    Args:
        path: PREFIX.mask.bin.
        tokens: tokens of the pair.
        expected: whether the sidecar says that the pair has a mask; None if it does not say.
    Returns:
        (tokens,) uint8, read-only; None if the pair has no mask.
    Raises:
        DataError: the file contradicts the sidecar, has the wrong size, or (if it is short) a value other than 0 and 1.
    """
    if not path.exists():
        if expected:
            hint = "Copy it too, or convert again: without the mask, all tokens would be in the loss."
            raise DataError(str(path), "no such file, but the .meta.json says that the pair has a mask", hint=hint)
        return None
    if expected is False:
        hint = "Delete it if it is left over from an older pair."
        raise DataError(str(path), "unexpected file: the .meta.json says that the pair has no mask", hint=hint)
    try:
        found = path.stat().st_size
        if found != tokens:
            what = "wrong size: a mask has one byte for each token of the .bin"
            raise DataError(str(path), what, found=f"{found} bytes", expected=tokens, hint=_REMAKE)
        mask = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise DataError(str(path), "cannot be read", found=error.strerror) from error
    if tokens <= CHECK_ALL_UP_TO:
        check_mask(path, mask, 0, tokens)
    return mask


def check_mask(path: Path, mask: np.ndarray, start: int, stop: int) -> None:
    """Raise DataError for the first value of mask[start:stop] that is neither 0 nor 1."""
    for first in range(start, stop, _CHECK_CHUNK):
        values = mask[first : min(first + _CHECK_CHUNK, stop)]
        if values.max() > 1:
            token = first + int(np.argmax(values > 1))
            raise DataError(
                str(path), f"invalid value at token {token}", found=mask[token], expected="0 or 1", hint=_REMAKE
            )
