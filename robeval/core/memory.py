"""How the process keeps memory that it will need again at once."""

from __future__ import annotations

import ctypes

#: glibc's option numbers (malloc.h), and what they are set to: bytes, and blocks that are mapped on their own.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEPT, STEP, MAPPED = (2 << 30) - 1, 64 << 20, 0


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep freed memory instead of handing it back to the system after every layer.

    A forward pass frees and asks for the same megabytes over and over; by default each round trip costs a page fault
    per 4 KiB, which made a row in a batch of 256 up to 1.7 times as dear as it is (benchmarks/results), and a proof by
    crown on 28x28 images, whose blocks are larger still, 2.6 times. Up to 2 GiB stay with the process until it ends.
    It is a setting of the whole process, so programs call it, the library does not.

    Returns:
        False where the C library is another one; nothing has happened then.
    """
    try:
        setting = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wanted = {MMAP_MAX: MAPPED, TRIM_THRESHOLD: KEPT, TOP_PAD: STEP}
    heard = [setting(option, value) == 1 for option, value in wanted.items()]  # every one is asked
    return all(heard)
