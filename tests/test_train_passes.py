"""What a step of each trainer costs in forward and backward passes, and which ones differentiate twice."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from robeval.core import catalogue
from robeval.core.streams import Streams
from robeval.train.awp import perturbed_weights
from robeval.train.memory import Memory
from robeval.train.passes import counting
from robeval.train.step import fill_gradients, objectives

#: Attack steps, and SOAR's Gaussian vectors.
K, N = 3, 2


class Row(NamedTuple):
    """A method with its settings; passes forward and backward; whether it needs double backpropagation.

    Args:
        awp: Radius of adversarial weight perturbation around the step.
        merged: Backward passes that the table counts and the method does not need.
    """

    spec: str
    forward: int
    backward: int
    double: bool = False
    awp: float = 0.0
    merged: int = 0


TABLE = {
    "standard": Row("standard", 1, 1),
    "weight decay": Row("weight-decay", 1, 1),
    "LRC-noise": Row("lrc-noise", 1, 1),
    "ADV-k": Row(f"adv:steps={K}", K + 1, K + 1),
    "FGSM-AT": Row("fgsm-at", 2, 2),
    "adversarial augmentation-k": Row(f"adv-augment:steps={K}", K + 2, K + 1),
    "Free-m": Row(f"free-at:replays={K}", K, K),
    "TRADES-k": Row(f"trades:steps={K}", K + 3, K + 1),
    "MART-k": Row(f"mart:steps={K}", K + 2, K + 1),
    # The table goes backward once for each of MMA's two losses; here one call of autograd descends their mixture.
    "MMA-k, 10 bisections": Row(f"mma:steps={K},bisections=10", K + 13, K + 2, merged=1),
    "AWP-ADV-k": Row(f"adv:steps={K}", K + 2, K + 2, awp=0.01),
    "AWP-TRADES-k": Row(f"trades:steps={K}", K + 5, K + 2, awp=0.005),
    "SOAR zero": Row("soar:init=zero", 2, 3, True),
    "SOAR rand": Row("soar:init=rand", 2, 3, True),
    "SOAR PGD1": Row("soar:init=pgd1", 3, 4, True),
    "SOAR PGD1, n vectors": Row(f"soar:init=pgd1,samples={N}", 2 + N, 3 + N, True),
    "CURE": Row("cure", 2, 3, True),
    "LLR-k": Row(f"llr:steps={K}", K + 2, K + 2, True),
    "GN": Row("gn", 1, 2, True),
    "SGR grad": Row("sgr:source=grad", 1, 2, True),
    "SGR sign": Row("sgr:source=sign", 1, 2, True),
    "SGR FGSM": Row("sgr:source=fgsm", 2, 3, True),
    "SGR PGD-k": Row(f"sgr:source=pgd,steps={K}", K + 1, K + 2, True),
    "FD O1": Row("fd-grad:order=1", 2, 2),
    "FD O2": Row("fd-grad:order=2", 3, 2),
    "RAT": Row(f"rat:steps={K},impl=antithetic", K + 7, K + 1),
    "FOAR zero": Row("foar:init=zero", 1, 2, True),
    "Gaussian noise": Row("noise", 1, 1),
    # Intervals are two passes, centres and radii; the linear bounds of 3 classes three more.
    "IBP, clean alone": Row("ibp:kappa=1,ramp=0,warmup=0", 1, 1),
    "IBP": Row("ibp:ramp=0,warmup=0", 3, 1),
    "CROWN-IBP": Row("crown-ibp:beta=0.5,ramp=0,warmup=0", 6, 1),
    "CROWN-IBP at the end": Row("crown-ibp:ramp=0,warmup=0", 3, 1),
    "FOAR PGD1": Row("foar:init=pgd1", 2, 3, True),
}


def cost(row: Row, batch: int = 8) -> tuple[float, float]:
    """Images passed forward and backward in the first mini-batch, divided by its size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(64, 3)).double()
    x, y = torch.rand(batch, 1, 4, 4, dtype=torch.float64), torch.arange(batch) % 3
    spec, rng = catalogue.parse("trainers", row.spec), Streams(0, range(batch), "passes", dtype=x.dtype)
    parameters, memory = list(model.parameters()), Memory(ids=torch.arange(batch))
    with counting(model) as passes:
        for objective in objectives(spec.method.load(), model, x, y, rng, spec.settings, memory):
            if row.awp:
                with perturbed_weights(model, objective, row.awp) as there:
                    fill_gradients(parameters, there)
            else:
                fill_gradients(parameters, objective)
    return passes.forward / batch, passes.backward / batch


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, plain = TABLE[name], torch.autograd.grad
    twice: list[bool] = []

    def grad(*args: Any, **kwargs: Any) -> Any:
        twice.append(bool(kwargs.get("create_graph", False)))
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    assert cost(row) == (row.forward, row.backward - row.merged)
    assert any(twice) is row.double


@pytest.mark.parametrize("spec", sorted({row.spec.partition(":")[0] for row in TABLE.values()}))
def test_the_count_does_not_depend_on_the_batch(spec: str) -> None:
    assert cost(Row(spec, 0, 0), batch=4) == cost(Row(spec, 0, 0), batch=9)
