"""A margin loss near each image: value, gradient, Hessian-vector products. Machinery of the bounds, no bound itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from robeval.bounds.cheap_products import CheapProducts
from robeval.core.classifier import ELSEWHERE, FLOOR, Classifier
from robeval.core.errors import ContractBroken
from robeval.core.goal import column, without
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams

#: Told (done, total, text) after every batch.
OnBatch = Callable[[int, int, str], None]
#: One stream of random numbers per image: (ids, number of the stream) -> Streams.
Draws = Callable[[list[int], int], Streams]

#: Autograd nodes of functions that are not twice differentiable, and what people call them.
KINKS = {
    "Relu": "ReLU", "Threshold": "ReLU", "LeakyRelu": "LeakyReLU", "Prelu": "PReLU", "RreluWithNoise": "RReLU",
    "Hardtanh": "Hardtanh or ReLU6", "Hardswish": "Hardswish", "Hardsigmoid": "Hardsigmoid", "Elu": "ELU",
    "MaxPool": "MaxPool", "AdaptiveMaxPool": "MaxPool", "FractionalMaxPool": "MaxPool", "Abs": "abs",
    "Max": "max", "Amax": "max", "Maximum": "max", "Min": "min", "Amin": "min", "Minimum": "min", "Sign": "sign",
}  # fmt: skip


#: Margins f_j - f_y that stand for themselves, one for every rival class j: of logits, of probabilities.
RIVALS = {"rivals": False, "rivals_prob": True}


@dataclass
class Reading:
    """What a bound says about one image, in plain numbers.

    Args:
        index: Id of the image in its split.
        label: True class.
        prediction: Class predicted for the image.
        radius: No adversarial point lies closer, if the constant holds; pixels in [0, 1]. 0 where misclassified.
        loss: Name of the loss whose change is bounded.
        loss_value: Its value at the image; negative = correct.
        gradient_norm: Dual norm of its gradient.
        constant: The constant L or C; with one per rival, that of the rival which decides.
        domain: Where the constant was taken.
        arithmetic: Floating-point format, and whether rounding is enclosed.
        forwards: Images passed forward for this row.
        backwards: Gradients and Hessian-vector products taken for this row.
        curvature: Largest eigenvalue of the loss Hessian at the image; nan where not computed.
        residual: An eigenvalue lies this close to ``curvature``; nan where not computed.
        samples: Random starts or points used.
        confidence: nan for an estimate, 1 for a proof.
        status: What became of the image where its kind does not say it, such as abstain; else empty.
        p_lower: Lower confidence limit of the probability of the predicted class under noise; nan where there is none.
        rival: Class whose margin decides the radius, -1 for a loss over all rivals.
        curvature_least: Smallest eigenvalue of the loss Hessian at the image; nan where not computed.
        reach: Radius within which points were drawn; nan where none were.
        blocks: Blocks of ``samples`` points whose largest values were fitted.
        plain: Radius that the largest value seen gives, without a fit; nan without a fit.
        p_value: Of the Kolmogorov-Smirnov test of the fit; nan where nothing varied or nothing was fitted.
    """

    index: int
    label: int
    prediction: int
    radius: float
    loss: str
    loss_value: float
    gradient_norm: float
    constant: float
    domain: str
    arithmetic: str
    forwards: int
    backwards: int
    curvature: float = math.nan
    residual: float = math.nan
    samples: int = 0
    confidence: float = math.nan
    status: str = ""
    p_lower: float = math.nan
    rival: int = -1
    curvature_least: float = math.nan
    reach: float = math.nan
    blocks: int = 0
    plain: float = math.nan
    p_value: float = math.nan

    @property
    def spectral_norm(self) -> float:
        """Largest absolute eigenvalue of the loss Hessian at the image; nan unless both ends were computed."""
        return max(self.curvature, -self.curvature_least) if self.curvature_least == self.curvature_least else math.nan


@dataclass
class Expansion:
    """Loss and gradient at some images, with the graph of the gradient kept where second derivatives are wanted.

    Args:
        point: (m, C, H, W), the images, requiring gradients.
        logits: (m, K).
        value: (m,).
        gradient: (m, C, H, W).
        rows: Images that were asked for; what follows them only fills the batch.
    """

    point: Tensor
    logits: Tensor
    value: Tensor
    gradient: Tensor
    rows: int

    def product(self, v: Tensor) -> Tensor:
        """Hessian of each image's loss times its own direction, one backward pass for all. (n, d) -> (n, d)."""
        if not self.gradient.requires_grad:  # a loss that is linear in the pixels
            return torch.zeros_like(v)
        padded = torch.cat([v, v.new_zeros(len(self.point) - len(v), v.shape[1])])
        (hv,) = torch.autograd.grad(
            self.gradient,
            self.point,
            padded.view_as(self.point),
            retain_graph=True,
            materialize_grads=True,
        )
        return hv.flatten(1)[: self.rows]

    def hessian(self) -> Tensor:
        """Every image's whole Hessian, one product per pixel. -> (n, d, d)."""
        d = self.point[0].numel()
        unit = torch.eye(d, dtype=self.point.dtype, device=self.point.device)
        return torch.stack([self.product(unit[k].expand(self.rows, d)) for k in range(d)], 2)


