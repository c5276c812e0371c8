"""The tests of the model's contract: silent on honest models, and each fault is seen by the test made for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robeval.core import catalogue
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.core.records import CLEAR, DOES_NOT_APPLY, FAILED, WARNING
from robeval.diagnose.finding import Finding, share_failed, surely, wilson
from robeval.diagnose.methods.hidden_optimisation import _Backwards
from robeval.diagnose.subject import Subject
from tests import planted
from tests.problems import images, network

CONTRACT = [m for m in catalogue.methods("diagnostics").values() if m.facts["group"] == 1]


def subject(model: Classifier | str, these: Images | None = None, **more: object) -> Subject:
    model = planted.model(model) if isinstance(model, str) else model
    return Subject(model, planted.chosen(64) if these is None else these, "linf", 0.15, **more)  # type: ignore[arg-type]


def found(test: str, of: Subject) -> Finding:
    (method,) = (m for m in CONTRACT if m.facts["id"] == test)
    finding: Finding = method.load()(of)
    return finding


@pytest.mark.parametrize("name", planted.HONEST)
def test_no_contract_test_accuses_an_honest_model(name: str) -> None:
    one = subject(name)
    results = {m.facts["id"]: m.load()(one).result for m in CONTRACT}
    assert results == {f"D{k}": CLEAR for k in range(1, 11)} | {"D9": DOES_NOT_APPLY}


@pytest.mark.parametrize(
    "test, name, result",
    [
        ("D1", "noise", FAILED),
        ("D2", "noise", FAILED),
        ("D2", "batchnorm-train", FAILED),
        ("D2", "batch-statistics", FAILED),
        ("D3", "softmax", FAILED),
        ("D3", "softmax-x1000", FAILED),
        ("D3", "one-hot", FAILED),
        ("D4", "batchnorm-train", FAILED),
        ("D4", "noise", WARNING),
        ("D5", "purifier", FAILED),
        ("D8", "constant", FAILED),
    ],
)
def test_each_fault_is_seen_by_its_test(test: str, name: str, result: str) -> None:
    finding = found(test, subject(name))
    assert finding.result == result
    assert finding.why
    assert finding.what_to_do


def test_noise_that_acts_only_while_gradients_are_recorded_is_seen() -> None:
    net = planted.standard()

    def shy(x: Tensor) -> Tensor:
        return net(x + 0.2 * torch.randn_like(x) if torch.is_grad_enabled() and x.requires_grad else x)

    assert found("D1", subject(Classifier(shy, 10))).result == FAILED


def test_a_declared_random_model_only_warns() -> None:
    one = subject("noise", randomised=True)
    assert found("D1", one).result == WARNING
    assert found("D2", one).result == DOES_NOT_APPLY
    assert found("D4", one).result == CLEAR


def test_backward_executions_are_counted_whatever_they_are_called() -> None:
    x = torch.ones(3, requires_grad=True)
    with _Backwards() as mode:
        (x * 2).exp().sum()
    assert len(mode.executions) == 0
    with _Backwards() as mode:
        for _ in range(4):
            torch.func.grad(lambda t: (t**3).sum())(torch.ones(2))
    assert len(mode.executions) == 4


@pytest.mark.parametrize(
    "after, kind",
    [
        (lambda z: z, "logits"),
        (lambda z: z.softmax(1), "probabilities"),
        (lambda z: z.log_softmax(1), "log-probabilities"),
        (lambda z: z.sigmoid(), "sigmoids"),
        (planted.one_hot, "one-hot"),
    ],
)
def test_kinds_of_output(after: Callable[[Tensor], Tensor], kind: str) -> None:
    net = planted.standard()
    assert found("D3", subject(Classifier(lambda x: after(net(x)), 10))).measured == kind


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(()))
        self.net = planted.standard()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


def test_state_that_a_pass_changes_is_named_and_put_back() -> None:
    net = Counting()
    one = subject(Classifier(net, 10))
    finding = found("D4", one)
    assert finding.result == FAILED
    assert "calls" in finding.why
    assert net.calls == 0


def test_not_a_number_is_found_at_corners_and_on_clean_images() -> None:
    net = planted.standard()
    for where, mask in (("corners", lambda x: x.mean((1, 2, 3)) > 0.9), ("clean", lambda x: x[:, 0, 0, 0] >= 0)):
        bad = Classifier(lambda x, m=mask: net(x).masked_fill(m(x)[:, None], torch.nan), 10)
        finding = found("D6", subject(bad))
        assert finding.result == FAILED
        assert where in finding.why


def test_an_overwritten_input_is_found() -> None:
    net = planted.standard()
    finding = found("D6", subject(Classifier(lambda x: net(x.detach().mul_(0.9)), 10)))
    assert "overwrites its input" in finding.why


def test_a_forgotten_normalisation_is_found() -> None:
    net, these = planted.standard(), planted.chosen(64)
    mean, std = these.x.mean(), these.x.std()
    wants = Classifier(lambda x: net(x * std + mean), 10)
    these.x = 0.4 + 0.1 * these.x
    assert found("D10", subject(wants, these)).result == FAILED


def test_two_classes_show_the_fallback() -> None:
    model, these = network(classes=2)
    finding = found("D7", subject(model, these))
    assert finding.result == CLEAR
    assert "margin instead of dlr" in finding.measured


def test_unbalanced_data_only_warn_of_one_answer() -> None:
    one_class = images(torch.rand(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64), 3)
    model = Classifier(lambda x: torch.tensor([3.0, 0.0, 1.0]) + 0 * x.flatten(1)[:, :1], 3)
    assert found("D8", subject(model, one_class)).result == WARNING


def test_steps_lost_in_bfloat16_are_counted() -> None:
    half = Classifier(planted.plain_net().to(torch.bfloat16), 10)
    these = planted.chosen(32)
    these.x = these.x.to(torch.bfloat16)
    finding = found("D9", Subject(half, these, "linf", 0.1 / 255))
    assert finding.result == WARNING
    assert "steps lost in bfloat16" in finding.measured


@pytest.mark.parametrize("k, n", [(3, 200), (4, 500), (6, 1000), (29, 10_000)])
def test_the_smallest_count_that_fails_is_the_specified_one(k: int, n: int) -> None:
    assert share_failed(k, n, 0.002)
    assert not share_failed(k - 1, n, 0.002)


def test_intervals_against_closed_forms() -> None:
    assert surely(0, 10) == 0
    assert surely(10, 10) == pytest.approx(0.05**0.1)
    assert wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert wilson(0, 0) is None
