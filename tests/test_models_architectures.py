"""Networks: sizes, activations, normalisation, factories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robeval.core.errors import FileRefused, UsageError
from robeval.core.smooth import SmoothReLU, smooth_relu
from robeval.models.activations import nonsmooth_layers
from robeval.models.build import build, fit
from robeval.models.normalise import Normalize, PerImageStandardize, normaliser


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "name, arguments, wanted",
    [
        ("sgr_cnn", {}, 312_202),
        ("sgr_cnn", {"in_channels": 3, "size": 32, "width": "cifar"}, 1_147_978),
        ("resnet10_nobn", {"bias": False}, 4_897_482),
        ("resnet10_nobn", {}, 4_900_362),
        ("resnet10", {}, 4_903_242),
        ("digits_cnn", {}, 27_402),
        ("linear", {}, 650),
        ("mlp", {"hidden": 5, "depth": 1}, 64 * 5 + 5 + 50 + 10),
    ],
)
def test_o70_parameter_counts(name: str, arguments: dict[str, Any], wanted: int) -> None:
    with torch.device("meta"):
        assert count(build(name, **arguments)) == wanted


@pytest.mark.parametrize(
    "name, shape",
    [("sgr_cnn", (1, 28, 28)), ("sgr_cnn", (3, 17, 17)), ("digits_cnn", (1, 8, 8)), ("digits_cnn", (3, 9, 9)),
     ("resnet10", (3, 8, 8)), ("resnet10_nobn", (1, 8, 8)), ("linear", (1, 1, 52)), ("mlp", (2, 3, 5))],
)  # fmt: skip
def test_fit_makes_a_network_for_the_data(name: str, shape: tuple[int, int, int]) -> None:
    module = build(name, normalise="per-image", **fit(name, shape, 7, {})).eval()
    assert module(torch.rand(2, *shape)).shape == (2, 7)


def test_fit_lets_the_user_win_and_refuses_unknown_settings() -> None:
    assert fit("digits_cnn", (1, 8, 8), 10, {"classes": "3"})["classes"] == 3
    with pytest.raises(UsageError, match='unknown setting of digits_cnn "clases"; did you mean classes'):
        fit("digits_cnn", (1, 8, 8), 10, {"clases": 3})


@pytest.mark.parametrize("name", ["sgr_cnn", "digits_cnn", "resnet10_nobn", "mlp"])
def test_smooth_networks_have_no_nonsmooth_layer(name: str) -> None:
    with torch.device("meta"):
        assert nonsmooth_layers(build(name, act="smooth")) == []
        assert nonsmooth_layers(build(name, act="softplus")) == []
        assert nonsmooth_layers(build(name))


def test_nonsmooth_layers_are_named_with_path_and_class() -> None:
    found = nonsmooth_layers(build("digits_cnn", act="smooth", pool="max"))
    assert found == ["network.4 (MaxPool2d)", "network.7 (MaxPool2d)"]
    assert nonsmooth_layers(nn.ReLU()) == ["the module itself (ReLU)"]


POINTS = [-0.5, -0.25, 0.0, 0.25, 0.5, -3.0, 3.0]
VALUES = [0, 0.013671875, 0.09375, 0.263671875, 0.5, 0, 3]
FIRST = [0, 0.15625, 0.5, 0.84375, 1, 0, 1]
SECOND = [0, 1.125, 1.5, 1.125, 0, 0, 0]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_o21_smooth_relu_and_its_two_derivatives(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.tensor(POINTS, dtype=dtype, requires_grad=True)
    y = SmoothReLU()(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    for got, wanted in ((y, VALUES), (first, FIRST), (second, SECOND)):
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=dtype), atol=tolerance, rtol=0)


def test_o21_max_form_is_the_same_function() -> None:
    x = torch.linspace(-2, 2, 4001, dtype=torch.float64)
    r = (x + 0.5).relu()
    torch.testing.assert_close(smooth_relu(x), torch.maximum(-(r**4) / 2 + r**3, x.relu()), atol=1e-12, rtol=0)


def test_smooth_relu_derivatives_next_to_the_joints_in_float32() -> None:
    half = torch.tensor(0.5)
    near = [torch.nextafter(half, torch.tensor(s)) for s in (0.0, 1.0)]
    x = torch.stack([*near, *[-v for v in near]]).requires_grad_()
    (first,) = torch.autograd.grad(smooth_relu(x).sum(), x)
    torch.testing.assert_close(first, torch.tensor([1.0, 1.0, 0.0, 0.0]), atol=1e-6, rtol=0)


def test_smooth_relu_does_not_overflow_in_float16() -> None:
    x = torch.tensor([17.0, 60000.0, -60000.0], dtype=torch.float16)
    assert smooth_relu(x).tolist() == [17.0, 60000.0, 0.0]


def test_normalize_is_per_channel_and_keeps_out_of_the_weights() -> None:
    layer = normaliser({"mean": [0.5, 0.25], "std": [0.5, 0.125]})
    assert isinstance(layer, Normalize)
    assert layer(torch.full((1, 2, 1, 1), 0.5)).flatten().tolist() == [0.0, 2.0]
    assert not layer.state_dict()
    assert "0.125" in repr(layer)


def test_per_image_standardize_matches_its_formula_and_survives_constant_images() -> None:
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64)
    z = PerImageStandardize()(x)
    for a, b in zip(x, z, strict=True):
        torch.testing.assert_close(b, (a - a.mean()) / max(float(a.std()), 32**-0.5))
    flat = torch.full((1, 1, 4, 4), 0.3, dtype=torch.float64, requires_grad=True)
    z = PerImageStandardize()(flat)
    (first,) = torch.autograd.grad((z**3).sum() + z[0, 0, 0, 0], flat, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), flat)
    assert torch.isfinite(z).all()
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()


@pytest.mark.parametrize(
    "spec", ["imagenet", {"mean": [0.5]}, {"mean": [0], "std": [0]}, {"mean": [1, 2], "std": [1]}, 3]
)
def test_bad_normalisation_is_refused(spec: Any) -> None:
    with pytest.raises(UsageError, match="is not understood"):
        normaliser(spec)


def test_unknown_names_and_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean sgr_cnn"):
        build("sgr_cn")
    with pytest.raises(UsageError, match="at least 16x16"):
        build("sgr_cnn", size=8)
    with pytest.raises(UsageError, match='unknown act of mlp "tanh"'):
        build("mlp", act="tanh")
    assert count(build("sgr-cnn", size=16)) > 0  # hyphens are underscores


def test_factory_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(hidden=3):\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, hidden))\n"
        "def number():\n    return 3\n"
    )
    assert build(f"{file}:net", hidden=5)(torch.rand(2, 1, 2, 2)).shape == (2, 5)
    with pytest.raises(UsageError, match="returned int, expected"):
        build(f"{file}:number")
    with pytest.raises(UsageError, match="did you mean net"):
        build(f"{file}:nett")
    with pytest.raises(UsageError, match="failed: TypeError"):
        build(f"{file}:net", width=5)
    with pytest.raises(FileRefused, match="no file at"):
        build(f"{tmp_path}/other.py:net")
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(FileRefused, match="failed when run: ModuleNotFoundError"):
        build(f"{file}:net")


def test_smooth_relu_differentiates_as_autograd_would() -> None:
    """Up to the third derivative, under vmap and forward-over-reverse too, against the plain formula."""

    def plain(x: torch.Tensor) -> torch.Tensor:
        t = (x + 0.5).clamp(0, 1)
        return torch.where(x < 0.5, t * t * t * (1 - t / 2), x)

    x = torch.linspace(-1, 1, 41, dtype=torch.float64) + 1e-3
    inside = x[:, None]
    torch.autograd.gradcheck(smooth_relu, inside.clone().requires_grad_())
    torch.autograd.gradgradcheck(smooth_relu, inside.clone().requires_grad_())
    for order in (1, 2, 3):
        mine, theirs = smooth_relu, plain
        for _ in range(order):
            mine, theirs = torch.func.grad(mine), torch.func.grad(theirs)
        torch.testing.assert_close(torch.func.vmap(mine)(x), torch.func.vmap(theirs)(x))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.hessian(smooth_relu))(x), torch.func.vmap(torch.func.hessian(plain))(x)
    )
