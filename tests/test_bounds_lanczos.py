"""Batched Lanczos against dense eigenvalues, known operators and scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from robeval.bounds.expansion import expand, uncoupled
from robeval.bounds.lanczos import Spectrum, lanczos
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken
from robeval.core.losses import per_sample_loss
from robeval.core.smooth import SmoothReLU
from robeval.core.streams import Streams


def draws(
    size: int, dtype: torch.dtype = torch.float64, ids: list[int] | None = None
) -> Callable[[Tensor, int], Tensor]:
    def draw(rows: Tensor, number: int) -> Tensor:
        names = [r if ids is None else ids[r] for r in rows.tolist()]
        return Streams(0, names, "test", [number] * len(names), dtype=dtype).normal(size)

    return draw


def of(matrices: Tensor, **settings: object) -> Spectrum:
    """Lanczos on given symmetric matrices (n, d, d)."""

    def products(rows: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: torch.einsum("nij,nj->ni", matrices[rows], v)

    return lanczos(products, draws(matrices.shape[1], matrices.dtype), *matrices.shape[:2], **settings)  # type: ignore[arg-type]


def symmetric(n: int, d: int, seed: int = 0) -> Tensor:
    a = torch.randn(n, d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a + a.mT


def smooth_cnn(seed: int = 0) -> tuple[Classifier, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), SmoothReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3, padding=1), SmoothReLU(),
        nn.Flatten(), nn.Linear(72, 5),
    ).double()  # fmt: skip
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 2 / max(1, p[0].numel()) ** 0.5
    x = torch.rand(12, 1, 6, 6, generator=generator, dtype=torch.float64)
    return Classifier(net, 5), x, net(x).argmax(1)


def hessians(model: Classifier, x: Tensor, y: Tensor, loss: str) -> Tensor:
    """Dense Hessians, image by image, by torch.func. -> (n, d, d)."""

    def one(flat: Tensor, label: Tensor) -> Tensor:
        return per_sample_loss(model.logits(flat.view(1, *x.shape[1:])), label[None], loss)[0]

    return torch.stack([torch.func.hessian(one)(p.flatten(), label) for p, label in zip(x, y, strict=True)])  # type: ignore[no-untyped-call]


def curvature(
    model: Classifier, x: Tensor, y: Tensor, loss: str, ids: list[int] | None = None, **how: object
) -> Spectrum:
    def products(rows: Tensor) -> Callable[[Tensor], Tensor]:
        return expand(model, x[rows], y[rows], loss, 10.0, second=True).product

    d = x[0].numel()
    return lanczos(products, draws(d, x.dtype, ids), len(x), d, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ["largest", "smallest", "both"])
def test_known_matrices(end: str) -> None:
    a = symmetric(30, 50)
    true = torch.linalg.eigvalsh(a)
    found = of(a, end=end)
    assert found.converged.all()
    assert (found.products >= 24).all()
    if end != "smallest":
        torch.testing.assert_close(found.largest, true[:, -1], rtol=1e-3, atol=0)
        assert ((found.largest[:, None] - true).abs().amin(1) <= found.residual_largest + 1e-10).all()
    if end != "largest":
        torch.testing.assert_close(found.smallest, true[:, 0], rtol=1e-3, atol=0)
        assert ((found.smallest[:, None] - true).abs().amin(1) <= found.residual_smallest + 1e-10).all()
    if end == "both":
        torch.testing.assert_close(found.norm, true.abs().amax(1), rtol=1e-3, atol=0)
    assert (found.largest <= true[:, -1] + 1e-10).all()


def test_a_tight_tolerance_is_met_and_a_small_budget_is_confessed() -> None:
    a = symmetric(5, 40)
    exact = of(a, tolerance=1e-10, steps=40)
    torch.testing.assert_close(exact.largest, torch.linalg.eigvalsh(a)[:, -1], rtol=1e-10, atol=0)
    short = of(a, steps=3, starts=1, tolerance=1e-6)
    assert not short.converged.any()
    assert (short.products == 3).all()
    assert (short.residual_largest > 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_breakdown_is_exact_on_invariant_subspaces(dtype: torch.dtype) -> None:
    d = 30
    v = torch.randn(d, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a = torch.stack([torch.zeros(d, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64), v @ v.T, -v @ v.T])
    found = of(a.to(dtype), end="both")
    true = torch.linalg.eigvalsh(a)
    close = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.largest, true[:, -1], rtol=close, atol=100 * close)
    torch.testing.assert_close(found.smallest, true[:, 0], rtol=close, atol=100 * close)
    assert found.converged.all()


def test_a_start_inside_an_invariant_subspace_is_left_by_a_restart() -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, 3.0, 9.0], dtype=torch.float64)).expand(2, 4, 4)

    def draw(rows: Tensor, number: int) -> Tensor:
        if number == 0:
            return torch.eye(4, dtype=torch.float64)[:1].expand(len(rows), 4)
        return draws(4)(rows, number)

    found = lanczos(lambda rows: lambda v: torch.einsum("nij,nj->ni", a[rows], v), draw, 2, 4, starts=1)
    torch.testing.assert_close(found.largest, torch.full((2,), 9.0, dtype=torch.float64))


def test_fewer_dimensions_than_products() -> None:
    a = symmetric(6, 2)
    torch.testing.assert_close(of(a).largest, torch.linalg.eigvalsh(a)[:, -1])
    one = torch.tensor([[[-3.0]]], dtype=torch.float64)
    assert float(of(one).largest) == -3


@pytest.mark.parametrize("loss", ["softcw_lse", "ce", "softcw_prob"])
def test_dense_hessians_of_a_smooth_network(loss: str) -> None:
    model, x, y = smooth_cnn()
    true = torch.linalg.eigvalsh(hessians(model, x, y, loss))
    found = curvature(model, x, y, loss, end="both")
    torch.testing.assert_close(found.largest, true[:, -1], rtol=1e-3, atol=1e-10)
    torch.testing.assert_close(found.smallest, true[:, 0], rtol=1e-3, atol=1e-10)
    assert ((found.largest[:, None] - true).abs().amin(1) <= found.residual_largest + 1e-12).all()
    assert (found.largest <= true[:, -1] + 1e-10).all()


def test_scipy_finds_the_same() -> None:
    model, x, y = smooth_cnn(3)
    found = curvature(model, x, y, "softcw_lse", tolerance=1e-6)
    for k in range(4):
        h = hessians(model, x[k : k + 1], y[k : k + 1], "softcw_lse")[0].numpy()
        operator = LinearOperator((36, 36), matvec=lambda v, h=h: h @ v, dtype=np.float64)
        theirs = eigsh(operator, k=1, which="LA", tol=1e-10, return_eigenvectors=False)[0]
        assert float(found.largest[k]) == pytest.approx(theirs, rel=1e-6, abs=1e-12)


def test_an_image_alone_or_in_a_batch() -> None:
    model, x, y = smooth_cnn()
    ids = list(range(50, 62))
    whole = curvature(model, x, y, "softcw_lse", ids)
    for k in range(len(x)):
        alone = curvature(model, x[k : k + 1], y[k : k + 1], "softcw_lse", ids[k : k + 1])
        assert float(alone.largest) == pytest.approx(float(whole.largest[k]), rel=1e-9)
        assert int(alone.products) == int(whole.products[k])


@pytest.mark.parametrize(("rows", "sizes_seen"), [(40, [40, 2]), (8, [8])])
def test_finished_rows_leave_the_batch(rows: int, sizes_seen: list[int]) -> None:
    """Unless the batch is so small that a new graph costs more than it saves."""
    a = symmetric(rows, 60)
    easy = torch.zeros(60, dtype=torch.float64)
    easy[0] = 100
    a[:-2] = torch.diag(easy)
    sizes = []

    def products(rows: Tensor) -> Callable[[Tensor], Tensor]:
        sizes.append(len(rows))
        return lambda v: torch.einsum("nij,nj->ni", a[rows], v)

    found = lanczos(products, draws(60), rows, 60, starts=1)
    assert sizes == sizes_seen
    assert found.products[-2:].min() > found.products[:-2].max() == 12
    torch.testing.assert_close(found.largest, torch.linalg.eigvalsh(a)[:, -1], rtol=1e-3, atol=0)


def test_quadratic_loss_has_its_matrix_as_hessian() -> None:
    a = symmetric(1, 9)[0]

    class Quadratic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            return torch.stack([torch.zeros_like(flat[:, 0]), ((flat @ a) * flat).sum(1) / 2], 1)

    x = torch.rand(3, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = curvature(Classifier(Quadratic(), 2), x, torch.zeros(3, dtype=torch.int64), "cw", end="both")
    true = torch.linalg.eigvalsh(a)
    torch.testing.assert_close(found.largest, true[-1].expand(3), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.smallest, true[0].expand(3), rtol=1e-9, atol=0)


def linear_model(classes: int) -> tuple[Classifier, Tensor]:
    layer = nn.Linear(16, classes).double()
    layer.weight.data = torch.randn(classes, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return Classifier(nn.Sequential(nn.Flatten(), layer), classes), layer.weight.detach()


def test_softmax_linear_hessian() -> None:
    model, w = linear_model(4)
    x = torch.rand(8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 4
    p = model.logits(x).softmax(1).detach()
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    true = torch.linalg.eigvalsh(w.T @ inner @ w)
    found = curvature(model, x, y, "ce", end="both")
    torch.testing.assert_close(found.largest, true[:, -1], rtol=1e-9, atol=0)
    torch.testing.assert_close(found.smallest, true[:, 0], rtol=0, atol=1e-9)


def test_cw_on_a_linear_network_has_no_curvature() -> None:
    model, _ = linear_model(4)
    x = torch.rand(8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = curvature(model, x, torch.arange(8) % 4, "cw", end="both")
    assert float(found.norm.max()) == 0
    assert found.converged.all()


def test_two_starts_cost_twice_and_never_find_less() -> None:
    model, x, y = smooth_cnn(5)
    one, two = (curvature(model, x, y, "softcw_lse", starts=s) for s in (1, 2))
    assert (two.largest >= one.largest).all()
    assert (two.products > one.products).all()


def test_coupled_images_are_detected() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), SmoothReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    x = torch.rand(8, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, v = torch.arange(8) % 3, torch.randn(8, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Classifier(net, 3)
    uncoupled(expand(model, x, y, "softcw_lse", 10.0, second=True).product, v)
    net.train()
    with pytest.raises(ContractBroken, match="depends on other images") as caught:
        uncoupled(expand(model, x, y, "softcw_lse", 10.0, second=True).product, v)
    assert caught.value.code == "C14"


def test_nan_products_are_refused() -> None:
    with pytest.raises(ContractBroken, match="NaN"):
        of(symmetric(3, 20) * float("nan"))
