"""``robeval``: the commands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from robeval import __version__
from robeval.core.errors import RobevalError, unknown
from robeval.core.memory import keep_freed_memory

#: Command -> (module, panel, summary). A module is imported when its command is asked for.
COMMANDS = {
    "train": ("train", "Main job", "Train a classifier with one of the regularizers."),
    "sweep": ("sweep", "Main job", "Train a grid over parameters, or the trainings of a file, and sum them up."),
    "attack": ("attack", "Main job", "Attack a classifier image by image."),
    "transfer": ("transfer", "Main job", "Craft images on each model, judge them on every model."),
    "certify": ("certify", "Main job", "Bound the robustness of a classifier image by image."),
    "sandwich": ("sandwich", "Results", "Proofs below, attacks above: what is certified and what is broken."),
    "diagnose": ("diagnose", "Main job", "Look for signs that a robustness evaluation is weak."),
    "table": ("table", "Results", "Make a table from finished runs."),
    "compare": ("compare", "Results", "Compare two attack runs image by image, with a paired test."),
    "report": ("report", "Results", "One HTML page about finished runs, complete in itself."),
    "plot": ("plot", "Results", "Pictures of finished runs: PNG, PDF and the numbers as CSV."),
    "curve": ("curve", "Results", "Robust accuracy against every eps, as a table or a plot."),
    "history": ("history", "Results", "The course of trainings: table, CSV and plot."),
    "verify": ("verify", "Results", "Check every stored adversarial image of a run again."),
    "cite": ("cite", "Results", "Print the sources of the methods that a run used."),
    "list": ("list_", "Look around", "List attacks, suites, bounds, diagnostics, trainers, models or data sets."),
    "demo": (
        "demo",
        "Look around",
        "Train, attack, diagnose, certify and verify two models on real digits, in two minutes.",
    ),
}


STOPPED = "robeval: stopped; what was decided is saved, the same command goes on from there\n"


class LazyGroup(TyperGroup):
    """A command group that imports a command's file only when that command runs or prints its help."""

    runs_one = False  # one command is about to run, or to print its help

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS)
        self.runs_one = True
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        if name not in COMMANDS:
            return None
        module, panel, summary = COMMANDS[name]
        if not self.runs_one and "_ROBEVAL_COMPLETE" not in os.environ:  # for `robeval --help` a summary is enough
            stub = typer.Typer(add_completion=False)
            stub.command(name=name, help=summary)(lambda: None)
            command = typer.main.get_command(stub)
            command.rich_help_panel = panel  # type: ignore[attr-defined]
            return command
        loaded = importlib.import_module(f"robeval.cli.{module}")
        alone = typer.Typer(add_completion=False, rich_markup_mode="markdown")
        function = getattr(loaded, name if name != "list" else "list_")
        context, examples = getattr(loaded, "CONTEXT", None), getattr(loaded, "EXAMPLES", None)
        alone.command(name=name, epilog=examples, context_settings=context)(function)
        command = typer.main.get_command(alone)
        command.rich_help_panel = panel  # type: ignore[attr-defined]
        return command


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"robeval {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 complete, 1 fault of robeval, 2 usage, 3 file refused, 4 model or data break the "
    "contract, 5 machine, 6 incomplete and resumable, 7 a threshold was not met, 8 an attack landed inside a proof."
)
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Robustness evaluation and certification of image classifiers, with evidence for every number."""


def _tell(error: RobevalError) -> None:
    if "--json" in sys.argv:
        sys.stdout.write(
            json.dumps({"error": {"code": error.code, "what": error.what, "exit": error.exit_code, "do": error.do}})
            + "\n"
        )
    sys.stderr.write(str(error) + "\n")


def _stop(number: int, frame: object) -> None:
    """Leave through the same doors as an error, so that what was decided is saved; a second signal kills at once."""
    signal.signal(number, signal.SIG_DFL)
    sys.stderr.write(STOPPED)
    sys.exit(128 + number)


def main() -> None:
    """Run the command line and leave with the documented exit code."""
    # Waiting threads that spin steal time from the others on a shared machine; torch reads this when it loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app(prog_name="robeval", standalone_mode=True)
    except RobevalError as error:
        _tell(error)
        sys.exit(error.exit_code)
    except Exception as error:
        with open("robeval-error.log", "w", encoding="utf-8") as log:
            log.write(traceback.format_exc())
        sys.stderr.write(
            f"robeval: error[X01] a fault of robeval: {type(error).__name__}: {error}\n"
            "  do: please report it with robeval-error.log, written in this folder\n"
        )
        sys.exit(1)
