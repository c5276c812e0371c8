"""Lipschitz constants of a whole network in l2, rounding enclosed. Machinery of the proofs, no bound itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robeval.bounds.convex import Convex
from robeval.bounds.graph import Graph
from robeval.bounds.intervals import intervals
from robeval.bounds.linear import backward
from robeval.bounds.norms import chain_norm
from robeval.bounds.operators import Affine, Average, Convolution, Dense, Input, Maximum, Reshape, Scale, Sum
from robeval.bounds.proof import margins_of
from robeval.bounds.region import Region
from robeval.bounds.rounding import UNIT, gamma
from robeval.core.ball import vector_norm


def margins_at(graph: Graph, x: Tensor, y: Tensor) -> Tensor:
    """Lower bounds of f_y - f_j at the images themselves: their values less rounding. (n, C, H, W) -> (n, K)."""
    point = Region(x, "linf", x.new_zeros(len(x)))
    return backward(graph, point, len(graph.nodes) - 1, margins_of(y, graph.classes), intervals(graph, point), {})


def less(a: Tensor, b: Tensor) -> Tensor:
    """a - b, rounded down."""
    return a - b - 4 * UNIT * (a.abs() + b.abs())


def reach(region: Region) -> Tensor:
    """Upper bound of the l2 distance from the image to any point of its region. -> (n,).

    |v|_2 <= eps in l2 and in l1, |v|_2 <= sqrt(d) eps in linf; and never more than the diagonal of the smallest box
    around the region, which knows where the pixel box ends.
    """
    room = torch.maximum(region.high - region.x, region.x - region.low)
    size = room[0].numel()
    return torch.minimum(vector_norm(room, "l2"), region.eps * (math.sqrt(size) if region.norm == "linf" else 1.0)) * (
        1 + gamma(size)
    )


def pair_constants(graph: Graph) -> Tensor:
    """Upper bounds of the l2 Lipschitz constants of f_i - f_j on the whole space. -> (K, K) float64.

    The product over blocks of affine layers, activations with slopes in [0, 1] between them; branches that meet in a
    sum add up. In the last block each pair of classes has the norm of its own row of weights.
    """
    nodes = graph.nodes
    weights = [n.op.weight for n in nodes if isinstance(n.op, Dense | Convolution | Scale)]
    like = torch.empty(0, dtype=torch.float64, device=weights[0].device if weights else "cpu")
    constant: dict[int, float] = {}

    def of(k: int) -> float:
        """The constant of one node; affine nodes are taken together with those before them."""
        if k in constant:
            return constant[k]
        op, inputs = nodes[k].op, nodes[k].inputs
        if isinstance(op, Input):
            value = 1.0
        elif isinstance(op, Sum):
            value = (of(inputs[0]) + abs(op.sign) * of(inputs[1])) * (1 + 4 * UNIT)
        elif isinstance(op, Convex):
            value = of(inputs[0])
        elif isinstance(op, Maximum):
            value = of(inputs[0]) * math.sqrt(overlap(op)) * (1 + 4 * UNIT)
        else:
            start, chain = before(graph, k)
            value = of(start) * chain_norm(chain, nodes[start].shape, like) * (1 + 4 * UNIT)
        constant[k] = value
        return value

    last = len(nodes) - 1
    start, chain = before(graph, last)
    labels = torch.arange(graph.classes, device=like.device)
    rows = sizes = margins_of(labels, graph.classes).data.flatten(0, 1)
    for op in reversed(chain):
        rows, sizes = op.transpose(rows), op.transpose(sizes.abs(), torch.abs)
    error = 2 * gamma(sum(op.fan + 8 for op in chain)) * vector_norm(sizes.flatten(1), "l2")
    norms = vector_norm(rows.flatten(1), "l2") * (1 + gamma(rows[0].numel())) + error
    return (norms * of(start) * (1 + 4 * UNIT)).view(graph.classes, graph.classes)


def before(graph: Graph, k: int) -> tuple[int, list[Affine]]:
    """The affine operators that end in node ``k``, one after the other, and the node that the first of them reads."""
    chain: list[Affine] = []
    while isinstance(op := graph.nodes[k].op, Dense | Convolution | Scale | Average | Reshape):
        chain.insert(0, op)
        (k,) = graph.nodes[k].inputs
    return k, chain


def overlap(op: Maximum) -> int:
    """In how many windows an entry lies at most: a step of size 1 there moves as many maxima."""
    o = op.options
    windows = 1
    for k, s, d in zip(o["kernel_size"], o["stride"], o["dilation"], strict=True):
        windows *= min(k, -(-((k - 1) * d + 1) // s))
    return windows
