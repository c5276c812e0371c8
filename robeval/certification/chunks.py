"""Images in chunks: saved as each chunk is decided, larger while they are quick, smaller where memory ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from robeval.core.errors import MachineError
from robeval.core.records import Certificate
from robeval.engine.backend import out_of_memory

#: Told (done, total, text).
OnProgress = Callable[[int, int, str], None]
#: A kill loses one chunk, so that a chunk should take about as long as people are ready to lose, in seconds.
TARGET = 20.0


def in_chunks(
    rows: list[int],
    first: int,
    most: int,
    decide: Callable[[list[int]], list[Certificate]],
    *,
    label: str,
    on_progress: OnProgress | None = None,
) -> Iterator[list[Certificate]]:
    """The records of chunk after chunk, each as soon as it is decided.

    Args:
        rows: Images left to do.
        first: Images in the first chunk.
        most: Most images in a chunk.
        decide: The records of some rows; no image's result depends on its company.
        label: What progress says.
        on_progress: Told after each chunk.

    Raises:
        MachineError: out of memory with one image.
    """
    size, at = min(first, most), 0
    while at < len(rows):
        started = time.monotonic()
        try:
            records = decide(rows[at : at + size])
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if size == 1:
                raise MachineError("out of memory with one image in a batch", code="E01", do="--device cpu") from None
            size = most = min(size, len(rows) - at) // 2 or 1
            continue
        at += size
        yield records
        if on_progress:
            on_progress(min(at, len(rows)), len(rows), label)
        took = time.monotonic() - started
        if took < TARGET / 4:
            size = min(2 * size, most)
        elif took > 2 * TARGET:
            size = max(1, size // 2)
