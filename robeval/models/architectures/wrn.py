"""Wide residual networks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from robeval.core.catalogue import architecture
from robeval.models.activations import activation
from robeval.models.architectures.residual import draw_fan_out, stage


class WideBlock(nn.Module):
    """conv(act(bn(conv(a)))) + x with a = act(bn(x)); where the width changes, a 1x1 convolution of a replaces x."""

    def __init__(self, inside: int, outside: int, stride: int, act: str):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.act1 = activation(act)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.act2 = activation(act)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        # Spelt as in the published weights.
        self.convShortcut = None if inside == outside else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor = self.act1(self.bn1(x))
        inner: Tensor = self.conv2(self.act2(self.bn2(self.conv1(a))))
        return inner + (x if self.convShortcut is None else self.convShortcut(a))


class Unused(nn.Sequential):
    """Weights that a file holds and no image meets."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _network(depth: int, width: int, in_channels: int, classes: int, act: str, unused: bool = False) -> nn.Module:
    """Three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times ``width`` channels."""
    number = (depth - 4) // 6
    one, two, three = (channels * width for channels in (16, 32, 64))
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(in_channels, 16, 3, padding=1, bias=False),
        block1=nn.Sequential(OrderedDict(layer=stage(WideBlock, number, 16, one, 1, act))),
    )
    if unused:
        layers["sub_block1"] = Unused(OrderedDict(layer=stage(WideBlock, number, 16, one, 1, act)))
    layers |= OrderedDict(
        block2=nn.Sequential(OrderedDict(layer=stage(WideBlock, number, one, two, 2, act))),
        block3=nn.Sequential(OrderedDict(layer=stage(WideBlock, number, two, three, 2, act))),
        bn1=nn.BatchNorm2d(three),
        act=activation(act),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
    )
    last = nn.Linear(three, classes)
    nn.init.zeros_(last.bias)
    network = nn.Sequential(layers | OrderedDict(fc=last))
    draw_fan_out(network)
    return network


@architecture(source="Zagoruyko, Komodakis 2016, Wide Residual Networks, arXiv:1605.07146")
def wrn34_10(
    *,
    in_channels: int = 3,
    classes: int = 10,
    act: Literal["relu", "smooth", "softplus"] = "relu",
    trades_block: bool = False,
) -> nn.Module:
    """A wide residual network of depth 34 and width 10, the large network of most robustness tables.

    Five blocks in each of three groups with 160, 320 and 640 channels: 46,160,474 parameters for 10 classes and
    colour images, convolutions drawn from N(0, 2 / (k^2 * channels out)). In training its logits depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.
        trades_block: Also hold the group sub_block1 that the weights of TRADES contain and that takes no part in the
            computation, 48,262,586 parameters in all, so that those files load.

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 1 on; 32x32 is what it was made for.
    Cost:
        About 6.7 billion multiplications per 32x32 image.
    Source:
        Zagoruyko, Komodakis 2016, arXiv:1605.07146, table 1; sub_block1 from Zhang et al. 2019, Theoretically
        Principled Trade-off between Robustness and Accuracy, arXiv:1901.08573.
    Departs:
        No dropout. Layers are named as in the published weights (conv1, block1 to block3, bn1, fc). The last pooling
        averages over the whole map, which is the 8x8 of 32x32 images.
    """
    return _network(34, 10, in_channels, classes, act, trades_block)


@architecture(
    source="Zagoruyko, Komodakis 2016, Wide Residual Networks, arXiv:1605.07146;"
    " Ding, Sharma, Lui, Huang 2020, MMA Training, arXiv:1812.02637",
)
def wrn28_4(
    *,
    in_channels: int = 3,
    classes: int = 10,
    act: Literal["relu", "smooth", "softplus"] = "relu",
) -> nn.Module:
    """A wide residual network of depth 28 and width 4, the network of max-margin adversarial training.

    Four blocks in each of three groups with 64, 128 and 256 channels: 5,849,050 parameters for 10 classes and colour
    images. In training its logits depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 1 on; 32x32 is what it was made for.
    Cost:
        About 0.85 billion multiplications per 32x32 image.
    Source:
        Zagoruyko, Komodakis 2016, arXiv:1605.07146, table 1; used by Ding et al. 2020, arXiv:1812.02637.
    Departs:
        As wrn34_10.
    """
    return _network(28, 4, in_channels, classes, act)


@architecture(
    source="Zagoruyko, Komodakis 2016, Wide Residual Networks, arXiv:1605.07146;"
    " Qin et al. 2019, Adversarial Robustness through Local Linearization, arXiv:1907.02610",
)
def wrn28_8(
    *,
    in_channels: int = 3,
    classes: int = 10,
    act: Literal["relu", "smooth", "softplus"] = "relu",
) -> nn.Module:
    """A wide residual network of depth 28 and width 8, the network of local linearity regularisation.

    Four blocks in each of three groups with 128, 256 and 512 channels: 23,354,842 parameters for 10 classes and
    colour images; local linearity regularisation takes act=softplus. In training its logits depend on the batch.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 1 on; 32x32 is what it was made for.
    Cost:
        About 3.4 billion multiplications per 32x32 image.
    Source:
        Zagoruyko, Komodakis 2016, arXiv:1605.07146, table 1; used by Qin et al. 2019, arXiv:1907.02610.
    Departs:
        As wrn34_10.
    """
    return _network(28, 8, in_channels, classes, act)
