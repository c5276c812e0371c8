"""Training on long-range-correlated noise: what is added, to what, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robeval.core.correlated import centred, channel_covariance, pixel_covariance, with_covariance
from robeval.core.errors import UsageError
from robeval.core.images import Images
from robeval.core.streams import Streams
from robeval.train.memory import Memory
from robeval.train.methods.lrc_noise import lrc_noise
from robeval.train.passes import counting
from robeval.train.step import Loss, fill_gradients
from tests.laws.test_trainers import on_blobs

F64 = torch.float64


class Seeing(nn.Module):
    """Remembers what it was shown; its logits are means over the halves of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=F64))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.scale * torch.stack([half.flatten(1).mean(1) for half in x.chunk(2, -1)], 1)


def shown(x: Tensor, memory: Memory | None = None, seed: int = 0, **settings: Any) -> tuple[list[Tensor], Loss]:
    """The images that the network saw in one step, and its loss."""
    model, y = Seeing(), torch.arange(len(x)) % 2
    rng = Streams(seed, range(len(x)), "lrc-noise", dtype=x.dtype)
    loss = next(iter(lrc_noise(model, x, y, rng, memory or Memory(), **settings)))()
    return model.seen, loss


def grey(n: int, *shape: int) -> Tensor:
    return torch.full((n, *shape), 0.5, dtype=F64)


def test_o45_the_noise_has_the_covariance_that_was_asked_for() -> None:
    x = grey(50_000, 3, 4, 4)
    noise = (shown(x, std=0.3, zeta=4.0, clamp=False)[0][0] - x).flatten(1)
    expected = torch.kron(channel_covariance(3, 0.5), pixel_covariance(4, 4, 4.0))
    assert (noise.T @ noise / len(x) / 0.09 - expected).abs().max() < 0.03
    assert noise.mean(0).abs().max() < 0.01


def test_the_box() -> None:
    x = grey(50, 1, 6, 6)
    free, clipped = (shown(x, std=0.5, clamp=c)[0][0] for c in (False, True))
    assert free.min() < 0 and free.max() > 1
    assert torch.equal(clipped, free.clamp(0, 1))


def test_the_mixture() -> None:
    x = torch.rand(8, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    losses = {w: float(shown(x, weight=w, std=0.2)[1].total.detach()) for w in (0.0, 0.25, 1.0)}
    assert losses[0.25] == pytest.approx(0.25 * losses[1.0] + 0.75 * losses[0.0], rel=1e-12)
    seen, loss = shown(x, weight=0.25, std=0.2)
    assert torch.equal(seen[1], x) and "clean_train_accuracy" in loss.logs
    assert losses[0.0] == pytest.approx(float(nn.functional.cross_entropy(Seeing()(x), torch.arange(8) % 2).detach()))


def test_the_covariance_of_the_data() -> None:
    """Images that differ along two patterns: noise lies in their span, with unit mean variance."""
    g = torch.Generator().manual_seed(0)
    patterns = torch.randn(2, 32, generator=g, dtype=F64) / 40
    pixels = (0.5 + torch.randn(300, 2, generator=g, dtype=F64) @ patterns).clamp(0, 1).view(300, 2, 4, 4)
    train = Images(pixels, torch.arange(300) % 2, torch.arange(300), "problem", ["a", "b"])
    memory, x = Memory(train=train), grey(50_000, 2, 4, 4)
    noise = (shown(x, memory, covariance="data", std=0.1, clamp=False)[0][0] - x).flatten(1)
    covariance = centred(pixels)
    expected = covariance / covariance.diagonal().mean()
    assert (noise.T @ noise / len(x) / 0.01 - expected).abs().max() < 0.03 * expected.max()
    basis = torch.linalg.qr(patterns.T)[0]
    assert (noise - noise @ basis @ basis.T).abs().max() < 1e-6
    memory.train = None  # the root is kept: nothing is computed from the images again
    again = (shown(x, memory, covariance="data", std=0.1, clamp=False)[0][0] - x).flatten(1)
    assert torch.equal(again, noise)
    assert set(memory.tensors) == {"channels", "pixels"}


@pytest.mark.parametrize("weight, forward", [(1.0, 1), (0.5, 2)])
def test_passes(weight: float, forward: int) -> None:
    model, x, y = Seeing(), grey(5, 1, 4, 4), torch.arange(5) % 2
    with counting(model) as passes:
        rng = Streams(0, range(5), "t", dtype=F64)
        for objective in lrc_noise(model, x, y, rng, Memory(), weight=weight):
            fill_gradients(list(model.parameters()), objective)
    assert (passes.forward, passes.backward) == (5 * forward, 5)


def test_o75_the_noise_is_unlearnt() -> None:
    """Noise that hardly correlates halves the weights of inputs that say nothing."""
    (_, plain, right), (_, noisy, still) = (
        on_blobs(name, 0, lr=0.1, count=150, std=0.3, zeta=0.5) for name in ("standard", "lrc-noise")
    )
    assert noisy <= 0.5 * plain
    assert abs(right - still) <= 0.01


@pytest.mark.parametrize("bad", [{"weight": 1.5}, {"weight": -0.1}, {"std": -1.0}, {"zeta": 0.0}, {"inter": 2.0}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as told:
        shown(grey(2, 3, 4, 4), **bad)
    assert told.value.code == "A04"


def test_equal_images_have_no_covariance() -> None:
    with pytest.raises(UsageError, match="no variance"):
        with_covariance(centred(grey(5, 1, 3, 3)))
