"""Several devices train as one does: shares of the mini-batch, merged memories, one set of weights, clear refusals."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from robeval.core.errors import ContractBroken, MachineError, RobevalError, UsageError
from robeval.train.devices import ALONE, Devices, before_sharing, together
from robeval.train.step import Loss, about, fill_gradients
from tests import test_train_fit
from tests.test_train_fit import Stop, go, images, same, stop_at

T = TypeVar("T")
MMA = "mma:steps=2,d_max=0.1,eps_min=0.02"
#: Name -> method and options of the loop.
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "adv": ("adv:steps=2,eps=0.1", {}),
    "mma": (MMA, {}),
    "awp": ("adv:steps=2,eps=0.1", {"awp": 0.02}),
    "clip": ("adv:steps=2,eps=0.1", {"clip_gradient": 0.1}),
    "average": ("trades:steps=2,eps=0.1", {"average": "swa", "average_start": 0.0}),
    "random rows": ("fgsm-at:eps=0.1", {"augment": "crop-flip"}),
    "free-at": ("free-at:replays=2,eps=0.1", {}),
    "fixed covariance": ("sgr:source=data", {}),
    "noise on weights": ("rat:steps=2,eps=0.1", {}),
}


BUILDING = threading.Lock()


def network(**options: Any) -> nn.Module:
    """The small network of test_train_fit, built by one thread at a time: they share the global generator."""
    with BUILDING:
        return test_train_fit.network(**options)


def in_threads(count: int, job: Callable[[Devices], T]) -> list[T | Exception]:
    """What a job comes to in each of several threads, which talk like processes."""
    barrier, slots = threading.Barrier(count, timeout=30), [torch.zeros(0)] * count

    def all_reduce(rank: int, tensor: Tensor) -> Tensor:
        slots[rank] = tensor
        barrier.wait()
        total = torch.stack(slots).sum(0)
        barrier.wait()
        return total

    def one(rank: int) -> T | Exception:
        try:
            return job(Devices(count, rank, SimpleNamespace(all_reduce=lambda t, reduce_op: all_reduce(rank, t))))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def several(folder: Path, spec: str, count: int = 2, **options: Any) -> list[Any]:
    """(result, weights) of each device; every one has a folder of its own, to see who writes."""

    def job(devices: Devices) -> Any:
        return go(folder / str(devices.rank), spec, devices=devices, **{"module": network(), **options})

    found = in_threads(count, lambda devices: job(devices))
    for result in found:
        if isinstance(result, Exception):
            raise result
    return found


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    return a.keys() == b.keys() and all(float((a[k] - b[k]).abs().max()) <= tolerance for k in a)


def numbers(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {k: [r[k] for r in rows] for k in rows[0] if k not in ("seconds", "warnings")}


@pytest.mark.parametrize("name", TRAININGS)
def test_two_devices_end_where_one_does(tmp_path: Path, name: str) -> None:
    spec, options = TRAININGS[name]
    options = {"batch_size": 13, "epochs": 2, "select": "last", **options}  # 13 and the last 8: uneven shares
    alone, expected = go(tmp_path / "alone", spec, module=network(), **options)
    (first, mine), (_, other) = several(tmp_path, spec, **options)
    assert same(mine, other)
    assert close(mine, expected)
    assert first.steps == alone.steps
    for column, values in numbers(alone.rows).items():
        rel = 0.05 if column == "first_over_zeroth" else 1e-3  # a ratio of two means, which each device takes itself
        assert numbers(first.rows)[column] == pytest.approx(values, rel=rel, abs=1e-6), column
    assert sorted(p.name for p in (tmp_path / "0").iterdir()) == ["log.csv", "state.pt"]
    assert not (tmp_path / "1").exists()
    kept = [torch.load(tmp_path / part / "state.pt", weights_only=True)["memory"] for part in ("alone", "0")]
    assert close(*kept)


def test_sgr_learns_the_covariance_of_all_devices(tmp_path: Path) -> None:
    """Each penalty sees its own device's newest perturbations, so it is not the same training, but nearly."""
    _, expected = go(tmp_path / "alone", "sgr", module=network(), select="last")
    (result, mine), (_, other) = several(tmp_path, "sgr", select="last")
    assert same(mine, other)
    assert close(mine, expected, 1e-3)
    assert [n.code for n in result.notices if n.epoch == 0] == ["PER_DEVICE"]
    kept = [torch.load(tmp_path / part / "state.pt", weights_only=True)["memory"] for part in ("alone", "0")]
    assert torch.allclose(kept[0]["moment"], kept[1]["moment"], rtol=1e-2)


