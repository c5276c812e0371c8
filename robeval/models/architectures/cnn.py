"""Two plain convolutional networks of six and eight layers, without batch normalisation."""

from __future__ import annotations

from typing import Literal

from torch import nn

from robeval.core.catalogue import architecture
from robeval.core.errors import UsageError
from robeval.models.activations import activation, pooling


@architecture(
    source="Ma, Faghri, Papernot, Farahmand 2020, SOAR: Second-Order Adversarial Regularization, arXiv:2004.01832",
)
def cnn6(
    *,
    in_channels: int = 3,
    classes: int = 10,
    size: int = 32,
    act: Literal["relu", "smooth", "softplus"] = "relu",
    pool: Literal["auto", "max", "avg"] = "auto",
) -> nn.Module:
    """Four unpadded 3x3 convolutions (32, 32, 64, 64), two poolings, two dense layers.

    890,410 parameters for 10 classes and 32x32 colour images. With a smooth activation the poolings average, so that
    the whole network is twice differentiable; logits never depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        size: Height and width of the images in pixels, at least 16.
        act: Activation.
        pool: Pooling; auto is max beside relu, avg beside smooth activations.

    Shapes:
        (n, in_channels, size, size) to (n, classes).
    Cost:
        About 15 million multiplications per 32x32 image.
    Source:
        Ma et al. 2020, table 14, which names the network but does not describe it.
    Departs:
        Widths and order are this project's choice, a common six-layer network for CIFAR. Normalisation is a layer of
        its own in front; normalise=per-image is the one that belongs to it.
    """
    if size < 16:
        raise UsageError(f"cnn6 needs images of at least 16x16 pixels, got {size}x{size}", code="A04")
    side = ((size - 4) // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 3), activation(act), nn.Conv2d(32, 32, 3), activation(act), pooling(pool, act),
        nn.Conv2d(32, 64, 3), activation(act), nn.Conv2d(64, 64, 3), activation(act), pooling(pool, act),
        nn.Flatten(),
        nn.Linear(64 * side * side, 512), activation(act), nn.Linear(512, classes),
    )  # fmt: skip


@architecture(
    source="Ma, Faghri, Papernot, Farahmand 2020, SOAR: Second-Order Adversarial Regularization, arXiv:2004.01832",
)
def cnn8(
    *,
    in_channels: int = 3,
    classes: int = 10,
    size: int = 32,
    act: Literal["relu", "smooth", "softplus"] = "relu",
    pool: Literal["auto", "max", "avg"] = "auto",
) -> nn.Module:
    """Six padded 3x3 convolutions (64, 64, 128, 128, 256, 256) with a pooling after each pair, two dense layers.

    3,248,202 parameters for 10 classes and 32x32 colour images. With a smooth activation the poolings average, so that
    the whole network is twice differentiable; logits never depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        size: Height and width of the images in pixels, at least 8.
        act: Activation.
        pool: Pooling; auto is max beside relu, avg beside smooth activations.

    Shapes:
        (n, in_channels, size, size) to (n, classes).
    Cost:
        About 155 million multiplications per 32x32 image.
    Source:
        Ma et al. 2020, table 14, which names the network but does not describe it.
    Departs:
        Widths and order are this project's choice. Normalisation is a layer of its own in front; normalise=per-image
        is the one that belongs to it.
    """
    if size < 8:
        raise UsageError(f"cnn8 needs images of at least 8x8 pixels, got {size}x{size}", code="A04")
    layers: list[nn.Module] = []
    for inside, outside in ((in_channels, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), activation(act)]
        layers += [nn.Conv2d(outside, outside, 3, padding=1), activation(act), pooling(pool, act)]
    dense = nn.Linear(256 * (size // 8) ** 2, 512)
    return nn.Sequential(*layers, nn.Flatten(), dense, activation(act), nn.Linear(512, classes))
