"""Which targets of a row train. One function per `--loss_mask`; each sees the row's real tokens and nothing else.

N real tokens of a row (at most T + 1), T = ctx_len.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Mask = Callable[[np.ndarray, int], np.ndarray]
"""(tokens (N,), ctx_len) -> (T,) bool; entry t is True where predicting tokens[t + 1] trains."""


def real_targets(tokens: np.ndarray, ctx_len: int) -> np.ndarray:
    """True for every target that is data. Padding is known by its place, never by its value: 0 is a real id too."""
    return np.arange(ctx_len) < len(tokens) - 1  # (T,)


MASKS: Mapping[str, Mask] = {
    # Padding never trains, whatever --loss_mask says: `none` masks nothing of the data itself.
    "none": real_targets,
    "pad": real_targets,
}
