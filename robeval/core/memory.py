"""How the process keeps memory that it will need again at once."""

from __future__ import annotations

import ctypes

#: glibc's option numbers (malloc.h), and what they are set to, in bytes.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
LARGEST, KEPT, STEP = 32 << 20, 256 << 20, 64 << 20


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep freed memory instead of handing it back to the system after every layer.

    A forward pass frees and asks for the same megabytes over and over; by default each round trip costs a page fault
    per 4 KiB, which made a row in a batch of 256 up to 1.7 times as dear as it is (benchmarks/results). Up to 256 MiB
    stay with the process. It is a setting of the whole process, so programs call it, the library does not.

    Returns:
        False where the C library is another one; nothing has happened then.
    """
    try:
        setting = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wanted = {MMAP_THRESHOLD: LARGEST, TRIM_THRESHOLD: KEPT, TOP_PAD: STEP}
    heard = [setting(option, size) == 1 for option, size in wanted.items()]  # every one is asked
    return all(heard)
