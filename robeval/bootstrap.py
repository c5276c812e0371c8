"""Set up ``.venv`` beside this checkout, then run a job in it. Standard library only.

``python3 -m robeval.bootstrap demo`` trains, attacks and certifies on real digits; ``test`` runs the test suite;
``setup`` installs and stops there. A stamp in ``.venv`` remembers what was installed, so a second call starts the job
at once. The stamp is written last: an interrupted installation is continued by the same command.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (3, 11)
USAGE = """usage: python3 -m robeval.bootstrap {demo,test,setup} [arguments for the job]

  demo    train, attack, certify and verify two models on real digits (robeval demo)
  test    run the test suite (pytest), for example: test -k pgd
  setup   make .venv and install everything, nothing more

Installs into .venv beside this checkout: once, then again only when the pins change."""


class Trouble(Exception):
    """Something that the person at the terminal must mend; told in plain words."""


def say(text: str) -> None:
    """One short line for people, at once."""
    print(f"bootstrap: {text}", file=sys.stderr, flush=True)


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> None:
    """Refuse a Python that is too old."""
    if version < NEEDED:
        have, need = ".".join(map(str, version)), ".".join(map(str, NEEDED))
        raise Trouble(
            f"Python {need} or newer is needed, this is {have} ({sys.executable})\n"
            f"  do: python{need} -m robeval.bootstrap ..., after installing it if it is not there"
        )


def check_venv() -> None:
    """Refuse a Python that cannot make environments, as Debian's is before python3-venv is installed."""
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        minor = "{}.{}".format(*sys.version_info[:2])
        raise Trouble(
            f"this Python ({sys.executable}) cannot make a virtual environment: no {' and no '.join(missing)}\n"
            f"  do: on Debian or Ubuntu: apt install python{minor}-venv; elsewhere use a Python from python.org"
        )


def fingerprint(root: Path) -> str:
    """Hash of everything that decides what is installed, and of the place, since environments cannot be moved."""
    digest = hashlib.sha256(str(root).encode())
    for name in ("pyproject.toml", "constraints.txt", "robeval/bootstrap.py"):
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def pin(root: Path, package: str) -> str:
    """``package==version`` as constraints.txt pins it."""
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.lower().startswith(package + "=="):
            return line.strip()
    raise Trouble(f"constraints.txt pins no {package}")


def run(what: str, *command: str | Path) -> None:
    """One step of the installation; its output is shown only when it fails.

    Raises:
        Trouble: the step failed.
    """
    say(f"{what} ...")
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-25:])
        raise Trouble(f"{what} failed with exit code {done.returncode}\n{tail}\n  do: mend the cause, run it again")


def usable(python: Path) -> bool:
    """Whether an environment is there, of a good Python and with pip."""
    probe = f"import sys, pip; sys.exit(sys.version_info < {NEEDED})"
    return python.exists() and subprocess.run([str(python), "-c", probe], capture_output=True).returncode == 0


def install(root: Path) -> Path:
    """Make ``.venv`` hold everything that the pins say; do nothing if it already does.

    Returns:
        The folder of the environment's programs.

    Raises:
        Trouble: Python is unfit, or a step failed; no stamp is left then.
    """
    bin_, stamp, wanted = root / ".venv" / "bin", root / ".venv" / "robeval-stamp", fingerprint(root)
    python = bin_ / "python"
    if python.exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return bin_
    started = time.monotonic()
    stamp.unlink(missing_ok=True)
    if not usable(python):
        check_venv()
        run("making .venv", sys.executable, "-m", "venv", "--clear", root / ".venv")
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "-c", root / "constraints.txt")
    run("pip", *pip, pin(root, "pip"))
    torch, rivals = pin(root, "torch"), (pin(root, "pyautoattack"), pin(root, "tqdm"))
    run(f"{torch} (the largest part, minutes on a slow line)", *pip, torch)
    run("robeval, its dependencies and the tools", *pip, "-e", f"{root}[dev]", *rivals)
    # Its metadata asks for an old requests and for torchvision; its code needs scipy and tqdm only.
    run("torchattacks", *pip, "--no-deps", pin(root, "torchattacks"))
    stamp.write_text(wanted, encoding="utf-8")
    say(f"ready after {time.monotonic() - started:.0f} s")
    return bin_


def job_command(job: str, bin_: Path, extra: list[str]) -> list[str]:
    """The command line of a job; the user's arguments come last and win."""
    if job == "demo":
        return [str(bin_ / "robeval"), "demo", *extra]
    return [str(bin_ / "python"), "-m", "pytest", "-n", "2", *extra]


def become(command: list[str]) -> NoReturn:
    """Turn this process into the job: signals and the exit code are the job's own."""
    # Waiting threads that spin steal time from the others on a shared machine.
    os.execve(command[0], command, {"OMP_WAIT_POLICY": "PASSIVE", **os.environ})


def main(arguments: list[str] | None = None) -> int:
    """Install if needed, then become the job; returns only when there is nothing to become."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    job, extra = words[0], words[1:]
    if job not in ("demo", "test", "setup"):
        say(f'unknown job "{job}"\n{USAGE}')
        return 2
    try:
        check_python()
        bin_ = install(ROOT)
    except Trouble as trouble:
        say(f"error: {trouble}")
        return 5
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    if job == "setup":
        return 0
    if job == "test":
        os.chdir(ROOT)
    become(job_command(job, bin_, extra))


if __name__ == "__main__":
    sys.exit(main())
