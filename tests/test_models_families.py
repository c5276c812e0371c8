"""The families of networks: sizes, maps, second derivatives, and names under which published weights load."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robeval.core import catalogue
from robeval.core.errors import ContractBroken, UsageError
from robeval.models.activations import nonsmooth_layers, pooling
from robeval.models.architectures.mobilenet import InvertedResidual
from robeval.models.architectures.preactresnet import PreActBlock
from robeval.models.architectures.resnet import Bottleneck
from robeval.models.architectures.resnext import BranchBlock, NormedConv, NormedLinear
from robeval.models.architectures.wrn import WideBlock
from robeval.models.build import build, fit
from robeval.models.checkpoint import save
from robeval.models.load import load

# One network of each kind of block, with the size of the images that the tests put through it.
SAMPLES = {
    "resnet18": 8, "resnet50": 16, "preactresnet18": 8, "wrn28_4": 8, "resnext34_2x32": 8, "vgg16": 8,
    "mobilenetv2": 8, "cnn6": 16, "cnn8": 8,
}  # fmt: skip
ALL = [*SAMPLES, "wrn34_10", "wrn28_8", "resnext34_2x64"]


def body(name: str, **arguments: Any) -> nn.Module:
    return build(name, **arguments).get_submodule("network")


def on_meta(name: str, **arguments: Any) -> nn.Module:
    """Shapes without numbers: neither memory nor time."""
    with torch.device("meta"):
        return body(name, **arguments)


def settle(module: nn.Module, x: Tensor) -> nn.Module:
    """Let every normalisation take its statistics from one batch, then switch to eval mode, in float64."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.momentum = None
    module.double().train()(x)
    return module.eval()


def images(size: int, count: int = 4) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@cache
def smooth(name: str) -> nn.Module:
    torch.manual_seed(0)
    size = SAMPLES[name]
    return settle(body(name, **fit(name, (3, size, size), 10, {"act": "smooth"})), images(size, 16))


@pytest.mark.parametrize(
    "name, arguments, wanted",
    [
        ("resnet18", {}, 11_173_962),
        ("preactresnet18", {}, 11_172_170),
        ("preactresnet18", {"classes": 100}, 11_218_340),
        ("wrn34_10", {}, 46_160_474),
        ("wrn34_10", {"trades_block": True}, 48_262_586),
        ("resnext34_2x32", {}, 3_892_298),
        ("vgg16", {}, 14_728_266),
        ("mobilenetv2", {}, 2_296_922),
        ("cnn6", {}, 890_410),
        ("resnet50", {}, 25_557_032),
        # The specification gives no number for the next four; these are the ones that the docstrings promise.
        ("resnext34_2x64", {}, 15_569_636),
        ("cnn8", {}, 3_248_202),
        ("wrn28_4", {}, 5_849_050),
        ("wrn28_8", {}, 23_354_842),
    ],
)
def test_o70_parameter_counts(name: str, arguments: dict[str, Any], wanted: int) -> None:
    assert sum(p.numel() for p in on_meta(name, **arguments).parameters()) == wanted
    assert f"{wanted:,}" in catalogue.find("models", name).doc


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 65, 65)])
def test_every_network_takes_the_images_of_its_data(name: str, shape: tuple[int, int, int]) -> None:
    module = on_meta(name, **fit(name, shape, 7, {}))
    assert module(torch.empty(2, *shape, device="meta")).shape == (2, 7)


@pytest.mark.parametrize(
    "name, size, wanted",
    [
        ("resnet18", 32, (512, 4)), ("preactresnet18", 32, (512, 4)), ("wrn34_10", 32, (640, 8)),
        ("wrn28_4", 32, (256, 8)), ("wrn28_8", 32, (512, 8)), ("resnext34_2x32", 32, (128, 8)), ("vgg16", 32, (512, 1)),
        ("mobilenetv2", 32, (1280, 4)), ("resnet50", 224, (2048, 7)), ("resnet18", 28, (512, 4)),
        ("vgg16", 28, (512, 1)),
    ],
)  # fmt: skip
def test_the_last_average_is_over_the_map_of_the_papers(name: str, size: int, wanted: tuple[int, int]) -> None:
    module = on_meta(name).eval()
    seen: list[torch.Size] = []
    for layer in module.children():
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    module(torch.empty(1, 3, size, size, device="meta"))
    assert [tuple(s) for s in seen] == [(1, wanted[0], wanted[1], wanted[1])]


