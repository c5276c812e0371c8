"""Linear lower bounds, carried from a node back to the image. Machinery of the proofs, no bound itself.

The rows of coefficients A on a node's output stand for <A, h>. Each step replaces h by what it is computed from: affine
operators exactly, curved ones by a line below where A is positive and one above where it is negative. What every step
loses to rounding is known from the size of the values that pass through it, and is taken off at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robeval.bounds.convex import Convex
from robeval.bounds.graph import Graph
from robeval.bounds.intervals import Interval, terms
from robeval.bounds.operators import Average, Convolution, Dense, Input, Maximum, Reshape, Scale, Sum
from robeval.bounds.region import Region
from robeval.bounds.rounding import TINY, UNIT, gamma
from robeval.bounds.rows import Rows


@dataclass(frozen=True)
class Lines:
    """Lines below and above an activation, for each of n images; a further axis of rows may follow the images.

    Args:
        down: Slopes below, (n, *shape) or (n, S, *shape).
        floor: Heights below.
        up: Slopes above, (n, *shape).
        top: Heights above.
    """

    down: Tensor
    floor: Tensor
    up: Tensor
    top: Tensor

    def size(self, reach: Tensor) -> Tensor:
        """Size of what the lines add up, for inputs of at most this size: (n,), the largest entry of each image."""
        down, up, floor, top = (largest(t.detach().abs()) for t in (self.down, self.up, self.floor, self.top))
        return torch.maximum(down, up) * largest(reach) + torch.maximum(floor, top)


@dataclass(frozen=True)
class Choice:
    """Bounds of a maximum over windows.

    Args:
        place: (n, C, H', W') flat place in its channel of the entry that bounds the window from below.
        ceiling: (n, C, H', W') largest value of the window.
        decided: (n, C, H', W') bool: that entry is the largest one everywhere.
    """

    place: Tensor
    ceiling: Tensor
    decided: Tensor


def relax(op: Convex | Maximum, at: Interval, position: Tensor | None = None) -> Lines | Choice:
    """Bounds of a curved operator on intervals of its input.

    Args:
        op: The operator.
        at: Intervals of its input.
        position: In [0, 1], which line below to take, see :meth:`Convex.lines`; (n, *shape) or (n, S, *shape).
    """
    if isinstance(op, Maximum):
        place = op.where(at.low)
        best = at.low.flatten(2).gather(2, place.flatten(2)).view_as(place)
        return Choice(place, op.forward(at.high), best >= op.second(at.high, place))
    low, high = at.low, at.high
    if position is not None and position.dim() > low.dim():
        low, high = low[:, None], high[:, None]
    return Lines(*op.lines(low, high, position))


def backward(
    graph: Graph,
    region: Region,
    node: int,
    rows: Rows,
    found: list[Interval],
    lines: dict[int, Lines | Choice],
    added: dict[int, Tensor] | None = None,
    seen: dict[int, Rows] | None = None,
) -> Tensor:
    """Lower bounds of <a, h> for the output h of a node, over the region of each image.

    A curved node without an entry in ``lines`` is not passed through: its interval is used there, which is what
    interval bound propagation does.

    Args:
        graph: The network.
        region: n regions.
        node: Number of the node.
        rows: S rows of coefficients a for each image.
        found: Intervals of the nodes up to this one.
        lines: Bounds of the curved nodes that are passed through.
        added: Coefficients to add where the rows reach a node, (n, S, *shape): multipliers of what is known of it.
        seen: Receives the rows as they stand on the output of every node that they reach.

    Returns:
        (n, S) float64, rounding enclosed; differentiable in the rows, the lines and what is added. With multipliers,
        a bound over those points of the region at which the sum of what is added, times h, is not above 0.
    """
    waiting: dict[int, Rows] = {node: rows}
    total = rows.data.new_zeros(rows.data.shape[:2])
    error = torch.zeros_like(total)

    def lose(a: Rows, size: Tensor, count: int) -> None:
        nonlocal error
        error = error + gamma(count) * a.size() * size[:, None]

    def give(k: int, more: Rows) -> None:
        if k in waiting:
            waiting[k] = waiting[k] + more
            lose(waiting[k], largest(found[k].size), 2)
        else:
            waiting[k] = more

    for k in range(node, -1, -1):
        if k not in waiting:
            continue
        here = waiting.pop(k)
        if added and k in added:
            here = here.whole()
            here = replace(here, data=here.data + added[k])
            lose(here, largest(found[k].size), 2)
        if seen is not None:
            seen[k] = here
        op, inputs, width = graph.nodes[k].op, graph.nodes[k].inputs, math.prod(graph.nodes[k].shape)
        if isinstance(op, Input):
            total = total + here.minimum(region)
        elif isinstance(op, Sum):
            give(inputs[0], here)
            give(inputs[1], here.times(op.sign))
            lose(here, largest(found[k].size), 4)
        elif isinstance(op, Convex | Maximum) and k not in lines:
            positive, negative = replace(here, data=here.data.clamp_min(0)), replace(here, data=here.data.clamp_max(0))
            total = total + positive.inner(found[k].low) + negative.inner(found[k].high)
            lose(here, largest(found[k].size), width)
        elif isinstance(op, Convex):
            line = lines[k]
            assert isinstance(line, Lines)
            down, floor, up, top = (here.pick(t) for t in (line.down, line.floor, line.up, line.top))
            plus, minus = here.data.clamp_min(0), here.data.clamp_max(0)
            total = total + (plus * floor + minus * top).flatten(2).sum(2)
            lose(here, line.size(found[inputs[0]].size), width + 4)
            give(inputs[0], replace(here, data=plus * down + minus * up))
        elif isinstance(op, Maximum):
            choice, here = lines[k], here.whole()
            assert isinstance(choice, Choice)
            decided = choice.decided[:, None]
            total = total + (here.data.clamp_max(0) * choice.ceiling[:, None]).masked_fill(decided, 0).flatten(2).sum(2)
            passed = torch.where(decided, here.data, here.data.clamp_min(0)).flatten(3)
            image = passed.new_zeros(*passed.shape[:3], op.into[1] * op.into[2])
            image = image.scatter_add(3, choice.place.flatten(2)[:, None].expand_as(passed), passed)
            give(inputs[0], Rows(image.view(*passed.shape[:2], *op.into), op.into))
            lose(here, largest(found[inputs[0]].size), width + 64)
        else:
            assert isinstance(op, Dense | Convolution | Scale | Average | Reshape)
            if op.bias is not None:
                total = total + (here.data * _bias(here, op.bias)).flatten(2).sum(2)
            if not isinstance(op, Reshape):
                lose(here, largest(terms(op, found[inputs[0]].size)), op.fan + width)
            give(inputs[0], here.through(op, graph.nodes[inputs[0]].shape))
    # The additions to the total, and the errors themselves, are rounded too.
    return total - 2 * error - 64 * len(graph.nodes) * UNIT * total.detach().abs() - TINY


def largest(t: Tensor) -> Tensor:
    """Largest entry of each image. (n, ...) -> (n,)."""
    most: Tensor = t.flatten(1).amax(1)
    return most


def _bias(rows: Rows, bias: Tensor) -> Tensor:
    """The bias where the rows stand; one number per channel needs no picking."""
    return bias if rows.origin is None or bias.shape[1:].numel() == 1 else rows.pick(bias[None])
