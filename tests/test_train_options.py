"""Options of the loop that go with any method: averages, weight perturbation, clipping, surrogate, selection."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from robeval.core import catalogue
from robeval.train.recipe import Recipe
from robeval.train.resume import LATER, identity_of
from robeval.train.warnings import after_epoch
from tests.test_train_fit import Stop, go, images, network, same, stop_at

OPTIONS: dict[str, dict[str, Any]] = {
    "ema": {"average": "ema", "average_decay": 0.9},
    "swa": {"average": "swa", "average_start": 0.3},
    "awp": {"awp": 0.01, "awp_warmup": 1},
    "clip": {"clip_gradient": 0.1},
}
#: Methods with a memory, with settings that keep a step short.
REMEMBERING = {
    "sgr": "sgr:source=grad",
    "mma": "mma:steps=2,d_max=0.1,eps_min=0.02",
    "free-at": "free-at:replays=2,eps=0.1",
    "soar": "soar:eps=0.1",
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("select", ["best", "last"])
def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path, option: str, select: str) -> None:
    how = {"save_steps": 2, "select": select, **OPTIONS[option]}
    whole, expected = go(tmp_path / "whole", module=network(batchnorm=True), **how)
    for step in (3, 7, 10):
        with pytest.raises(Stop):
            go(tmp_path / "broken", module=network(batchnorm=True), on_progress=stop_at(step), **how)
    result, resumed = go(tmp_path / "broken", module=network(batchnorm=True), **how)
    assert result.resumed == "yes"
    assert same(resumed, expected)
    _, plain = go(tmp_path / "plain", module=network(batchnorm=True), save_steps=2, select=select)
    assert not same(plain, expected)
    averaged = [name for name in whole.rows[-1] if name.startswith("averaged_")]
    assert len(averaged) == (2 if "average" in OPTIONS[option] else 0)


@pytest.mark.parametrize("method", [m for m in REMEMBERING if m in catalogue.methods("trainers")])
def test_a_killed_training_remembers(tmp_path: Path, method: str) -> None:
    spec = REMEMBERING[method]
    _, expected = go(tmp_path / "whole", spec, save_steps=1)
    for step in (2, 6, 9):
        with pytest.raises(Stop):
            go(tmp_path / "broken", spec, on_progress=stop_at(step), save_steps=1)
    result, resumed = go(tmp_path / "broken", spec, save_steps=1)
    assert result.resumed == "yes"
    assert same(resumed, expected)


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from tests.test_train_fit import go
go(Path(sys.argv[1]), sys.argv[2], epochs=4, save_steps=1, on_progress=lambda *a: time.sleep(0.05))
"""


@pytest.mark.parametrize("method", [m for m in ("soar", "sgr", "mma") if m in catalogue.methods("trainers")])
def test_kill_9_in_the_middle_of_an_epoch(tmp_path: Path, method: str) -> None:
    script, folder, spec = tmp_path / "child.py", tmp_path / "run", REMEMBERING[method]
    root = str(Path(__file__).parents[1])
    script.write_text(CHILD.format(root=root))
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen([sys.executable, str(script), str(folder), spec], env=environment)
    deadline = time.monotonic() + 60
    while not (folder / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    saved = torch.load(folder / "state.pt", weights_only=True)
    assert saved["step"] > 0
    assert not saved["done"]
    assert method == "soar" or saved["memory"]
    result, resumed = go(folder, spec, epochs=4, save_steps=1)
    assert result.resumed == "yes"
    assert same(resumed, go(tmp_path / "whole", spec, epochs=4)[1])


def test_swa_is_the_mean_of_the_epochs_ends(tmp_path: Path) -> None:
    ends = []

    def keep(module: torch.nn.Module) -> Any:
        return lambda done, total, text: ends.append([p.detach().clone() for p in module.parameters()])

    module = network()
    _, averaged = go(
        tmp_path, module=module, epochs=4, average="swa", average_start=0.5, select="last", on_progress=keep(module)
    )
    last_of_epoch = ends[3::4][-2:]  # four mini-batches an epoch; the mean begins after half of the epochs
    for k, name in enumerate(n for n, _ in module.named_parameters()):
        assert torch.allclose(averaged[name], (last_of_epoch[0][k] + last_of_epoch[1][k]) / 2, atol=1e-6)


def test_awp_costs_one_pass_each_way_more(tmp_path: Path) -> None:
    plain, _ = go(tmp_path / "a", module=network())
    shifted, _ = go(tmp_path / "b", module=network(), awp=0.01, awp_warmup=1)
    passes = lambda result: [(r["forward_per_step"], r["backward_per_step"]) for r in result.rows]
    assert passes(plain) == [(3, 3)] * 3
    assert passes(shifted) == [(3, 3), (4, 4), (4, 4)]


def test_the_surrogate_unmasks(tmp_path: Path) -> None:
    surrogate = network()
    go(tmp_path / "surrogate", "standard", module=surrogate, epochs=6)
    result, _ = go(tmp_path / "a", surrogate=surrogate)
    assert all(0 <= r["transfer_accuracy"] <= r["clean_accuracy"] for r in result.rows)
    pretrained, _ = go(tmp_path / "b", module=surrogate, pretrained=True)
    assert "transfer_accuracy" in pretrained.rows[0]
    assert "transfer_accuracy" not in go(tmp_path / "c")[0].rows[0]


ROW = {
    "confidence_clean": 0.9, "grad_nonzero": 16.0, "pgd20_accuracy": 0.8, "train_accuracy": 0.8, "clean_accuracy": 0.9,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, code",
    [
        ({"transfer_accuracy": 0.7}, "GRADIENT_MASKING"),
        ({"transfer_accuracy": 0.76}, None),
        ({"confidence_clean": 0.9995}, "GRADIENT_MASKING"),
        ({"grad_nonzero": 7.0}, "GRADIENT_MASKING"),
        ({"clean_train_accuracy": 0.7}, "LABEL_LEAKING"),
        ({"clean_train_accuracy": 0.81}, None),
        ({"confidence_clean": 0.36}, "UNIFORM"),
        ({"indefinite": 0.2}, "SGR_INDEFINITE"),
        ({"lowest_eigenvalue": -1.0}, None),
        ({"first_over_zeroth": 1e-4}, "RAT_NEGLIGIBLE"),
    ],
)
def test_warnings_after_an_epoch(change: dict[str, float], code: str | None) -> None:
    found = after_epoch([{**ROW, **change}] * 6, robust=True, size=16, classes=3)
    assert [n.code for n in found] == ([code] if code else [])


def test_selection_on_test_images_is_stamped(tmp_path: Path) -> None:
    result, _ = go(tmp_path, select_from="test", validation=images(30, 5))
    assert [n.code for n in result.notices if n.epoch == 0] == ["TEST_SELECTED"]
    assert "optimistic" in result.notices[0].text


def test_options_at_their_defaults_do_not_change_what_a_training_is() -> None:
    """A state that was written before an option existed can still be resumed."""
    named = identity_of("adv", {}, Recipe())
    assert not set(named) & set(LATER)
    assert set(asdict(Recipe())) - set(named) == set(LATER)
    assert identity_of("adv", {}, Recipe(awp=0.01))["awp"] == "0.01"
