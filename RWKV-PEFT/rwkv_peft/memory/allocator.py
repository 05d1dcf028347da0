"""Settings of glibc's allocator for memory that training frees and allocates again in every step."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""

MOST_FREE = 2**31 - 1
LARGEST_ON_THE_HEAP = 2**25
"""32 MB; older versions of glibc refuse more."""
SMALLEST_MAPPED = 2**20
"""With `give_back_freed_pages`, allocations of at least this many bytes are memory maps of their own."""


def keep_freed_pages() -> bool:
    """Let the allocator keep freed pages, instead of returning them to the system and faulting them in again.

    For training on a CPU, where every step needs the same memory. Measured at width 2048: LoRA's layers are 5 % faster,
    col's 15 %, at the same peak.

    Returns:
        Whether the process uses glibc.
    """
    return _set(M_TRIM_THRESHOLD, MOST_FREE) and _set(M_MMAP_THRESHOLD, LARGEST_ON_THE_HEAP)


def give_back_freed_pages() -> bool:
    """Let the allocator return large freed allocations to the system immediately.

    For runs that recompute activations to save memory. Otherwise glibc's heap fragments: the next block's tensors do
    not fit into the holes of the last one's, and the process grows as if nothing was recomputed. Measured for Bone row
    with --grad_cp 1 (6 layers x 1024, 2 x 512 tokens): 222 MB in addition to the model instead of 701 MB, at 1.3 to 1.5
    times the time per step.

    Returns:
        Whether the process uses glibc.
    """
    return _set(M_MMAP_THRESHOLD, SMALLEST_MAPPED)


def _set(parameter: int, value: int) -> bool:
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(parameter, value))
