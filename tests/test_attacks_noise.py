"""Gaussian and long-range-correlated noise: covariances, sampler, sizes, nested draws, independence of neighbours."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from robeval.attacks.gaussian import gaussian
from robeval.attacks.lrc import BLOCK, lrc
from robeval.core.ball import Ball
from robeval.core.catalogue import parse
from robeval.core.correlated import Sampler, channel_covariance, exponential, from_file, pixel_covariance, root
from robeval.core.errors import UsageError
from robeval.core.goal import Untargeted
from robeval.core.questions import Answer, Attack
from robeval.core.streams import Streams
from tests.problems import attack, network


def points(run: Attack, rows: int) -> list[Tensor]:
    """Every point that a noise attack asks about, the last one too; nothing is ever decided."""
    seen, said = [], Answer(torch.zeros(rows, 3), torch.ones(rows, dtype=torch.bool), torch.empty(0), torch.empty(0))
    try:
        seen.append(next(run).points)
        while True:
            seen.append(run.send(said).points)
    except StopIteration as end:
        return seen if end.value is None else [*seen, end.value]


def noises(made: object, x0: Tensor, norm: str = "l2", eps: float = 0.2, name: str = "t", **settings: object) -> Tensor:
    """Perturbations of an attack, (n, draws, C, H, W)."""
    rng = Streams(0, range(len(x0)), name, dtype=x0.dtype)
    run = made(x0, Untargeted(torch.zeros(len(x0), dtype=torch.int64)), Ball(norm, eps), rng, **settings)  # type: ignore[operator]
    return torch.stack([x - x0 for x in points(run, len(x0))], 1)


def grey(rows: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((rows, *shape), 0.5, dtype=dtype)


# -- covariances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("zeta", "smallest", "rounded"), [(8.0, 0.0523, -0.733), (2.0, 0.207, -0.274)])
def test_o43_the_exact_distance_gives_a_covariance(zeta: float, smallest: float, rounded: float) -> None:
    exact = pixel_covariance(32, 32, zeta)
    assert float(torch.linalg.eigvalsh(exact)[0]) == pytest.approx(smallest, abs=1e-3)
    whole = (-(-zeta * exact.log()).round() / zeta).exp()  # distances in whole pixels
    assert float(torch.linalg.eigvalsh(whole)[0]) == pytest.approx(rounded, abs=1e-3)
    with pytest.raises(UsageError, match="negative eigenvalue"):  # O-44: noise cannot be drawn from it
        root(whole)


def test_the_pixel_covariance_by_hand() -> None:
    c = pixel_covariance(2, 3, 1.5)  # pixels in the order of rows: (0,0) (0,1) (0,2) (1,0) ...
    apart = torch.tensor([0.0, 1, 2, 1, 2**0.5, 5**0.5], dtype=torch.float64)
    assert torch.allclose(c[0], (-apart / 1.5).exp(), rtol=0, atol=1e-15)
    assert torch.equal(c, c.T)


def test_the_channel_covariance_has_the_papers_eigenvalues() -> None:
    values = torch.linalg.eigvalsh(channel_covariance(3, 0.5))
    assert torch.allclose(values, torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64))
    assert channel_covariance(1, 0.5).tolist() == [[1.0]]


@pytest.mark.parametrize("inter", [-0.6, 1.01])
def test_impossible_channel_correlations_are_refused(inter: float) -> None:
    with pytest.raises(UsageError, match=r"inter must lie between -0\.5 and 1"):
        channel_covariance(3, inter)


@pytest.mark.parametrize("zeta", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_decay_lengths_are_refused(zeta: float) -> None:
    with pytest.raises(UsageError, match="zeta must be a number > 0"):
        pixel_covariance(4, 4, zeta)


def test_a_singular_covariance_has_a_root() -> None:
    a = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor = root(a @ a.T)
    assert torch.allclose(factor @ factor.T, a @ a.T, atol=1e-12)
    both = root(channel_covariance(3, 1.0))
    assert torch.allclose(both @ both.T, torch.ones(3, 3, dtype=torch.float64), atol=1e-7)


# -- the sampler -------------------------------------------------------------------------------------------------------


def test_the_sampler_is_the_kronecker_product_of_its_factors() -> None:
    noise = exponential((3, 4, 5), 3.0, 0.5)
    white = torch.randn(7, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = torch.kron(noise.channels, noise.pixels)
    assert torch.allclose(noise(white).flatten(1), white.flatten(1) @ whole.T, atol=1e-12)
    assert torch.allclose(
        whole @ whole.T, torch.kron(channel_covariance(3, 0.5), pixel_covariance(4, 5, 3.0)), atol=1e-12
    )


def test_o45_the_empirical_covariance_is_the_models() -> None:
    white = Streams(0, range(20), "t", dtype=torch.float64).normal(1000, 3, 8, 8).flatten(0, 1)
    drawn = exponential((3, 8, 8), 4.0, 0.5)(white).flatten(1)
    expected = torch.kron(channel_covariance(3, 0.5), pixel_covariance(8, 8, 4.0))
    apart = (drawn.T @ drawn / len(drawn) - expected).abs()
    assert apart.max() < 6 * (2 / len(drawn)) ** 0.5  # six standard errors of the largest entries


def test_o46_without_decay_length_the_pixels_are_independent() -> None:
    c = pixel_covariance(8, 8, 0.05)
    assert (c - torch.eye(64, dtype=torch.float64)).abs().max() < 1e-8
    white = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(exponential((2, 8, 8), 0.05, 0.0)(white), white, atol=1e-7)
    assert not torch.allclose(exponential((2, 8, 8), 0.05, 0.5)(white), white, atol=0.1)  # channels still mix


def test_a_covariance_file_is_scaled_to_unit_variance(tmp_path: Path) -> None:
    a = np.random.default_rng(0).standard_normal((32, 32))
    covariance = a @ a.T
    np.save(tmp_path / "c.npy", covariance)
    noise = from_file(str(tmp_path / "c.npy"), (2, 4, 4))
    assert torch.allclose(
        noise.pixels @ noise.pixels.T, torch.from_numpy(covariance / covariance.diagonal().mean()), atol=1e-12
    )
    white = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(noise(white).flatten(1), white.flatten(1) @ noise.pixels.T)
    before = parse("attacks", f"lrc:covariance={tmp_path}/c.npy").config_hash
    np.save(tmp_path / "c.npy", np.eye(32))  # the file of the same name is read anew
    assert torch.allclose(from_file(str(tmp_path / "c.npy"), (2, 4, 4))(white), white)
    assert parse("attacks", f"lrc:covariance={tmp_path}/c.npy").config_hash != before  # and is another configuration
    np.save(tmp_path / "c.npy", covariance)
    assert parse("attacks", f"lrc:covariance={tmp_path}/c.npy").config_hash == before


BAD = {
    "shape": (np.eye(15), r"expected a covariance of shape \(16, 16\)"),
    "vector": (np.ones(16), r"float64 of shape \(16,\)"),
    "text": (np.full((16, 16), "a"), "expected a covariance"),
    "nan": (np.full((16, 16), np.nan), "no covariance"),
    "zero": (np.zeros((16, 16)), "no covariance"),
    "lopsided": (np.triu(np.ones((16, 16))), "no covariance"),
    "indefinite": (np.ones((16, 16)) - 0.5 * np.eye(16), "negative eigenvalue"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_covariances_are_refused(case: str, tmp_path: Path) -> None:
    matrix, message = BAD[case]
    np.save(tmp_path / "c.npy", matrix)
    with pytest.raises(UsageError, match=message):
        noises(lrc, grey(2, 1, 4, 4), covariance=str(tmp_path / "c.npy"), draws=1)


def test_bad_covariance_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.npy").write_text("not numbers")
    with pytest.raises(UsageError, match=r"not a \.npy file"):
        from_file(str(tmp_path / "c.npy"), (1, 4, 4))
    with pytest.raises(UsageError, match="no file at"):
        from_file("exponentail", (1, 4, 4))
    np.savez(tmp_path / "c.npz", a=np.eye(16), b=np.eye(16))
    with pytest.raises(UsageError, match="several arrays"):
        from_file(str(tmp_path / "c.npz"), (1, 4, 4))


# -- the attacks -------------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("made", [gaussian, lrc], ids=["gaussian", "lrc"])


@BOTH
def test_in_l2_every_draw_has_length_eps(made: object) -> None:
    d = noises(made, grey(5, 3, 6, 6), draws=20, eps=0.2)
    assert torch.allclose(d.flatten(2).norm(dim=2), torch.tensor(0.2, dtype=torch.float64), rtol=1e-5)


@BOTH
def test_in_linf_a_third_of_the_pixels_is_clipped(made: object) -> None:
    """Normal noise of standard deviation eps: 31.7 % lies beyond, the rest keeps its value."""
    d = noises(made, grey(60, 3, 6, 6), norm="linf", draws=30, eps=0.2)
    assert float(d.abs().max()) <= 0.2
    assert float((d.abs() > 0.2 * (1 - 1e-9)).double().mean()) == pytest.approx(0.3173, abs=0.015)
    assert float((d.abs() < 0.1).double().mean()) == pytest.approx(0.3829, abs=0.015)


def test_lrc_draws_have_the_correlations_that_were_asked_for() -> None:
    """Rescaling to one length keeps ratios nearly, since neighbours and far pixels shrink alike."""
    d = noises(lrc, grey(80, 2, 8, 8), draws=50, zeta=2.0, inter=0.5).flatten(0, 1)

    def correlation(a: Tensor, b: Tensor) -> float:
        return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())

    assert correlation(d[:, :, :, 1:], d[:, :, :, :-1]) == pytest.approx(np.exp(-1 / 2), abs=0.06)
    assert correlation(d[:, :, 4:], d[:, :, :-4]) == pytest.approx(np.exp(-4 / 2), abs=0.06)
    assert correlation(d[:, 0], d[:, 1]) == pytest.approx(0.5, abs=0.06)
    white = noises(gaussian, grey(80, 2, 8, 8), draws=50).flatten(0, 1)
    assert abs(correlation(white[:, :, :, 1:], white[:, :, :, :-1])) < 0.02


@BOTH
@pytest.mark.parametrize("few", [1, 5, BLOCK])
def test_o49_draws_are_nested(made: object, few: int) -> None:
    x0 = grey(3, 2, 5, 5)
    assert torch.equal(noises(made, x0, draws=few), noises(made, x0, draws=2 * BLOCK + 3)[:, :few])


@pytest.mark.parametrize("name", ["gaussian", "lrc"])
def test_o49_more_draws_never_break_less(name: str) -> None:
    model, these = network(rows=40)
    broken = [
        {o.position for o in attack(name, model, these, "l2", 0.12, draws=n) if o.success} for n in (1, 4, 16, 64)
    ]
    assert all(a <= b for a, b in pairwise(broken))
    assert len(broken[0]) < len(broken[-1]) < len(these)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 7, 5), (3, 16, 16)])
@BOTH
def test_an_image_draws_the_same_in_any_company(made: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x0 = grey(17, *shape, dtype=dtype)
    whole = noises(made, x0, draws=BLOCK + 2)
    for width in (1, 4, 5):
        assert torch.equal(noises(made, x0[:width], draws=BLOCK + 2), whole[:width])


def test_lrc_leaves_decided_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix products are made for open images only."""
    made = []

    def product(self: Sampler, white: Tensor) -> Tensor:
        made.append(white)
        return white

    monkeypatch.setattr(Sampler, "__call__", product)
    run = partial(lrc, draws=2 * BLOCK)(
        grey(4, 1, 4, 4), Untargeted(torch.zeros(4, dtype=torch.int64)), Ball("l2", 0.1), Streams(0, range(4), "t")
    )
    next(run)
    assert len(made) == 4
    said = Answer(torch.zeros(4, 2), torch.tensor([True, False, False, False]), torch.empty(0), torch.empty(0))
    for _ in range(BLOCK):
        run.send(said)
    assert len(made) == 5
