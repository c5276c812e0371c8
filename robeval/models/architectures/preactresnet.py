"""A residual network whose normalisations and activations come before the convolutions."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from robeval.core.catalogue import architecture
from robeval.models.activations import activation
from robeval.models.architectures.residual import stage


class PreActBlock(nn.Module):
    """conv(act(bn(conv(a)))) + x with a = act(bn(x)); where the shape changes, a 1x1 convolution of a replaces x."""

    def __init__(self, inside: int, outside: int, stride: int, act: str):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.act1 = activation(act)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.act2 = activation(act)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        same = stride == 1 and inside == outside
        self.shortcut = None if same else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor = self.act1(self.bn1(x))
        inner: Tensor = self.conv2(self.act2(self.bn2(self.conv1(a))))
        return inner + (x if self.shortcut is None else self.shortcut(a))


@architecture(source="He, Zhang, Ren, Sun 2016, Identity Mappings in Deep Residual Networks, arXiv:1603.05027")
def preactresnet18(
    *,
    in_channels: int = 3,
    classes: int = 10,
    act: Literal["relu", "smooth", "softplus"] = "relu",
) -> nn.Module:
    """A pre-activation residual network of 18 layers for small images.

    A 3x3 stem, two pre-activation blocks in each of four stages (64 to 512 channels), a last normalisation and
    activation: 11,172,170 parameters for 10 classes, 11,218,340 for 100. In training its logits depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 1 on; 32x32 is what it was made for.
    Cost:
        About 560 million multiplications per 32x32 image.
    Source:
        He et al. 2016, arXiv:1603.05027, figure 4 (e) and the appendix.
    Departs:
        Layers are named as in the published weights of adversarially trained networks (conv1, layer1 to layer4, bn,
        linear). The last pooling averages over the whole map, which is their 4x4 for 32x32 images.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 64, 3, padding=1, bias=False),
            layer1=stage(PreActBlock, 2, 64, 64, 1, act),
            layer2=stage(PreActBlock, 2, 64, 128, 2, act),
            layer3=stage(PreActBlock, 2, 128, 256, 2, act),
            layer4=stage(PreActBlock, 2, 256, 512, 2, act),
            bn=nn.BatchNorm2d(512),
            act=activation(act),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(512, classes),
        )
    )
