"""The laws that every proof in the folder obeys, over networks drawn at random. A new file is tested by existing."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robeval.bounds.graph import Graph, graph_of
from robeval.bounds.proof import Proof
from robeval.bounds.region import Region
from robeval.core import catalogue
from robeval.core.ball import DUAL, NORMS, Ball, vector_norm
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.smooth import SmoothReLU
from robeval.core.streams import Streams

PROOFS = {name: m for name, m in catalogue.methods("bounds").items() if m.facts["kind"] == "proof"}
CASES = [(name, norm) for name, m in PROOFS.items() for norm in m.facts["norms"]]
REACH = {"linf": 1.0, "l2": 3.0, "l1": 8.0}
IMAGES = 3
#: Settings that keep slow proofs quick.
QUICK = {"bab": {"branches": 60}}
#: Proofs that see fewer networks.
SLOW = ("alpha-crown", "bab", "curvature", "jacobian")

torch_seeds = st.integers(0, 2**31 - 1)


class Residual(nn.Module):
    """x + f(x), or x - f(x)."""

    def __init__(self, inner: nn.Module, sign: int):
        super().__init__()
        self.inner, self.sign = inner, sign

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x) if self.sign > 0 else x - self.inner(x)


class Centred(nn.Module):
    """Arithmetic with constants, as a normalisation does it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4]).view(1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return 1 - (x - self.mean) / 0.25


def network(seed: int, act: str = "") -> nn.Module:
    """A small float32 network of random parts: convolutions, strides, pools, BatchNorm, branches, activations."""
    g = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=g))

    kinds = {
        "relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.1), "smooth": SmoothReLU, "softplus": lambda: nn.Softplus(3.0)
    }  # fmt: skip
    names = [act] if act else list(kinds)
    layers: list[nn.Module] = [Centred()] if pick(2) else []
    channels, side = 1, 5
    for _ in range(pick(3)):
        wide, stride, pad, kernel = 2 + pick(2), 1 + pick(2), pick(2), 1 + pick(3)
        if (side + 2 * pad - kernel) // stride + 1 < 2:
            continue
        layers.append(nn.Conv2d(channels, wide, kernel, stride, pad, bias=bool(pick(2))))
        channels, side = wide, (side + 2 * pad - kernel) // stride + 1
        if pick(2):
            norm: Any = nn.BatchNorm2d(channels)
            norm.running_mean.normal_(generator=g)
            norm.running_var.uniform_(0.3, 2, generator=g)
            layers.append(norm)
        layers.append(kinds[names[pick(len(names))]]())
        if pick(2):
            same = [nn.Conv2d(channels, channels, 3, padding=1), kinds[names[pick(len(names))]]()]
            layers.append(Residual(nn.Sequential(*same), 1 if pick(2) else -1))
        if side >= 4 and pick(2):
            smooth = act in ("smooth", "softplus")
            layers.append(nn.AvgPool2d(2) if smooth or pick(2) else nn.MaxPool2d(3, 2, 1))
            side = side // 2 if isinstance(layers[-1], nn.AvgPool2d) else (side - 1) // 2 + 1
    layers.append(nn.Flatten())
    width = channels * side * side
    for _ in range(pick(3)):
        layers += [nn.Linear(width, 6), kinds[names[pick(len(names))]]()]
        width = 6
    layers.append(nn.Linear(width, 2 + pick(3)))
    net = nn.Sequential(*layers).eval()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * 2 / max(1, p[0].numel()) ** 0.5
    return net


def problem(seed: int, norm: str, act: str = "") -> tuple[nn.Module, Graph, Region, Tensor]:
    """A network, some images with black and white pixels, radii from tiny to large, and the classes predicted."""
    net = network(seed, act)
    g = torch.Generator().manual_seed(seed + 1)
    x = (1.6 * torch.rand(IMAGES, 1, 5, 5, generator=g, dtype=torch.float64) - 0.3).clamp(0, 1)
    eps = REACH[norm] * 10 ** (-3 * torch.rand(IMAGES, generator=g, dtype=torch.float64))
    graph = graph_of(net, (1, 5, 5))
    return net, graph, Region(x, norm, eps), graph.logits(x).argmax(1)


