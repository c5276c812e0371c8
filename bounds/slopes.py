"""Intervals of slopes and of the Jacobians that they make. Machinery of the proofs, no bound itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robeval.bounds.convex import Convex
from robeval.bounds.graph import Graph
from robeval.bounds.intervals import Affine, Interval
from robeval.bounds.operators import Average, Convolution, Dense, Input, Maximum, Reshape, Scale, Sum
from robeval.bounds.region import Region
from robeval.bounds.rounding import TINY, ULPS, UNIT, gamma
from robeval.core.ball import DUAL, vector_norm

#: Slopes of an activation, or the entries of each window that may be the largest: (n, C, k, H', W') bool.
Slopes = dict[int, Interval | Tensor]


def derivatives(op: Convex, at: Interval) -> Interval:
    """Interval of the derivative between two points: it never falls."""
    error = 4 * ULPS * UNIT
    low, high = op.slope(at.low) - error, op.slope(at.high) + error
    if op.bend is None:  # at the kink itself both sides count
        high = torch.where(at.high >= 0, 1.0, high)
    return Interval(low.clamp(op.low, 1), high.clamp(op.low, 1))


def secants(op: Convex, at: Interval, centre: Interval) -> Interval:
    """Interval of (s(u') - s(u)) / (u' - u) for the one point u and every point u' of an interval.

    The slope of a chord of a convex function rises with either end, so the ends of the interval have its extremes. It
    lies between the derivatives; that bound serves where the chord is too short to be computed.

    Args:
        op: The activation.
        at: Interval of u'.
        centre: Enclosure of u, as tight as rounding allows.
    """
    low, high = derivatives(op, at).low, derivatives(op, at).high
    size = at.size + centre.size
    for end, near, up in ((at.low, centre.low, False), (at.high, centre.high, True)):
        run = (end - near).abs()
        rise = (op.value(end) - op.value(near)).abs()
        error = 2 * op.slack(size + op.value(end).abs() + op.value(near).abs()) + 2 * op.below
        long = run > 1e-9 * (1 + size)
        chord = (rise + error if up else rise - error) / run.masked_fill(~long, 1.0)
        if up:
            high = torch.where(long, torch.minimum(high, chord * (1 + 8 * UNIT)), high)
        else:
            low = torch.where(long, torch.maximum(low, chord * (1 - 8 * UNIT)), low)
    return Interval(low, torch.maximum(low, high))


def slopes(graph: Graph, found: list[Interval], centre: list[Interval] | None = None) -> Slopes:
    """Slopes of every curved node: derivatives over intervals, or with a centre the secants from it."""
    result: Slopes = {}
    for k, node in enumerate(graph.nodes):
        if isinstance(node.op, Convex):
            at = found[node.inputs[0]]
            result[k] = derivatives(node.op, at) if centre is None else secants(node.op, at, centre[node.inputs[0]])
        elif isinstance(node.op, Maximum):
            at = found[node.inputs[0]]
            least = node.op.windows(at.low, -torch.inf).amax(2, keepdim=True)
            result[k] = node.op.windows(at.high, -torch.inf) >= least
    return result


def widened(low: Tensor, high: Tensor, relative: float = 4 * UNIT) -> Interval:
    """The interval with room for a relative error of its ends."""
    return Interval(low - relative * low.abs() - TINY, high + relative * high.abs() + TINY)


def times(a: Interval, slope: Interval) -> Interval:
    """Product with slopes that are not negative; (n, S, *shape) with (n, *shape)."""
    least, most = slope.low[:, None], slope.high[:, None]
    return widened(
        torch.where(a.low >= 0, a.low * least, a.low * most), torch.where(a.high >= 0, a.high * most, a.high * least)
    )


def plus(a: Interval, b: Interval) -> Interval:
    """Sum of two intervals."""
    error = 4 * UNIT * (a.size + b.size)
    return Interval(a.low + b.low - error, a.high + b.high + error)


def scaled(a: Interval, factor: float) -> Interval:
    """A multiple of an interval."""
    low, high = (factor * a.low, factor * a.high) if factor >= 0 else (factor * a.high, factor * a.low)
    return Interval(low, high) if abs(factor) == 1 else widened(low, high)


def mapped(a: Interval, op: Affine, apply: Callable[..., Tensor], terms: int) -> Interval:
    """Image of intervals under the linear part of an operator, or its transpose.

    Args:
        a: (n, S, *shape).
        op: The operator.
        apply: Its ``forward`` or ``transpose``.
        terms: Most products in one sum.
    """
    if isinstance(op, Reshape):
        return Interval(*(apply(end.flatten(0, 1)).unflatten(0, end.shape[:2]) for end in (a.low, a.high)))
    middle, half = (a.low + a.high).flatten(0, 1) / 2, (a.high - a.low).flatten(0, 1) / 2
    half = half + 2 * gamma(terms + op.fan) * (middle.abs() + half)  # before the sums, so that they carry it along
    centre, reach = apply(middle), apply(half, torch.abs) + TINY
    return Interval(*(end.unflatten(0, a.low.shape[:2]) for end in (centre - reach, centre + reach)))


def pulled(graph: Graph, rows: Tensor, slopes: Slopes) -> tuple[Interval, dict[int, Interval]]:
    """Intervals of the gradient of <a, logits>, by the chain rule from the logits back to the image.

    Args:
        graph: The network.
        rows: (n, S, K), S rows a for each image.
        slopes: Of all curved nodes.

    Returns:
        (n, S, C, H, W) with respect to the image; and (n, S, *shape) with respect to the output of each activation.
    """
    waiting = {len(graph.nodes) - 1: Interval(rows, rows)}
    seen: dict[int, Interval] = {}

    def give(k: int, more: Interval) -> None:
        waiting[k] = plus(waiting[k], more) if k in waiting else more

    for k in range(len(graph.nodes) - 1, 0, -1):
        if k not in waiting:
            continue
        here, node = waiting.pop(k), graph.nodes[k]
        op = node.op
        if isinstance(op, Sum):
            give(node.inputs[0], here)
            give(node.inputs[1], scaled(here, op.sign))
        elif isinstance(op, Convex):
            slope = slopes[k]
            assert isinstance(slope, Interval)
            seen[k] = here
            give(node.inputs[0], times(here, slope))
        elif isinstance(op, Maximum):
            may = slopes[k]
            assert isinstance(may, Tensor)
            give(node.inputs[0], _through_maximum(op, here, may))
        elif not isinstance(op, Input):
            assert isinstance(op, Dense | Convolution | Scale | Average | Reshape)
            give(node.inputs[0], mapped(here, op, op.transpose, math.prod(node.shape)))
    zero = rows.new_zeros(*rows.shape[:2], *graph.nodes[0].shape)
    return waiting.get(0, Interval(zero, zero)), seen


def _through_maximum(op: Maximum, a: Interval, may: Tensor) -> Interval:
    """Back through a maximum: a lone entry has slope 1, each of several that may be the largest a slope in [0, 1]."""
    places = torch.arange(op.into[1] * op.into[2], device=may.device).double().view(1, 1, *op.into[1:])
    where = op.windows(places, -1.0).long().clamp_min(0)  # padding is never the largest
    alone = (may.sum(2, keepdim=True) == 1)[:, None]
    ends = []
    for end, other in ((a.low[:, :, :, None], -1), (a.high[:, :, :, None], 1)):
        share = torch.where(alone, end, (end * other).clamp_min(0) * other) * may[:, None]
        image = end.new_zeros(*end.shape[:3], op.into[1] * op.into[2])
        index = where[None].expand_as(share).flatten(3)
        ends.append(image.scatter_add(3, index, share.flatten(3)).view(*end.shape[:2], *op.into))
    return widened(ends[0], ends[1], 2 * gamma(may.shape[2]))


def steepest_fall(region: Region, change: Interval) -> tuple[Tensor, Tensor]:
    """The most that <J, v> can fall below 0 over the region, for a J in intervals, and the dual norm of its slopes.

    Shapes:
        (n, S, C, H, W) -> (n, S), (n, S).
    """
    up, down = ((end[:, None]).flatten(2) for end in (region.high - region.x, region.x - region.low))
    rise, sink = change.low.flatten(2).neg().clamp_min(0), change.high.flatten(2).clamp_min(0)
    cost = torch.maximum(rise * (up > 0), sink * (down > 0))
    corner = torch.maximum(rise * up, sink * down).sum(2)
    constant = vector_norm(cost.flatten(0, 1), DUAL[region.norm]).view(cost.shape[:2])
    wide = 1 + 2 * gamma(cost.shape[2])
    constant = constant * wide
    return torch.minimum(region.eps[:, None] * constant, corner) * wide, constant


def jumps(graph: Graph, seen: dict[int, Interval]) -> Tensor | float:
    """What margins move by where an activation as computed jumps (softplus at its threshold). -> (n, S)."""
    total: Tensor | float = 0.0
    for k, a in seen.items():
        op = graph.nodes[k].op
        assert isinstance(op, Convex)
        if op.below:
            total = total + op.below * a.size.flatten(2).sum(2) * (1 + gamma(a.low[0, 0].numel()))
    return total
