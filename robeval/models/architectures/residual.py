"""What the residual networks share: the post-activation block, a stage of blocks, the draw of the weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from robeval.models.activations import activation


class BasicBlock(nn.Module):
    """act(conv(act(conv(x))) + shortcut(x)), the shortcut a 1x1 convolution where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int, act: str, *, bias: bool = False, bn: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(outside) if bn else nn.Identity()
        self.act1 = activation(act)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(outside) if bn else nn.Identity()
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut.append(nn.Conv2d(inside, outside, 1, stride, bias=bias))
            if bn:
                self.shortcut.append(nn.BatchNorm2d(outside))
        self.act2 = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out: Tensor = self.act2(inner + self.shortcut(x))
        return out


def stage(
    block: Callable[[int, int, int, str], nn.Module], number: int, inside: int, outside: int, stride: int, act: str
) -> nn.Sequential:
    """Blocks in a row, of which the first changes the width and the resolution.

    Args:
        block: Makes a block from the channels that come in and go out, a stride and the name of an activation.
        number: Number of blocks.
        inside: Channels that come in.
        outside: Channels that go out.
        stride: Stride of the first block.
        act: Activation.
    """
    rest = (block(outside, outside, 1, act) for _ in range(number - 1))
    return nn.Sequential(block(inside, outside, stride, act), *rest)


def draw_fan_out(network: nn.Module) -> None:
    """Draw the convolutions from N(0, 2 / (k^2 * channels out)), as He et al. 2015 do for the backward pass."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
