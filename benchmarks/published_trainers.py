"""Training methods in the plain form in which they are published, with nothing saved, for benchmarks.trainers.

Each is a trainer like those of robeval/train/methods and makes the same random draws in the same order, so that ours
and the plain form should compute the same loss: exactly, or in the limit of a small step where ours is a finite
difference. What differs is how it is computed. All are for linf and for networks without BatchNorm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from robeval.core.streams import Streams
from robeval.train.memory import Memory
from robeval.train.step import Loss, Objective


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The leaf, the loss of each row and its gradient with its graph, for a second differentiation."""
    points = x.clone().requires_grad_()
    loss = cross_entropy(model(points), y, reduction="none")
    (g,) = torch.autograd.grad(loss.sum(), points, create_graph=True)
    return points, loss, g


def divergence(z: Tensor, z_other: Tensor) -> Tensor:
    """Mean KL(p || q) of the probabilities of two sets of logits."""
    return kl_div(log_softmax(z_other, 1), softmax(z, 1), reduction="batchmean")


def inside(x: Tensor, points: Tensor, eps: float) -> Tensor:
    """Cut to the ball around x, then to the box."""
    return torch.min(torch.max(points, x - eps), x + eps).clamp(0, 1)


def fd_grad(model: nn.Module, x: Tensor, y: Tensor, rng: Streams, *, weight: float = 0.1) -> Iterator[Objective]:
    """The squared gradient norm by double backpropagation, which the finite difference replaces."""

    def objective() -> Loss:
        _, loss, g = input_gradient(model, x, y)
        return Loss(loss.mean() + weight / 2 * g.flatten(1).square().sum(1).mean())

    yield objective


def trades(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    *,
    eps: float = 0.031,
    steps: int = 10,
    step_size: float = 0.007,
    beta: float = 6.0,
) -> Iterator[Objective]:
    """The clean probabilities are computed anew in every step of the attack: 2 steps + 3 forward passes.

    Unlike the authors' code, the first noisy point is cut to the box; the two attacks would differ otherwise.
    """
    model.eval()
    x_adv = inside(x, x + 0.001 * rng.normal(*x.shape[1:]), eps)
    for _ in range(steps):
        x_adv.requires_grad_()
        value = kl_div(log_softmax(model(x_adv), 1), softmax(model(x), 1), reduction="sum")
        (g,) = torch.autograd.grad(value, x_adv)
        x_adv = inside(x, x_adv.detach() + step_size * g.sign(), eps)
    model.train()
    # The authors pass the clean images once for each of the two terms.
    yield lambda: Loss(cross_entropy(model(x), y) + beta * divergence(model(x), model(x_adv)))


@lru_cache(maxsize=2)
def rounded_distances(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rounded distance of any two pixels, and how many pairs lie at each. -> (H W, H W), (R,)."""
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    apart = torch.cdist(place, place, compute_mode="donot_use_mm_for_euclid_dist").round().long()
    return apart, apart.flatten().bincount()


def sgr(
    model: nn.Module, x: Tensor, y: Tensor, rng: Streams, memory: Memory, *, weight: float = 0.1, beta: float = 0.1
) -> Iterator[Objective]:
    """Structured gradient regularization by the gradients' covariance function, through (d, d) matrices.

    All entries of the second moment at the same rounded distance are averaged, the matrix is filled from the averages,
    and gradients are multiplied by it. The running mean starts from zeros, as algorithm 1 has it.
    """
    channels, height, width = x.shape[1:]
    apart, pairs = rounded_distances(height, width)
    images = x if memory.train is None else memory.train.x

    def objective() -> Loss:
        _, loss, g = input_gradient(model, x, y)
        rows = g.flatten(1)
        moment = (rows.detach().T @ rows.detach()) / len(x)
        blocks = moment.view(channels, height * width, channels, height * width).transpose(1, 2)
        f = x.new_zeros(channels, channels, len(pairs)).index_add(2, apart.flatten(), blocks.flatten(2)) / pairs
        f = (f + f.transpose(0, 1)) / 2
        memory.tensors["f"] = (1 - beta) * memory.tensors.get("f", torch.zeros_like(f)) + beta * f
        sigma = memory.tensors["f"][:, :, apart].transpose(1, 2).reshape(rows.shape[1], rows.shape[1])
        if "c" not in memory.tensors:
            memory.tensors["c"] = images.var(0, correction=0).mean()
        scale = memory.tensors["c"] / sigma.diagonal().mean()
        return Loss(loss.mean() + weight * scale / 2 * ((rows @ sigma) * rows).sum(1).mean())

    yield objective


def rat(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float = 2 / 255,
    beta: float = 6.0,
    eta: float = 0.2,
    sigma: float = 0.01,
) -> Iterator[Objective]:
    """Both weight derivatives of the logits by torch.func.jvp inside torch.func.jvp; the rest is as ours."""
    weights, generator = dict(model.named_parameters()), memory.generator()
    u = {n: sigma * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in weights.items()}

    def logits(w: dict[str, Tensor], points: Tensor) -> Tensor:
        z: Tensor = functional_call(model, w, (points,))
        return z

    def derivatives(points: Tensor) -> tuple[Tensor, Tensor]:
        def first(w: dict[str, Tensor]) -> Any:
            return jvp(lambda v: logits(v, points), (w,), (u,))[1]

        return cast(tuple[Tensor, Tensor], jvp(first, (weights,), (u,)))

    noisy = {n: p.detach() + u[n] for n, p in weights.items()}
    with torch.no_grad():
        clean = softmax(logits(noisy, x), 1)
    x_adv = inside(x, x + 0.001 * rng.normal(*x.shape[1:]), eps)
    for _ in range(steps):
        x_adv.requires_grad_()
        value = kl_div(log_softmax(logits(noisy, x_adv), 1), clean, reduction="sum")
        (g,) = torch.autograd.grad(value, x_adv)
        x_adv = inside(x, x_adv.detach() + step_size * g.sign(), eps)

    def objective() -> Loss:
        z = model(x)
        (d1, d2), (d1_adv, d2_adv) = derivatives(x), derivatives(x_adv)
        noise = eta * divergence(d1, d1_adv) + eta / 2 * divergence(d2, d2_adv)
        return Loss(cross_entropy(z, y) + beta * divergence(z, model(x_adv)) + noise)

    yield objective


def soar(
    model: nn.Module, x: Tensor, y: Tensor, rng: Streams, *, eps: float = 8 / 255, clip: float = 10.0
) -> Iterator[Objective]:
    """SOAR after one step of the attack, its Hessian-vector product by exact differentiation of the gradient."""
    start = inside(x, x + (2 * rng.uniform(*x.shape[1:]) - 1) * (eps / 2), eps / 2).requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(model(start), y, reduction="sum"), start)
    start = inside(x, start.detach() + eps / 2 * g.sign(), eps / 2)
    zd, z1 = rng.normal(*x.shape[1:]), rng.normal()
    kappa = (x[0].numel() * (eps / 2) ** 2 + 1) / 2

    def objective() -> Loss:
        points, loss, g = input_gradient(model, start, y)
        rows, directions = g.flatten(1), zd.flatten(1)
        slope = (rows * directions).sum(1)
        (hz,) = torch.autograd.grad(slope.sum(), points, create_graph=True)
        product = torch.cat([hz.flatten(1) + z1[:, None] * rows, (slope + z1)[:, None]], 1)
        return Loss(loss.mean() + kappa * product.norm(dim=1).clamp_max(clip).mean())

    yield objective
