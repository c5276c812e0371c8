"""``robeval list``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from robeval.cli.common import Json, print_json
from robeval.core import catalogue
from robeval.core.errors import unknown
from robeval.train.preset import FOLDER, presets, unwrapped

#: Facts of more characters take a line of their own.
SHORT = 20
EXAMPLES = "**Examples**\n\n    robeval list attacks\n\n    robeval list attacks pgd"


def list_(
    what: Annotated[
        str,
        typer.Argument(help="attacks, suites, bounds, diagnostics, trainers, presets, models or data.", metavar="WHAT"),
    ],
    name: Annotated[
        str | None, typer.Argument(help="One of them, with its whole documentation.", metavar="NAME")
    ] = None,
    json: Json = False,
) -> None:
    """List what there is, or show one method in full."""
    kinds = [*catalogue.KINDS, "suites", "presets"]
    if what not in kinds:
        raise unknown("kind", what, kinds)
    special = {"suites": _suites, "presets": _presets}
    rows = special[what]() if what in special else _methods(what)
    if name:
        key = name if what in special else catalogue.find(what, name).name
        if key not in rows:
            raise unknown(what.removesuffix("s"), name, rows)
        rows = {key: rows[key]}
    if json:
        print_json(rows)
        return
    if name and what == "presets":
        typer.echo((FOLDER / f"{name}.toml").read_text(encoding="utf-8"), nl=False)
        return
    if name and what not in special:
        method = catalogue.find(what, name)
        typer.echo(f"{method.name}\n\n{method.doc}\n")
        for setting in method.settings:
            typer.echo(f"  {setting.name}: {setting.type} = {setting.default}")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, row in rows.items():
        table.add_row(key, _entry(row))
    Console(highlight=False, markup=False).print(table)


def _entry(row: dict[str, str]) -> str:
    """What it is, its short facts in one line, and each long one in a line of its own."""
    facts = {column: f"{column}: {value}" for column, value in row.items() if column != "what" and value}
    short = [fact for column, fact in facts.items() if len(row[column]) <= SHORT]
    return "\n".join(
        [row["what"], *(["; ".join(short)] if short else []), *(f for f in facts.values() if f not in short)]
    )


def _methods(kind: str) -> dict[str, dict[str, str]]:
    extra = {"attacks": ("norms", "access", "search"), "bounds": ("kind", "norms"), "trainers": ("norms",)}
    extra["diagnostics"] = ("id", "level", "question", "limit")
    defaults = {"access": "white-box", "search": "fixed eps"}
    short = {v: [k for k, n in catalogue.presets(kind).items() if n == v] for v in catalogue.methods(kind)}
    rows = {}
    more = catalogue.methods("references") if kind == "attacks" else {}
    for method in (*catalogue.methods(kind).values(), *more.values()):
        row = {}
        for fact in extra.get(kind, ()):
            value = method.facts.get(fact, defaults.get(fact, ""))
            row[fact] = ", ".join(value) if isinstance(value, tuple) else str(value)
        row["settings"] = ", ".join(f"{s.name}={s.default}" for s in method.settings)
        row["also"] = ", ".join(short.get(method.name, ()))
        row["what"] = method.summary
        rows[method.name] = row
    return rows


def _suites() -> dict[str, dict[str, str]]:
    from robeval.evaluate.suites import SUITES

    return {name: {"attacks": ", ".join(suite.attacks), "what": suite.about} for name, suite in SUITES.items()}


def _presets() -> dict[str, dict[str, str]]:
    trainers = catalogue.methods("trainers")
    return {
        p.name: {
            "methods": ", ".join(m for m in p.methods if unwrapped(m)[1] in trainers),
            "what": p.about,
            "source": p.source,
        }
        for p in presets().values()
    }
