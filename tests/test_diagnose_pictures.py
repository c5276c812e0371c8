"""What the pictures of a full diagnosis are drawn from, held against closed forms and recomputation."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robeval.core.classifier import Classifier
from robeval.diagnose.finding import CLEAR, FAILED, Finding
from robeval.diagnose.methods.attack_path import attack_path
from robeval.diagnose.methods.curvature_density import curvature_density
from robeval.diagnose.methods.label_leaking import label_leaking
from robeval.diagnose.methods.loss_surface import loss_surface
from robeval.diagnose.methods.perturbation_covariance import by_distance, perturbation_covariance
from robeval.diagnose.methods.softmax_path import softmax_path
from robeval.diagnose.methods.weight_surface import filter_normalised, weight_surface
from robeval.diagnose.subject import Subject
from robeval.reports.groups import Group
from robeval.reports.plots.kinds import KINDS
from tests import planted


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(planted.model("honest-standard"), planted.chosen(20), planted.NORM, planted.EPS, level="full")


def test_the_middle_of_a_surface_is_the_image_and_its_gradient_axis_rises(subject: Subject) -> None:
    data = loss_surface(subject, images=2, points=5).data
    for one in data["images"]:
        at = subject.images[torch.tensor([subject.place[one["index"]]])]
        ce = nn.functional.cross_entropy(subject.logits(at.x), at.y)
        assert one["ce"][2][2] == pytest.approx(float(ce), abs=1e-5)
        assert one["ce"][2][4] > one["ce"][2][2] and one["cw"][2][2] < 0


def test_the_weights_are_put_back_and_the_middle_is_the_trained_network(subject: Subject) -> None:
    before = subject.clean_logits().clone()
    data = weight_surface(subject, images=20, points=3).data
    ce = float(nn.functional.cross_entropy(before, subject.images.y))
    assert data["ce"][1][1] == pytest.approx(ce, rel=1e-4)
    assert all(row[k] > ce for j, row in enumerate(data["ce"]) for k in range(3) if (j, k) != (1, 1))
    assert torch.equal(subject.logits(subject.images.x), before)


def test_directions_have_the_norm_of_each_filter() -> None:
    weight = torch.randn(5, 3, 2, 2)
    said = filter_normalised(weight, 0, 1).flatten(1).norm(dim=1)
    assert torch.allclose(said, weight.flatten(1).norm(dim=1), rtol=1e-5)


def test_the_line_through_the_image_gives_its_own_probabilities_in_the_middle(subject: Subject) -> None:
    data = softmax_path(subject, images=3, points=11).data
    assert data["t"][5] == 0 and 0 < data["size"] <= planted.EPS * 1.001
    for one in data["images"]:
        p = subject.logits(subject.images.x[[subject.place[one["index"]]]]).softmax(1)[0]
        for name, curve in one["probabilities"].items():
            assert curve[5] == pytest.approx(float(p[int(name)]), abs=1e-5)


def test_loss_and_success_grow_along_the_path(subject: Subject) -> None:
    data = attack_path(subject, steps=10).data
    for one in data["losses"].values():
        assert one["broken"] == sorted(one["broken"]) and one["median"][-1] > one["median"][0]
        assert all(a <= b <= c for a, b, c in zip(one["low"], one["median"], one["high"], strict=True))


def test_covariance_against_distance_is_the_mean_over_all_pairs() -> None:
    d = torch.randn(3, 2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = [(i, j) for i in range(6) for j in range(5)]
    within, between = by_distance(d)
    for r in range(3):
        pairs = [(p, q) for p in places for q in places if round(float(np.hypot(p[0] - q[0], p[1] - q[1]))) == r]
        same = [float((d[:, c, p[0], p[1]] * d[:, c, q[0], q[1]]).mean()) for c in range(2) for p, q in pairs]
        other = [float((d[:, c, p[0], p[1]] * d[:, 1 - c, q[0], q[1]]).mean()) for c in range(2) for p, q in pairs]
        assert within[r] == pytest.approx(float(np.mean(same)), abs=1e-9)
        assert between[r] == pytest.approx(float(np.mean(other)), abs=1e-9)


class Leaking(nn.Module):
    """Reads the class from bit patterns that one signed step along the gradient leaves, and is wrong without them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -(x.flatten(1) - 0.5) @ self.weight * 1e-3 + self.read(x)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        moved = (x - 0.5).detach().flatten(1)
        return 100 * torch.relu(moved @ self.weight)


def test_a_model_that_reads_the_label_from_the_step_is_found_and_an_honest_one_is_not(subject: Subject) -> None:
    assert label_leaking(subject).result == CLEAR
    grey = planted.chosen(20)
    grey.x = torch.full_like(grey.x, 0.5)
    found = label_leaking(Subject(Classifier(Leaking(), 10), grey, "linf", 0.1))
    assert found.result == FAILED and len(found.flagged) > 10


def test_the_spectrum_is_that_of_the_whole_hessian(subject: Subject) -> None:
    """As many products as pixels give every eigenvalue, so the ends and the trace are exact."""
    found = curvature_density(subject, images=4, starts=1, steps=64).data
    chosen = subject.correct(4)
    x, y = chosen.x.double(), chosen.y
    net = copy.deepcopy(subject.model.module)
    assert isinstance(net, nn.Module)
    net.double()

    def loss(one: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(net(one.view_as(x[:1])), label[None])

    for k in range(len(chosen)):
        hessian = torch.autograd.functional.hessian(lambda one, k=k: loss(one, y[k]), x[k].flatten())
        values = torch.linalg.eigvalsh(hessian)
        size = float(values.abs().max())
        assert found["largest"][k] == pytest.approx(float(values[-1]), abs=1e-6 * size)
        assert found["least"][k] == pytest.approx(float(values[0]), abs=1e-6 * size)
        assert found["trace"][k] > 0  # the cross-entropy of a piecewise linear network is convex between kinks
    grid, heights = torch.tensor(found["eigenvalue"]), torch.tensor(found["density"])
    assert float(torch.trapezoid(heights, grid)) == pytest.approx(1, abs=0.02)


def test_every_kind_draws_what_was_stored(subject: Subject, tmp_path: Path) -> None:
    class Stored:
        folder = tmp_path

    def keep(key: str, found: Finding) -> None:
        (tmp_path / "evidence").mkdir(exist_ok=True)
        (tmp_path / "evidence" / f"{key}.json").write_text(json.dumps(found.data))

    keep("P2", attack_path(subject, steps=4))
    keep("P4", loss_surface(subject, images=2, points=5))
    keep("P7", weight_surface(subject, images=5, points=3))
    keep("P8", softmax_path(subject, images=2, points=5))
    keep("P9", perturbation_covariance(subject))
    keep("P10", curvature_density(subject, images=6, starts=1, steps=6))
    about = {"model": {"name": "net", "fingerprint": "f" * 64}, "data": {"fingerprint": "d" * 64}}
    group = Group("net", "linf", about)
    group.diagnoses.append(Stored())
    for kind in ("paths", "surface", "weights", "softmax", "covariance", "density"):
        (picture,) = KINDS[kind]([group])
        assert picture.svg().startswith("<svg") and "style=" not in picture.svg()
        assert len(picture.csv().splitlines()) > 5
        assert KINDS[kind]([Group("net", "linf", about)]) == []
    assert picture.draw("png").startswith(b"\x89PNG") and picture.draw("pdf").startswith(b"%PDF")
