"""Training on clean and adversarial images together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from robeval.core.ball import Ball
from robeval.core.catalogue import trainer
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.craft import crafted, predicted_class
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Roth, Lucchi, Nowozin, Hofmann 2018, Adversarially Robust Training through Structured Gradient"
    " Regularization, arXiv:1805.08736, section 4",
    norms=("linf", "l2"),
    robust=True,
    presets={"pgd-augment": {"steps": 10}, "fgsm-augment": {"steps": 1}},
)
def adv_augment(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    *,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    mix: float = 0.5,
) -> Iterator[Objective]:
    """A mixture of the cross-entropy on the images and on adversarial images made from them.

    The attack starts at the image and ascends the loss of the class that the network sees there, not of the label, so
    that the perturbation cannot carry the label. Accuracy on both kinds of images is logged; the loop warns when the
    adversarial ones are recognised better.

    Args:
        norm: Norm of the threat model.
        eps: Radius of the threat model in pixel units.
        steps: Gradient steps of the attack; 1 is FGSM.
        step_size: Length of a step in pixel units; none means eps / 5, and eps for a single step.
        mix: Share of the adversarial images in the loss.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        ``steps`` + 2 forward and ``steps`` + 1 backward passes per step.
    Source:
        Roth et al. 2018, arXiv:1805.08736, section 4; Goodfellow et al. 2015, arXiv:1412.6572, section 6.
    Departs:
        Roth et al. do not give the ratio of the mixture; it is one half here.
    Raises:
        UsageError: a mix outside [0, 1].
    """
    if not 0 <= mix <= 1:
        raise UsageError(f"mix of adv-augment must lie in [0, 1], got {mix}", code="A04")
    step_size = step_size or (eps if steps == 1 else eps / 5)
    x_adv = crafted(
        model, x, y, rng, Ball(norm, eps), steps=steps, step_size=step_size, loss=predicted_class(), random_start=False
    )

    def objective() -> Loss:
        z, z_adv = model(x), model(x_adv)
        clean, adversarial = (per_sample_loss(logits, y, "ce").mean() for logits in (z, z_adv))
        logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(z_adv, y), "clean_train_accuracy": accuracy(z, y)}
        return Loss((1 - mix) * clean + mix * adversarial, logs)

    yield objective
