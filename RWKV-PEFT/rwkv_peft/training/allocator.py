"""Memory that a training process frees and takes again in every step."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""

MOST_FREE = 2**31 - 1
LARGEST_ON_THE_HEAP = 2**25
"""32 MB: more is refused by older versions of glibc."""


def keep_freed_pages() -> bool:
    """Have the allocator keep what it is given back, instead of handing pages to the system and faulting them in again.

    For training on a CPU: every step takes the same memory. Measured at width 2048: LoRA's layers gain 5 %, col's 15 %,
    at the same peak.

    Returns:
        Whether there is a glibc to tell.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, MOST_FREE) and mallopt(M_MMAP_THRESHOLD, LARGEST_ON_THE_HEAP))