@pytest.mark.parametrize("name", ALL)
def test_smooth_networks_have_no_nonsmooth_layer(name: str) -> None:
    for act in ("smooth", "softplus"):
        assert nonsmooth_layers(on_meta(name, act=act)) == []
    assert nonsmooth_layers(on_meta(name))


@pytest.mark.parametrize("name", SAMPLES)
def test_second_derivatives_are_the_differences_of_the_first(name: str) -> None:
    module, x = smooth(name), images(SAMPLES[name])[:2]
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    v /= v.norm()

    def slope(at: Tensor, create_graph: bool = False) -> Tensor:
        loss = functional.cross_entropy(module(at), torch.tensor([1, 3]))
        return torch.autograd.grad(loss, at, create_graph=create_graph)[0]

    at = x.clone().requires_grad_()
    (hv,) = torch.autograd.grad(slope(at, create_graph=True), at, v)
    assert hv.norm() > 0
    h = 1e-5
    numeric = (slope((x + h * v).requires_grad_()) - slope((x - h * v).requires_grad_())) / (2 * h)
    assert (hv - numeric).norm() < 1e-4 * hv.norm()


@pytest.mark.parametrize("name", SAMPLES)
def test_logits_do_not_depend_on_the_batch_in_eval_mode(name: str) -> None:
    module, x = smooth(name), images(SAMPLES[name])
    with torch.no_grad():
        z = module(x)
        assert (z - z[0]).any()
        torch.testing.assert_close(torch.cat([module(x[:1]), module(x[1:])]), z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_parameter_takes_part(name: str) -> None:
    module = smooth(name)
    loss = functional.cross_entropy(module(images(SAMPLES[name])), torch.arange(4))
    names = [n for n, _ in module.named_parameters()]
    grads = torch.autograd.grad(loss, list(module.parameters()))
    assert [n for n, g in zip(names, grads, strict=True) if not (torch.isfinite(g).all() and g.any())] == []


def test_trades_block_is_held_and_not_used() -> None:
    bare, held = on_meta("wrn34_10"), on_meta("wrn34_10", trades_block=True)
    extra = held.state_dict().keys() - bare.state_dict().keys()
    assert bare.state_dict().keys() < held.state_dict().keys()
    assert {k.removeprefix("sub_") for k in extra} == {k for k in bare.state_dict() if k.startswith("block1.")}
    named = dict(held.named_parameters())
    z = held(torch.empty(2, 3, 8, 8, device="meta"))
    grads = torch.autograd.grad(z.sum(), list(named.values()), allow_unused=True)
    unused = {n for n, g in zip(named, grads, strict=True) if g is None}
    assert unused == {n for n in named if n.startswith("sub_block1.")}


@pytest.mark.parametrize(
    "name, number, some",
    [
        ("resnet18", 122, "conv1.weight bn1.weight layer1.0.conv1.weight layer2.0.shortcut.0.weight"
         " layer2.0.shortcut.1.running_var layer4.1.bn2.bias linear.bias"),
        ("resnet50", 320, "conv1.weight bn1.running_mean layer1.0.downsample.0.weight layer1.0.downsample.1.bias"
         " layer3.5.conv3.weight layer4.2.bn3.weight fc.weight fc.bias"),
        ("preactresnet18", 107, "conv1.weight layer1.0.bn1.weight layer2.0.shortcut.0.weight layer4.1.conv2.weight"
         " bn.running_var linear.weight"),
        ("wrn34_10", 191, "conv1.weight block1.layer.0.convShortcut.weight block1.layer.0.bn1.weight"
         " block3.layer.4.conv2.weight bn1.num_batches_tracked fc.bias"),
        ("resnext34_2x32", 200, "layer0.weight layer0.bias layer0.bn.running_mean layers.0.4.conv1.weight"
         " layers.1.0.weight layers.1.0.bn.running_var layers.2.2.bn0.weight fc.weight fc.bias fc.bn.running_mean"),
        ("vgg16", 93, "features.0.weight features.0.bias features.1.running_mean features.40.bias classifier.weight"),
        ("mobilenetv2", 344, "conv1.weight layers.0.conv2.weight layers.0.shortcut.1.weight layers.16.bn3.weight"
         " conv2.weight bn2.bias linear.weight"),
    ],
)  # fmt: skip
def test_weights_have_the_names_of_published_files(name: str, number: int, some: str) -> None:
    keys = on_meta(name).state_dict().keys()
    assert set(some.split()) <= keys
    assert len(keys) == number


def test_resnet10_keeps_the_names_of_its_weights() -> None:
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    wanted = ["0.weight", *(f"1.{n}" for n in norm)]
    for block in range(3, 7):
        wanted += [f"{block}.conv{i}.weight" for i in (1, 2)] + [f"{block}.bn{i}.{n}" for i in (1, 2) for n in norm]
        if block > 3:
            wanted += [f"{block}.shortcut.0.weight", *(f"{block}.shortcut.1.{n}" for n in norm)]
    assert sorted(on_meta("resnet10").state_dict()) == sorted([*wanted, "9.weight", "9.bias"])
    convs = ["0", *(f"{b}.conv{i}" for b in range(2, 6) for i in (1, 2)), *(f"{b}.shortcut.0" for b in range(3, 6))]
    wanted = [f"{c}.{kind}" for c in [*convs, "8"] for kind in ("weight", "bias")]
    assert sorted(on_meta("resnet10_nobn").state_dict()) == sorted(wanted)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_foreign_file_loads_with_its_architecture(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = body("mobilenetv2").eval()
    torch.save({"state_dict": {prefix + k: v for k, v in module.state_dict().items()}}, tmp_path / "their.pt")
    x = images(8).float()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "their.pt", arch="mobilenetv2").module(x), module(x))
    with pytest.raises(ContractBroken, match="weights missing"):
        load(tmp_path / "their.pt", arch="resnext34_2x32")


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_checkpoints_hold_what_the_networks_need(ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name, given in (("cnn8", {"act": "softplus"}), ("resnext34_2x32", {"final_act": True, "act": "smooth"})):
        arguments = fit(name, (1, 12, 12), 5, given)
        module = build(name, normalise="per-image", **arguments).eval()
        file = save(
            tmp_path / f"{name}.{ending}", module, architecture=name, arguments=arguments, normalise="per-image",
            input_shape=(1, 12, 12), classes=list("abcde"), recipe={}, metrics={},
        )  # fmt: skip
        classifier = load(file)
        x = images(12)[:, :1].float()
        with torch.no_grad():
            assert torch.equal(classifier.module(x), module(x))
        assert classifier.info["arguments"] == arguments


def test_wide_networks_start_from_their_own_draw() -> None:
    torch.manual_seed(0)
    module = body("wrn28_4")
    for path, out, size in (("block1.layer.1.conv1", 64, 3), ("block3.layer.0.convShortcut", 256, 1)):
        weight = module.get_parameter(f"{path}.weight")
        assert float(weight.detach().std()) == pytest.approx((2 / (size * size * out)) ** 0.5, rel=0.03)
    assert not module.get_parameter("fc.bias").any()


def test_zero_last_gamma_starts_every_block_as_the_identity() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 256, 4, 4)
    for zero in (False, True):
        module = body("resnet50", zero_last_gamma=zero)
        block = module.get_submodule("layer1.1")
        assert torch.equal(block(x), x) == zero
        assert {bool(m.bn3.weight.any()) for m in module.modules() if isinstance(m, Bottleneck)} == {not zero}
        assert (float(module.get_parameter("fc.weight").detach().std()) == pytest.approx(0.01, rel=0.01)) == zero


def norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Batch normalisation in eval mode, written out."""
    held = [layer.running_mean, layer.running_var, layer.weight, layer.bias]
    mean, variance, scale, shift = (None if t is None else t.view(1, -1, 1, 1) for t in held)  # type: ignore[union-attr]
    y = (x - mean) / (variance + 1e-5).sqrt()  # type: ignore[operator]
    return y if scale is None else y * scale + shift


def block_and_input(kind: Any, *arguments: Any) -> tuple[Any, Tensor]:
    """A settled block whose normalisations have scales and shifts, and images of ``arguments[0]`` channels."""
    torch.manual_seed(0)
    x = torch.randn(4, arguments[0], 6, 6, dtype=torch.float64)
    block = settle(kind(*arguments), x)
    for p in block.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    return block, x


conv = functional.conv2d


@pytest.mark.parametrize("kind, shortcut", [(PreActBlock, "shortcut.0"), (WideBlock, "convShortcut")])
@pytest.mark.parametrize("inside, outside, stride", [(3, 5, 2), (3, 5, 1), (4, 4, 1)])
def test_preactivation_blocks(kind: Any, shortcut: str, inside: int, outside: int, stride: int) -> None:
    """Where the shape changes the shortcut sees the activated input, elsewhere the sum takes the raw one."""
    block, x = block_and_input(kind, inside, outside, stride, "relu")
    a = norm(block.bn1, x).relu()
    inner = conv(norm(block.bn2, conv(a, block.conv1.weight, None, stride, 1)).relu(), block.conv2.weight, None, 1, 1)
    if inside != outside:
        x_or_shortcut = conv(a, block.get_parameter(f"{shortcut}.weight"), None, stride)
    else:
        x_or_shortcut = x
    torch.testing.assert_close(block(x), inner + x_or_shortcut)


@pytest.mark.parametrize("inside, outside, stride", [(8, 16, 2), (8, 8, 1)])
def test_bottleneck_has_its_stride_in_the_middle_and_its_activation_after_the_sum(
    inside: int, outside: int, stride: int
) -> None:
    block, x = block_and_input(Bottleneck, inside, outside, stride, "relu")
    y = norm(block.bn1, conv(x, block.conv1.weight)).relu()
    y = norm(block.bn2, conv(y, block.conv2.weight, None, stride, 1)).relu()
    y = norm(block.bn3, conv(y, block.conv3.weight))
    if inside != outside:
        x_or_shortcut = norm(block.downsample[1], conv(x, block.downsample[0].weight, None, stride))
    else:
        x_or_shortcut = x
    torch.testing.assert_close(block(x), (y + x_or_shortcut).relu())


@pytest.mark.parametrize("inside, outside, stride", [(4, 6, 2), (4, 4, 2), (4, 6, 1), (4, 4, 1)])
def test_inverted_residual_adds_only_where_the_resolution_stays(inside: int, outside: int, stride: int) -> None:
    block, x = block_and_input(InvertedResidual, inside, outside, 6, stride, "relu")
    y = norm(block.bn1, conv(x, block.conv1.weight)).relu()
    y = norm(block.bn2, conv(y, block.conv2.weight, None, stride, 1, groups=6 * inside)).relu()
    y = norm(block.bn3, conv(y, block.conv3.weight))
    if stride == 1:
        y = y + (x if inside == outside else norm(block.shortcut[1], conv(x, block.shortcut[0].weight)))
    torch.testing.assert_close(block(x), y)


def test_branch_block_is_the_mean_of_two_branches() -> None:
    block, x = block_and_input(BranchBlock, 4, "relu")
    wide = norm(block.bn0, conv(x, block.conv0.weight, None, 1, 1)).relu()
    weight = block.conv1.weight  # (8, 4, 3, 3): each branch reads its own half
    both = [conv(wide[:, half], weight[half], None, 1, 1) for half in (slice(0, 4), slice(4, 8))]
    first, second = norm(block.bn1, torch.cat(both, 1)).chunk(2, 1)
    torch.testing.assert_close(block(x), (x + (first + second) / 2).relu())


def test_bias_comes_after_the_normalisation() -> None:
    block, x = block_and_input(NormedConv, 3, 5, 3, "relu")
    wanted = norm(block.bn, conv(x, block.weight, None, 1, 1)) + block.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(block(x), wanted.relu())
    assert [n for n, _ in block.named_parameters()] == ["weight", "bias"]


def test_final_act_rectifies_the_logits() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 7, dtype=torch.float64)
    for final_act in (False, True):
        head = settle(NormedLinear(7, 10, "relu", final_act), x)
        z = (x - x.mean(0)) @ head.get_parameter("weight").T
        z = z / (z.square().sum(0) / 63 + 1e-5).sqrt() + head.get_parameter("bias")
        torch.testing.assert_close(head(x), z.relu() if final_act else z)
        assert bool((head(x) < 0).any()) != final_act


def test_an_average_leaves_the_padding_out() -> None:
    ones = torch.ones(1, 1, 5, 5)
    assert torch.equal(pooling("auto", "smooth", 3, stride=2, padding=1)(ones), torch.ones(1, 1, 3, 3))
    assert torch.equal(pooling("avg", "relu", ceil_mode=True)(ones), torch.ones(1, 1, 3, 3))
    assert isinstance(pooling("auto", "relu", 3), nn.MaxPool2d)


def test_images_that_are_too_small_are_refused() -> None:
    for name, least in (("cnn6", 16), ("cnn8", 8)):
        assert on_meta(name, size=least)(torch.empty(1, 3, least, least, device="meta")).shape == (1, 10)
        with pytest.raises(UsageError, match=f"{name} needs images of at least {least}x{least} pixels"):
            build(name, size=least - 1)


def test_each_name_is_in_the_catalogue_with_its_activations() -> None:
    held = catalogue.methods("models")
    for name in ALL:
        settings = {s.name for s in held[name].settings}
        assert {"in_channels", "classes", "act"} <= settings
        with pytest.raises(UsageError, match=r'unknown act of .* "tanh"'):
            build(name, act="tanh")