def prove(name: str, graph: Graph, region: Region, y: Tensor) -> Proof:
    method = catalogue.find("bounds", name)
    found: Proof = method.load()(graph, region, y, **method.bind(QUICK.get(name, {})))
    return found


def points(graph: Graph, region: Region, y: Tensor, seed: int) -> Tensor:
    """Points of the regions: samples, surfaces, corners, and steps of ascent on every margin. (m, n, C, H, W)."""
    found = []
    for i in range(len(region.x)):
        ball, x = Ball(region.norm, float(region.eps[i])), region.x[i : i + 1]
        mine = []
        for k in range(4):
            rng = Streams(seed, [i], "points", [k])
            mine += [ball.sample(x, rng), ball.surface(x, rng)]
        for j in range(graph.classes):
            at = mine[j % len(mine)]
            for _ in range(6):
                at = at.detach().requires_grad_()
                z = graph.logits(at)
                (slope,) = torch.autograd.grad(
                    (z[:, j] - z[:, y[i]]).sum(), at, allow_unused=True, materialize_grads=True
                )
                at = ball.project(x, at.detach() + 0.5 * ball.eps * ball.ascent(slope, at.detach())).detach()
                mine.append(at)
        found.append(torch.cat(mine))
    return torch.stack(found, 1)


def least(graph: Graph | nn.Module, at: Tensor, y: Tensor) -> Tensor:
    """Smallest margin f_y - f_j seen over the points. -> (n, K)."""
    m, n = at.shape[:2]
    z = graph.logits(at.flatten(0, 1)) if isinstance(graph, Graph) else graph(at.flatten(0, 1))
    z = z.view(m, n, -1)
    seen: Tensor = (z.gather(2, y.expand(m, n)[..., None]) - z).amin(0)
    return seen


@pytest.mark.parametrize("name", list(PROOFS))
def test_law_1_a_proof_says_so(name: str) -> None:
    facts = PROOFS[name].facts
    assert set(facts["norms"]) <= set(NORMS)
    assert facts["source"]
    assert "ESTIMATE" not in PROOFS[name].doc
    assert list(inspect.signature(PROOFS[name].load()).parameters)[:3] == ["graph", "region", "y"]


