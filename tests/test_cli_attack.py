"""``robeval attack`` end to end on real digits: the same answer however it is run, and one sentence on bad input."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from robeval.models.build import build
from robeval.models.checkpoint import save
from robeval.store.runstore import RunStore
from tests.command import here, start
from tests.problems import trained

COMPARED = [
    "index", "label", "clean_prediction", "attack", "eps", "success", "prediction", "distance_linf", "distance_l2",
    "distance_l1", "distance_l0", "margin", "attempt", "iterations", "forwards", "backwards", "first_success_forward",
    "survives_8bit",
]  # fmt: skip
ATTACKS = ["--attack", "pgd:steps=5,restarts=3", "--attack", "deepfool:steps=5", "--attack", "square:queries=20"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits model trained for a few seconds, in a folder of its own."""
    return trained(tmp_path_factory.mktemp("model") / "m.pt", "digits_cnn")


def rows(folder: Path) -> pd.DataFrame:
    (run,) = (folder / "runs").iterdir()
    frame = RunStore.open(run).frame()
    return frame.sort_values(["index", "attack", "eps"])[COMPARED].reset_index(drop=True)


def attack(model: Path, cwd: Path, *more: str) -> pd.DataFrame:
    code, _, err = here(
        "attack", str(model), "--no-diagnose", *ATTACKS, "--eps", "1/16,2/16", "--images", "16", "-q", *more, cwd=cwd
    )
    assert code == 0, err
    return rows(cwd)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    frame = attack(model, tmp_path_factory.mktemp("whole"))
    assert len(frame[frame["attack"] == "clean"]) == 16
    assert 0 < frame.loc[frame["attack"].str.startswith("pgd"), "success"].mean() < 1
    return frame


@pytest.mark.parametrize("batch", ["1", "7"])
def test_the_batch_size_changes_nothing(model: Path, whole: pd.DataFrame, tmp_path: Path, batch: str) -> None:
    pd.testing.assert_frame_equal(attack(model, tmp_path, "--batch-size", batch), whole, check_exact=True)


def test_two_shards_joined_are_the_whole(model: Path, whole: pd.DataFrame, tmp_path: Path) -> None:
    attack(model, tmp_path, "--shard", "1/2")
    assert len(rows(tmp_path)) < len(whole)
    pd.testing.assert_frame_equal(attack(model, tmp_path, "--shard", "2/2"), whole, check_exact=True)


