"""The command line as a user calls it: in a process of its own, or in this one where only its words matter."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from robeval.cli.app import main


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    run = [sys.executable, "-c", "from robeval.cli.app import main; main()", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env)


def robeval(*words: str, cwd: Path) -> tuple[int, str, str]:
    """Run a command in a process of its own. -> exit code, stdout, stderr."""
    process = start(*words, cwd=cwd)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def here(*words: str, cwd: Path, columns: int = 160) -> tuple[int, str, str]:
    """Run a command in this process, which spares torch's loading time. -> exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["robeval", *words])
        patch.setenv("COLUMNS", str(columns))
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0, out.getvalue(), err.getvalue()
