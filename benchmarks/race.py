"""Tools against each other on one model: interleaved, one thread, rows and calls counted on the model."""

from __future__ import annotations

import os
import resource
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.counting import Counting, Timed, line, machine
from robeval.core.memory import keep_freed_memory

#: Paired CPU ratios that lie further apart than this say that the machine was busy.
NOISY = 0.25
Tool = Callable[[Counting], set[int]]


def race(
    counted: Counting, tools: dict[str, Tool], *, repeat: int, out: Path | None = None, **case: Any
) -> dict[str, dict[str, Any]]:
    """Run every tool ``repeat`` times in alternating order (A B, B A, ...); print a line a run and the ratios.

    Args:
        counted: Counts what is asked of it. Its parameters ask for gradients, as they do in a user's hands.
        tools: Ours first; each returns the ids of the images that it broke.
        repeat: Times that every tool runs.
        out: File to append the lines to.
        case: What the lines are about.

    Returns:
        By tool: median CPU and wall seconds, the counts of its last run and the ids.
    """
    line(out, **case, machine=machine())
    cpu: dict[str, list[float]] = {name: [] for name in tools}
    wall: dict[str, list[float]] = {name: [] for name in tools}
    last: dict[str, dict[str, Any]] = {}
    for turn in range(repeat):
        for name in list(tools)[:: 1 if turn % 2 == 0 else -1]:
            counted.reset()
            counted.requires_grad_(True)  # as a user's model comes; who freezes it does so himself
            with Timed() as time:
                broken = tools[name](counted)
            cpu[name].append(time.cpu)
            wall[name].append(time.wall)
            last[name] = {"broken": sorted(broken), **counted.counts()}
            line(
                out,
                **case,
                tool=name,
                turn=turn,
                **last[name] | {"broken": len(broken)},
                cpu_s=time.cpu,
                wall_s=time.wall,
                peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                load=round(os.getloadavg()[0], 2),
            )
    ours = next(iter(tools))
    for name in list(tools)[1:]:
        pairs = [theirs / mine for theirs, mine in zip(cpu[name], cpu[ours], strict=True)]
        mine, theirs = set(last[ours]["broken"]), set(last[name]["broken"])
        line(
            out,
            **case,
            against=name,
            broken_ours=len(mine),
            broken_theirs=len(theirs),
            only_ours=sorted(mine - theirs),
            only_theirs=sorted(theirs - mine),
            cpu_ratio=round(statistics.median(pairs), 2),
            noisy=max(pairs) > (1 + NOISY) * min(pairs),
            **{f"{key}_ratio": _ratio(last[name][key], last[ours][key]) for key in ("forwards", "backwards", "calls")},
        )
    return {n: last[n] | {"cpu_s": statistics.median(cpu[n]), "wall_s": statistics.median(wall[n])} for n in tools}


def _ratio(theirs: int, ours: int) -> float | None:
    return round(theirs / ours, 2) if ours else None


def quiet_machine() -> None:
    """One thread, and freed memory is kept, for every tool alike. Set OMP_WAIT_POLICY=PASSIVE outside."""
    torch.set_num_threads(1)
    keep_freed_memory()