def test_kill_9_and_the_same_command_again(model: Path, whole: pd.DataFrame, tmp_path: Path) -> None:
    words = [
        "attack",
        str(model),
        "--no-diagnose",
        *ATTACKS,
        "--eps",
        "1/16,2/16",
        "--images",
        "16",
        "-q",
        "--batch-size",
        "1",
    ]
    killed = 0
    for _ in range(2):
        process = start(*words, cwd=tmp_path)
        parts = len(list((tmp_path / "runs").glob("*/records/*.parquet")))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list((tmp_path / "runs").glob("*/records/*.parquet"))) > parts:  # something new is on disk
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
    assert killed
    pd.testing.assert_frame_equal(attack(model, tmp_path), whole, check_exact=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_what_was_decided(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    words = [
        "attack",
        str(model),
        "--no-diagnose",
        "--attack",
        "square",
        "--eps",
        "1/16",
        "--images",
        "30",
        "-q",
        "--batch-size",
        "2",
    ]
    process = start(*words, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs").glob("*/records/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "the same command goes on" in err
    assert "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert RunStore.open(folder).sessions()[0]["exit_code"] == 128 + number


def test_json_is_one_document_and_verify_agrees(model: Path, tmp_path: Path) -> None:
    words = ("attack", str(model), "--no-diagnose", "--suite", "quick", "--eps", "1/16", "--images", "30", "--json")
    code, out, err = here(*words, cwd=tmp_path)
    assert (code, err) == (0, "")
    document = json.loads(out)
    again = json.loads(here(*words, cwd=tmp_path)[1])  # resumed: nothing to do, the same numbers
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in document.items() if k != "seconds"}
    code, out, _ = here("verify", "runs", "--json", cwd=tmp_path)
    assert code == 0
    assert json.loads(out)[0]["confirmed"] == document["verified"] > 0
    code, out, _ = here("cite", "runs", cwd=tmp_path)
    assert code == 0
    assert "arXiv:2003.01690" in out


def test_verify_catches_a_forged_image(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    here(
        "attack", str(model), "--no-diagnose", "--attack", "pgd", "--eps", "2/16", "--images", "30", "-q", cwd=tmp_path
    )
    (folder,) = (tmp_path / "runs").iterdir()
    store = RunStore.open(folder)
    frame = store.frame()
    assert frame["success"].any()
    for part in folder.glob("examples/*.safetensors"):
        tensors = {k: v * 0 for k, v in load_file(part).items()}
        save_file(tensors, part)
    code, _, err = here("verify", "runs", cwd=tmp_path)
    assert code != 0
    assert "robeval: error" in err or "fails its checksum" in err


def test_each_attacks_every_correct_image(model: Path, tmp_path: Path) -> None:
    code, _, _ = here(
        "attack",
        str(model),
        "--no-diagnose",
        "--suite",
        "quick",
        "--eps",
        "2/16",
        "--images",
        "30",
        "--each",
        "-q",
        cwd=tmp_path,
    )
    assert code == 0
    frame = rows(tmp_path)
    correct = int((~frame.loc[frame["attack"] == "clean", "success"]).sum())
    assert set(frame.groupby("attack").size().drop("clean")) == {correct}


def test_a_gate_fails_with_exit_7(model: Path, tmp_path: Path) -> None:
    words = ["attack", str(model), "--no-diagnose", "--attack", "pgd", "--eps", "4/16", "--images", "30", "-q"]
    code, _, err = here(*words, "--fail-under", "0.99", cwd=tmp_path)
    assert (code, err.splitlines()[0][:23]) == (7, "robeval: error[G01] rob")
    assert here(*words, "--fail-under", "0.0", cwd=tmp_path)[0] == 0


def test_a_mistyped_command_is_told_the_closest(tmp_path: Path) -> None:
    code, out, err = here("certfy", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert 'error[A04] unknown command "certfy"; did you mean certify' in err


BAD = [
    (["gone.pt"], 3, "M01", "no model file"),
    (["empty.pt"], 3, "M03", "is empty"),
    (["cut.pt"], 3, "M04", "cut short"),
    (["wide.pt"], 4, "", "classes"),
    (["MODEL", "--attack", "pdg"], 2, "A04", "did you mean pgd"),
    (["MODEL", "--attack", "fgsm", "--norm", "l2"], 2, "A06", "no l2 form"),
    (["MODEL", "--norm", "l7"], 2, "A04", "unknown norm"),
    (["MODEL", "--eps", "8/0"], 2, "A02", "divides by zero"),
    (["MODEL", "--eps", "8"], 2, "A03", "did you mean 8/255"),
    (["MODEL", "--suite", "slow"], 2, "A04", "unknown suite"),
    (["MODEL", "--attack", "pgd"], 2, "A02", "needs a radius"),
    (["MODEL", "--eps", "0.1", "--shard", "3/2"], 2, "A04", "--shard"),
    (["MODEL", "--eps", "0.1", "--data", "npz:bright.npz"], 4, "D06", "range 0 to 255"),
    (["MODEL", "--eps", "0.1", "--data", "npz:gone.npz"], 3, "D01", "gone.npz"),
    (["nan.pt", "--eps", "0.1"], 4, "M12", "NaN"),
    (["MODEL", "--eps", "0.1", "--device", "cuda:99"], 5, "E02", "no device"),
]


@pytest.mark.parametrize(("words", "exit_code", "code", "says"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input(model: Path, tmp_path: Path, words: list[str], exit_code: int, code: str, says: str) -> None:
    import numpy as np

    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.pt").write_bytes(model.read_bytes()[:2000])
    net = build("digits_cnn", classes=7)
    arguments = {"classes": 7}
    common: dict[str, Any] = {
        "architecture": "digits_cnn",
        "normalise": "none",
        "input_shape": (1, 8, 8),
        "recipe": {},
        "metrics": {},
    }
    save(tmp_path / "wide.pt", net, arguments=arguments, classes=[str(k) for k in range(7)], **common)
    broken = build("digits_cnn")
    next(broken.parameters()).data[0] = torch.nan
    save(tmp_path / "nan.pt", broken, arguments={}, classes=[str(k) for k in range(10)], **common)
    bright = np.linspace(0, 255, 256, dtype=np.float32).reshape(4, 1, 8, 8)
    np.savez(tmp_path / "bright.npz", x=bright, y=np.zeros(4, np.int64))
    before = sorted(tmp_path.rglob("*"))
    words = [str(model) if w == "MODEL" else w for w in words]
    got, out, err = here("attack", *words, cwd=tmp_path)
    assert got == exit_code, err
    assert says in err
    assert f"error[{code}" in err
    assert "Traceback" not in err
    assert out == ""
    assert len(err.strip().splitlines()) <= 4
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written
