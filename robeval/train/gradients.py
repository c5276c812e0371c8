"""Input gradients and Hessian-vector products, per sample.

Gradients come from the SUM of per-sample losses (the mean would shrink them by the batch size) and from
``autograd.grad`` (``backward()`` would also fill the parameters' ``.grad``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from robeval.core.ball import vector_norm
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss

T = TypeVar("T")


def input_grad(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    kind: str = "ce",
    *,
    create_graph: bool = False,
    keep_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss of each sample and its gradient with respect to that sample.

    Args:
        model: Pixels to logits.
        x: (n, C, H, W); used as it is when it already asks for gradients, otherwise a detached copy.
        y: (n,) labels.
        kind: A name of :data:`robeval.core.losses.KINDS`.
        create_graph: The gradient can be differentiated again, in x and in the parameters.
        keep_graph: The loss can be differentiated again, in the parameters.

    Shapes:
        Returns (n,) and (n, C, H, W).
    """
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        loss = per_sample_loss(model(x), y, kind)
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=create_graph, retain_graph=create_graph or keep_graph)
    return (loss if create_graph or keep_graph else loss.detach()), grad


def exact_hvp(grad: Tensor, x: Tensor, v: Tensor, *, create_graph: bool = False) -> Tensor:
    """Hessian times vector by differentiating <grad, v>; zero where the gradient does not depend on x.

    Args:
        grad: Gradient at ``x``, made with ``create_graph=True``.
        x: The point that ``grad`` was taken at.
        v: One vector per row.
        create_graph: The product can be differentiated again.

    Shapes:
        All (n, ...) -> (n, ...).
    """
    if not grad.requires_grad:
        return torch.zeros_like(v)
    (product,) = torch.autograd.grad(
        (grad * v).sum(), x, create_graph=create_graph, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return product


def fd_hvp(gradient: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float, at_x: Tensor | None = None) -> Tensor:
    """Hessian times vector as (g(x + h v) - g(x)) / h; error grows like h.

    Args:
        gradient: Point to gradient, (n, ...) -> (n, ...).
        x: The points.
        v: One vector per row, best of unit length.
        h: Step.
        at_x: ``gradient(x)``, when it is known already.
    """
    return (gradient(x + h * v) - (gradient(x) if at_x is None else at_x)) / h


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each row. Shapes: (n, ...), (n, ...) -> (n,)."""
    return (a * b).flatten(1).sum(1)


def safe_l2(t: Tensor) -> Tensor:
    """Euclidean norm of each row whose derivatives of every order are 0, not NaN, at a zero row. -> (n,)."""
    square = t.flatten(1).square().sum(1)
    positive = square > 0
    return torch.where(
        positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), torch.zeros_like(square)
    )


def penalty_norm(g: Tensor, norm: str) -> Tensor:
    """Norm of each row, to be differentiated: its derivatives are 0, not NaN, at a zero row. (n, ...) -> (n,)."""
    return safe_l2(g) if norm == "l2" else vector_norm(g, norm)


def unit_direction(g: Tensor, norm: str) -> Tensor:
    """Direction d along which <g, d> is the named norm of g; a zero gradient gives a zero direction.

    Args:
        g: Gradients, detached.
        norm: ``l2`` gives g / ||g||; ``l1`` gives sign(g) / sqrt(N), so that <g, d> = ||g||_1 / sqrt(N) and d has
            unit Euclidean length; ``linf`` gives the signed unit vector of the largest entry.

    Shapes:
        (n, ...) -> (n, ...).
    """
    flat = g.detach().flatten(1)
    if norm == "l2":
        # Scaling by the largest entry first keeps tiny gradients from vanishing in the square.
        scaled = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
        d = scaled / scaled.norm(dim=1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny)
    elif norm == "l1":
        d = flat.sign() / flat.shape[1] ** 0.5
    else:
        top = flat.abs().argmax(1, keepdim=True)
        d = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign())
    unit: Tensor = d.view_as(g)
    return unit


@contextmanager
def penalty_points(model: nn.Module, x: Tensor, space: str) -> Iterator[Tensor]:
    """The points at which a penalty is taken, as a leaf; inside, the model starts from such points.

    Args:
        model: The network.
        x: (n, C, H, W) in [0, 1].
        space: ``pixel`` gives the images, ``normalised`` gives what the network's normalisation makes of them.

    Raises:
        UsageError: ``normalised``, and the network does not begin with a part called ``normalise``.
    """
    if space == "pixel":
        yield x.detach().requires_grad_()
        return
    name, first = next(model.named_children(), ("", None))
    if first is None or name != "normalise":
        raise UsageError(
            "penalty_space=normalised needs a network that begins with its normalisation, and this one does not",
            code="A04",
            do="penalty_space=pixel, or an architecture by its name: robeval puts the normalisation first",
        )
    points = first(x).detach().requires_grad_()
    model.normalise = nn.Identity()  # the whole network still runs as one, so its passes are still counted
    try:
        yield points
    finally:
        model.normalise = first


def reusing(value: T, compute: Callable[[], T], model: nn.Module) -> Callable[[], T]:
    """A function that gives ``value`` once, while the weights are still the same, and ``compute()`` at any other call.

    A graph serves one backward pass only, and only at the weights that it was made with.

    Args:
        value: What ``compute`` gave just now.
        compute: A function of the present weights.
        model: Whose weights.
    """
    ready, versions = [value], [p._version for p in model.parameters()]

    def get() -> T:
        if ready and versions == [p._version for p in model.parameters()]:
            return ready.pop()
        return compute()

    return get
