"""Second-order adversarial regularization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from robeval.core.ball import per_row
from robeval.core.catalogue import trainer
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.gradients import exact_hvp, fd_hvp, inner, input_grad, safe_l2
from robeval.train.modes import bn_mode, fp32_exact
from robeval.train.starts import radius_left, soar_start
from robeval.train.step import Loss, Objective, accuracy


def kappa(norm: str, eps: float, size: int) -> float:
    """Weight of ||Hz|| in the regularizer: (d eps^2 + 1) / 2 for linf, (eps^2 + 1) / 2 for l2."""
    return ((size if norm == "linf" else 1) * eps**2 + 1) / 2


def hz_length(
    model: nn.Module, start: Tensor, y: Tensor, g: Tensor, zd: Tensor, z1: Tensor, *, hvp: str, h: float
) -> Tensor:
    """||Hz|| for the augmented Hessian H = [[hessian, g], [g, 1]] and z = (zd, z1).

    Args:
        model: The network.
        start: (n, C, H, W), the leaf that ``g`` was taken at.
        y: (n,) labels.
        g: Gradient at ``start``, with its graph.
        zd: (n, C, H, W).
        z1: (n,).
        hvp: ``fd`` or ``exact``.
        h: Step of the finite difference.

    Shapes:
        Returns (n,), differentiable in the parameters.
    """
    if hvp == "exact":
        product = exact_hvp(g, start, zd, create_graph=True)
    else:
        size = per_row(safe_l2(zd), zd)
        product = size * fd_hvp(
            lambda at: input_grad(model, at, y, create_graph=True)[1], start.detach(), zd / size, h, g
        )
    u = (product + per_row(z1, g) * g).flatten(1)
    return safe_l2(torch.cat([u, (inner(g, zd) + z1)[:, None]], 1))


@trainer(
    source="Ma, Faghri, Papernot, Farahmand 2020, SOAR: Second-Order Adversarial Regularization, arXiv:2004.01832,"
    " equation 14 and algorithms 1 and 2",
    norms=("linf", "l2"),
    robust=True,
    batchnorm="refused",
    start="standard",
    warns={
        "init=zero": "a zero start tends to end at confidence 1 and masked gradients; init=pgd1 does not",
        "init=rand": "a random start tends to end at confidence 1 and masked gradients; init=pgd1 does not",
    },
    presets={
        "soar-snapshot-2020": {"init": "pgd1_author", "h": 0.03, "eps": 0.03, "weight": 0.5, "grad_clip": 30.0},
    },
)
def soar(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    *,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 8 / 255,
    init: Literal["pgd1", "rand", "zero", "pgd1_author"] = "pgd1",
    split: bool = True,
    hvp: Literal["fd", "exact"] = "fd",
    h: float = 0.01,
    samples: int = 1,
    weight: float = 1.0,
    clip_on: Literal["norm", "value", "grad", "none"] = "norm",
    clip: float = 10.0,
    grad_clip: float | None = None,
    batchnorm: Literal["refuse", "frozen", "train"] = "refuse",
) -> Iterator[Objective]:
    """A bound on the worst case of the loss's second-order expansion, added to the loss.

    Around a start x' the augmented Hessian of the loss is multiplied with Gaussian vectors; the length of the product
    times kappa estimates how far the loss can rise in the ball. Both the loss at x' and this term are descended.

    Args:
        norm: Norm of the threat model.
        eps: Radius of the threat model in pixel units.
        init: Start x': one gradient step of eps / 2 from a random point of the half ball, a random point of it, the
            image, or, as the first author's code has it, one step of eps / 4 from a random point of the whole ball.
        split: With pgd1 and rand, use eps / 2 in kappa, since the start has spent the other half; no uses eps, as
            algorithm 1 prints it.
        hvp: Hessian-vector product by finite differences or by exact double differentiation.
        h: Step of the finite difference, in pixel units along a unit vector.
        samples: Gaussian vectors per image, averaged.
        weight: Multiplier of the regularizer.
        clip_on: What is limited: the norm of Hz, the regularizer's value, the regularizer's parameter gradient, or
            nothing.
        clip: The limit.
        grad_clip: Largest norm of the regularizer's parameter gradient, besides another limit; none for no such limit.
        batchnorm: With BatchNorm layers: refuse, use their running statistics, or the batch's.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        2 forward and 3 backward passes per step, one more of each with pgd1 and per further sample.
    Source:
        Ma et al. 2020, arXiv:2004.01832, equation 14, algorithms 1 and 2.
    Departs:
        kappa uses eps / 2 after pgd1 and rand, as the paper's text and its tables say and algorithm 1 does not. The
        start is clamped to the box. What the paper clips at 10 is unclear, so three modes exist; the default limits
        the norm of Hz. The preset soar-snapshot-2020 has the settings of the first author's code of that year, where a
        limit on Hz and one on the gradient stood side by side; pgd1_author's radius eps and step eps / 4 are that
        code's 8/255 and 2/255 at eps 8/255. Dropout is off, because the two gradients of a difference must see the
        same network.
    Raises:
        UsageError: fewer than one sample.
    """
    if samples < 1:
        raise UsageError(f"samples of soar must be at least 1, got {samples}", code="A04")
    start = soar_start(model, x, y, rng, init=init, norm=norm, eps=eps).detach().requires_grad_()
    k = kappa(norm, radius_left(init, eps, split), x[0].numel())
    draws = [(rng.normal(*x.shape[1:]), rng.normal()) for _ in range(samples)]

    def objective() -> Loss:
        with fp32_exact(), bn_mode(model, "train" if batchnorm == "train" else "eval"), torch.enable_grad():
            z = model(start)
            loss = per_sample_loss(z, y, "ce")
            (g,) = torch.autograd.grad(loss.sum(), start, create_graph=True)
            length = torch.stack([hz_length(model, start, y, g, zd, z1, hvp=hvp, h=h) for zd, z1 in draws])
        raw = k * length
        limited = {"norm": k * length.clamp_max(clip), "value": raw.clamp_max(clip)}.get(clip_on, raw)
        over = length if clip_on == "norm" else raw
        penalty = weight * limited.mean()
        logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(z, y), "penalty": penalty.detach()}
        if clip_on in ("norm", "value"):
            logs["clipped"] = (over > clip).to(x.dtype).mean()
        limit = clip if clip_on == "grad" else grad_clip
        if limit is not None:
            return Loss(loss.mean(), logs, apart=penalty, apart_limit=limit)
        return Loss(loss.mean() + penalty, logs)

    yield objective
