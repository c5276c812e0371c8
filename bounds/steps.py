"""From one step of a traced network to operators. Machinery of the proofs, no bound itself."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from robeval.bounds.operators import Input, Scale
from robeval.bounds.parts import Batch, Parts, Ref, Refused, aligned
from robeval.core.smooth import SmoothReLU, smooth_relu

#: Mean and variance of each channel.
Statistics = tuple[Tensor, Tensor]
#: Functions of torch and methods of tensors that stand for one operator each.
PLAIN = (
    "relu", "leaky_relu", "softplus", "linear", "conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "flatten",
    "mean", "unflatten",
)  # fmt: skip
SUPPORTED = (
    "Linear, Conv2d, BatchNorm (eval), ReLU, LeakyReLU, smooth ReLU, Softplus, MaxPool2d, AvgPool2d,"
    " AdaptiveAvgPool2d(1), mean, Flatten, Dropout (eval), Identity, sums of branches, arithmetic with constants"
)


class Steps:
    """Walks over a trace and collects ``(operator, inputs, shape, path)``.

    Args:
        module: The network.
        shape: (C, H, W).
        statistics: What BatchNorm layers in train mode normalise with.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], statistics: Mapping[nn.Module, Statistics]):
        self.module, self.shape, self.statistics, self.parts = module, shape, statistics, Parts(module)
        self.known: dict[fx.Node, Any] = {}

    def take(self, step: fx.Node) -> None:
        """One step of the trace.

        Raises:
            Refused: it is none of the known operators.
        """
        self.parts.path = str(step.target) if step.op == "call_module" else step.name
        args = fx.node.map_arg(step.args, lambda n: self.known[n])
        named = fx.node.map_arg(step.kwargs, lambda n: self.known[n])
        if step.op == "placeholder":
            if self.parts.nodes:
                raise Refused("a forward with several arguments")
            self.known[step] = self.parts.add(Input(), (), self.shape)
        elif step.op == "get_attr":
            value: Any = self.module
            for name in str(step.target).split("."):
                value = getattr(value, name)
            self.known[step] = value
        elif step.op == "output":
            if not isinstance(args[0], Ref):
                raise Refused("an output that is not one tensor")
            if args[0] != len(self.parts.nodes) - 1:  # what follows the logits is not asked for
                self.parts.nodes = self.parts.nodes[: args[0] + 1]
        elif step.op == "call_module":
            layer = self.module.get_submodule(str(step.target))
            if len(args) != 1 or named or not isinstance(args[0], Ref):
                raise Refused(f"{type(layer).__name__} at {step.target} with several arguments")
            self.known[step] = self.layer(layer, args[0])
        elif not any(isinstance(a, Ref) for a in [*args, *named.values()]):
            function = step.target if callable(step.target) else getattr(args[0], str(step.target))
            self.known[step] = function(*(args if callable(step.target) else args[1:]), **named)
        else:
            word = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", str(step.target))
            try:
                self.known[step] = self.call(step.target, word, args, named)
            except TypeError as error:  # arguments beyond those that are understood
                raise Refused(f"{word} at {step.name}", str(error)) from None

    def layer(self, layer: nn.Module, ref: Ref) -> Ref:
        """A layer of torch or of the house; classes derived from them may do something else and are not taken."""
        m: Any = layer
        kind, shape = type(m), self.parts.nodes[ref][2]
        if kind is nn.Linear:
            return self.parts.dense(ref, m.weight, m.bias)
        if kind is nn.Conv2d:
            if m.padding_mode != "zeros" or isinstance(m.padding, str):
                raise Refused(f"Conv2d at {self.parts.path} with padding {m.padding_mode}, {m.padding}")
            return self.parts.conv2d(ref, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)
        if kind in (nn.BatchNorm2d, nn.BatchNorm1d):
            if m not in self.statistics and (m.training or m.running_mean is None):
                raise Refused(
                    f"{kind.__name__} at {self.parts.path} without running statistics",
                    "images would influence each other",
                )
            mean, variance = self.statistics.get(m, (m.running_mean, m.running_var))
            scale = (variance + m.eps).rsqrt() * (1 if m.weight is None else m.weight)
            shift = torch.zeros_like(scale) if m.bias is None else m.bias
            moved = mean * scale
            factor, bias, terms = (aligned(t, shape) for t in (scale, shift - moved, shift.abs() + moved.abs()))
            return self.parts.add(Scale(factor, bias, terms, fan=8), (ref,), shape)
        if kind is nn.ReLU:
            return self.parts.relu(ref)
        if kind is nn.LeakyReLU:
            return self.parts.leaky_relu(ref, m.negative_slope)
        if kind is SmoothReLU:
            return self.parts.smooth(ref)
        if kind is nn.Softplus:
            return self.parts.softplus(ref, m.beta, m.threshold)
        if kind is nn.MaxPool2d:
            return self.parts.max_pool2d(
                ref, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
            )
        if kind is nn.AvgPool2d:
            return self.parts.avg_pool2d(
                ref, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
            )
        if kind is nn.AdaptiveAvgPool2d:
            return self.parts.adaptive_avg_pool2d(ref, m.output_size)
        if kind is nn.Flatten:
            return self.parts.flatten(ref, m.start_dim, m.end_dim)
        if kind in (nn.Identity, nn.Dropout, nn.Dropout2d):
            return ref
        raise Refused(f"{kind.__name__} at {self.parts.path}")

    def call(self, target: Any, word: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A function or a method of a tensor."""
        if target in (operator.add, torch.add) or word == "add":
            return self.parts.sum(*args, sign=1.0, **named)
        if target in (operator.sub, torch.sub) or word == "sub":
            return self.parts.sum(*args, sign=-1.0, **named)
        if target in (operator.mul, torch.mul) or word == "mul":
            return self.parts.product(*args, **named)
        if target in (operator.truediv, torch.div) or word == "div":
            if not isinstance(args[0], Ref) or isinstance(args[1], Ref):
                raise Refused(f"a quotient of activations at {self.parts.path}")
            return self.parts.product(args[0], 1 / torch.as_tensor(args[1], dtype=self.parts.like.dtype), **named)
        if target is getattr:
            if args[1] != "shape":
                raise Refused(f"the attribute {args[1]} of an activation at {self.parts.path}")
            return (Batch(), *self.parts.nodes[args[0]][2])
        if word == "size" and isinstance(args[0], Ref):
            whole = (Batch(), *self.parts.nodes[args[0]][2])
            return whole if len(args) == 1 else whole[args[1]]
        if word in ("view", "reshape"):
            wanted = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
            return self.parts.reshape(args[0], tuple(wanted))
        if target is operator.getitem:
            raise Refused(f"indexing at {self.parts.path}")
        if word == "contiguous":
            return args[0]
        if target is smooth_relu:
            return self.parts.smooth(*args)
        if word in PLAIN and (isinstance(target, str) or target in _known_functions(word)):
            return getattr(self.parts, "dense" if word == "linear" else word)(*args, **named)
        raise Refused(f"{word} at {self.parts.path}")


def _known_functions(word: str) -> list[Any]:
    """torch's functions of that name."""
    return [f for f in (getattr(torch, word, None), getattr(functional, word, None)) if f is not None]
