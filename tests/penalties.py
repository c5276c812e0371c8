"""Small networks with known losses and gradients, and what the tests of penalties ask of a trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robeval.core import catalogue
from robeval.core.streams import Streams
from robeval.train.memory import Memory
from robeval.train.passes import counting
from robeval.train.step import Loss, Objective, fill_gradients, objectives

F64 = torch.float64


class Valued(nn.Module):
    """Two classes whose cross-entropy of class 0 is a given positive function of the image."""

    def __init__(self, q: Callable[[Tensor], Tensor]):
        super().__init__()
        self.q = q
        self.unused = nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        t = self.q(x.flatten(1)).expm1().log() + 0 * self.unused  # softplus(t) is q
        return torch.stack([torch.zeros_like(t), t], 1)


class Logistic(nn.Module):
    """Two classes with logits (0, <w, x>), so that the loss of class 1 is softplus(-<w, x>)."""

    def __init__(self, *w: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(t), t], 1)


def softplus_cnn(batchnorm: bool = False, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(3)
    norm = [nn.BatchNorm2d(4)] if batchnorm else []
    layers = [nn.Conv2d(2, 4, 3, padding=1), *norm, nn.Softplus(), nn.Flatten(), nn.Linear(4 * 25, 3)]
    return nn.Sequential(*layers).to(dtype)


def dead_at_zero() -> nn.Sequential:
    """A network whose input gradient is exactly 0 at the black image."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        weight, bias = list(model.parameters())[:2]
        bias.fill_(-0.5)
        weight[0].abs_()  # bright images pass through one unit
    return model


def batch(n: int = 6, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, 5, 5, generator=g, dtype=F64).to(dtype)
    return x, torch.randint(3, (n,), generator=g)


def single(*pixels: float) -> Tensor:
    return torch.tensor(pixels, dtype=F64).reshape(1, 1, 1, -1)


def objective_of(
    name: str, model: nn.Module, x: Tensor, y: Tensor, memory: Memory | None = None, copies: int = 1, **options: Any
) -> Objective:
    """The one objective of a trainer's mini-batch; with ``copies`` the images draw the same in each copy."""
    method = catalogue.methods("trainers")[name]
    rng = Streams(5, list(range(len(x) // copies)) * copies, "t", dtype=x.dtype)
    (objective,) = objectives(method.load(), model, x, y, rng, method.bind(options), memory)
    return objective


def loss_of(name: str, model: nn.Module, x: Tensor, y: Tensor, memory: Memory | None = None, **options: Any) -> Loss:
    return objective_of(name, model, x, y, memory, **options)()


def penalty_of(
    name: str, model: nn.Module, x: Tensor, y: Tensor, memory: Memory | None = None, **options: Any
) -> float:
    return float(loss_of(name, model, x, y, memory, **options).logs["penalty"])


def value_and_gradient(model: nn.Module, objective: Objective) -> tuple[float, Tensor]:
    """Loss and parameter gradient in one vector."""
    loss = fill_gradients(list(model.parameters()), objective)["loss"]
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def slope_error(model: nn.Module, objective: Objective, step: float = 1e-5) -> float:
    """Relative error of the parameter gradient along a random direction, against a central difference."""
    g = torch.Generator().manual_seed(4)
    parameters = list(model.parameters())
    directions = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]
    _, gradient = value_and_gradient(model, objective)
    along = gradient @ torch.cat([d.flatten() for d in directions])

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(by * d)
        return objective().total.detach()

    difference = (moved(step) - moved(-2 * step)) / (2 * step)
    moved(step)
    return float((difference - along).abs() / along.abs())


def passes_of(name: str, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> tuple[float, float]:
    """Forward and backward passes of one optimiser step, per image."""
    with counting(model) as passes:
        fill_gradients(list(model.parameters()), objective_of(name, model, x, y, **options))
    return passes.forward / len(x), passes.backward / len(x)


def repeated(name: str, copies: int, **options: Any) -> tuple[float, Tensor]:
    """Loss and parameter gradient on a batch that holds every image several times."""
    model, (x, y) = softplus_cnn(), batch(4)
    objective = objective_of(name, model, x.repeat(copies, 1, 1, 1), y.repeat(copies), copies=copies, **options)
    return value_and_gradient(model, objective)


def under_autocast(name: str, **options: Any) -> tuple[float, float]:
    """The penalty in float32, and again where bf16 autocast is on."""
    model, (x, y) = softplus_cnn(dtype=torch.float32), batch(dtype=torch.float32)
    plain = penalty_of(name, model, x, y, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        return plain, penalty_of(name, model, x, y, **options)
