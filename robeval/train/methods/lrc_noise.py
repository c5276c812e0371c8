"""Training on images with long-range-correlated noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from robeval.core.catalogue import trainer
from robeval.core.correlated import Sampler, centred, exponential, with_covariance
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.memory import Memory
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Roth, Lucchi, Nowozin, Hofmann 2018, Adversarially Robust Training through Structured Gradient"
    " Regularization, arXiv:1805.08736, augmentation with long-range-correlated noise",
    norms=(),
    robust=False,
    presets={"lrc-noise-data": {"covariance": "data"}},
)
def lrc_noise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    weight: float = 1.0,
    std: float = 0.3,
    covariance: Literal["exponential", "data"] = "exponential",
    zeta: float = 8.0,
    inter: float = 0.5,
    clamp: bool = True,
) -> Iterator[Objective]:
    """Cross-entropy on images with Gaussian noise that is correlated over many pixels.

    Every image of the mini-batch gets one draw of noise with the wanted covariance. A weight below 1 mixes the loss on
    the clean images in.

    Args:
        weight: Share lambda of the noisy images in the loss; the clean images have the share 1 - lambda.
        std: Standard deviation of the noise per pixel, in pixel units.
        covariance: exponential, exp(-r / zeta) at a distance of r pixels, or data, that of the training images.
        zeta: Decay length of the exponential, in pixels.
        inter: Correlation of two channels at the same pixel, for the exponential.
        clamp: Clip the noisy images to the box [0, 1].

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        1 forward and 1 backward pass per step, one more forward with a weight below 1.
    Source:
        Roth et al. 2018, arXiv:1805.08736, the experiments with long-range-correlated noise.
    Departs:
        The paper does not name the mixture, the strength of the noise in training, or whether it clips.
    Raises:
        UsageError: a weight outside [0, 1] or a negative std; a zeta or inter that no noise has.
    """
    if not 0 <= weight <= 1 or not std >= 0:
        raise UsageError(f"lrc-noise needs 0 <= weight <= 1 and std >= 0, got {weight} and {std}", code="A04")
    kept = memory.tensors
    if "pixels" not in kept:  # the root of the covariance is taken once
        images = x if memory.train is None else memory.train.x
        shape = (x.shape[1], x.shape[2], x.shape[3])
        made = exponential(shape, zeta, inter) if covariance == "exponential" else with_covariance(centred(images))
        kept["channels"], kept["pixels"] = made.channels.to(x), made.pixels.to(x)
    noise = Sampler(kept["channels"], kept["pixels"])
    noisy = x + std * noise(rng.normal(*x.shape[1:]))
    noisy = noisy.clamp(0, 1) if clamp else noisy

    def objective() -> Loss:
        z = model(noisy)
        loss = per_sample_loss(z, y, "ce").mean()
        logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(z, y)}
        if weight < 1:
            clean = model(x)
            loss = weight * loss + (1 - weight) * per_sample_loss(clean, y, "ce").mean()
            logs["clean_train_accuracy"] = accuracy(clean, y)
        return Loss(loss, logs)

    yield objective
