"""Training on Gaussian noise, for smoothing."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from robeval.core.catalogue import trainer
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Cohen, Rosenfeld, Kolter 2019, Certified Adversarial Robustness via Randomized Smoothing,"
    " arXiv:1902.02918, section 3.3",
    norms=(),
    robust=False,
)
def noise(model: nn.Module, x: Tensor, y: Tensor, rng: Streams, *, sigma: float = 0.25) -> Iterator[Objective]:
    """Cross-entropy on images with Gaussian noise, the ones that a smoothed classifier votes on.

    Every image of the mini-batch gets one draw of white noise. The network itself is not claimed to resist attacks: it
    is the base of the bound ``smoothing``, which should be asked with the same sigma.

    Args:
        sigma: Standard deviation of the noise per pixel, in pixel units.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        1 forward and 1 backward pass per step.
    Source:
        Cohen et al. 2019, arXiv:1902.02918, section 3.3 and appendix F.
    Departs:
        Nothing; noisy images are not clipped to the box, since those of smoothing are not either.
    Raises:
        UsageError: a negative sigma.
    """
    if not sigma >= 0:
        raise UsageError(f"sigma of noise must be a number >= 0, got {sigma}", code="A04")
    noisy = x + sigma * rng.normal(*x.shape[1:])

    def objective() -> Loss:
        z = model(noisy)
        return Loss(per_sample_loss(z, y, "ce").mean(), {"train_accuracy": accuracy(z, y)})

    yield objective