@pytest.mark.parametrize("spec", [MMA, "free-at:replays=2,eps=0.1", "adv:steps=2,eps=0.1"])
def test_a_last_mini_batch_with_fewer_images_than_devices(tmp_path: Path, spec: str) -> None:
    _, expected = go(tmp_path / "alone", spec, module=network(), batch_size=59, epochs=2)
    found = several(tmp_path, spec, count=3, batch_size=59, epochs=2)
    assert all(close(weights, expected) for _, weights in found)


def test_dropout_draws_another_mask_on_each_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    class Listening(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seeds.append(torch.initial_seed())
            return x

    monkeypatch.setattr(Devices, "agree", lambda *_: None)
    for rank in range(2):  # one after the other: threads share the global generator
        module = nn.Sequential(network(), Listening(0.5))
        one = Devices(2, rank, SimpleNamespace(all_reduce=lambda t, reduce_op: t))
        go(tmp_path / str(rank), "standard", module=module, devices=one, epochs=1)
    assert len(seeds) == len(set(seeds)) == 8


def test_another_number_of_devices_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_steps": 1, "select": "last"}
    _, expected = go(tmp_path / "alone", MMA, module=network(), **options)
    with pytest.raises(Stop):
        go(tmp_path / "0", MMA, module=network(), on_progress=stop_at(6), **options)
    (tmp_path / "1").symlink_to(tmp_path / "0")
    (result, weights), _ = several(tmp_path, MMA, **options)
    assert result.resumed == "yes"
    assert close(weights, expected)


def test_batchnorm_has_one_set_of_running_statistics_and_a_warning(tmp_path: Path) -> None:
    def job(devices: Devices) -> Any:
        return go(tmp_path / str(devices.rank), module=network(batchnorm=True), devices=devices, epochs=1)

    (result, a), (_, b) = in_threads(2, job)  # type: ignore[misc]
    assert same(a, b)
    assert [(n.code, "BatchNorm" in n.text, "8 in a step" in n.text) for n in result.notices if n.epoch == 0] == [
        ("PER_DEVICE", True, True)
    ]


def test_devices_that_hold_different_things_are_stopped(tmp_path: Path) -> None:
    def seeds(devices: Devices) -> Any:
        return go(tmp_path / str(devices.rank), "standard", module=network(), devices=devices, seed=devices.rank)

    def drifts(devices: Devices) -> Any:
        module = network()

        def drift(done: int, total: int, text: str) -> None:
            with torch.no_grad():
                next(module.parameters()).add_(1e-6)  # only the first device reports progress

        return go(tmp_path / f"w{devices.rank}", "standard", module=module, devices=devices, on_progress=drift)

    for job, what in ((seeds, "different settings"), (drifts, "different weights")):
        errors = in_threads(2, job)
        assert all(isinstance(e, ContractBroken) and e.code == "L04" and what in e.what for e in errors)


def test_a_loss_that_is_not_a_number_on_one_device_stops_all(tmp_path: Path) -> None:
    def job(devices: Devices) -> Any:
        weight = nn.Parameter(torch.ones(2))
        total = weight.sum() * (float("nan") if devices.rank else 1.0)
        return fill_gradients([weight], about(devices.part(4), lambda: Loss(total)))

    errors = in_threads(2, job)
    assert all(isinstance(e, ContractBroken) and e.code == "L01" for e in errors)


def test_the_clipped_part_of_a_loss_is_clipped_over_all_devices() -> None:
    rows = torch.tensor([[3.0, 0.0], [0.0, 4.0], [5.0, 1.0]])

    def job(devices: Devices) -> Any:
        weight, mine = nn.Parameter(torch.ones(2)), devices.share(rows)
        loss = lambda: Loss((mine @ weight).square().mean(), apart=(mine @ weight).mean(), apart_limit=0.5)
        return fill_gradients([weight], about(devices.part(3), loss)), weight.grad

    (expected, gradient), *found = job(ALONE), *in_threads(2, job)
    for logs, grad in found:  # type: ignore[misc]
        assert torch.allclose(grad, gradient)
        assert logs == pytest.approx(expected)
        assert logs["gradient_clipped"] == 1.0


def test_what_nobody_knows_how_to_share_is_refused() -> None:
    errors = in_threads(2, lambda d: d.collect({"streak": torch.zeros(3)}, {}, torch.arange(4)))
    assert all(isinstance(e, UsageError) and '"streak"' in e.what for e in errors)
    assert ALONE.collect({"streak": torch.zeros(3)}, {}, torch.arange(4)).keys() == {"streak"}
    with pytest.raises(UsageError, match="of 1 images cannot be shared by 2 devices"):
        before_sharing(Devices(2), "adv", network(), 1)


STARTED = ("WORLD_SIZE", "GROUP_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")


@pytest.mark.parametrize(
    "count, device, started, message",
    [
        (2, "cpu", {}, "needs 2 processes, and this command runs as 1.*torchrun --nproc-per-node 2"),
        (2, "cpu", {"WORLD_SIZE": "4"}, "needs 2 processes, and this command runs as 4"),
        (2, "cpu", {"SLURM_STEP_NUM_TASKS": "3"}, "this command runs as 3"),
        (1, "cpu", {"WORLD_SIZE": "2"}, "needs 1 process, and this command runs as 2.*without torchrun"),
        (0, "cpu", {}, "devices must be at least 1"),
        (2, "cuda:1", {"WORLD_SIZE": "2"}, "cuda:1 is one device"),
        (64, "cuda", {"WORLD_SIZE": "64"}, "need as many GPUs"),
        (2, "cpu", {"WORLD_SIZE": "2"}, "needs the package lightning-fabric.*robeval.fabric."),
    ],
)
def test_a_command_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, count: int, device: str, started: dict[str, str], message: str
) -> None:
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises((UsageError, MachineError), match=f"(?s){message}") as error:
        together(count, device)
    assert isinstance(error.value, RobevalError)
    assert error.value.code == ("A07" if "package" in message else "E02" if "GPUs" in message else "A04")


def test_one_device_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert together(1) == (ALONE, torch.device("cpu"))
    rows = images().ids[:5]
    assert torch.equal(ALONE.share(rows), rows)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from robeval.train.devices import together
from tests.test_train_devices import TRAININGS
from tests.test_train_fit import go, network
devices, device = together(2)
for name in {names!r}:
    spec, options = TRAININGS[name]
    _, weights = go(Path(sys.argv[1]) / name, spec, module=network(), devices=devices, device=device, select="last")
    torch.save(weights, Path(sys.argv[1]) / f"{{name}}-{{devices.rank}}.pt")
"""


@pytest.mark.skipif(find_spec("lightning_fabric") is None, reason="needs the extra fabric: lightning-fabric")
def test_torchrun_with_two_processes(tmp_path: Path) -> None:
    names, root = ["standard", "adv", "mma"], str(Path(__file__).parents[1])
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(root=root, names=names))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*launcher, str(script), str(tmp_path)], env=environment, capture_output=True, timeout=240)
    assert ended.returncode == 0, ended.stderr.decode()
    for name in names:
        _, expected = go(tmp_path / "alone" / name, TRAININGS[name][0], module=network(), select="last")
        mine, other = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
        assert same(mine, other)
        assert close(mine, expected)
