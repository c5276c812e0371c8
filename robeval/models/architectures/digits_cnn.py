"""A small convolutional network for small images."""

from __future__ import annotations

from typing import Literal

from torch import nn

from robeval.core.catalogue import architecture
from robeval.core.errors import UsageError
from robeval.models.activations import activation, pooling


@architecture(source="robeval; a plain convolutional network in the manner of LeCun et al. 1998")
def digits_cnn(
    *,
    in_channels: int = 1,
    classes: int = 10,
    size: int = 8,
    act: Literal["relu", "smooth", "softplus"] = "relu",
    pool: Literal["auto", "max", "avg"] = "auto",
) -> nn.Module:
    """Three padded 3x3 convolutions (16, 32, 32), two poolings, two dense layers.

    27,402 parameters for the 8x8 digits: seconds of training on one core. With a smooth activation the poolings
    average, so that the whole network is twice differentiable.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        size: Height and width of the images in pixels, at least 4.
        act: Activation.
        pool: Pooling; auto is max beside relu, avg beside smooth activations.

    Shapes:
        (n, in_channels, size, size) to (n, classes).
    Cost:
        About 0.5 million multiplications per 8x8 image.
    Source:
        None; a conventional small network.
    """
    if size < 4:
        raise UsageError(f"digits_cnn needs images of at least 4x4 pixels, got {size}x{size}", code="A04")
    side = size // 4
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1), activation(act),
        nn.Conv2d(16, 32, 3, padding=1), activation(act), pooling(pool, act),
        nn.Conv2d(32, 32, 3, padding=1), activation(act), pooling(pool, act),
        nn.Flatten(),
        nn.Linear(32 * side * side, 96), activation(act), nn.Linear(96, classes),
    )  # fmt: skip
