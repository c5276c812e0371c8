"""The network of Simonyan and Zisserman with batch normalisation, for small images."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from robeval.core.catalogue import architecture
from robeval.models.activations import activation, pooling


@architecture(
    source="Simonyan, Zisserman 2015, Very Deep Convolutional Networks for Large-Scale Image Recognition,"
    " arXiv:1409.1556",
)
def vgg16(
    *,
    in_channels: int = 3,
    classes: int = 10,
    act: Literal["relu", "smooth", "softplus"] = "relu",
    pool: Literal["auto", "max", "avg"] = "auto",
) -> nn.Module:
    """Thirteen normalised 3x3 convolutions in five groups, a pooling after each group, one dense layer.

    64 to 512 channels, 14,728,266 parameters for 10 classes and colour images. With a smooth activation the poolings
    average, so that the whole network is twice differentiable. In training its logits depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.
        pool: Pooling; auto is max beside relu, avg beside smooth activations.

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 1 on; 32x32 is what it was made for.
    Cost:
        About 310 million multiplications per 32x32 image.
    Source:
        Simonyan, Zisserman 2015, table 1, configuration D.
    Departs:
        Batch normalisation after every convolution and one dense layer in place of three, as is common for CIFAR
        (layers features and classifier). Poolings round up and the map is averaged at the end, which changes nothing
        at 32x32 and admits other sizes.
    """
    layers: list[nn.Module] = []
    inside = in_channels
    for number, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(number):
            layers += [nn.Conv2d(inside, channels, 3, padding=1), nn.BatchNorm2d(channels), activation(act)]
            inside = channels
        layers.append(pooling(pool, act, ceil_mode=True))
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*layers),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(512, classes),
        )
    )
