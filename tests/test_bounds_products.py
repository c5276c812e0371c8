"""Cheap Hessian products against autograd's own, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robeval.bounds.expansion import expand
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken
from robeval.core.smooth import SmoothReLU
from robeval.models.build import build


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Dynamic(nn.Module):
    """A convolution whose kernel is made from the images themselves."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, x.mean((0, 2, 3), keepdim=True).tanh().expand(2, x.shape[1], 3, 3), padding=1)


def normalised() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(4)
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        assert tensor is not None
        tensor.copy_(torch.rand(4) + 0.5)
    return layer


#: Layers from (n, 4, 6, 6) to anything.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "conv same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same"),
    "conv strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), bias=False),
    "conv groups": lambda: nn.Conv2d(4, 8, 3, dilation=2, groups=2, padding_mode="circular", padding=1),
    "conv1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 3, 5, stride=2)),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 2)),
    "transposed": lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1),
    "avg pool": lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    "avg pool in tiles": lambda: nn.AvgPool2d(2),
    "avg pool in threes": lambda: nn.AvgPool2d((3, 3), stride=3),
    "avg pool in strips": lambda: nn.AvgPool2d((2, 3)),
    "avg pool apart": lambda: nn.AvgPool2d(2, 4),
    "avg pool, a rest": lambda: nn.AvgPool2d(4, ceil_mode=True),
    "avg pool, own divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "avg pool 1d": lambda: nn.Sequential(nn.Flatten(2), nn.AvgPool1d(5)),
    "global pool": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d((4, 2)),
    "batch norm": normalised,
    "plain batch norm": lambda: nn.BatchNorm2d(4, affine=False),
    "dynamic": Dynamic,
    "smooth": SmoothReLU,
    "softplus": lambda: nn.Softplus(beta=3),
    "gelu": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "silu in place": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU(inplace=True)),
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "no bias given": lambda: Call(lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3, dtype=x.dtype))),
    "keywords": lambda: Call(lambda x: torch.conv2d(x, torch.ones(2, 4, 3, 3, dtype=x.dtype), stride=2)),
}


def network(layer: nn.Module) -> Classifier:
    """The layer between convolutions and bends, so that its derivative and its adjoint both count."""
    before = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh())
    size = layer.double()(torch.zeros(2, 4, 6, 6, dtype=torch.float64)).flatten(1).shape[1]
    net = nn.Sequential(before, layer, nn.Flatten(), nn.Linear(size, 8), nn.Softplus(), nn.Linear(8, 3)).double()
    return Classifier(net, 3)


def images(n: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, v = torch.rand(2, n, 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % 3, v.flatten(1) - 0.5


def autograds(model: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and the gradient of the cross-entropy at a point with its graph, as autograd makes them."""
    point = x.clone().requires_grad_()
    z = model.logits(point)
    (g,) = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), point, create_graph=True)
    return z.detach(), g, point


def plain(model: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Logits, gradient and product of autograd."""
    z, g, point = autograds(model, x, y)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(g, point, v.view_as(point), retain_graph=True)[0].flatten(1)

    return z, g.detach(), product


def slope_of_curvature(g: Tensor, point: Tensor, v: Tensor) -> Tensor:
    """Gradient of v^T H v with respect to the point, a third derivative."""
    (hv,) = torch.autograd.grad(g, point, v.view_as(point), create_graph=True)
    return torch.autograd.grad((hv * v.view_as(point)).sum(), point)[0]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_products_are_autograds(name: str) -> None:
    torch.manual_seed(0)
    model, (x, y, v) = network(LAYERS[name]()), images()
    z, g, product = plain(model, x, y)
    at = expand(model, x, y, "ce", 1.0, second=True)
    torch.testing.assert_close(at.logits.detach(), z, rtol=0, atol=0)
    torch.testing.assert_close(at.gradient.detach(), g, rtol=1e-12, atol=1e-14)
    for direction in (v, v.flip(0)):  # the graph serves again and again
        assert product(direction).abs().max() > 1e-6
        torch.testing.assert_close(at.product(direction), product(direction), rtol=1e-10, atol=1e-14)
    third = [slope_of_curvature(g, point, v) for g, point in ((at.gradient, at.point), autograds(model, x, y)[1:])]
    assert third[1].abs().max() > 1e-6
    torch.testing.assert_close(third[0], third[1], rtol=1e-9, atol=1e-13)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_the_cheaper_graph_is_the_one_that_is_built(name: str) -> None:
    x, y, _ = images()
    at = expand(network(LAYERS[name]()), x, y, "ce", 1.0, second=True)
    names, seen, todo = [], set(), [at.logits.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            todo += [parent for parent, _ in node.next_functions]
    around = 3  # the first convolution and two activations of the network itself
    ours = sum(n in ("_AffineBackward", "_CurveBackward") for n in names) - around
    assert ours == (0 if name in ("dynamic", "keywords") else 1)


def test_weights_that_ask_for_gradients_change_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()
    model, (x, y, v) = Classifier(net, 3), images()
    asking = Classifier(net.__call__, 3)
    for p in net.parameters():
        p.requires_grad_(True)
    there = expand(asking, x, y, "ce", 1.0, second=True).product(v)
    for p in net.parameters():
        p.requires_grad_(False)
    assert torch.equal(there, expand(model, x, y, "ce", 1.0, second=True).product(v))


def test_no_gradient_of_the_weights_is_made() -> None:
    """Two passes of convolutions a product, the derivative and the adjoint; autograd makes a third for the weights."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(144, 3),
    ).double()
    model, (x, y, v) = Classifier(net, 3), images()
    with FlopCounterMode(display=False) as forward:
        model.logits(x)
    counts = []
    for product in (expand(model, x, y, "ce", 1.0, second=True).product, plain(model, x, y)[2]):
        with FlopCounterMode(display=False) as count:
            product(v)
        counts.append(count.get_total_flops() / forward.get_total_flops())
    assert counts[0] <= 2.01
    assert counts[1] >= 2.8


def test_reduced_precision_stays_with_autograd() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            z: Tensor = net(x)
        return z.float()

    model, (x, y, v) = Classifier(forward, 3), images()
    product = expand(model, x.float(), y, "ce", 1.0, second=True).product(v.float())
    assert torch.equal(product, plain(model, x.float(), y)[2](v.float()))


def test_nothing_stays_replaced_after_an_error() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ContractBroken("no logits today", code="C07")

    x, y, _ = images()
    with pytest.raises(ContractBroken):
        expand(Classifier(broken, 3), x, y, "ce", 1.0, second=True)
    value = torch.tanh(torch.zeros(2, requires_grad=True))
    assert value.grad_fn is not None and value.grad_fn.name() == "TanhBackward0"


@pytest.mark.parametrize("name", ["digits_cnn", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_has_the_same_bits_in_any_company(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Classifier(build(name, act="smooth", size=8).to(dtype), 10)
    x, v, y = torch.rand(40, 1, 8, 8, dtype=dtype), torch.randn(40, 64, dtype=dtype), torch.arange(40) % 10
    alone = expand(model, x[:1], y[:1], "ce", 1.0, second=True)
    for n in (2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 40):
        at = expand(model, x[:n], y[:n], "ce", 1.0, second=True)
        assert torch.equal(at.gradient[0], alone.gradient[0])
        assert torch.equal(at.product(v[:n])[0], alone.product(v[:1])[0])
