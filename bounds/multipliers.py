"""Bounds of sub-problems by ascent on lines and multipliers (beta-CROWN). Machinery of ``bab``, no bound itself.

Where a neuron h has the sign s by assumption, s h >= 0, so <A, x> >= <A, x> - b s h for every b >= 0: the multipliers b
enter the backward pass as coefficients on h, and whatever they are, the bound holds (Wang et al. 2021,
arXiv:2103.06624, theorem 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robeval.bounds.cells import Cells, Kinks, narrowed
from robeval.bounds.convex import Convex
from robeval.bounds.crown_intervals import ENTRIES
from robeval.bounds.intervals import Interval
from robeval.bounds.linear import Choice, Lines, backward, relax
from robeval.bounds.operators import Maximum
from robeval.bounds.proof import margins_of
from robeval.bounds.region import Region
from robeval.bounds.rows import Rows

#: Decay of the two moments of Adam, and of its step size from step to step.
FIRST, SECOND, FALL = 0.9, 0.999, 0.95


@dataclass(frozen=True)
class Task:
    """What all sub-problems of a call share.

    Args:
        kinks: The neurons that may be split.
        region: n regions.
        y: (n,) classes.
        found: Intervals of all nodes over the regions.
    """

    kinks: Kinks
    region: Region
    y: Tensor
    found: list[Interval]


@dataclass(frozen=True)
class Bounded:
    """Sub-problems with their bounds.

    Args:
        cells: D of them, with new bounds, lines and multipliers.
        score: (D, P) how much each neuron that can be split may cost the bound; 0 where none can.
        slope: (D, C, H, W) slope of the linear bound at the image; 0 for those that need no more.
    """

    cells: Cells
    score: Tensor
    slope: Tensor


def bounded(task: Task, cells: Cells, steps: int, rate: float) -> Bounded:
    """Raise the bound of every sub-problem by gradient ascent; those that are proven leave early.

    Args:
        task: What they share.
        cells: D sub-problems.
        steps: Steps of Adam.
        rate: Its first step size; for multipliers in units of the largest coefficient of their layer.
    """
    nodes = sum(f.low[0].numel() for f in task.found)
    parts = [_bounded(task, cells.take(rows), steps, rate) for rows in _chunks(len(cells), nodes)]
    score, slope = torch.cat([p.score for p in parts]), torch.cat([p.slope for p in parts])
    return Bounded(Cells.cat([p.cells for p in parts]), score, slope)


def passed(task: Task, cells: Cells) -> Tensor:
    """Lower bounds of sub-problems by one backward pass each. -> (D,)."""
    nodes = sum(f.low[0].numel() for f in task.found)
    lower = [_Pass(task, cells.take(rows)).once(cells.dial[rows]) for rows in _chunks(len(cells), nodes)]
    return torch.maximum(torch.cat(lower), cells.lower)


def _chunks(count: int, width: int) -> tuple[Tensor, ...]:
    """Rows that fit into memory together."""
    parts: tuple[Tensor, ...] = torch.arange(count).split(max(1, ENTRIES // width))
    return parts


class _Pass:
    """Backward passes of some sub-problems, all with the same intervals."""

    def __init__(self, task: Task, cells: Cells):
        self.kinks, self.graph, self.cells = task.kinks, task.kinks.graph, cells
        self.region = task.region.take(cells.image)
        self.now, self.empty = narrowed(task.kinks, task.found, cells)
        rows = margins_of(task.y[cells.image], self.graph.classes)
        place = torch.arange(len(cells), device=cells.image.device)
        self.rows = Rows(rows.data[place, cells.rival][:, None], rows.shape)
        nodes = enumerate(self.graph.nodes)
        self.chosen = {k: relax(n.op, self.now[n.inputs[0]]) for k, n in nodes if isinstance(n.op, Maximum)}

    def take(self, rows: Tensor) -> None:
        """Go on with some of them."""
        self.cells, self.region, self.empty = self.cells.take(rows), self.region.take(rows), self.empty[rows]
        self.now = [Interval(f.low[rows], f.high[rows]) for f in self.now]
        self.rows = replace(self.rows, data=self.rows.data[rows])
        self.chosen = {k: _some(c, rows) for k, c in self.chosen.items()}

    def once(self, dial: Tensor, seen: dict[int, Rows] | None = None) -> Tensor:
        """Lower bounds, differentiable in the dial. (D, P) -> (D,)."""
        lines: dict[int, Lines | Choice] = dict(self.chosen)
        added: dict[int, Tensor] = {}
        for before, readers in self.kinks.readers.items():
            at, side = self.kinks.at(dial, before)[:, None], self.kinks.at(self.cells.side, before)[:, None]
            for k in readers:
                op = self.graph.nodes[k].op
                assert isinstance(op, Convex)
                lines[k] = relax(op, self.now[before], at.clamp(0, 1))
            if side.any():
                added[before] = -side * at * (side != 0)
        last = len(self.graph.nodes) - 1
        lower = backward(self.graph, self.region, last, self.rows, self.now, lines, added, seen)[:, 0]
        return lower.masked_fill(self.empty, torch.inf)

    def units(self, seen: dict[int, Rows]) -> Tensor:
        """Step sizes of the dial in units that fit: 1 for a line, the layer's largest coefficient for a multiplier."""
        parts = {k: self._coefficients(seen, k).amax(1, keepdim=True) for k in self.kinks.places}
        shapes = {k: (len(self.cells), *self.graph.nodes[k].shape) for k in parts}
        sizes = {k: p.view(-1, *[1] * (len(shapes[k]) - 1)).expand(shapes[k]) for k, p in parts.items()}
        return torch.where(self.cells.side == 0, 1.0, self.kinks.row(sizes, len(self.cells)).to(self.region.x))

    def score(self, seen: dict[int, Rows]) -> Tensor:
        """Coefficient times height of the triangle between the lines, as in BaBSR (Bunel et al. 2020). -> (D, P)."""
        parts = {}
        for k in self.kinks.places:
            low, high = self.now[k].low.flatten(1), self.now[k].high.flatten(1)
            split = self.kinks.at(self.cells.side, k).flatten(1) != 0
            height = (high * -low / (high - low)).masked_fill((low >= 0) | (high <= 0) | split, 0)
            parts[k] = self._coefficients(seen, k) * height
        return self.kinks.row(parts, len(self.cells)).to(self.region.x)

    def _coefficients(self, seen: dict[int, Rows], node: int) -> Tensor:
        """Sizes of the coefficients on the activations of a node's neurons. -> (D, neurons)."""
        rows = [seen[k].whole().data[:, 0].detach().abs().flatten(1) for k in self.kinks.readers[node] if k in seen]
        return torch.stack(rows).sum(0) if rows else self.now[node].low.flatten(1) * 0


