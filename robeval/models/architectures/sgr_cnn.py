"""The convolutional network of Carlini and Wagner, as used for structured gradient regularisation."""

from __future__ import annotations

from typing import Literal

from torch import nn

from robeval.core.catalogue import architecture
from robeval.core.errors import UsageError
from robeval.models.activations import activation, pooling


@architecture(
    source="Carlini, Wagner 2017, Towards Evaluating the Robustness of Neural Networks, arXiv:1608.04644, table 1;"
    " Roth, Lucchi, Nowozin, Hofmann 2018, Adversarially Robust Training through Structured Gradient Regularization,"
    " arXiv:1805.08736, table 5",
)
def sgr_cnn(
    *,
    in_channels: int = 1,
    classes: int = 10,
    size: int = 28,
    width: Literal["mnist", "cifar"] = "mnist",
    act: Literal["relu", "smooth", "softplus"] = "relu",
    pool: Literal["auto", "max", "avg"] = "auto",
    dropout: float = 0.0,
) -> nn.Module:
    """Four unpadded 3x3 convolutions, two poolings, three dense layers.

    Made for 28x28 grey (width mnist, 312,202 parameters) and 32x32 colour images (width cifar, 1,147,978 parameters).
    With a smooth activation the poolings average, so that the whole network is twice differentiable.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        size: Height and width of the images in pixels, at least 16.
        width: Layer widths: mnist 32, 32, 64, 64, 200, 200; cifar 64, 64, 128, 128, 256, 256.
        act: Activation.
        pool: Pooling; auto is max beside relu, avg beside smooth activations.
        dropout: Probability of dropping a unit between the dense layers.

    Shapes:
        (n, in_channels, size, size) to (n, classes).
    Cost:
        About 6 million (mnist) or 39 million (cifar) multiplications per image.
    Source:
        Carlini, Wagner 2017, table 1; Roth et al. 2018, table 5.
    Departs:
        Normalisation is a layer of its own in front; dropout is off, as in Roth et al.
    """
    if size < 16:
        raise UsageError(f"sgr_cnn needs images of at least 16x16 pixels, got {size}x{size}", code="A04")
    a, b, dense = (32, 64, 200) if width == "mnist" else (64, 128, 256)
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, a, 3), activation(act), nn.Conv2d(a, a, 3), activation(act), pooling(pool, act),
        nn.Conv2d(a, b, 3), activation(act), nn.Conv2d(b, b, 3), activation(act), pooling(pool, act),
        nn.Flatten(),
        nn.Linear(b * side * side, dense), activation(act), nn.Dropout(dropout),
        nn.Linear(dense, dense), activation(act), nn.Linear(dense, classes),
    )  # fmt: skip
