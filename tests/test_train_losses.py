"""Per-sample losses: oracle O-34 and their relations."""

from __future__ import annotations

import pytest
import torch

from robeval.core.errors import UsageError
from robeval.core.losses import KINDS, per_sample_loss

Z, Y = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64), torch.tensor([0])


@pytest.mark.parametrize(
    "kind, expected", [("cw", -1.0), ("cw_prob", -0.4205125), ("softcw_prob", -0.4621539), ("cw_k50", -51.0)]
)
def test_o34_values(kind: str, expected: float) -> None:
    assert abs(float(per_sample_loss(Z, Y, kind)) - expected) < 1e-7
    assert abs(float(Z.softmax(1).amax()) - 0.6652410) < 1e-7


def test_relations_between_the_kinds() -> None:
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(200, 5, generator=g, dtype=torch.float64)
    y = torch.randint(5, (200,), generator=g)
    loss = {kind: per_sample_loss(z, y, kind) for kind in KINDS}
    assert torch.allclose(loss["ce"], torch.nn.functional.cross_entropy(z, y, reduction="none"), atol=1e-12)
    assert torch.equal(loss["cw"] > 0, z.argmax(1) != y)
    assert torch.equal(loss["cw_prob"] > 0, z.argmax(1) != y)
    assert (loss["softcw_lse"] >= loss["cw_prob"]).all()
    assert (loss["softcw_prob"] <= loss["cw_prob"] + 1e-12).all()
    assert (loss["slm"] >= loss["cw"]).all()
    assert torch.allclose(per_sample_loss(z, y, "softcw_lse", 1e4), loss["cw_prob"], atol=1e-3)
    assert torch.allclose(loss["cw_k50"], -(50 - loss["cw"]).clamp_min(0))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gradients_of_extreme_logits_are_finite(kind: str) -> None:
    z = torch.tensor([[1e3, -1e3], [-1e3, 1e3]], requires_grad=True)
    loss = per_sample_loss(z, torch.tensor([0, 0]), kind)
    (g,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
    assert loss.isfinite().all()
    assert g.isfinite().all()


def test_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="cw_prob"):
        per_sample_loss(Z, Y, "cw_porb")
