"""The branched residual network of Finlay and Oberman."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from robeval.core.catalogue import architecture
from robeval.models.activations import activation


class NormedConv(nn.Conv2d):
    """act(BN(conv(x)) + bias), the normalisation without scale and shift of its own."""

    bias: Tensor

    def __init__(self, inside: int, outside: int, size: int, act: str):
        super().__init__(inside, outside, size, padding=size // 2)
        self.bn = nn.BatchNorm2d(outside, affine=False)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(functional.conv2d(x, self.weight, padding=self.kernel_size[0] // 2))
        out: Tensor = self.act(y + self.bias.view(1, -1, 1, 1))
        return out


class NormedLinear(nn.Linear):
    """BN(W x) + bias, with an activation after it or without."""

    def __init__(self, inside: int, outside: int, act: str, final_act: bool):
        super().__init__(inside, outside)
        self.bn = nn.BatchNorm1d(outside, affine=False)
        self.act = activation(act) if final_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(functional.linear(x, self.weight)) + self.bias)
        return out


class BranchBlock(nn.Module):
    """act(x + mean of two branches); a branch is the second convolution on its own half of the first one's channels."""

    def __init__(self, channels: int, act: str, branches: int = 2):
        super().__init__()
        wide = branches * channels
        self.conv0 = nn.Conv2d(channels, wide, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(wide)
        self.act0 = activation(act)
        self.conv1 = nn.Conv2d(wide, wide, 3, padding=1, groups=branches, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.act1 = activation(act)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn1(self.conv1(self.act0(self.bn0(self.conv0(x)))))
        out: Tensor = self.act1(x + y.unflatten(1, (self.branches, -1)).mean(1))
        return out


def _network(base: int, in_channels: int, classes: int, act: str, final_act: bool) -> nn.Module:
    """Three stages of five blocks with ``base`` channels, twice and four times as many."""
    stages = [nn.Sequential(*(BranchBlock(base, act) for _ in range(5)))]
    for channels in (2 * base, 4 * base):
        change = NormedConv(channels // 2, channels, 1, act), nn.AvgPool2d(2)
        stages.append(nn.Sequential(*change, *(BranchBlock(channels, act) for _ in range(5))))
    return nn.Sequential(
        OrderedDict(
            layer0=NormedConv(in_channels, base, 3, act),
            layers=nn.Sequential(*stages),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=NormedLinear(4 * base, classes, act, final_act),
        )
    )


@architecture(
    source="Finlay, Oberman 2021, Scaleable input gradient regularization for adversarial robustness, arXiv:1905.11468;"
    " Xie, Girshick, Dollar, Tu, He 2017, Aggregated Residual Transformations for Deep Neural Networks,"
    " arXiv:1611.05431",
)
def resnext34_2x32(
    *,
    in_channels: int = 3,
    classes: int = 10,
    act: Literal["relu", "smooth", "softplus"] = "relu",
    final_act: bool = False,
) -> nn.Module:
    """A residual network whose blocks average two branches, 32 channels at first.

    Three stages of five blocks with 32, 64 and 128 channels, a 1x1 convolution and a 2x2 average between them:
    3,892,298 parameters for 10 classes and colour images. In training its logits depend on the batch, which must hold
    at least two images.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.
        final_act: Apply the activation to the logits too, as the authors' code does; no logit is then negative.

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 4 on; 32x32 is what it was made for.
    Cost:
        About 0.57 billion multiplications per 32x32 image.
    Source:
        Finlay, Oberman 2021, arXiv:1905.11468, section 5; the authors' published code for what the text leaves open.
    Departs:
        Logits are not rectified unless final_act is set. The normalisations of stem, transitions and last layer have
        no scale, only a bias, as in the authors' code. Weights start as torch draws them, U(+-1 / sqrt(fan-in)).
    """
    return _network(32, in_channels, classes, act, final_act)


@architecture(
    source="Finlay, Oberman 2021, Scaleable input gradient regularization for adversarial robustness, arXiv:1905.11468",
)
def resnext34_2x64(
    *,
    in_channels: int = 3,
    classes: int = 100,
    act: Literal["relu", "smooth", "softplus"] = "relu",
    final_act: bool = False,
) -> nn.Module:
    """The same network with 64 channels at first, for CIFAR-100.

    Stages of 64, 128 and 256 channels: 15,569,636 parameters for 100 classes and colour images. In training its
    logits depend on the batch, which must hold at least two images.

    Args:
        in_channels: Colour channels of the images.
        classes: Number of classes.
        act: Activation.
        final_act: Apply the activation to the logits too, as the authors' code does; no logit is then negative.

    Shapes:
        (n, in_channels, H, W) to (n, classes), any H and W from 4 on; 32x32 is what it was made for.
    Cost:
        About 2.3 billion multiplications per 32x32 image.
    Source:
        Finlay, Oberman 2021, arXiv:1905.11468, the footnote on CIFAR-100.
    Departs:
        As resnext34_2x32.
    """
    return _network(64, in_channels, classes, act, final_act)
