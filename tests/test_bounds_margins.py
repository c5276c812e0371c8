"""The L-bound and the C-bound against golden values and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robeval.bounds.c_bound import c_bound
from robeval.bounds.curvature import dual_constant, second_order_radius
from robeval.bounds.expansion import Reading, expand, kinks
from robeval.bounds.l_bound import l_bound
from robeval.bounds.margins import level
from robeval.core import catalogue
from robeval.core.ball import DUAL, vector_norm
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.images import Images
from robeval.core.losses import per_sample_loss
from robeval.core.smooth import SmoothReLU
from robeval.core.streams import Streams
from tests.problems import attack, exact_distance, images, linear, network

F64 = torch.float64


def rng(ids: list[int], number: int) -> Streams:
    return Streams(0, ids, "test", [number] * len(ids))


def radii(readings: list[Reading]) -> Tensor:
    return torch.tensor([r.radius for r in readings], dtype=F64)


def smooth(classes: int = 3, rows: int = 10) -> tuple[Classifier, Images]:
    torch.manual_seed(0)
    last = nn.Linear(12, classes)
    last.weight.data *= 20
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), SmoothReLU(), last).double()
    x = torch.rand(rows, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    model = Classifier(net, classes)
    return model, images(x, model.logits(x).argmax(1), classes)


def test_o30_golden_values_of_the_c_bound() -> None:
    gap, slope, c = (torch.tensor([v], dtype=F64) for v in (0.7, 0.9, 2.3))
    r = second_order_radius(gap, slope, c)
    assert float(r) == pytest.approx(0.4815156, abs=1e-7)
    assert float(slope * r + c * r**2 / 2) == pytest.approx(0.7, abs=1e-12)
    assert float(second_order_radius(gap, slope, 0 * c)) == pytest.approx(0.7 / 0.9, abs=1e-12)
    assert float(second_order_radius(gap, 0 * slope, c)) == pytest.approx(0.7801895, abs=1e-7)
    assert float(second_order_radius(gap, slope, -c)) == pytest.approx(0.7 / 0.9, abs=1e-12)


def test_the_second_form_does_not_cancel() -> None:
    small = torch.tensor([1e-3])
    r = second_order_radius(small, torch.tensor([50.0]), small)
    assert float(r) == pytest.approx(2.0e-5, rel=1e-5)
    a = torch.tensor([50.0])
    assert float(((a**2 + 2 * small * small).sqrt() - a) / small) == 0  # what the usual form gives


def test_degenerate_radii() -> None:
    zero, one = torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)
    assert float(second_order_radius(zero, zero, zero)) == 0
    assert float(second_order_radius(zero, one, one)) == 0
    assert math.isinf(float(second_order_radius(one, zero, zero)))


def test_o34_losses() -> None:
    z, y = torch.tensor([[2.0, 1.0, 0.0]], dtype=F64), torch.tensor([0])
    for kind, value in (("cw", -1.0), ("cw_prob", -0.4205125), ("softcw_prob", -0.4621539)):
        assert float(per_sample_loss(z, y, kind)) == pytest.approx(value, abs=1e-7)
    hard, soft = (float(per_sample_loss(z, y, k)) for k in ("cw_prob", "softcw_lse"))
    assert hard <= soft <= hard + math.log(2) / 10


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_o32_the_l_bound_of_a_linear_two_class_model_is_the_distance(norm: str) -> None:
    model, these = linear(2)
    found = radii(l_bound(model, these, norm, rng, loss="cw"))
    torch.testing.assert_close(found, exact_distance(model, these, norm), rtol=1e-9, atol=0)


def test_o32_the_c_bound_of_a_linear_two_class_model_is_the_distance() -> None:
    model, these = linear(2)
    readings = c_bound(model, these, "l2", rng, loss="cw")
    torch.testing.assert_close(radii(readings), exact_distance(model, these, "l2"), rtol=1e-9, atol=0)
    assert readings[0].constant == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_o32_never_above_an_attack_on_a_linear_model(norm: str) -> None:
    model, these = linear(4)
    found = radii(l_bound(model, these, norm, rng, loss="cw"))
    distances = torch.tensor([o.distances[norm] for o in attack("deepfool", model, these, norm, math.inf)], dtype=F64)
    assert distances.isfinite().all()
    assert (found <= distances * (1 + 1e-6)).all()


@pytest.mark.parametrize("loss", ["cw_prob", "cw", "softcw_lse"])
def test_the_l_bound_by_hand(loss: str) -> None:
    model, these = smooth()
    wrong = these.y.clone()
    wrong[0] = (wrong[0] + 1) % 3
    these = images(these.x, wrong, 3)
    readings = l_bound(model, these, "linf", rng, loss=loss)  # type: ignore[arg-type]
    slopes, values = [], []
    for x, y in zip(these.x, these.y, strict=True):
        point = x[None].clone().requires_grad_()
        value = per_sample_loss(model.logits(point), y[None], loss).sum()
        slopes.append(float(torch.autograd.grad(value, point)[0].abs().sum()))
        values.append(float(value))
    assert readings[0].constant == pytest.approx(max(slopes), rel=1e-12)
    assert [r.gradient_norm for r in readings] == pytest.approx(slopes, rel=1e-12)
    assert readings[0].radius == 0
    assert readings[0].prediction != readings[0].label
    assert [r.radius for r in readings[1:]] == pytest.approx([max(-v, 0) / max(slopes) for v in values[1:]], rel=1e-12)
    assert all((r.forwards, r.backwards) == (1, 1) for r in readings)


def test_a_misclassified_image_still_counts_in_the_constant() -> None:
    model, these = smooth()
    steepest = max(l_bound(model, these, "l2", rng), key=lambda r: r.gradient_norm)
    y = these.y.clone()
    at = [r.index for r in l_bound(model, these, "l2", rng)].index(steepest.index)
    z = model.logits(these.x[at : at + 1])[0]
    y[at] = z.argsort(descending=True)[1]  # now the loss is p_best - p_second: the same slope, the other sign
    again = l_bound(model, images(these.x, y, 3), "l2", rng)
    assert again[at].radius == 0
    assert again[0].constant == pytest.approx(steepest.gradient_norm, rel=1e-9)


def test_the_c_bound_by_hand() -> None:
    model, these = smooth()
    readings = c_bound(model, these, "l2", rng, tolerance=1e-8, loss="softcw_lse")

    def loss(flat: Tensor, y: Tensor) -> Tensor:
        return per_sample_loss(model.logits(flat.view(1, 1, 4, 4)), y[None], "softcw_lse")[0]

    top = [
        float(torch.linalg.eigvalsh(torch.func.hessian(loss)(x.flatten(), y))[-1])  # type: ignore[no-untyped-call]
        for x, y in zip(these.x, these.y, strict=True)
    ]
    assert [r.curvature for r in readings] == pytest.approx(top, rel=1e-6, abs=1e-12)
    assert readings[0].constant == pytest.approx(max(top), rel=1e-6)
    for r in readings:
        gap = max(-r.loss_value, 0)
        assert r.gradient_norm * r.radius + r.constant * r.radius**2 / 2 == pytest.approx(gap, abs=1e-12)
        assert r.backwards >= 24
        assert r.forwards >= 1
        assert r.residual <= 1e-8 * max(abs(r.curvature), 1) + 1e-12
        assert r.arithmetic == "float64, rounding not enclosed"
    assert max(r.radius for r in readings) > 0


def test_float64_option() -> None:
    model, these = smooth()
    model.module.float()  # type: ignore[attr-defined]
    single = Images(these.x.float(), these.y, these.ids, these.name, these.classes)
    readings = c_bound(model, single, "l2", rng, float64=True)
    assert readings[0].arithmetic.startswith("float64")
    assert next(model.module.parameters()).dtype == torch.float32  # type: ignore[attr-defined]
    plain = c_bound(model, single, "l2", rng)
    assert plain[0].arithmetic.startswith("float32")
    assert plain[0].constant == pytest.approx(readings[0].constant, rel=1e-3)


def test_relu_networks_are_refused_by_name() -> None:
    model, these = network(rows=4)
    with pytest.raises(ContractBroken, match="twice differentiable network; this one uses ReLU") as caught:
        c_bound(model, these, "l2", rng)
    assert caught.value.code == "B01"
    assert "act=smooth" in caught.value.do
    assert "l-bound" in caught.value.do


@pytest.mark.parametrize(
    ("function", "called"),
    [
        (torch.relu, ["ReLU"]),
        (torch.abs, ["abs"]),
        (nn.functional.leaky_relu, ["LeakyReLU"]),
        (nn.functional.elu, ["ELU"]),
        (lambda t: nn.functional.max_pool2d(t, 2), ["MaxPool"]),
        (lambda t: torch.maximum(t, -t), ["max"]),
        (SmoothReLU(), []),
        (nn.functional.softplus, []),
        (torch.tanh, []),
        (lambda t: nn.functional.avg_pool2d(t, 2), []),
    ],
)
def test_kinks_are_seen_where_layers_cannot_be(function: object, called: list[str]) -> None:
    x = torch.rand(2, 1, 4, 4, requires_grad=True)
    assert kinks(function(x - 0.5).flatten(1) * 2) == called  # type: ignore[operator]


def test_kinked_losses_are_refused() -> None:
    model, these = smooth()
    with pytest.raises(ContractBroken, match="maximum over 2 classes") as caught:
        c_bound(model, these, "l2", rng, loss="cw_prob")
    assert caught.value.code == "B01"
    assert "rivals" in caught.value.do


def pairwise(model: Classifier, x: Tensor, y: Tensor, space: str) -> tuple[Tensor, Tensor, Tensor]:
    """f_j - f_y of all classes j, its gradients and Hessians, by torch.func. -> (n, K), (n, K, d), (n, K, d, d)."""

    def one(flat: Tensor, label: Tensor) -> Tensor:
        z = model.logits(flat.view(1, *x.shape[1:]))[0]
        f = z.softmax(0) if space == "rivals_prob" else z
        return f - f[label]

    rows = [(p.flatten(), label) for p, label in zip(x, y, strict=True)]
    return (
        torch.stack([one(*r) for r in rows]),
        torch.stack([torch.func.jacrev(one)(*r) for r in rows]),  # type: ignore[no-untyped-call]
        torch.stack([torch.func.hessian(one)(*r) for r in rows]),  # type: ignore[no-untyped-call]
    )


@pytest.mark.parametrize("space", ["rivals", "rivals_prob"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_one_constant_per_rival_by_hand(norm: str, space: str) -> None:
    model, these = smooth(4, rows=12)
    value, gradient, _ = pairwise(model, these.x, these.y, space)
    slope = vector_norm(gradient.flatten(0, 1), DUAL[norm]).view_as(value)
    own = torch.nn.functional.one_hot(these.y, 4).bool()
    constant = slope.masked_fill(own, 0).amax(0)
    each = ((-value).clamp_min(0) / constant).masked_fill(own, math.inf)
    for top in (1, 2):
        found = l_bound(model, these, norm, rng, loss=space, top=top)  # type: ignore[arg-type]
        expected, which = each.kthvalue(top, dim=1)
        torch.testing.assert_close(radii(found), expected, rtol=1e-12, atol=0)
        assert [r.rival for r in found] == which.tolist()
        assert [r.constant for r in found] == pytest.approx(constant[which].tolist(), rel=1e-12)
        assert all((r.forwards, r.backwards) == (1, 3) for r in found)
    one = radii(l_bound(model, these, norm, rng, loss="cw" if space == "rivals" else "cw_prob"))
    assert (radii(l_bound(model, these, norm, rng, loss=space)) >= 0).all()  # type: ignore[arg-type]
    assert (each.amin(1) > one * 0.999).float().mean() > 0.5  # a constant of its own costs a rival nothing


def test_the_order_of_the_rivals_does_not_matter_to_a_top_k_loss() -> None:
    model, these = smooth(4, rows=12)
    for loss, top in (("cw", 2), ("cw_prob", 3)):
        value, _, _ = pairwise(model, these.x, these.y, "rivals" if loss == "cw" else "rivals_prob")
        own = torch.nn.functional.one_hot(these.y, 4).bool()
        ranked = value.masked_fill(own, -math.inf).sort(1, descending=True).values[:, top - 1]
        found = l_bound(model, these, "l2", rng, loss=loss, top=top)  # type: ignore[arg-type]
        assert [r.loss_value for r in found] == pytest.approx(ranked.tolist(), rel=1e-9)
    for loss, top in (("softcw_lse", 2), ("rivals", 4), ("rivals", 0)):
        with pytest.raises(UsageError, match="top"):
            l_bound(model, these, "l2", rng, loss=loss, top=top)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_curvature_per_rival_by_hand(norm: str) -> None:
    model, these = smooth(3, rows=8)
    value, gradient, hessian = pairwise(model, these.x, these.y, "rivals")
    slope = vector_norm(gradient.flatten(0, 1), DUAL[norm]).view_as(value)
    top = torch.linalg.eigvalsh(hessian)[..., -1].clamp_min(0)
    entries = hessian.abs().flatten(2)
    c = {"l2": top, "linf": torch.minimum(16 * top, entries.sum(2)), "l1": torch.minimum(top, entries.amax(2))}[norm]
    own = torch.nn.functional.one_hot(these.y, 3).bool()
    constant = c.masked_fill(own, 0).amax(0)
    each = second_order_radius((-value).clamp_min(0).masked_fill(own, math.inf), slope, constant.expand_as(value))
    # With every rival looked at the constants are these; else a constant can only come from fewer images.
    found = c_bound(model, these, norm, rng, tolerance=1e-9)
    assert all(r.constant <= float(constant.max()) * (1 + 1e-6) for r in found)
    nearest = each.amin(1)
    for r, slope_, gap in zip(found, slope, -value, strict=True):
        assert r.gradient_norm == pytest.approx(float(slope_[r.rival]), rel=1e-9)
        reached = r.gradient_norm * r.radius + r.constant * r.radius**2 / 2
        assert reached == pytest.approx(float(gap[r.rival]), rel=1e-9)
    assert (radii(found) >= nearest * (1 - 1e-6)).all()


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_the_dual_constant_bounds_every_quadratic_form(norm: str) -> None:
    a = torch.randn(30, 9, 9, dtype=F64, generator=torch.Generator().manual_seed(3))
    a = a + a.mT - 2 * torch.eye(9, dtype=F64) * torch.linspace(-2, 4, 30, dtype=F64)[:, None, None]
    w = torch.randn(4000, 9, dtype=F64, generator=torch.Generator().manual_seed(4))
    w = torch.cat([w.sign(), w / w.abs().sum(1, keepdim=True), torch.eye(9, dtype=F64)])
    w = w / vector_norm(w, norm)[:, None]
    seen = torch.einsum("pi,nij,pj->np", w, a, w).amax(1)
    assert (dual_constant(torch.linalg.eigvalsh(a)[:, -1], norm, 9) >= seen - 1e-12).all()


def test_both_ends_and_the_spectral_norm() -> None:
    model, these = smooth(3, rows=6)
    _, _, hessian = pairwise(model, these.x, these.y, "rivals")
    eigenvalues = torch.linalg.eigvalsh(hessian)
    for r, ends in zip(c_bound(model, these, "l2", rng, tolerance=1e-9, ends="both"), eigenvalues, strict=True):
        assert r.curvature == pytest.approx(float(ends[r.rival, -1]), rel=1e-6, abs=1e-9)
        assert r.curvature_least == pytest.approx(float(ends[r.rival, 0]), rel=1e-6, abs=1e-9)
        assert r.spectral_norm == pytest.approx(float(ends[r.rival].abs().max()), rel=1e-6, abs=1e-9)
    assert all(math.isnan(r.spectral_norm) for r in c_bound(model, these, "l2", rng))


def test_the_paper_mode_is_tulips() -> None:
    """Margin of probabilities, one constant, level 0 even for the soft mean that lies below the maximum."""
    model, these = smooth(3, rows=8)
    for name, loss in (("l-bound-paper", "cw_prob"), ("c-bound-paper", "softcw_prob")):
        spec = catalogue.parse("bounds", name)
        assert (spec.label, spec.settings["loss"]) == (name, loss)
        found = spec.method.load()(model, these, "l2", rng, **spec.settings)
        constant = found[0].constant
        for r in found:
            gap, a = max(-r.loss_value, 0), r.gradient_norm
            by_hand = gap / constant if name[0] == "l" else ((a * a + 2 * constant * gap) ** 0.5 - a) / constant
            assert r.radius == pytest.approx(by_hand, rel=1e-6, abs=1e-12)
    own = c_bound(model, these, "l2", rng, loss="softcw_prob")
    released = c_bound(model, these, "l2", rng, loss="softcw_prob", level=0.0)
    assert level("softcw_prob", 3, 10.0) == pytest.approx(-math.log(3) / 10)
    assert all(a.radius < b.radius for a, b in zip(own, released, strict=True) if b.radius > 0)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        zero = 0 * x.flatten(1).sum(1)
        return torch.stack([zero + 4, zero, zero], 1)


def test_a_constant_network() -> None:
    x = torch.rand(4, 1, 4, 4, dtype=F64)
    these = images(x, torch.tensor([0, 0, 0, 1]), 3)
    for readings in (
        l_bound(Classifier(Constant(), 3), these, "l2", rng),
        c_bound(Classifier(Constant(), 3), these, "l2", rng),
    ):
        assert [r.radius for r in readings] == [math.inf] * 3 + [0]
        assert readings[0].constant == 0


def test_a_network_without_gradients_is_refused() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)[:, :3]

    these = images(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), 3)
    with pytest.raises(ContractBroken, match="no gradient") as caught:
        l_bound(Classifier(Cut(), 3), these, "l2", rng)
    assert caught.value.code == "C19"


def test_nan_logits_are_refused() -> None:
    these = images(torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), 3)
    broken = Classifier(lambda x: x.flatten(1)[:, :3] / 0 * 0, 3)
    with pytest.raises(ContractBroken, match="NaN or Inf logits") as caught:
        l_bound(broken, these, "l2", rng)
    assert caught.value.code == "C07"


def test_batch_statistics_are_detected_by_the_c_bound() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), SmoothReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    model = Classifier(net, 3)
    these = images(torch.rand(6, 1, 4, 4, dtype=F64), torch.arange(6) % 3, 3)
    assert len(c_bound(model, these, "l2", rng)) == 6
    net.train()
    with pytest.raises(ContractBroken, match="depends on other images"):
        c_bound(model, these, "l2", rng)


def test_small_batches_are_padded_without_touching_the_result() -> None:
    model, these = smooth(rows=3)
    at = expand(model, these.x, these.y, "softcw_lse", 10.0, second=True)
    assert at.rows == 3
    v = torch.randn(3, 16, dtype=F64, generator=torch.Generator().manual_seed(0))
    for k in range(3):
        one = expand(model, these.x[k : k + 1], these.y[k : k + 1], "softcw_lse", 10.0, second=True)
        torch.testing.assert_close(one.product(v[k : k + 1])[0], at.product(v)[k], rtol=1e-12, atol=1e-14)
