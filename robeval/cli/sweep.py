"""``robeval sweep``."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robeval.cli.common import RUN, Json, Quiet, note, print_json, progress, set_quiet
from robeval.cli.sweeping import attack_settings, attacked, short, summary, train_apart, written
from robeval.cli.train import flags, job_of, run, train
from robeval.core.errors import Incomplete, MachineError, RobevalError, UsageError
from robeval.train import orders, sweeps
from robeval.train.sweeps import Point

if TYPE_CHECKING:
    from robeval.reports.frames import AttackFacts

#: Words that this command does not know are those of ``robeval train``.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True}

EXAMPLES = (
    "**Examples**\n\n"
    "    robeval sweep trades --param beta=1,3,6 --param eps=1/16,2/16 --data digits --epochs 10 --out betas\n\n"
    "    robeval sweep comparison.toml --out comparison\n\n"
    "Every flag of `robeval train` holds for all trainings. A file has such keys, a table `[[run]]` per training with "
    "`name`, `method` and keys of its own (`init-from` may name an earlier run), and perhaps `[attack]` with `attacks` "
    "or `suite`, `norm`, `eps`, `images`, `each`."
)


def sweep(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(help="A method, or a .toml file that lists trainings.", metavar="METHOD|FILE")],
    param: Annotated[
        list[str] | None,
        typer.Option("--param", help="key=value,value: a setting or a flag of train; once or twice."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of models, logs and the summary.")] = Path("sweep"),
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, help="Trainings at the same time, in processes.", rich_help_panel=RUN)
    ] = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a grid over one or two parameters, or the trainings that a file lists, and sum them up.

    Every point is an ordinary training in its own file. The same command resumes; what is finished is skipped, what
    diverges is reported and the others go on.
    """
    set_quiet(quiet or json)
    words = _train_words([what, *ctx.args])
    points, attack = _points(words, param or [], out)
    if words["print_config"]:
        for p in points:
            sys.stdout.write(f"# {p.name}\n{orders.to_toml(p.order)}\n")
        return
    for p in points:  # all words are checked before anything is trained
        job_of(p.order)
        if attack:
            attack_settings(p, attack)
    written(points, out)
    fresh = bool(words["fresh"])
    failed = train_apart(points, jobs, fresh) if jobs > 1 else _train_here(points, fresh)
    facts: dict[str, AttackFacts] = {}
    for p in points if attack else []:
        if p.name not in failed:
            try:
                facts[p.name] = attacked(p, attack, out)
            except MachineError:
                raise
            except RobevalError as error:
                failed[p.name] = f"attack: {error.what} [{error.code}]"
                note(f"{p.name}: {failed[p.name]}")
    _tell(points, failed, facts, out, json)


def _train_words(arguments: list[str]) -> dict[str, Any]:
    """What ``robeval train`` would understand by these words."""
    alone = typer.Typer(add_completion=False)
    alone.command(name="sweep")(train)
    return dict(typer.main.get_command(alone).make_context("robeval sweep", arguments).params)


def _points(words: dict[str, Any], params: list[str], out: Path) -> tuple[list[Point], dict[str, Any]]:
    what, config = str(words.pop("method") or ""), words.get("config")
    if words.get("out"):
        raise UsageError("--out of a sweep is a folder", code="A04")
    beneath = [orders.layer(str(config), orders.from_file(Path(config)))] if config else []
    above = [orders.environment(), flags(words)]
    if what.endswith(".toml"):
        if params:
            raise UsageError("--param does not go with a file of trainings", code="A04", do="write [[run]] tables")
        return sweeps.comparison(Path(what), out, beneath, above)
    above.append(orders.layer("command line", {"method": what} if what else {}))
    return sweeps.grid(out, [*beneath, *above], params), {}


def _train_here(points: list[Point], fresh: bool) -> dict[str, str]:
    """Train one after the other. -> why some failed, by name."""
    from robeval.data.load import load

    failed: dict[str, str] = {}
    kept = lru_cache(maxsize=4)(load)
    for place, p in enumerate(points, 1):
        lost = [name for name in p.needs if name in failed]
        if lost:
            failed[p.name] = f"not started: it needs {lost[0]}"
        else:
            try:
                with progress(f"{place}/{len(points)} {p.name}") as on_progress:
                    _, result = run(p.order, fresh=fresh, load=kept, on_progress=on_progress)
                note(f"{p.name}: {'finished already' if result.resumed == 'finished' else 'trained'}")
            except MachineError:
                raise
            except RobevalError as error:
                failed[p.name] = f"{error.what} [{error.code}]"
        if p.name in failed:
            note(f"{p.name}: {failed[p.name]}")
    return failed


def _tell(points: list[Point], failed: dict[str, str], facts: dict[str, AttackFacts], out: Path, as_json: bool) -> None:
    """Write the summary, show it, and say what is missing.

    Raises:
        Incomplete: a point failed.
    """
    from robeval.reports.writers import csv, latex, markdown, terminal
    from robeval.store.files import cannot_write, write_whole

    table = summary(points, failed, facts)
    files = {"summary.csv": csv(table), "summary.tex": latex(table), "summary.md": markdown(table)}
    for name, text in files.items():
        try:
            write_whole(out / name, text.encode())
        except OSError as error:
            raise cannot_write(error, out / name) from None
    if as_json:
        print_json(table.to_json() | {"failed": failed, "files": [str(out / name) for name in files]})
        if failed:
            raise typer.Exit(Incomplete.exit_code)
        return
    sys.stdout.write(terminal(short(table)))
    done = next((p.order for p in points if p.name not in failed), None)
    note(f"{', '.join(str(out / name) for name in files)}" + (f"   next: robeval history {out}" if done else ""))
    if failed:
        raise Incomplete(
            f"{len(failed)} of {len(points)} trainings are missing: {', '.join(failed)}",
            code="R07",
            do="mend them or leave them out; the same command goes on",
        )
