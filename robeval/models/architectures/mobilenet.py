"""The network of inverted residuals, for small images."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from robeval.core.catalogue import architecture
from robeval.models.activations import activation

# Expansion, channels, blocks, stride of the first block; the second stride is 2 for ImageNet.
STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter each channel by 3x3, narrow by 1x1, and add x where the resolution stays."""

    def __init__(self, inside: int, outside: int, expansion: int, stride: int, act: str):
        super().__init__()
        wide = expansion * inside
        self.conv1 = nn.Conv2d(inside, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.act1 = activation(act)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.act2 = activation(act)
        self.conv3 = nn.Conv2d(wide, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential() if stride == 1 else None
        if self.shortcut is not None and inside != outside:
            self.shortcut.append(nn.Conv2d(inside, outside, 1, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act1(self.bn1(self.conv1(x)))
        inner = self.act2(self.bn2(self.conv2(inner)))
        out: Tensor = self.bn3(self.conv3(inner))
        return out if self.shortcut is None else out + self.shortcut(x)


@architecture(
    source="Sandler, Howard, Zhu, Zhmoginov, Chen 2018, MobileNetV2: Inverted Residuals and Linear Bottlenecks,"
    " arXiv:1801.04381",
)
def mobilenetv2(
    *,
    in_channels: int = 3,
    classes: int = 10,
    act: Literal["relu", "smooth", "softplus"] = "relu",
) -> nn.Module:
    """Seventeen inverted residual blocks between a 3x3 stem and a 1x1 convolution to 1280 channels.

    Most of the work is done by cheap convolutions of one channel each: 2,296,922 parameters for 10 classes and colour
    images. In training its logits depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 1 on; 32x32 is what it was made for.
    Cost:
        About 90 million multiplications per 32x32 image.
    Source:
        Sandler et al. 2018, table 2.
    Departs:
        Stride 1 in the stem and the second stage, for small images; blocks with stride 1 that change the width have a
        1x1 convolution as shortcut; ReLU in place of ReLU6. Layers are named as in the common CIFAR version.
    """
    blocks: list[nn.Module] = []
    inside = 32
    for expansion, outside, number, first in STAGES:
        for stride in [first] + [1] * (number - 1):
            blocks.append(InvertedResidual(inside, outside, expansion, stride, act))
            inside = outside
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 32, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(32),
            act1=activation(act),
            layers=nn.Sequential(*blocks),
            conv2=nn.Conv2d(320, 1280, 1, bias=False),
            bn2=nn.BatchNorm2d(1280),
            act2=activation(act),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(1280, classes),
        )
    )
