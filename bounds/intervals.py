"""Intervals of every node's values over a region, rounding enclosed. Machinery of the proofs, no bound itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.bounds.convex import Convex
from robeval.bounds.graph import Graph, Node
from robeval.bounds.operators import Average, Convolution, Dense, Input, Maximum, Reshape, Scale, Sum
from robeval.bounds.region import Region
from robeval.bounds.rounding import TINY, UNIT, gamma
from robeval.core.ball import per_row

Affine = Dense | Convolution | Scale | Average | Reshape


@dataclass(frozen=True)
class Interval:
    """Lowest and highest value of each entry; (n, *shape) each."""

    low: Tensor
    high: Tensor

    @property
    def size(self) -> Tensor:
        """Largest absolute value."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def meet(self, other: Interval) -> Interval:
        """What both allow."""
        return Interval(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))


def terms(op: Affine, size: Tensor) -> Tensor:
    """Sum of the sizes of what an affine operator adds up, for inputs of at most these sizes: rounding goes with it."""
    total = op.forward(size, torch.abs)
    own = op.terms if isinstance(op, Scale) else op.bias
    return total if own is None else total + own.abs()


def step(node: Node, inputs: list[Interval]) -> Interval:
    """Interval of a node's output from those of its inputs (Gowal et al. 2018, arXiv:1810.12715, section 3)."""
    op = node.op
    if isinstance(op, Convex):
        return Interval(*op.interval(inputs[0].low, inputs[0].high))
    if isinstance(op, Maximum):
        return Interval(op.forward(inputs[0].low), op.forward(inputs[0].high))
    if isinstance(op, Sum):
        a, b = inputs
        down, up = (b.low, b.high) if op.sign > 0 else (b.high, b.low)
        low, high = a.low + op.sign * down, a.high + op.sign * up
        error = 4 * UNIT * (a.size + abs(op.sign) * b.size)
        return Interval(low - error, high + error)
    assert not isinstance(op, Input)
    if isinstance(op, Reshape):
        return Interval(op.forward(inputs[0].low), op.forward(inputs[0].high))
    middle, half = (inputs[0].low + inputs[0].high) / 2, (inputs[0].high - inputs[0].low) / 2
    centre = op.forward(middle)
    if op.bias is not None:
        centre = centre + op.bias
    reach = op.forward(half, torch.abs)
    if reach.dtype == torch.float64:  # training's float32 would swallow the allowance, and asks for no proof
        reach = reach + 2 * gamma(op.fan + 8) * terms(op, inputs[0].size) + TINY
    return Interval(centre - reach, centre + reach)


def spread(graph: Graph) -> dict[int, Tensor]:
    """For nodes that only scale the image, entry by entry, the size of the scale: (*shape) by node."""
    found: dict[int, Tensor] = {}
    for k, node in enumerate(graph.nodes):
        if isinstance(node.op, Input):
            found[k] = torch.ones(node.shape, dtype=torch.float64)
        elif isinstance(node.op, Scale | Reshape) and node.inputs[0] in found:
            s = found[node.inputs[0]].to(node.op.weight.device if isinstance(node.op, Scale) else "cpu")
            found[k] = node.op.forward(s[None], torch.abs)[0] * (1 + gamma(8))
    return found


def of_ball(node: Node, region: Region, scale: Tensor, centre: Tensor) -> Interval | None:
    """Interval of a layer that reads the scaled image, from the row norms of its weights; None for other layers.

    A row w moves by at most eps times the dual norm of w over the ball, often far less than over the pixels' box.

    Args:
        node: The layer.
        region: The region, in l2 or l1.
        scale: What the image was multiplied with, by entry.
        centre: The layer's exact output at the image, (n, *shape).
    """
    op = node.op
    if not isinstance(op, Dense | Convolution):
        return None
    if region.norm == "l2":
        norms = op.forward(scale.square()[None].to(centre), torch.square)[0].sqrt()
    else:
        norms = op.largest(scale.to(centre))
    reach = per_row(region.eps, centre) * norms * (1 + gamma(op.fan + 8))
    return Interval(centre - reach, centre + reach)


def intervals(graph: Graph, region: Region) -> list[Interval]:
    """Interval of every node, in the order of the nodes."""
    found: list[Interval] = []
    scales = spread(graph) if region.norm != "linf" else {}
    values = graph.values(region.x) if scales else []
    for k in range(len(graph.nodes)):
        found.append(advance(graph, k, region, found, scales, values))
    return found


def advance(
    graph: Graph, k: int, region: Region, found: list[Interval], scales: dict[int, Tensor], values: list[Tensor]
) -> Interval:
    """Interval of node ``k`` from those before it; in l2 and l1 also from the row norms of the first layer."""
    node = graph.nodes[k]
    if not node.inputs:
        return Interval(region.low, region.high)
    now = step(node, [found[i] for i in node.inputs])
    before = node.inputs[0]
    if before in scales:
        assert not isinstance(node.op, Input)
        ball = of_ball(node, region, scales[before], values[k])
        if ball is not None:
            # The values at the image carry the rounding of the scales and of the layer.
            error = (
                4 * gamma(sum(getattr(n.op, "fan", 1) for n in graph.nodes[: k + 1]) + 64) * _terms_at(graph, k, values)
            )
            now = now.meet(Interval(ball.low - error, ball.high + error))
    return now


def _terms_at(graph: Graph, k: int, values: list[Tensor]) -> Tensor:
    """Sizes that went into node k, which reads the image through scales only."""
    node = graph.nodes[k]
    if not node.inputs:
        return values[k].abs()
    assert isinstance(node.op, Dense | Convolution | Scale | Average | Reshape)
    return terms(node.op, _terms_at(graph, node.inputs[0], values) + values[node.inputs[0]].abs())
