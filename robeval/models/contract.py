"""One batch through the model before anything is measured: does it keep what robeval needs of a classifier?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken
from robeval.core.images import Images

SIZE = 32
TOLERANCE = 1e-4  # of the largest logit


def check(classifier: Classifier, images: Images, *, randomised: bool = False, form_only: bool = False) -> list[str]:
    """Try the model on up to 32 images, spread over the set.

    Args:
        classifier: The model.
        images: The data that it is going to be measured on.
        randomised: The model may answer at random, so that it need not repeat itself.
        form_only: Stop where the form of the answer is right: the rest is about to be diagnosed.

    Returns:
        Notes and warnings, one sentence each, such as ``warning[C16] 98 % of answers are class 3``.
    Cost:
        15 calls of the model with at most 32 images each, one backward pass.
    Raises:
        ContractBroken: with the code of what is broken: C02 to C04, C06, C07, C11 to C15, C18, D04, D05, D10.
    """
    rows = torch.linspace(0, len(images) - 1, min(SIZE, len(images))).round().long()
    x, y = images.x[rows].to(classifier.device), images.y[rows]
    _shapes(classifier, x)
    if form_only:
        _outputs(_forward(classifier, x.clone()), len(x), classifier, images)
        return []
    _modes(classifier)
    before = _buffers(classifier)
    given = x.clone()
    z = _forward(classifier, given)
    _outputs(z, len(x), classifier, images)
    if not torch.equal(given, x):
        raise ContractBroken("the model overwrites its input", code="C15", do="clone the input inside forward")
    _finite(z, images.ids[rows])
    changed = [k for k, v in _buffers(classifier).items() if not torch.equal(v, before[k])]
    if changed:
        raise ContractBroken(f"a forward pass changes buffer {changed[0]}", code="C13")
    if not randomised:
        _repeats(classifier, x, z)
        _batches(classifier, x, z)
    if _probabilities(z):
        raise ContractBroken(
            "outputs are probabilities; remove the softmax",
            code="C06",
            why="attacks and bounds need logits; a softmax hides gradients",
        )
    return _warnings(classifier, x, y, z.cpu(), len(images.classes))


def _shapes(classifier: Classifier, x: Tensor) -> None:
    """Compare the images with the shape that the checkpoint names."""
    wanted, came = classifier.info.get("input_shape"), list(x.shape[1:])
    if not wanted or list(wanted) == came:
        return
    shown, takes = ("x".join(map(str, s)) for s in (came, wanted))
    if came == [*wanted[1:], wanted[0]]:
        raise ContractBroken(f"images look like {shown} (channels last)", code="D05", do="give them as (N, C, H, W)")
    if came[0] != wanted[0]:
        raise ContractBroken(
            f"images have {came[0]} channel{'s' * (came[0] > 1)}, the model takes {wanted[0]}", code="D04"
        )
    raise ContractBroken(f"images are {shown}, the model takes {takes}", code="C02")


def _modes(classifier: Classifier) -> None:
    if not isinstance(classifier.module, nn.Module):
        return
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.modules.instancenorm._InstanceNorm)
    live = [m for m in classifier.module.modules() if isinstance(m, kinds) and m.training]
    if live:
        kind = type(live[0]).__name__
        raise ContractBroken(
            f"{len(live)} {kind} layer{'s are' if len(live) > 1 else ' is'} in train mode",
            code="C11",
            do="call model.eval()",
        )


def _buffers(classifier: Classifier) -> dict[str, Tensor]:
    """Copies of all state that is not an input."""
    if not isinstance(classifier.module, nn.Module):
        return {}
    module = classifier.module
    return {k: v.detach().clone() for k, v in [*module.named_buffers(), *module.named_parameters()]}


def _forward(classifier: Classifier, x: Tensor) -> Any:
    """Logits without gradients; whatever the model throws is told in one sentence."""
    try:
        with torch.no_grad():
            return classifier.logits(x)
    except SystemExit:
        raise ContractBroken("the model called sys.exit", code="C18") from None
    except Exception as error:
        shape = "x".join(map(str, x.shape[1:]))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ContractBroken(
            f"model fails on {shape} ({reason[:160]})", code="C02", do="check the size and the channels of the images"
        ) from error


def _outputs(z: Any, n: int, classifier: Classifier, images: Images) -> None:
    """(n, K) floating logits with the K that the classifier and the data have."""
    if not isinstance(z, Tensor):
        size = f" of {len(z)}" if isinstance(z, (tuple, list, dict)) else ""
        raise ContractBroken(f"the model returns a {type(z).__name__}{size}, expected a tensor (n, K)", code="C03")
    if z.shape in ((n,), (n, 1)):
        raise ContractBroken(
            "the model has 1 output, expected one logit per class", code="C04", do="return two logits, (-z/2, z/2)"
        )
    if z.dim() != 2 or len(z) != n or not z.is_floating_point():
        raise ContractBroken(
            f"the model returns {z.dtype} of shape {tuple(z.shape)} for {n} images, expected floating (n, K)",
            code="C03",
        )
    if z.shape[1] != classifier.classes:
        raise ContractBroken(
            f"the model returns {z.shape[1]} logits, its class list has {classifier.classes}", code="C03"
        )
    if len(images.classes) != z.shape[1]:
        bad = (images.y >= z.shape[1]).nonzero()
        label = f"label {int(images.y[bad[0]])} at image {int(images.ids[bad[0]])}, " if len(bad) else ""
        raise ContractBroken(
            f"{label}the model has {z.shape[1]} classes, the data have {len(images.classes)}",
            code="D10",
            where=images.name,
        )


def _finite(z: Tensor, ids: Tensor) -> None:
    bad = (~torch.isfinite(z)).any(1).cpu()
    if bad.any():
        which = ", ".join(str(int(i)) for i in ids[bad][:5])
        raise ContractBroken(f"NaN or Inf logits on {int(bad.sum())} clean images: ids {which}", code="C07")


def _repeats(classifier: Classifier, x: Tensor, z: Tensor) -> None:
    again = _forward(classifier, x.clone())
    gap, flips = float((again - z).abs().max()), int((again.argmax(1) != z.argmax(1)).sum())
    if not gap <= TOLERANCE * _scale(z):
        said = f"{flips} of {len(x)} images change label" if flips else f"logits change by {gap:.2g}"
        raise ContractBroken(
            f"{said} between two runs",
            code="C12",
            why="a random model needs attacks that average over its randomness",
            do="robeval attack --randomised --suite autoattack-rand",
        )


def _batches(classifier: Classifier, x: Tensor, z: Tensor) -> None:
    for size, most in ((1, 4), (4, 32)):
        parts = [_forward(classifier, part.clone()) for part in x[:most].split(size)]
        gap = float((torch.cat(parts) - z[:most]).abs().max())
        if not gap <= TOLERANCE * _scale(z):
            raise ContractBroken(
                f"logits change with the other images in the batch ({gap:.2g})", code="C14", where=f"batch size {size}"
            )


def _scale(z: Tensor) -> float:
    return max(float(z.abs().max()), 1e-3)


def _probabilities(z: Tensor) -> bool:
    return bool((z >= 0).all() and (z <= 1).all() and ((z.sum(1) - 1).abs() < 1e-3).all())


def _warnings(classifier: Classifier, x: Tensor, y: Tensor, z: Tensor, classes: int) -> list[str]:
    said, n = [], len(x)
    blind = _blind(classifier, x)
    if blind:
        said.append(f"warning[G1] {blind}: gradient attacks and gradient bounds say nothing here")
    if n >= 10:
        answers, top = z.argmax(1).bincount().float() / n, float(y.bincount().max()) / n
        if float(answers.max()) > 0.9 >= top:
            said.append(f"warning[C16] {float(answers.max()):.0%} of answers are class {int(answers.argmax())}")
        accuracy, chance = float((z.argmax(1) == y).float().mean()), 1 / classes
        if accuracy <= chance + 2 * (chance * (1 - chance) / n) ** 0.5 and top <= 0.9:
            said.append(
                f"warning[C19] clean accuracy on {n} images is {accuracy:.0%}, near chance:"
                " wrong labels or normalisation?"
            )
    return [s.replace("%", " %") for s in said]


def _blind(classifier: Classifier, x: Tensor) -> str:
    """Why no gradient reaches the pixels; empty when it does."""
    point = x.clone().requires_grad_()
    try:
        with torch.enable_grad():
            z = classifier.logits(point)
            # Logits, not the loss: a saturated softmax has a zero gradient although the network has none.
            gap = (z.max(1).values - z.min(1).values).sum()
            (gradient,) = torch.autograd.grad(gap, point)
    except RuntimeError:
        return "no gradient reaches the pixels (detach, argmax or no_grad inside the model?)"
    return "" if gradient.any() else "the gradient at the pixels is exactly zero"
