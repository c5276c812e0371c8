"""What every command shares: where text goes, progress, and the options that all of them have.

stdout is for results, stderr for people.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

OUTPUT = "Output"
RUN = "Run"

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document.", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.", rich_help_panel=OUTPUT)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.", rich_help_panel=RUN)]

OnProgress = Callable[[int, int, str], None]

_state = {"quiet": False}
_people = Console(stderr=True, highlight=False)


def set_quiet(quiet: bool) -> None:
    """Silence notes and progress for the rest of the command."""
    _state["quiet"] = quiet


def note(text: str) -> None:
    """Tell the person at the terminal something, on stderr."""
    if not _state["quiet"]:
        _people.print(text, markup=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """The one JSON document of a command with ``--json``, on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


@contextmanager
def progress(label: str) -> Iterator[OnProgress]:
    """A progress bar with an ETA on stderr; a plain line every 30 s where stderr is not a terminal."""
    if _state["quiet"]:
        yield lambda done, total, text: None
        return
    if not _people.is_terminal:
        last = [time.monotonic()]

        def lines(done: int, total: int, text: str) -> None:
            if time.monotonic() - last[0] >= 30:
                last[0] = time.monotonic()
                note(f"{label}  {done}/{total}  {text}")

        yield lines
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=_people, transient=True) as bar:
        task = bar.add_task(label, total=None, text="")
        yield lambda done, total, text: bar.update(task, completed=done, total=total, text=text)


def device_named(name: str) -> str:
    """The device, after a check that it is there.

    Raises:
        MachineError: no such device on this machine.
    """
    import torch

    from robeval.core.errors import MachineError

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise MachineError(f"no device {name} on this machine", code="E02", do="--device cpu") from None
    return name
