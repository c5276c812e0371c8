"""Many trainings at once: a grid over one or two parameters, or a file that lists them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from robeval.core import catalogue
from robeval.core.errors import FileRefused, UsageError
from robeval.train.orders import KEYS, Layer, Order, flag, from_file, layer, unknown_at, values_of
from robeval.train.preset import resolve, unwrapped

#: Keys that a sweep decides itself.
OWN = ("out", "tiny", "device")
#: Keys of the table [attack] of a file of trainings.
ATTACK = ("attacks", "suite", "norm", "eps", "images", "each", "seed", "batch-size", "data", "split")


@dataclass(frozen=True)
class Point:
    """One training of a sweep.

    Args:
        name: Its file is this with ``.pt``.
        order: What is trained.
        needs: Names of earlier points whose models it starts from or is tried with.
        swept: What the grid varies, as text.
    """

    name: str
    order: Order
    needs: tuple[str, ...] = ()
    swept: Mapping[str, str] = field(default_factory=dict)


def grid(folder: Path, layers: Sequence[Layer], params: Sequence[str]) -> list[Point]:
    """All combinations of the values of one or two parameters.

    Args:
        folder: Where models go.
        layers: What all points share.
        params: ``beta=1,3,6``: a key of ``robeval train``, or else a setting of the method.

    Raises:
        UsageError: none or over two parameters, a parameter without values or twice, a bad name or value.
    """
    if not 1 <= len(params) <= 2:
        raise UsageError(
            f"a grid has one or two parameters, got {len(params)}", code="A04", do="such as --param beta=1,3,6"
        )
    axes: dict[str, list[str]] = {}
    for text in params:
        key, equals, tail = text.partition("=")
        key = key.strip().replace("-", "_")
        values = list(dict.fromkeys(v.strip() for v in tail.split(",") if v.strip()))
        if not (equals and key and values):
            raise UsageError(f'expected key=value,value, got "{text}"', code="A04", where="--param")
        if key in OWN or key in axes:
            why = "is given twice" if key in axes else "cannot vary"
            raise UsageError(f"--param {flag(key)} {why}", code="A04")
        axes[key] = values
    found = []
    for choice in itertools.product(*axes.values()):
        swept = dict(zip(axes, choice, strict=True))
        told: dict[str, Any] = {k: v for k, v in swept.items() if k in KEYS}
        top = layer("--param", told | {"settings": {k: v for k, v in swept.items() if k not in KEYS}})
        order = resolve([*layers, top])
        name = ",".join(f"{flag(k)}={v}" for k, v in swept.items())
        method = values_of([*layers, top])["method"]
        name = _file_name(f"{method}-{name}" if "method" not in swept else name)
        found.append(Point(name, _placed(order, folder, name), swept=swept))
    return found


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.,=+-]", "-", text)


def _placed(order: Order, folder: Path, name: str) -> Order:
    return replace(order, out=str(folder / f"{name}.pt"))


def comparison(
    path: Path, folder: Path, beneath: Sequence[Layer], above: Sequence[Layer]
) -> tuple[list[Point], dict[str, Any]]:
    """The trainings of a file, and its attack.

    The file has keys of ``robeval train`` for all runs, tables ``[[run]]`` with ``name``, ``method`` and keys of their
    own, and perhaps ``[attack]``. ``init-from`` and ``surrogate`` may name an earlier run. Common ``[settings]`` go to
    the methods that have them.

    Args:
        path: The file.
        folder: Where models go.
        beneath: Layers that the file wins over.
        above: Layers that win over the file.

    Returns:
        The points in the file's order, and the table ``[attack]``, empty if there is none.
    Raises:
        FileRefused: missing, not TOML, or without runs.
        UsageError: unknown keys or names, with the file and the run.
    """
    told = from_file(path)
    runs, attack = told.pop("run", None), _attack(path, told.pop("attack", {}))
    if not (isinstance(runs, list) and runs and all(isinstance(r, dict) for r in runs)):
        raise FileRefused(
            f"{path} lists no trainings", code="F02", do='write [[run]] tables, each with method = "trades" or another'
        )
    shared = layer(f"{path} [settings]", {"settings": told.pop("settings", {})})
    common = layer(str(path), told)
    names = [str(run.get("name") or _file_name(str(run.get("method", "")))) for run in runs]
    points: list[Point] = []
    for place, (run, name) in enumerate(zip(runs, names, strict=True), 1):
        where = f"{path}, run {place}" + (f' "{name}"' if name else "")
        if name in names[: place - 1]:
            raise UsageError(f'two runs are called "{name}"', code="A04", where=str(path), do="give each a name")
        if name != _file_name(name):
            raise UsageError(f'a run cannot be called "{name}"', code="A04", where=where, do="letters, digits, -_.,=+")
        run, needs = _linked({k: v for k, v in run.items() if k != "name"}, names, place, folder, where)
        own = layer(where, run)
        method = values_of([*beneath, common, own, *above]).get("method", "")
        if not method:
            raise UsageError("this run names no method", code="A04", where=where)
        mine = {k: v for k, v in shared.settings.items() if k in _settings_of(method)}
        try:
            order = resolve([*beneath, common, replace(shared, settings=mine), own, *above])
        except UsageError as error:
            error.where = error.where or where
            raise
        points.append(Point(name, _placed(order, folder, name), needs))
    for key in shared.settings:
        taken = {name for p in points for name in _settings_of(p.order.method)}
        if key not in taken:
            raise unknown_at(shared.where, "setting", key, taken)
    return points, attack


def _settings_of(method: str) -> set[str]:
    """Names of the settings of a method as it is typed."""
    name = unwrapped(method)[1]
    return {s.name for s in catalogue.find("trainers", name).settings} - {"norm", "eps"}


def _linked(
    run: dict[str, Any], names: list[str], place: int, folder: Path, where: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A run with the names of earlier runs replaced by their files, and those names."""
    linked, needs = dict(run), []
    for key, target in run.items():
        if key.replace("-", "_") not in ("init_from", "surrogate") or not target:
            continue
        if target in names[: place - 1]:
            linked[key] = str(folder / f"{target}.pt")
            needs.append(target)
        elif not Path(str(target)).is_file():
            raise unknown_at(f"{where}, {key}", "earlier run or file", str(target), names[: place - 1])
    return linked, tuple(needs)


def _attack(path: Path, table: Any) -> dict[str, Any]:
    """The table [attack], its keys checked."""
    where = f"{path} [attack]"
    if not isinstance(table, dict):
        raise UsageError("attack must be a table", code="A04", where=where, do="write [attack]")
    told: dict[str, Any] = {flag(k): v for k, v in table.items()}
    for key in told:
        if key not in ATTACK:
            raise unknown_at(where, "key", key, ATTACK)
    attacks = told.get("attacks", [])
    if not (isinstance(attacks, list) and all(isinstance(a, str) for a in attacks)):
        raise UsageError('attacks must be a list such as ["pgd20", "square"]', code="A04", where=where)
    if not isinstance(told.get("each", False), bool):
        raise UsageError("each must be true or false", code="A04", where=where)
    if told and not attacks and "suite" not in told:
        raise UsageError("neither attacks nor a suite", code="A04", where=where, do='write suite = "quick"')
    for key in ("seed", "batch-size"):
        if not isinstance(told.get(key, 0), int):
            raise UsageError(f"{key} must be a whole number, got {told[key]!r}", code="A04", where=where)
    return told
