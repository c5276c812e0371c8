"""The training loop: exact resume, the guard, warnings, logs, schedules; oracles O-66, O-72, O-74."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robeval.train.epoch as epoch_module
from robeval.core import catalogue
from robeval.core.errors import ContractBroken, FileRefused, MachineError, UsageError
from robeval.core.images import Images
from robeval.train import resume
from robeval.train.fit import FitResult, fit
from robeval.train.initial import seeded
from robeval.train.recipe import Recipe, make_optimizer
from robeval.train.step import Loss, fill_gradients
from robeval.train.warnings import Guard, after_epoch, before_training


def images(n: int = 60, seed: int = 0) -> Images:
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = 0.5 * torch.rand(n, 1, 4, 4, generator=g)
    for k in range(3):
        x[y == k, :, k : k + 2, k : k + 2] += 0.4
    return Images(x, y, torch.arange(1000, 1000 + n), "made/train", ["a", "b", "c"])


def network(batchnorm: bool = False, dropout: float = 0.0) -> nn.Module:
    def build() -> nn.Module:
        norm: list[nn.Module] = [nn.BatchNorm2d(4)] if batchnorm else []
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), *norm, nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 3)
        )

    return seeded(build, 4)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def go(folder: Path, spec: str = "adv:steps=2,eps=0.1", module: nn.Module | None = None, **more: Any) -> Any:
    names = set(Recipe.__dataclass_fields__)
    recipe = Recipe(**{"epochs": 3, "batch_size": 16, "eps": 0.1, **{k: v for k, v in more.items() if k in names}})
    module = module or network(dropout=0.3)
    rest = {"validation": images(30, 1), **{k: v for k, v in more.items() if k not in names}}
    result = fit(module, images(), method=catalogue.parse("trainers", spec), recipe=recipe, folder=folder, **rest)
    return result, weights(module)


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def on_progress(done: int, total: int, text: str) -> None:
        if done == step:
            raise Stop

    return on_progress


def test_it_learns_and_writes_a_log(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result, _ = go(tmp_path, epochs=8, on_progress=lambda done, total, text: seen.append((done, total)))
    assert isinstance(result, FitResult)
    assert result.metrics["clean_accuracy"] > 0.9
    assert result.rows[-1]["loss"] < result.rows[0]["loss"]
    assert seen == [(i + 1, 32) for i in range(32)]
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["epoch"]) for r in rows] == list(range(1, 9))
    assert float(rows[3]["pgd20_accuracy"]) == result.rows[3]["pgd20_accuracy"]
    assert {float(r["forward_per_step"]) for r in rows} == {3.0}
    assert {float(r["backward_per_step"]) for r in rows} == {3.0}
    assert float(rows[0]["grad_nonzero"]) == 16
    for name in ("confidence_clean", "confidence_random", "confidence_pgd1", "grad_l1", "grad_l2", "seconds"):
        assert float(rows[0][name]) > 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    options: dict[str, Any] = {"optimizer": optimizer, "lr": 0.02, "augment": "crop-flip", "save_steps": 2}
    whole, expected = go(tmp_path / "whole", **options)
    for step in (3, 6, 9):
        with pytest.raises(Stop):
            go(tmp_path / "broken", on_progress=stop_at(step), **options)
    result, resumed = go(tmp_path / "broken", **options)
    assert result.resumed == "yes"
    assert same(resumed, expected)
    drop = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    assert drop(result.rows) == drop(whole.rows)
    again, same_weights = go(tmp_path / "broken", on_progress=stop_at(1), **options)
    assert again.resumed == "finished"
    assert same(same_weights, expected)


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_train_fit import go
go(Path(sys.argv[1]), epochs=4, save_steps=1, on_progress=lambda *a: time.sleep(0.05))
"""


def test_kill_9_in_the_middle_and_the_same_command_again(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(tests=str(Path(__file__).parent)))
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    folder, state = tmp_path / "run", tmp_path / "run" / "state.pt"
    victim = subprocess.Popen([sys.executable, str(script), str(folder)], env=environment)
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.35)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    saved = torch.load(state, weights_only=True)
    assert 0 < saved["step"] < 16
    assert not saved["done"]
    result, resumed = go(folder, epochs=4, save_steps=1)
    assert result.resumed == "yes"
    _, expected = go(tmp_path / "whole", epochs=4)
    assert same(resumed, expected)
    assert [int(r["epoch"]) for r in csv.DictReader((folder / "log.csv").read_text().splitlines())] == [1, 2, 3, 4]


def test_o74_seed_and_only_the_seed_decides(tmp_path: Path) -> None:
    _, first = go(tmp_path / "a")
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    _, second = go(tmp_path / "b")
    assert torch.equal(torch.random.get_rng_state(), before)
    _, other = go(tmp_path / "c", seed=1)
    assert same(first, second)
    assert not same(first, other)


def test_another_training_in_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    go(tmp_path)
    with pytest.raises(UsageError, match=r"used lr 0\.05, you gave 0\.1") as error:
        go(tmp_path, lr=0.1)
    assert error.value.code == "R01"
    with pytest.raises(UsageError, match="used adv's steps 2, you gave 3"):
        go(tmp_path, "adv:steps=3,eps=0.1")
    with pytest.raises(UsageError, match="starting weights"):
        go(tmp_path, module=network(batchnorm=True))


