"""A linear map and a multilayer perceptron."""

from __future__ import annotations

from typing import Literal

from torch import nn

from robeval.core.catalogue import architecture
from robeval.models.activations import activation


@architecture(source="robeval; the model whose distances have a closed form")
def linear(*, in_channels: int = 1, height: int = 8, size: int = 8, classes: int = 10, bias: bool = True) -> nn.Module:
    """One affine map from pixels to logits.

    Distances to its decision boundaries are known exactly, which makes it the yardstick of tests.

    Args:
        in_channels: Colour channels of the images.
        height: Height of the images in pixels.
        size: Width of the images in pixels.
        classes: Number of classes.
        bias: Whether to add a constant to every logit.

    Shapes:
        (n, in_channels, height, size) to (n, classes).
    Cost:
        in_channels * height * size * classes multiplications per image.
    Source:
        None.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * height * size, classes, bias=bias))


@architecture(source="robeval; the multilayer perceptron")
def mlp(
    *,
    in_channels: int = 1,
    height: int = 8,
    size: int = 8,
    classes: int = 10,
    hidden: int = 64,
    depth: int = 2,
    act: Literal["relu", "smooth", "softplus"] = "relu",
) -> nn.Module:
    """Dense layers of one width.

    ``depth`` hidden layers with an activation after each, then an affine map to the logits.

    Args:
        in_channels: Colour channels of the images.
        height: Height of the images in pixels.
        size: Width of the images in pixels.
        classes: Number of classes.
        hidden: Units of each hidden layer.
        depth: Number of hidden layers.
        act: Activation.

    Shapes:
        (n, in_channels, height, size) to (n, classes).
    Cost:
        About pixels * hidden + (depth - 1) * hidden^2 multiplications per image.
    Source:
        None.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    inside = in_channels * height * size
    for _ in range(depth):
        layers += [nn.Linear(inside, hidden), activation(act)]
        inside = hidden
    return nn.Sequential(*layers, nn.Linear(inside, classes))
