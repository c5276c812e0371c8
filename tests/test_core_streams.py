"""Random streams: the published test vectors, the distributions, and independence of neighbours."""

from __future__ import annotations

import torch
from scipy import stats

from robeval.core.streams import Streams, philox


def test_philox_known_answers() -> None:
    """Test vectors of Random123 for Philox4x32-10."""

    def words(*values: int) -> list[torch.Tensor]:
        return [torch.tensor([v]) for v in values]

    full = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, (full,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        assert [int(w) for w in philox(words(*counter), words(*key))] == list(expected)


def test_a_row_draws_the_same_in_any_company() -> None:
    together, alone = Streams(3, [5, 6, 7], "pgd", [0, 1, 0]), Streams(3, [6], "pgd", [1])
    for draw in ("uniform", "normal", "sign"):
        assert torch.equal(getattr(together, draw)(3, 2)[1:2], getattr(alone, draw)(3, 2))
    assert torch.equal(together.integers(10, 4)[1:2], alone.integers(10, 4))
    assert torch.equal(together.permutation(9)[1:2], alone.permutation(9))


def test_seed_id_method_and_attempt_all_matter() -> None:
    base = Streams(0, [1], "pgd", [0]).uniform(4)
    others = [
        Streams(1, [1], "pgd", [0]),
        Streams(0, [2], "pgd", [0]),
        Streams(0, [1], "apgd", [0]),
        Streams(0, [1], "pgd", [1]),
    ]
    assert not any(torch.equal(base, s.uniform(4)) for s in others)


def test_distributions() -> None:
    rng = Streams(0, range(40), "t", dtype=torch.float64)
    assert stats.kstest(rng.uniform(500).flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(rng.normal(501).flatten().numpy(), "norm").pvalue > 1e-3
    counts = rng.integers(7, 1000).flatten().bincount(minlength=7).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(float(rng.sign(1000).mean())) < 0.02
    order = rng.permutation(6)
    assert torch.equal(order.sort(1).values, torch.arange(6).expand(40, 6))
    assert len(order.unique(dim=0)) > 30
