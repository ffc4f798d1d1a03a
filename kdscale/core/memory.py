"""Memory of long-lived processes."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def release_memory() -> None:
    """Gives freed memory back to the system, where the C library is glibc.

    Each stage trains in a thread of its own, and glibc keeps what a thread has freed for the next
    one that happens to share its arena (malloc(3), M_ARENA_MAX): a process that runs stage after
    stage held several gigabytes that nothing used.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
