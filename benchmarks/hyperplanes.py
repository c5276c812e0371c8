"""Projections on hyperplanes within the box: ours against pyautoattack's, which sort.

Random points and normals in float32, hyperplanes at a tenth to nine tenths of what the box lets a point reach. Both
tools run in alternating repetitions on one thread. Differences of norms are relative and measured in float64, where
rounding does not count. One JSON line per norm, dimension and batch; needs the extra ``reference``.

    python -m benchmarks.hyperplanes
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.counting import line, machine
from robeval.attacks.hyperplanes import shortest_move
from robeval.core.ball import NORMS, vector_norm


def problem(batch: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points, normals and gaps in float64."""
    g = torch.Generator().manual_seed(seed)
    x, w = (
        torch.rand(batch, d, generator=g, dtype=torch.float64),
        torch.randn(batch, d, generator=g, dtype=torch.float64),
    )
    reach = (w.clamp_min(0) * x - w.clamp_max(0) * (1 - x)).sum(1)
    return x, w, reach * (0.1 + 0.8 * torch.rand(batch, generator=g, dtype=torch.float64))


def cpu_seconds(function: Callable[[], Tensor], calls: int) -> float:
    before = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - before) / calls


def main(repetitions: int = 7, calls: int = 5) -> None:
    from pyautoattack import fab_projections

    torch.set_num_threads(1)
    line(None, benchmark="hyperplanes", machine=machine())
    for norm in NORMS:
        theirs = getattr(fab_projections, f"projection_{norm}")
        for d in (64, 784, 3072):
            for batch in (64, 256):
                x, w, gap = problem(batch, d)
                b = (w * x).sum(1) - gap
                mine, reference = (vector_norm(m, norm) for m in (shortest_move(x, w, gap, norm), theirs(x, w, b)))
                apart = float(((mine - reference) / reference).abs().max())
                x, w, gap, b = x.float(), w.float(), gap.float(), b.float()
                tools = {"robeval": partial(shortest_move, x, w, gap, norm), "pyautoattack": partial(theirs, x, w, b)}
                seconds: dict[str, list[float]] = {name: [] for name in tools}
                for _ in range(repetitions):
                    for name, function in tools.items():
                        seconds[name].append(cpu_seconds(function, calls))
                ratios = [t / m for m, t in zip(seconds["robeval"], seconds["pyautoattack"], strict=True)]
                line(
                    None, norm=norm, d=d, batch=batch, largest_relative_difference=apart,
                    microseconds_per_row={n: round(1e6 * statistics.median(s) / batch, 2) for n, s in seconds.items()},
                    times_quicker=round(statistics.median(ratios), 2),
                    spread=[round(min(ratios), 2), round(max(ratios), 2)],
                )  # fmt: skip


if __name__ == "__main__":
    main()
