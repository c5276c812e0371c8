"""Residual networks of ten layers, with and without batch normalisation."""

from __future__ import annotations

from typing import Literal

from torch import nn

from robeval.core.catalogue import architecture
from robeval.models.activations import activation
from robeval.models.architectures.residual import BasicBlock


def _network(in_channels: int, classes: int, act: str, *, bias: bool, bn: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(in_channels, 64, 3, padding=1, bias=bias)]
    layers += [nn.BatchNorm2d(64)] if bn else []
    layers.append(activation(act))
    for inside, outside, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers.append(BasicBlock(inside, outside, stride, act, bias=bias, bn=bn))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


@architecture(
    source="Ma, Faghri, Papernot, Farahmand 2020, SOAR: Second-Order Adversarial Regularization, arXiv:2004.01832;"
    " He, Zhang, Ren, Sun 2016, Deep Residual Learning for Image Recognition, arXiv:1512.03385",
)
def resnet10_nobn(
    *,
    in_channels: int = 3,
    classes: int = 10,
    act: Literal["relu", "smooth", "softplus"] = "relu",
    bias: bool = True,
) -> nn.Module:
    """A residual network with one block in each of four stages (64 to 512 channels) and no batch normalisation.

    4,900,362 parameters for 10 classes and colour images, 4,897,482 with bias-free convolutions. The logits of an
    image do not depend on any other image, in training either, as second-order regularisers need.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.
        bias: Whether convolutions have biases, which batch normalisation would otherwise supply.

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 1 on; 32x32 is what it was made for.
    Cost:
        About 250 million multiplications per 32x32 image.
    Source:
        Ma et al. 2020, arXiv:2004.01832.
    Departs:
        The last pooling averages over the whole map, which is the paper's 4x4 for 32x32 images.
    """
    return _network(in_channels, classes, act, bias=bias, bn=False)


@architecture(source="He, Zhang, Ren, Sun 2016, Deep Residual Learning for Image Recognition, arXiv:1512.03385")
def resnet10(
    *,
    in_channels: int = 3,
    classes: int = 10,
    act: Literal["relu", "smooth", "softplus"] = "relu",
) -> nn.Module:
    """The same residual network with batch normalisation after every convolution.

    4,903,242 parameters for 10 classes and colour images. In training its logits depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.

    Shapes:
        (n, in_channels, H, W) to (n, classes).
    Cost:
        About 250 million multiplications per 32x32 image.
    Source:
        He et al. 2016, arXiv:1512.03385.
    Departs:
        One block per stage; a 3x3 stem without pooling, for small images.
    """
    return _network(in_channels, classes, act, bias=False, bn=True)
