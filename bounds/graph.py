"""A network as a list of operators that proofs know. Machinery of the proofs, no bound itself.

torch.fx writes down what ``forward`` does; every step must be one of the known operators, with arguments that are
understood to the last one. Whatever is not is refused by name: a layer that is skipped would make a proof false.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from robeval.bounds.convex import Convex
from robeval.bounds.operators import Average, Convolution, Dense, Maximum, Operator, Reshape, Scale, Sum
from robeval.bounds.parts import Refused
from robeval.bounds.steps import SUPPORTED, Statistics, Steps
from robeval.core.errors import ContractBroken
from robeval.core.smooth import SmoothReLU


@dataclass(frozen=True)
class Node:
    """One operator of a network.

    Args:
        op: The operator.
        inputs: Numbers of the nodes that it reads.
        shape: Shape of its output for one image.
        path: Where it stands in the network.
    """

    op: Operator
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    path: str


@dataclass(frozen=True)
class Graph:
    """A network, node by node in the order of evaluation; the first is the image, the last the logits."""

    nodes: list[Node]
    facts: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: str, work: Callable[[Graph], Tensor]) -> Tensor:
        """What depends on the network alone, worked out the first time and kept."""
        if name not in self.facts:
            self.facts[name] = work(self)
        found: Tensor = self.facts[name]
        return found

    @property
    def classes(self) -> int:
        """Number of logits."""
        return self.nodes[-1].shape[0]

    @property
    def smooth(self) -> bool:
        """Twice differentiable."""
        return not self.kinks()

    def kinks(self) -> list[str]:
        """Operators without second derivatives, as ``path (name)``."""
        return [
            f"{n.path} ({n.op.name if isinstance(n.op, Convex) else 'MaxPool2d'})"
            for n in self.nodes
            if isinstance(n.op, Maximum) or (isinstance(n.op, Convex) and n.op.bend is None)
        ]

    def values(self, x: Tensor) -> list[Tensor]:
        """Output of every node; x (n, C, H, W) in the precision of the weights, float64 in proofs."""
        found: list[Tensor] = []
        for node in self.nodes:
            found.append(evaluate(node, [found[i] for i in node.inputs]) if node.inputs else x)
        return found

    def logits(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, K)."""
        return self.values(x)[-1]


def evaluate(node: Node, inputs: list[Tensor]) -> Tensor:
    """The node's function."""
    op = node.op
    if isinstance(op, Convex):
        return op.value(inputs[0])
    if isinstance(op, Sum):
        return inputs[0] + op.sign * inputs[1]
    if isinstance(op, Maximum):
        return op.forward(inputs[0])
    assert isinstance(op, Dense | Convolution | Scale | Average | Reshape)
    h = op.forward(inputs[0])
    return h if op.bias is None else h + op.bias


class _Tracer(fx.Tracer):
    """Layers of torch and the house's activation stay whole; everything else is walked through."""

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return isinstance(m, SmoothReLU) or super().is_leaf_module(m, qualname)


def graph_of(module: Callable[[Tensor], Tensor], shape: tuple[int, ...], name: str = "the model") -> Graph:
    """Write a network down as operators, in float64.

    Args:
        module: A torch module in eval mode, from (n, C, H, W) pixels to (n, K) logits.
        shape: (C, H, W).
        name: How messages call it.

    Raises:
        ContractBroken: B03, an operator that proofs do not know, with its path and the ones they do.
    """
    if not isinstance(module, nn.Module):
        raise refused(
            name, "a plain function", "the layers of a torch.nn.Module can be read, those of a function cannot"
        )
    double = copy.deepcopy(module).double().eval().requires_grad_(False)
    traced = _traced(double, name)
    with torch.no_grad():
        graph = _read(double, traced, shape, name, {})
    _agrees(graph, double, shape, name)
    return graph


def live_graph(
    module: nn.Module, shape: tuple[int, ...], statistics: Mapping[nn.Module, Statistics], name: str = "the model"
) -> Graph:
    """The same on the network's own weights and in their precision, for training; its bounds are no proofs.

    Nothing is copied, so that bounds can be differentiated in the weights. Dropout is left out.

    Args:
        module: The network. Its forward is traced once; hooks on it as a whole only watch it, and are allowed.
        shape: (C, H, W).
        statistics: Mean and variance of what enters each BatchNorm layer in train mode; those in eval mode have theirs.
        name: How messages call it.

    Raises:
        ContractBroken: B03, an operator that proofs do not know, with its path and the ones they do.
    """
    modes = [m.training for m in module.modules()]
    if module not in _TRACES or _TRACES[module][0] != modes:
        _TRACES[module] = modes, _traced(module, name, watched=True)
    return _read(module, _TRACES[module][1], shape, name, statistics)


#: What live networks do in the modes that they were in, since tracing costs as much as a step on a small one.
_TRACES: WeakKeyDictionary[nn.Module, tuple[list[bool], fx.Graph]] = WeakKeyDictionary()


def _traced(module: nn.Module, name: str, *, watched: bool = False) -> fx.Graph:
    """What ``forward`` does, step by step."""
    hooked = [
        path or type(m).__name__
        for path, m in module.named_modules()
        if (m._forward_hooks or m._forward_pre_hooks) and not (watched and m is module)
    ]
    if hooked:
        raise refused(name, f"a forward hook on {hooked[0]}", "what a hook does to a layer is unknown")
    try:
        return _Tracer().trace(module)
    except Exception as error:
        raise refused(name, "a forward that depends on its data", str(error).strip().splitlines()[0]) from None


def _read(
    module: nn.Module,
    traced: fx.Graph,
    shape: tuple[int, ...],
    name: str,
    statistics: Mapping[nn.Module, Statistics],
) -> Graph:
    """The operators of a network on the tensors that it holds."""
    steps = Steps(module, shape, statistics)
    try:
        for step in traced.nodes:
            steps.take(step)
    except Refused as refusal:
        raise refused(name, str(refusal), refusal.why) from None
    graph = Graph([Node(*facts) for facts in steps.parts.nodes])
    if len(graph.nodes[-1].shape) != 1:
        raise refused(
            name, f"an output of shape {graph.nodes[-1].shape}", "a classifier gives one row of logits an image"
        )
    return graph


def refused(name: str, what: str, why: str = "") -> ContractBroken:
    """One sentence that names what proofs do not know."""
    return ContractBroken(
        f"no proof knows {what}",
        code="B03",
        where=name,
        why=why or f"known: {SUPPORTED}",
        do="use an estimate (l-bound), or smoothing, which asks for logits only",
    )


def _agrees(graph: Graph, module: nn.Module, shape: tuple[int, ...], name: str) -> None:
    """The operators must compute what the network computes: a last line of defence against a wrong reading."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, *shape, generator=generator, dtype=torch.float64).to(
        next(module.parameters(), torch.empty(0)).device
    )
    with torch.no_grad():
        gap = (graph.logits(x) - module(x)).abs().max()
        size = module(x).abs().max()
    if not gap <= 1e-9 * (1 + size):
        raise refused(name, "a network whose operators give other logits than its forward", f"they differ by {gap:.2g}")
