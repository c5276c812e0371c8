"""The set-up: when it installs, what it says when it cannot, and that a second call starts the job at once."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from robeval import bootstrap

ROOT = Path(__file__).resolve().parent.parent


class Recorder:
    """Stands in for subprocess.run: makes the environment's python, remembers commands, fails or stops on demand."""

    def __init__(self, root: Path) -> None:
        self.root, self.commands, self.fail_on, self.stop_on = root, list[str](), "", ""

    def run(self, command: list[str], **_: Any) -> SimpleNamespace:
        line = " ".join(command)
        self.commands.append(line)
        if self.stop_on and self.stop_on in line:
            raise KeyboardInterrupt
        if self.fail_on and self.fail_on in line:
            return SimpleNamespace(returncode=1, stdout="no space left on device")
        if "-m venv" in line:
            python = self.root / ".venv" / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        return SimpleNamespace(returncode=0, stdout="")

    @property
    def installed(self) -> list[str]:
        return [line for line in self.commands if " install " in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout with what decides on the installation."""
    (tmp_path / "robeval").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "robeval/bootstrap.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


@pytest.fixture
def recorder(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(checkout)
    monkeypatch.setattr(subprocess, "run", recorder.run)
    monkeypatch.setattr(bootstrap, "ROOT", checkout)
    return recorder


def test_it_installs_the_pins_in_order_and_leaves_a_stamp(checkout: Path, recorder: Recorder) -> None:
    assert bootstrap.install(checkout) == checkout / ".venv" / "bin"
    assert "-m venv" in recorder.commands[0]
    pip, torch, house, rival = (line.split("constraints.txt ")[1] for line in recorder.installed)
    assert pip.startswith("pip==")
    assert torch == "torch==2.13.0"
    assert house.startswith(f"-e {checkout}[dev] pyautoattack==")
    assert rival.startswith("--no-deps torchattacks==")
    assert all(f"-c {checkout}/constraints.txt" in line for line in recorder.installed)
    assert (checkout / ".venv" / "robeval-stamp").read_text() == bootstrap.fingerprint(checkout)


def test_a_second_call_installs_nothing(checkout: Path, recorder: Recorder) -> None:
    bootstrap.install(checkout)
    recorder.commands.clear()
    bootstrap.install(checkout)
    assert recorder.commands == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "robeval/bootstrap.py"])
def test_a_changed_pin_installs_again_into_the_same_environment(checkout: Path, recorder: Recorder, name: str) -> None:
    bootstrap.install(checkout)
    (checkout / name).write_text((checkout / name).read_text() + "\n# changed\n")
    recorder.commands.clear()
    bootstrap.install(checkout)
    assert len(recorder.installed) == 4
    assert not [line for line in recorder.commands if "-m venv" in line]


def test_a_lost_interpreter_makes_the_environment_again(checkout: Path, recorder: Recorder) -> None:
    bootstrap.install(checkout)
    (checkout / ".venv" / "bin" / "python").unlink()
    recorder.commands.clear()
    bootstrap.install(checkout)
    assert "-m venv --clear" in recorder.commands[0]


def test_the_stamp_belongs_to_its_place(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = tmp_path_factory.mktemp("moved") / "checkout"
    checkout.rename(moved)
    before = bootstrap.fingerprint(moved)
    moved.rename(checkout)
    assert bootstrap.fingerprint(checkout) != before


@pytest.mark.parametrize("step", ["pip==", "torch==", "[dev]", "torchattacks=="])
def test_an_interrupted_installation_leaves_no_stamp(checkout: Path, recorder: Recorder, step: str) -> None:
    bootstrap.install(checkout)
    (checkout / "constraints.txt").write_text((checkout / "constraints.txt").read_text() + "# new\n")
    recorder.stop_on = f" {step}" if step != "[dev]" else step
    assert bootstrap.main(["test"]) == 130
    assert not (checkout / ".venv" / "robeval-stamp").exists()


def test_a_failed_step_is_told_with_its_last_words(
    checkout: Path, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.fail_on = " torch=="
    assert bootstrap.main(["demo"]) == 5
    said = capsys.readouterr().err
    assert "failed with exit code 1" in said
    assert "no space left on device" in said
    assert "Traceback" not in said
    assert not (checkout / ".venv" / "robeval-stamp").exists()


def test_an_old_python_is_refused_by_name() -> None:
    with pytest.raises(bootstrap.Trouble, match=r"Python 3\.11 or newer is needed, this is 3\.9\.2"):
        bootstrap.check_python((3, 9, 2))
    bootstrap.check_python((3, 11, 0))


def test_an_old_python_can_still_read_this_file() -> None:
    for name in ("__init__.py", "bootstrap.py"):
        ast.parse((ROOT / "robeval" / name).read_text(), feature_version=(3, 7))


def test_a_python_without_ensurepip_is_told_how_to_get_it(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    assert bootstrap.main(["test"]) == 5
    said = capsys.readouterr().err
    assert "no ensurepip" in said
    assert f"apt install python3.{sys.version_info[1]}-venv" in said
    assert recorder.commands == []


@pytest.mark.parametrize(
    "words, command",
    [
        (["demo", "--quiet"], ["robeval", "demo", "--quiet"]),
        (["test", "-k", "pgd"], ["python", "-m", "pytest", "-n", "2", "-k", "pgd"]),
    ],
)
def test_the_job_gets_the_users_arguments_and_quiet_threads(
    checkout: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, words: list[str], command: list[str]
) -> None:
    became: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *call: became.append(call))
    monkeypatch.chdir(checkout)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    bootstrap.main(words)
    program, arguments, environment = became.pop()
    assert program == arguments[0] == str(checkout / ".venv" / "bin" / command[0])
    assert arguments[1:] == command[1:]
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    bootstrap.main(words)
    assert became.pop()[2]["OMP_WAIT_POLICY"] == "ACTIVE"


def test_setup_installs_and_stops(checkout: Path, recorder: Recorder) -> None:
    assert bootstrap.main(["setup"]) == 0
    assert len(recorder.installed) == 4


def test_help_and_unknown_jobs(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.main(["--help"]) == 0
    assert "usage: python3 -m robeval.bootstrap" in capsys.readouterr().out
    assert bootstrap.main(["tset"]) == 2
    assert 'unknown job "tset"' in capsys.readouterr().err
    assert recorder.commands == []


@pytest.mark.parametrize("code", [0, 7])
def test_a_second_start_is_fast_and_returns_the_jobs_exit_code(checkout: Path, code: int) -> None:
    bin_ = checkout / ".venv" / "bin"
    bin_.mkdir(parents=True)
    (checkout / "robeval" / "__init__.py").touch()
    (bin_ / "python").touch()
    (bin_ / "robeval").write_text(f'#!/bin/sh\necho "job $*"\nexit {code}\n')
    (bin_ / "robeval").chmod(0o755)
    (checkout / ".venv" / "robeval-stamp").write_text(bootstrap.fingerprint(checkout))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "robeval.bootstrap", "demo", "--out", "x"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.monotonic() - started < 2
    assert (done.returncode, done.stdout, done.stderr) == (code, "job demo --out x\n", "")
