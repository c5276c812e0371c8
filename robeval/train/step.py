"""What a trainer yields, and the optimiser step that it stands for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from robeval.core.errors import ContractBroken
from robeval.core.streams import Streams
from robeval.train.devices import WHOLE, Part
from robeval.train.memory import Memory


@dataclass
class Loss:
    """What one optimiser step descends.

    Args:
        total: Scalar that the step descends.
        logs: Means over the batch for the epoch's log, by column name.
        apart: Scalar whose parameter gradient is clipped alone and then added; None when there is none.
        apart_limit: Largest Euclidean norm of that parameter gradient.
        part: The rows that this loss is about, where several devices have some each; set by the loop.
    """

    total: Tensor
    logs: dict[str, Tensor | float] = field(default_factory=dict)
    apart: Tensor | None = None
    apart_limit: float = float("inf")
    part: Part = WHOLE


#: The loss as a function of the present weights; everything that was crafted or drawn is a constant in it, so that it
#: can be evaluated again at other weights.
Objective = Callable[[], Loss]
#: A trainer: one mini-batch in, one :data:`Objective` per optimiser step out.
Trainer = Callable[..., Generator[Objective, None, None]]


def objectives(
    trainer: Trainer,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    settings: Mapping[str, Any],
    memory: Memory | None = None,
) -> Iterator[Objective]:
    """Start a trainer on a mini-batch; one that names ``memory`` as its fifth argument is given it."""
    if "memory" in inspect.signature(trainer).parameters:
        return trainer(model, x, y, rng, Memory() if memory is None else memory, **settings)
    return trainer(model, x, y, rng, **settings)


def accuracy(z: Tensor, y: Tensor) -> Tensor:
    """Share of rows whose largest logit is the label's. -> scalar."""
    return (z.detach().argmax(1) == y).to(z.dtype).mean()


def about(part: Part, objective: Objective) -> Objective:
    """The objective of one device, whose gradient is that of all of them together wherever it is taken."""
    return lambda: replace(objective(), part=part)


def fill_gradients(parameters: list[nn.Parameter], objective: Objective, where: str = "") -> dict[str, float]:
    """Put the gradient of an objective into ``.grad`` and return its logs as numbers.

    Raises:
        ContractBroken: the loss is NaN or infinite; the parameters are then still as they were.
    """
    loss = objective()
    logs = {name: float(value) for name, value in loss.logs.items()}
    logs["loss"] = float(loss.total.detach()) + (0.0 if loss.apart is None else float(loss.apart.detach()))
    logs = loss.part.means(logs)  # before the check, so that a loss that breaks one device stops them all
    if not torch.isfinite(torch.tensor(logs["loss"])):
        raise ContractBroken(
            "training diverged: the loss is NaN or infinite", code="L01", where=where, do="a smaller --lr, with --fresh"
        )
    clipped: Sequence[Tensor] = ()
    if loss.apart is not None and loss.apart.requires_grad:
        grads = loss.part.mean(
            torch.autograd.grad(loss.apart, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        )
        length = torch.stack([g.norm() for g in grads]).norm()
        scale = (loss.apart_limit / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1.0)
        clipped = [g.detach() * scale for g in grads]
        logs["gradient_clipped"] = float(length > loss.apart_limit)
    for p in parameters:
        p.grad = None
    loss.total.backward()
    filled = [p.grad for p in parameters if p.grad is not None]
    for grad, of_all in zip(filled, loss.part.mean(filled), strict=True):
        grad.copy_(of_all)
    for p, more in zip(parameters, clipped, strict=False):
        p.grad = torch.empty_like(p).copy_(more) if p.grad is None else p.grad.add_(more)  # in the layout of p
    return logs
