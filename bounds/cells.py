"""Sub-problems of branch and bound: an image, a rival, and the signs of some neurons. Machinery of ``bab``."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from robeval.bounds.convex import Convex
from robeval.bounds.graph import Graph
from robeval.bounds.intervals import Interval, step
from robeval.core.errors import ContractBroken


@dataclass(frozen=True)
class Kinks:
    """All neurons that may be split: the P entries before ReLU and LeakyReLU, in one row.

    Args:
        graph: The network.
        places: The columns of each node that such an activation reads.
        readers: The activations that read it.
    """

    graph: Graph
    places: dict[int, slice]
    readers: dict[int, list[int]]

    @classmethod
    def of(cls, graph: Graph) -> Kinks:
        """The kinks of a network.

        Raises:
            ContractBroken: B01, an activation without a kink.
        """
        places: dict[int, slice] = {}
        readers: dict[int, list[int]] = {}
        width = 0
        for k, node in enumerate(graph.nodes):
            if not isinstance(node.op, Convex):
                continue
            if node.op.bend is not None:
                raise ContractBroken(
                    f"bab splits ReLU and LeakyReLU; this network has {node.op.name}",
                    code="B01",
                    where=node.path,
                    why="branching fixes on which side of its kink a neuron works, and a smooth activation has none",
                    do="use alpha-crown, which bounds smooth activations too",
                )
            before = node.inputs[0]
            if before not in places:
                size = math.prod(graph.nodes[before].shape)
                places[before] = slice(width, width + size)
                width += size
            readers.setdefault(before, []).append(k)
        return cls(graph, places, readers)

    def at(self, t: Tensor, node: int) -> Tensor:
        """The entries of one node. (D, P) -> (D, *shape)."""
        return t[:, self.places[node]].view(len(t), *self.graph.nodes[node].shape)

    def row(self, parts: dict[int, Tensor], count: int) -> Tensor:
        """The reverse, for all nodes of ``count`` sub-problems. -> (D, P)."""
        if not self.places:
            return torch.zeros(count, 0, dtype=torch.float64)
        return torch.cat([parts[k].flatten(1) for k in self.places], 1)


@dataclass(frozen=True)
class Cells:
    """D sub-problems.

    Args:
        image: (D,) place of the image in the batch.
        rival: (D,) the class that must stay behind.
        side: (D, P) int8, the sign that each neuron has by assumption; 0 where it was not split.
        dial: (D, P) for a split neuron the multiplier of its sign, not negative; for another the position of the line
            below it, in [0, 1].
        lower: (D,) proven lower bound of the margin, infinite where no point has these signs.
        tries: (D,) how often the sub-problem was bounded again for want of a neuron to split.
    """

    image: Tensor
    rival: Tensor
    side: Tensor
    dial: Tensor
    lower: Tensor
    tries: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def take(self, rows: Tensor) -> Cells:
        """Some of them."""
        return Cells(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def cat(cls, parts: list[Cells]) -> Cells:
        """All of them."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def halves(self, neuron: Tensor) -> Cells:
        """Both signs of one neuron each, (D,) -> 2 D sub-problems: first all positive ones."""
        parts = []
        for sign in (1, -1):
            side, dial = self.side.clone(), self.dial.clone()
            side.scatter_(1, neuron[:, None], sign)
            dial.scatter_(1, neuron[:, None], 0.0)
            parts.append(Cells(self.image, self.rival, side, dial, self.lower, torch.zeros_like(self.tries)))
        return Cells.cat(parts)


def roots(kinks: Kinks, lower: Tensor, positions: dict[int, Tensor]) -> Cells:
    """One sub-problem without signs for each margin that is not proven.

    Args:
        kinks: The neurons.
        lower: (n, K) lower bounds, infinite at the class itself.
        positions: Positions of the lines by activation, (n, K, *shape).
    """
    image, rival = (lower <= 0).nonzero(as_tuple=True)
    parts = {k: positions[readers[0]][image, rival] for k, readers in kinks.readers.items()}
    dial = kinks.row(parts, len(image)).to(lower)
    side = torch.zeros_like(dial, dtype=torch.int8)
    return Cells(image, rival, side, dial, lower[image, rival], torch.zeros_like(image))


def narrowed(kinks: Kinks, found: list[Interval], cells: Cells) -> tuple[list[Interval], Tensor]:
    """Intervals of every node where the neurons have the assumed signs, and which sub-problems have no point at all.

    Args:
        kinks: The neurons.
        found: Intervals of the nodes over the regions of the images.
        cells: D sub-problems.
    """
    now: list[Interval] = []
    empty = torch.zeros(len(cells), dtype=torch.bool, device=cells.image.device)
    for k, node in enumerate(kinks.graph.nodes):
        at = Interval(found[k].low[cells.image], found[k].high[cells.image])
        if node.inputs:
            at = at.meet(step(node, [now[i] for i in node.inputs]))
        if k in kinks.places:
            side = kinks.at(cells.side, k)
            low = torch.where(side > 0, at.low.clamp_min(0), at.low)
            at = Interval(low, torch.where(side < 0, at.high.clamp_max(0), at.high))
        empty |= (at.low > at.high).flatten(1).any(1)
        now.append(Interval(at.low, torch.maximum(at.low, at.high)))
    return now, empty