def no_point_is_outside(name: str, norm: str, seed: int) -> None:
    """In float64, and in float32 up to its own rounding."""
    act = ("relu", "smooth", "softplus", "leaky", "")[seed % 5]
    net, graph, region, y = problem(seed, norm, act)
    try:
        proof = prove(name, graph, region, y)
    except ContractBroken:  # smooth networks only, or networks with kinks only
        net, graph, region, y = problem(seed, norm, "relu" if name == "bab" else "smooth")
        proof = prove(name, graph, region, y)
    assert proof.lower.shape == (IMAGES, graph.classes)
    assert proof.lower.gather(1, y[:, None]).isinf().all()
    at = points(graph, region, y, seed % 1000)
    assert (least(graph, at, y) >= proof.lower.masked_fill(proof.lower.isinf(), -torch.inf)).all()
    single = least(net, at.float(), y).double()
    slack = 1e-4 * (1 + graph.logits(region.x).abs().amax())
    assert (single >= proof.lower.masked_fill(proof.lower.isinf(), -torch.inf) - slack).all()


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[0] not in SLOW])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=torch_seeds)
def test_law_2_no_point_of_the_region_is_outside_a_proven_bound(name: str, norm: str, seed: int) -> None:
    no_point_is_outside(name, norm, seed)


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[0] in SLOW])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=torch_seeds)
def test_law_2_holds_for_slow_proofs_too(name: str, norm: str, seed: int) -> None:
    no_point_is_outside(name, norm, seed)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_3_larger_balls_have_smaller_bounds(name: str, norm: str) -> None:
    _, graph, region, y = problem(7, norm, "relu" if name == "bab" else "smooth")
    before = torch.full((IMAGES, graph.classes), torch.inf, dtype=torch.float64)
    for eps in (0.0, 0.003, 0.03, 0.3):
        lower = prove(name, graph, Region(region.x, norm, torch.full_like(region.eps, eps)), y).lower
        assert (lower <= before + 1e-9).all()
        before = lower
    assert before.isfinite().sum() == IMAGES * (graph.classes - 1)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_4_at_radius_0_the_margin_itself(name: str, norm: str) -> None:
    _, graph, region, y = problem(11, norm, "relu" if name == "bab" else "smooth")
    lower = prove(name, graph, Region(region.x, norm, torch.zeros_like(region.eps)), y).lower
    z = graph.logits(region.x)
    margin = (z.gather(1, y[:, None]) - z).scatter(1, y[:, None], torch.inf)
    assert (lower <= margin).all()
    torch.testing.assert_close(lower, margin, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_law_5_exact_on_linear_networks(name: str, norm: str) -> None:
    """Away from the box, f_y - f_j falls by eps times the dual norm of its weights and no more."""
    generator = torch.Generator().manual_seed(3)
    dense = nn.Linear(16, 3)
    net = nn.Sequential(nn.Flatten(), dense)
    x = 0.4 + 0.2 * torch.rand(IMAGES, 1, 4, 4, generator=generator, dtype=torch.float64)
    graph = graph_of(net, (1, 4, 4))
    y = graph.logits(x).argmax(1)
    eps = torch.tensor([0.01, 0.05, 0.3], dtype=torch.float64)
    lower = prove(name, graph, Region(x, norm, eps), y).lower
    z, w = graph.logits(x), dense.weight.detach().double()
    for i in range(IMAGES):
        for j in set(range(3)) - {int(y[i])}:
            fall = eps[i] * vector_norm((w[y[i]] - w[j])[None], DUAL[norm])[0]
            exact = z[i, y[i]] - z[i, j] - fall
            assert lower[i, j] <= exact + (0 if name == "lipschitz" else 1e-12)
            if name != "lipschitz" or norm == "l2":
                assert lower[i, j] == pytest.approx(float(exact), abs=1e-6 * (1 + float(fall)))


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=torch_seeds)
def test_law_6_more_work_is_never_looser(norm: str, seed: int) -> None:
    _, graph, region, y = problem(seed, norm, ("relu", "leaky")[seed % 2])
    crown = prove("crown", graph, region, y)
    alpha = prove("alpha-crown", graph, region, y)
    assert (alpha.lower >= crown.lower - 1e-9).all()


@pytest.mark.parametrize("name", list(PROOFS))
def test_law_7_images_do_not_influence_each_other(name: str) -> None:
    norm = PROOFS[name].facts["norms"][0]
    _, graph, region, y = problem(5, norm, "relu" if name == "bab" else "smooth")
    together = prove(name, graph, region, y).lower
    for i in range(IMAGES):
        one = torch.tensor([i])
        torch.testing.assert_close(
            prove(name, graph, region.take(one), y[one]).lower, together[one], rtol=1e-9, atol=1e-9
        )


def test_law_8_an_unknown_layer_is_refused_by_name() -> None:
    for layer, said in ((nn.Sigmoid(), "Sigmoid at 1"), (nn.GELU(), "GELU at 1"), (nn.Softmax(1), "Softmax at 1")):
        with pytest.raises(ContractBroken, match=said) as refusal:
            graph_of(nn.Sequential(nn.Flatten(), layer, nn.Linear(25, 2)), (1, 5, 5))
        assert refusal.value.code == "B03"
        assert "Conv2d" in str(refusal.value.why)


def test_law_9_an_unknown_norm_is_refused() -> None:
    with pytest.raises(UsageError):
        Ball("l7", 1.0)