def _some(choice: Lines | Choice, rows: Tensor) -> Choice:
    """A choice for some of the sub-problems."""
    assert isinstance(choice, Choice)
    return Choice(choice.place[rows], choice.ceiling[rows], choice.decided[rows])


@torch.enable_grad()
def _bounded(task: Task, cells: Cells, steps: int, rate: float) -> Bounded:
    """The ascent itself, on as many sub-problems as fit into memory."""
    passes = _Pass(task, cells)
    dial, best = cells.dial.clone(), cells.lower.clone()
    score, slope = torch.zeros_like(dial), torch.zeros_like(task.region.x[cells.image])
    at, rows = cells.dial, torch.arange(len(cells), device=dial.device)
    size = rate * 0.7 ** cells.tries.to(dial)[:, None]
    first, second = torch.zeros_like(at), torch.zeros_like(at)
    for t in range(steps + 1):
        seen: dict[int, Rows] = {}
        with torch.set_grad_enabled(t < steps):
            at = at.detach().requires_grad_(t < steps)
            lower = passes.once(at, seen)
        best[rows] = torch.maximum(best[rows], lower.detach())
        dial[rows] = at.detach()
        if t == steps:
            score[rows], slope[rows] = passes.score(seen), seen[0].whole().data[:, 0] if 0 in seen else 0.0
            break
        if t == 0:
            unit = passes.units(seen)
        (g,) = torch.autograd.grad(lower.sum(), at, allow_unused=True, materialize_grads=True)
        first, second = FIRST * first + (1 - FIRST) * g, SECOND * second + (1 - SECOND) * g.square()
        move = first / (1 - FIRST ** (t + 1)) / ((second / (1 - SECOND ** (t + 1))).sqrt() + 1e-12)
        at = (at.detach() + size * FALL**t * unit * move).clamp_min(0)
        at = torch.where(passes.cells.side == 0, at.clamp_max(1), at)
        open_ = best[rows] <= 0
        if not open_.all():
            keep = open_.nonzero()[:, 0]
            rows, at, unit, size, first, second = (s[keep] for s in (rows, at, unit, size, first, second))
            if len(rows) == 0:
                break
            passes.take(keep)
    return Bounded(replace(cells, lower=best, dial=dial), score, slope)
