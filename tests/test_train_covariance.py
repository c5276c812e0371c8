"""Covariances of perturbations: matrices, functions of distance, FFT products, indefinite ones: O-38 to O-44, O-46."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from robeval.core.correlated import CHUNK, centred, channel_covariance, pixel_covariance, second_moment
from robeval.train.covariance import Matrix, covariance_of, data_moment, form, running_mean, synthetic
from robeval.train.covariance_function import Stationary, covariance_function, decaying, reach, stationary

F64 = torch.float64
CLOSE = {"rtol": 0.0, "atol": 1e-12}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def apart(height: int, width: int) -> Tensor:
    """Distance of every two pixels, (H * W, H * W), written without the code under test."""
    place = torch.tensor([[i, j] for i in range(height) for j in range(width)], dtype=F64)
    return torch.cdist(place, place)


def matrix_of(f: Tensor, height: int, width: int, interpolate: bool = False) -> Tensor:
    """The (d, d) matrix of a covariance function, entry by entry."""
    r, last = apart(height, width), f.shape[-1] - 1
    low = (r.floor() if interpolate else r.round()).long().clamp_max(last)
    share = (r - low).clamp_max(last - low) if interpolate else torch.zeros_like(r)
    blocks = f[..., low] * (1 - share) + f[..., (low + 1).clamp_max(last)] * share
    return blocks.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)


def some_function(channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    f = normal(channels, channels, reach(height, width) + 1, seed=seed)
    return f + f.transpose(0, 1)


SIZES = pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 7), (2, 5, 9), (2, 4, 1)], ids=str)


@SIZES
@pytest.mark.parametrize("psd", ["none", "interp"])
def test_o38_fft_is_the_matrix_product(shape: tuple[int, int, int], psd: str) -> None:
    f, g = some_function(*shape), normal(5, *shape)
    whole = Matrix(matrix_of(f, *shape[1:], interpolate=psd == "interp"))
    waves = stationary(f, shape[1:], psd)
    assert torch.allclose(waves.product(g), whole.product(g), **CLOSE)
    assert torch.allclose(form(waves, g), form(whole, g), rtol=1e-12, atol=1e-12)
    assert float(waves.variance) == pytest.approx(float(whole.variance), abs=1e-12)


def test_o38_a_convolution_says_the_same() -> None:
    shape = (3, 8, 8)
    f, g = some_function(*shape), normal(5, *shape)
    lags = torch.arange(-7, 8).double()
    kernel = f[..., (lags.square()[:, None] + lags.square()).sqrt().round().long()]
    assert torch.allclose(
        stationary(f, shape[1:], "none").product(g), functional.conv2d(g, kernel, padding=(7, 7)), **CLOSE
    )


def test_o38_in_single_precision() -> None:
    f, g = decaying(channel_covariance(3, 0.5), 8, 8, 4.0).float(), normal(5, 3, 8, 8, dtype=torch.float32)
    got, exact = stationary(f, (8, 8), "none"), Matrix(matrix_of(f.double(), 8, 8))
    assert (got.product(g) - exact.product(g.double())).norm() < 1e-6 * exact.product(g.double()).norm()
    assert torch.allclose(form(got, g).double(), form(exact, g.double()), rtol=1e-5)


def test_o39_a_square_by_hand() -> None:
    g = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=F64)
    f = torch.tensor([[[1.0, 0.5]]], dtype=F64)  # the diagonal, sqrt(2), rounds to 1
    assert float(form(stationary(f, (2, 2), "none"), g)) == pytest.approx(65, abs=1e-10)
    assert float(form(Matrix(matrix_of(f, 2, 2)), g)) == pytest.approx(65, abs=1e-10)


@SIZES
def test_the_gradient_of_the_form_is_twice_the_product(shape: tuple[int, int, int]) -> None:
    g = normal(3, *shape).requires_grad_()
    full = torch.kron(channel_covariance(shape[0], 0.5), pixel_covariance(*shape[1:], 2.0))
    for covariance in (stationary(some_function(*shape), shape[1:], "none"), Matrix(full)):
        (slope,) = torch.autograd.grad(form(covariance, g).sum(), g)
        assert torch.allclose(slope, 2 * covariance.product(g.detach()), **CLOSE)


@SIZES
def test_o40_the_estimate_is_the_binned_matrix(shape: tuple[int, int, int]) -> None:
    xi = normal(6, *shape)
    channels, height, width = shape
    full = second_moment(xi).view(channels, height * width, channels, height * width).transpose(1, 2)
    rounded = apart(height, width).round()
    binned = torch.stack([full[..., rounded == r].mean(-1) for r in range(reach(height, width) + 1)], -1)
    f = covariance_function(xi)
    assert torch.allclose(f, binned, **CLOSE)
    assert torch.equal(f, f.transpose(0, 1))
    # O-41: the mean diagonal of the matrix is the mean over channels of f_aa(0).
    assert float(second_moment(xi).diagonal().mean()) == pytest.approx(float(f[..., 0].diagonal().mean()), abs=1e-12)


@SIZES
def test_o40_an_exactly_stationary_covariance_is_recovered(shape: tuple[int, int, int]) -> None:
    """The rows of a root of the matrix, times sqrt(d), have that matrix as their second moment."""
    f = synthetic(torch.zeros(1, *shape, dtype=F64), "covfun", zeta=None)
    f = f + 0.1 * some_function(*shape) / reach(*shape[1:]) ** 2 / f.shape[-1]
    root = torch.linalg.cholesky(matrix_of(f, *shape[1:]))
    rows = (root.T * len(root) ** 0.5).view(-1, *shape)
    assert torch.allclose(covariance_function(rows), f, **CLOSE)


@pytest.mark.parametrize("representation", ["full", "covfun"])
def test_o41_after_scaling_the_mean_diagonal_is_c(representation: str) -> None:
    xi = normal(9, 3, 6, 5)
    moment = second_moment(xi) if representation == "full" else covariance_function(xi)
    covariance = covariance_of(moment, (3, 6, 5), "spectral")
    sigma = 0.0614 / covariance.variance
    # Sums of each unit vector's image are the diagonal, whatever the representation.
    diagonal = form(covariance, torch.eye(90, dtype=F64).view(90, 3, 6, 5))
    assert float(sigma * diagonal.mean()) == pytest.approx(0.0614, abs=1e-12)


@pytest.mark.parametrize("zeta, interp, rounded", [(8.0, 0.0539, -0.733), (2.0, 0.230, -0.274)], ids=["8", "2"])
def test_o43_lowest_eigenvalues_on_32_by_32(zeta: float, interp: float, rounded: float) -> None:
    """Those at the exact distance are in test_attacks_noise.py."""
    f = decaying(torch.ones(1, 1, dtype=F64), 32, 32, zeta)
    unit = torch.eye(1024, dtype=F64).view(-1, 1, 32, 32)
    for psd, lowest in (("interp", interp), ("none", rounded)):
        built = stationary(f, (32, 32), psd)
        whole = built.product(unit).flatten(1)
        assert float(torch.linalg.eigvalsh((whole + whole.T) / 2)[0]) == pytest.approx(lowest, abs=1e-3)
        assert float(built.lowest) <= lowest + 1e-3  # the torus bounds the image from below


def test_o44_the_spectral_clamp_mends_an_indefinite_covariance() -> None:
    f = decaying(torch.ones(1, 1, dtype=F64), 32, 32, 8.0)
    unit = torch.eye(1024, dtype=F64).view(-1, 1, 32, 32)
    broken, mended = stationary(f, (32, 32), "none"), stationary(f, (32, 32), "spectral")
    _, vectors = torch.linalg.eigh(broken.product(unit).flatten(1))
    worst = vectors[:, 0].view(1, 1, 32, 32)
    assert float(form(broken, worst)) == pytest.approx(-0.733, abs=1e-3)
    assert float(form(mended, worst)) >= 0
    whole = mended.product(unit).flatten(1)
    assert float(torch.linalg.eigvalsh((whole + whole.T) / 2)[0]) >= -1e-8
    assert float(mended.lowest) < 0  # what the log shows is what was found
    before = broken.product(unit).flatten(1)
    change = (whole / mended.variance - before).norm() / before.norm()
    assert float(change) < 0.08
    assert 1 < float(mended.variance) < 1.15


def test_the_clamp_works_over_channels_too() -> None:
    f = some_function(3, 6, 6)
    mended = stationary(f, (6, 6), "spectral")
    whole = mended.product(torch.eye(108, dtype=F64).view(-1, 3, 6, 6)).flatten(1)
    assert torch.allclose(whole, whole.T, **CLOSE)
    assert float(torch.linalg.eigvalsh(matrix_of(f, 6, 6))[0]) < -1
    assert float(torch.linalg.eigvalsh(whole)[0]) >= -1e-8


def test_a_definite_covariance_is_left_as_it_is() -> None:
    f = synthetic(torch.zeros(1, 2, 6, 6, dtype=F64), "covfun", zeta=0.5, inter=0.5)
    plain, mended = stationary(f, (6, 6), "none"), stationary(f, (6, 6), "spectral")
    assert float(plain.lowest) > 0
    assert torch.allclose(plain.spectrum, mended.spectrum, **CLOSE)


@pytest.mark.parametrize("inter, mixes", [(0.0, False), (0.5, True)])
@pytest.mark.parametrize("representation", ["full", "covfun"])
def test_o46_without_decay_length_the_pixels_are_independent(representation: str, inter: float, mixes: bool) -> None:
    x, g = torch.zeros(1, 3, 8, 8, dtype=F64), normal(4, 3, 8, 8)
    near = covariance_of(synthetic(x, representation, zeta=0.05, inter=inter), (3, 8, 8), "interp")
    identity = covariance_of(synthetic(x, representation, zeta=None), (3, 8, 8), "interp")
    assert torch.allclose(identity.product(g), g, **CLOSE)
    mixed = torch.einsum("ab,nbhw->nahw", channel_covariance(3, inter), g)
    assert torch.allclose(near.product(g), mixed, rtol=0, atol=2e-8)
    assert torch.allclose(near.product(g), g, rtol=0, atol=2e-8) is not mixes


def test_synthetic_noise_agrees_between_the_representations() -> None:
    """At whole distances the two are the same number; between them interpolation errs by the curvature of exp."""
    x, g = torch.zeros(1, 3, 10, 10, dtype=F64), normal(4, 3, 10, 10)
    full, short = (
        covariance_of(synthetic(x, r, zeta=8.0, inter=0.5), (3, 10, 10), "interp") for r in ("full", "covfun")
    )
    assert torch.allclose(form(full, g), form(short, g), rtol=0.02)
    assert not isinstance(short, Matrix)
    assert isinstance(full, Matrix)
    assert float(full.variance) == pytest.approx(1) == float(short.variance)


@pytest.mark.parametrize("representation", ["full", "covfun"])
def test_the_moment_of_data_is_centred_and_the_same_in_parts(
    representation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = 0.5 + 0.1 * normal(50, 2, 4, 5)
    whole = data_moment(x, representation)
    assert CHUNK > 50
    monkeypatch.setattr("robeval.core.correlated.CHUNK", 7)
    assert torch.allclose(data_moment(x, representation), whole, **CLOSE)
    assert torch.allclose(centred(x), torch.cov(x.flatten(1).T, correction=0), **CLOSE)
    variance = covariance_of(whole, (2, 4, 5), "none").variance
    assert float(variance) == pytest.approx(float(x.var(0, correction=0).mean()), abs=1e-12)


def test_o42_the_running_mean_is_the_bias_corrected_one() -> None:
    beta, zeros = 0.1, torch.zeros(3, dtype=F64)
    kept: dict[str, Tensor] = {}
    for t in range(1, 40):
        new = normal(3, seed=t)
        running_mean(kept, {"m": new}, beta)
        zeros = (1 - beta) * zeros + beta * new
        assert torch.allclose(kept["m"], zeros / (1 - (1 - beta) ** t), **CLOSE)
    assert int(kept["updates"]) == 39


def test_the_full_matrix_is_never_built() -> None:
    """A covariance function of 3 x 128 x 128 pixels is quick; its matrix would take 9.7 GB."""
    xi = normal(2, 3, 128, 128, dtype=torch.float32)
    covariance = covariance_of(covariance_function(xi), (3, 128, 128), "none")
    assert isinstance(covariance, Stationary)
    assert bool(form(covariance, xi).isfinite().all())