def margin(
    z: Tensor, y: Tensor, loss: str, temperature: float = 10.0, *, rival: Tensor | None = None, top: int = 1
) -> Tensor:
    """A loss below whose level the class cannot change: a named one, or f_j - f_y towards one rival of each row.

    With ``top`` the k-th best rival counts instead of the best, for cw and cw_prob.

    Shapes:
        (n, K), (n,) -> (n,).
    """
    if loss in RIVALS:
        assert rival is not None
        f = z.softmax(1) if RIVALS[loss] else z
        return column(f, rival) - column(f, y)
    if top > 1:
        f = z.softmax(1) if loss == "cw_prob" else z
        return without(f, y).topk(top, dim=1).values[:, -1] - column(f, y)
    return per_sample_loss(z, y, loss, temperature)


def forward(classifier: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points that ask for gradients, their labels and logits with a graph, in a batch filled up to the floor.

    Raises:
        ContractBroken: NaN or infinite logits, or no gradient with respect to the input.
    """
    fill = -len(x) % FLOOR if x.device.type == "cpu" else max(0, ELSEWHERE - len(x))
    point = torch.cat([x, x[:1].expand(fill, *x.shape[1:])]).detach().requires_grad_()
    labels = torch.cat([y, y[:1].expand(fill)])
    with torch.enable_grad():
        z = classifier.logits(point)
    bad = ~z.isfinite().all(1)[: len(x)]
    if bad.any():
        raise ContractBroken(f"NaN or Inf logits on {int(bad.sum())} clean images", code="C07")
    if not z.requires_grad:
        raise ContractBroken(
            "the model gives no gradient with respect to its input",
            code="C19",
            why="a detach, a no_grad or a rounding inside the model cuts the graph; every bound would be infinite",
        )
    return point, labels, z


def expand(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    loss: str,
    temperature: float,
    *,
    second: bool = False,
    rival: Tensor | None = None,
    top: int = 1,
) -> Expansion:
    """Value and gradient of the loss at each image, and with ``second`` the means to take Hessian products.

    Per-image losses do not interact, so the gradient of their sum holds every image's own gradient.

    Shapes:
        x (n, C, H, W), y and rival (n,).
    Raises:
        ContractBroken: NaN or infinite logits, or no gradient with respect to the input.
    """
    with CheapProducts() if second else nullcontext():
        point, labels, z = forward(classifier, x, y)
    with torch.enable_grad():
        towards = None if rival is None else torch.cat([rival, rival[:1].expand(len(point) - len(x))])
        value = margin(z, labels, loss, temperature, rival=towards, top=top)
        (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=second, materialize_grads=True)
    if not gradient[: len(x)].isfinite().all():
        raise ContractBroken(f"the gradient of {loss} is NaN or infinite", code="B02", do="try float64=true")
    return Expansion(point, z, value, gradient, len(x))


def kinks(output: Tensor) -> list[str]:
    """Functions without second derivatives that an output's graph holds, as people call them; empty when smooth.

    Looks at what autograd recorded, so it also sees a ReLU that is called inside ``forward``; not inside compiled or
    scripted parts. Clamps are allowed, since smooth activations are built from them.
    """
    found, seen, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name().removeprefix("torch::autograd::").partition("Backward")[0].rstrip("0123456789")
        for kink, called in KINKS.items():
            if name == kink or ("Pool" in kink and name.startswith(kink)):
                found.add(called)
        todo += [parent for parent, _ in node.next_functions]
    return sorted(found)


def uncoupled(product: Callable[[Tensor], Tensor], v: Tensor) -> None:
    """Check that no image's product depends on another image's direction.

    Every other row is flipped: those products must flip and the rest must not move. One product; its order of
    summation is the same in both calls, so the tolerance only has to cover rounding.

    Raises:
        ContractBroken: images influence each other, as with batch normalisation in training mode.
    """
    if len(v) < 2:
        return
    sign = torch.ones(len(v), 1, dtype=v.dtype, device=v.device)
    sign[::2] = -1
    straight, flipped = product(v), product(v * sign)
    moved = (flipped - sign * straight).abs().max()
    if moved > 1e-4 * straight.abs().max():
        raise ContractBroken(
            "the loss of one image depends on other images of the batch",
            code="C14",
            why=f"flipping one image's direction moved another's Hessian product by {float(moved):.3g}",
            do="put the network in eval mode; batch statistics couple the images",
        )


def in_double(classifier: Classifier) -> Classifier:
    """The same classifier with float64 weights; a plain callable must follow the type of its input."""
    if not isinstance(classifier.module, torch.nn.Module):
        return classifier
    return Classifier(
        copy.deepcopy(classifier.module).double(), classifier.classes, classifier.name, classifier.fingerprint
    )
