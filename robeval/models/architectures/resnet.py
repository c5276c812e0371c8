"""Residual networks with activations after the sums: 18 layers for small images, 50 layers for ImageNet."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from robeval.core.catalogue import architecture
from robeval.models.activations import activation, pooling
from robeval.models.architectures.residual import BasicBlock, draw_fan_out, stage


@architecture(source="He, Zhang, Ren, Sun 2016, Deep Residual Learning for Image Recognition, arXiv:1512.03385")
def resnet18(
    *,
    in_channels: int = 3,
    classes: int = 10,
    act: Literal["relu", "smooth", "softplus"] = "relu",
) -> nn.Module:
    """A residual network of 18 layers for small images.

    A 3x3 stem and two basic blocks in each of four stages, 64 to 512 channels: 11,173,962 parameters for 10 classes
    and colour images. In training its logits depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 1 on; 32x32 is what it was made for.
    Cost:
        About 560 million multiplications per 32x32 image.
    Source:
        He et al. 2016, arXiv:1512.03385, table 1 with the stem of section 4.2.
    Departs:
        Shortcuts are 1x1 convolutions where the shape changes. Layers are named as the common CIFAR versions name
        them (conv1, bn1, layer1 to layer4, linear), so that their weights load.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 64, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(64),
            act=activation(act),
            layer1=stage(BasicBlock, 2, 64, 64, 1, act),
            layer2=stage(BasicBlock, 2, 64, 128, 2, act),
            layer3=stage(BasicBlock, 2, 128, 256, 2, act),
            layer4=stage(BasicBlock, 2, 256, 512, 2, act),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            linear=nn.Linear(512, classes),
        )
    )


class Bottleneck(nn.Module):
    """act(1x1, 3x3 and 1x1 convolutions of x + x); the middle one has a quarter of the channels and the stride."""

    def __init__(self, inside: int, outside: int, stride: int, act: str):
        super().__init__()
        narrow = outside // 4
        self.conv1 = nn.Conv2d(inside, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.act1 = activation(act)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.act2 = activation(act)
        self.conv3 = nn.Conv2d(narrow, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.downsample = nn.Sequential()
        if stride != 1 or inside != outside:
            self.downsample.append(nn.Conv2d(inside, outside, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(outside))
        self.act3 = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act1(self.bn1(self.conv1(x)))
        inner = self.act2(self.bn2(self.conv2(inner)))
        inner = self.bn3(self.conv3(inner))
        out: Tensor = self.act3(inner + self.downsample(x))
        return out


@architecture(
    source="He, Zhang, Ren, Sun 2016, Deep Residual Learning for Image Recognition, arXiv:1512.03385;"
    " Finlay, Oberman 2021, Scaleable input gradient regularization for adversarial robustness, arXiv:1905.11468",
)
def resnet50(
    *,
    in_channels: int = 3,
    classes: int = 1000,
    act: Literal["relu", "smooth", "softplus"] = "relu",
    pool: Literal["auto", "max", "avg"] = "auto",
    zero_last_gamma: bool = False,
) -> nn.Module:
    """A residual network of 50 layers for ImageNet.

    A 7x7 stem with stride 2, a 3x3 pooling with stride 2, then 3, 4, 6 and 3 bottleneck blocks: 25,557,032 parameters
    for 1000 classes and colour images. With a smooth activation the pooling averages, so that the whole network is
    twice differentiable. In training its logits depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.
        pool: Pooling after the stem; auto is max beside relu, avg beside smooth activations.
        zero_last_gamma: Start every block as the identity (scale 0 in its last batch normalisation) and draw the last
            layer from N(0, 0.01^2).

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 1 on; 224x224 is what it was made for.
    Cost:
        About 4.1 billion multiplications per 224x224 image.
    Source:
        He et al. 2016, arXiv:1512.03385, table 1; zero_last_gamma from Goyal et al. 2017, arXiv:1706.02677,
        section 5.1.
    Departs:
        The stride of a block lies in its 3x3 convolution, as in the weights that are passed around; layers bear
        their names (conv1, bn1, layer1 to layer4, downsample, fc).
    """
    network = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 64, 7, 2, padding=3, bias=False),
            bn1=nn.BatchNorm2d(64),
            act=activation(act),
            maxpool=pooling(pool, act, 3, stride=2, padding=1),
            layer1=stage(Bottleneck, 3, 64, 256, 1, act),
            layer2=stage(Bottleneck, 4, 256, 512, 2, act),
            layer3=stage(Bottleneck, 6, 512, 1024, 2, act),
            layer4=stage(Bottleneck, 3, 1024, 2048, 2, act),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(2048, classes),
        )
    )
    draw_fan_out(network)
    if zero_last_gamma:
        nn.init.normal_(network.get_submodule("fc").get_parameter("weight"), std=0.01)
        for block in network.modules():
            if isinstance(block, Bottleneck):
                nn.init.zeros_(block.bn3.weight)
    return network