def test_a_damaged_state_and_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(FileRefused, match="is damaged"):
        go(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(MachineError, match="cannot write"):
        resume.write_atomic(tmp_path / "file" / "state.pt", lambda file: file.write(b"x"))


def test_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robust, clean = iter([0.2, 0.5, 0.3, 0.3] * 3), iter([0.9, 0.6, 0.9, 0.95] * 3)
    base = {"confidence_clean": 0.5, "grad_nonzero": 16.0}
    monkeypatch.setattr(
        epoch_module, "measure", lambda *a, **k: {**base, "pgd20_accuracy": next(robust), "clean_accuracy": next(clean)}
    )
    assert go(tmp_path / "a", epochs=4)[0].epoch == 2
    assert go(tmp_path / "b", epochs=4, select_on="clean")[0].epoch == 4
    assert go(tmp_path / "c", epochs=4, select="last")[0].epoch == 4


def test_o72_guard() -> None:
    guard = Guard()
    assert [guard.fell(a) for a in (0.40, 0.42, 0.15)] == [False, False, True]


@pytest.mark.parametrize("select", ["last", "best"])
def test_o72_collapse_stops_and_restores_the_epoch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str
) -> None:
    sequence: Iterator[float] = iter([0.40, 0.42, 0.15, 0.9, 0.9])
    kept: list[dict[str, Tensor]] = []

    def measured(module: nn.Module, *args: Any, **options: Any) -> float:
        kept.append(weights(module))
        return next(sequence)

    monkeypatch.setattr(epoch_module, "pgd_accuracy", measured)
    result, final = go(tmp_path / select, epochs=5, select=select)
    assert result.stopped == "CATASTROPHIC_OVERFITTING"
    assert len(result.rows) == 3
    assert "CATASTROPHIC_OVERFITTING" in [n.code for n in result.notices]
    assert "CATASTROPHIC_OVERFITTING" in result.rows[2]["warnings"]
    assert result.epoch <= 2
    assert same(final, kept[1 if select == "last" else result.epoch - 1])


def test_a_loss_that_is_not_a_number_stops_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ContractBroken, match="training diverged") as error:
        go(tmp_path, "standard", lr=1e30, schedule="constant")
    assert error.value.code == "L01"
    assert "epoch 1" in error.value.where


def test_batchnorm_and_soar(tmp_path: Path) -> None:
    with pytest.raises(ContractBroken, match="BN_INCOMPATIBLE") as error:
        go(tmp_path / "a", "soar", network(batchnorm=True))
    assert error.value.code == "L02"
    assert not (tmp_path / "a").exists()
    result, _ = go(tmp_path / "b", "soar:batchnorm=frozen", network(batchnorm=True), epochs=1)
    assert {"BN_INCOMPATIBLE", "FROM_SCRATCH"} <= {n.code for n in result.notices}


def codes(spec: str, module: nn.Module | None = None, pretrained: bool = True) -> list[str]:
    return [n.code for n in before_training(catalogue.parse("trainers", spec), module or network(), pretrained)]


def test_warnings_before_training() -> None:
    assert codes("soar") == []
    assert codes("soar", pretrained=False) == ["FROM_SCRATCH"]
    assert codes("soar:init=zero") == codes("soar:init=rand") == ["RISKY_SETTING"]
    assert codes("standard", network(batchnorm=True), False) == codes("adv", network(batchnorm=True)) == []
    assert codes("fd-grad", network(batchnorm=True)) == ["BN_INCOMPATIBLE"]


def test_warnings_after_an_epoch() -> None:
    fine = {"confidence_clean": 0.8, "grad_nonzero": 16.0, "train_accuracy": 0.5, "clipped": 0.0}

    def found(*rows: dict[str, float], robust: bool = True) -> list[str]:
        return [n.code for n in after_epoch([{**fine, **r} for r in rows], robust=robust, size=16, classes=10)]

    assert found({}) == []
    assert found({"confidence_clean": 0.9995}) == ["GRADIENT_MASKING"]
    assert found({"grad_nonzero": 7.9}) == ["GRADIENT_MASKING"]
    assert found({"grad_nonzero": 7.9}, robust=False) == []
    inert = {"clipped": 0.96}
    assert found(inert, inert) == []
    assert found(inert, inert, inert) == ["SOAR_INERT"]
    assert found({}, {}, {}, {}, {"train_accuracy": 0.12}) == ["NOT_LEARNING"]
    assert found({}, {}, {}, {}, {"train_accuracy": 0.13}) == []


def test_o66_weight_decay_is_an_explicit_penalty() -> None:
    def trained(decay: float, penalty: float) -> dict[str, Tensor]:
        module = network().double()
        data = images()
        optimizer = make_optimizer(Recipe(lr=0.1, momentum=0.0, weight_decay=decay), module)
        for _ in range(3):
            total = nn.functional.cross_entropy(module(data.x.double()), data.y)
            total = total + penalty / 2 * sum(p.square().sum() for p in module.parameters())
            fill_gradients(list(module.parameters()), lambda total=total: Loss(total))
            optimizer.step()
        return weights(module)

    a, b, plain = trained(0.05, 0.0), trained(0.0, 0.05), trained(0.0, 0.0)
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=1e-12)
    assert not torch.allclose(a["0.weight"], plain["0.weight"], rtol=0, atol=1e-4)
