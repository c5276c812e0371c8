"""The course of trainings, from the logs that they write after every epoch."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from robeval.core.errors import FileRefused
from robeval.reports.curve import COLOURS
from robeval.reports.tables import Cell, Table
from robeval.reports.writers import csv, one_line

NEEDED = ("epoch", "clean_accuracy", "pgd20_accuracy", "warnings")
#: Columns of the table on screen, with the heading of each.
SHOWN = {
    "clean_accuracy": "clean",
    "pgd20_accuracy": "PGD-20 <=",
    "averaged_clean_accuracy": "averaged clean",
    "averaged_pgd20_accuracy": "averaged PGD-20 <=",
    "transfer_accuracy": "transfer <=",
    "loss": "loss",
    "penalty": "penalty",
    "confidence_clean": "confidence",
    "grad_l1": "gradient l1",
    "grad_nonzero": "non-zero",
}
STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
#: Panel -> columns with their names, drawn solid, dashed and dotted; the axis; whether it is logarithmic.
PANELS: dict[str, tuple[dict[str, str], str, bool]] = {
    "clean accuracy": ({"clean_accuracy": "held out", "averaged_clean_accuracy": "averaged weights"}, "%", False),
    "robust accuracy (upper bounds)": (
        {
            "pgd20_accuracy": "PGD-20", "transfer_accuracy": "transfer", "first_batch_accuracy": "first batch",
            "averaged_pgd20_accuracy": "averaged weights",
        }, "%", False,
    ),
    "loss and penalty": ({"loss": "loss", "penalty": "penalty"}, "", False),
    "input gradient, mean norm": ({"grad_l1": "l1", "grad_l2": "l2"}, "", True),
    "input gradient, non-zero entries": ({"grad_nonzero": "mean number"}, "", False),
    "mean largest softmax output": (
        {"confidence_clean": "clean", "confidence_random": "random", "confidence_pgd1": "PGD-1"}, "%", False
    ),
}  # fmt: skip


@dataclass(frozen=True)
class History:
    """One training.

    Args:
        name: The model file's name without its ending.
        frame: One row per epoch, the columns of the log.
        chosen: Epoch of the weights in the model file; 0 where there is none yet.
    """

    name: str
    frame: pd.DataFrame
    chosen: int = 0

    @property
    def row(self) -> Mapping[str, Any]:
        """The chosen epoch, or the last where none is chosen."""
        chosen = self.frame[self.frame["epoch"] == self.chosen]
        last: dict[str, Any] = (chosen if len(chosen) else self.frame).iloc[-1].to_dict()
        return last

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """(epoch, codes) of the epochs with warnings."""
        told = self.frame["warnings"].astype(object).fillna("")
        return [(int(e), str(codes)) for e, codes in zip(self.frame["epoch"], told, strict=True) if codes]


def logs(path: str) -> list[tuple[Path, Path]]:
    """Model file and log of every training at a path: a model, its training folder, a log, or a folder of models.

    Raises:
        FileRefused: no training there (H01).
    """
    given = Path(path)
    if given.suffix == ".csv" and given.is_file():
        folders = [given]
    elif (given / "log.csv").is_file():
        folders = [given / "log.csv"]
    elif Path(f"{given}.train", "log.csv").is_file():
        folders = [Path(f"{given}.train", "log.csv")]
    else:
        folders = sorted(given.glob("*.train/log.csv"))
    if not folders:
        raise FileRefused(
            f"no training log at {path}",
            code="H01",
            why="a training writes MODEL.train/log.csv after each epoch",
            do="give the model file, its .train folder, the log, or a folder of these",
        )
    return [(log.parent.with_suffix("") if log.parent.suffix == ".train" else log, log) for log in folders]


def read(model: Path, log: Path, chosen: int = 0) -> History:
    """A training's log.

    Raises:
        FileRefused: not a log of a training, or one without an epoch (H02).
    """
    try:
        frame = pd.read_csv(log)
    except (OSError, ValueError) as error:
        raise FileRefused(f"{log} is not the log of a training: {error}", code="H02") from None
    lacking = [name for name in NEEDED if name not in frame.columns]
    if lacking:
        raise FileRefused(f"{log} is not the log of a training: no column {lacking[0]}", code="H02")
    if not frame["epoch"].is_unique:
        raise FileRefused(f"{log} holds several trainings", code="H02", do="give the models or their logs")
    if not len(frame):
        raise FileRefused(f"{log} has no finished epoch yet", code="H02")
    return History(model.stem, frame, chosen)


def distinct(histories: Sequence[History], models: Sequence[Path]) -> list[History]:
    """The same with names that differ: where two share a name, with the folder before it."""
    names = [h.name for h in histories]
    longer = [
        f"{m.parent.name}/{h.name}" if names.count(h.name) > 1 else h.name
        for h, m in zip(histories, models, strict=True)
    ]
    told = [n if longer.count(n) == 1 else str(m) for n, m in zip(longer, models, strict=True)]
    return [History(n, h.frame, h.chosen) for n, h in zip(told, histories, strict=True)]


def history_table(histories: Sequence[History]) -> Table:
    """The chosen epoch of each training."""
    rows: list[dict[str, Cell]] = []
    for h in histories:
        held, last = h.row, int(h.frame["epoch"].max())
        row: dict[str, Cell] = {
            "training": h.name,
            "epoch": f"{int(held['epoch'])}/{last}" + ("" if h.chosen else " *"),
        }
        for column, heading in SHOWN.items():
            value = held.get(column, math.nan)
            if isinstance(value, int | float) and not math.isnan(value):
                row[heading] = float(value)
        row["seconds"] = f"{h.frame['seconds'].sum():.1f}" if "seconds" in h.frame else ""
        row["warnings"] = ", ".join(f"{codes} (epoch {e})" for e, codes in h.warnings)
        rows.append(row)
    found = dict.fromkeys(c for row in rows for c in row)
    columns = ["training", "epoch", *(c for c in SHOWN.values() if c in found), "seconds", "warnings"]
    notes = ["* no model file beside it: the last epoch so far"] if any(not h.chosen for h in histories) else []
    return Table("Chosen epochs", columns, rows, notes)


def history_csv(histories: Sequence[History]) -> str:
    """All logs as one, with the training and whether the epoch was chosen before each row."""
    columns = list(dict.fromkeys(c for h in histories for c in h.frame.columns))
    rows: list[dict[str, Cell]] = []
    for h in histories:
        for held in h.frame.to_dict("records"):
            told = {str(k): v for k, v in held.items() if not (isinstance(v, float) and math.isnan(v))}
            rows.append({"training": h.name, "chosen": int(held["epoch"] == h.chosen), **told})
    return csv(Table("", ["training", "chosen", *map(str, columns)], rows))


def draw(histories: Sequence[History], form: str) -> bytes:
    """Six panels over the epochs: one colour per training, one style per quantity.

    The chosen epoch is a dot; an epoch with warnings is a vertical line with a cross at its foot.

    Args:
        histories: At least one training.
        form: ``png`` or ``pdf``.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 6.4), dpi=140, layout="constrained")
    for place, (title, (columns, unit, logarithmic)) in enumerate(PANELS.items(), 1):
        axes = figure.add_subplot(2, 3, place)
        axes.set_title(title, fontsize=10, loc="left")
        seen = [c for c in columns if any(c in h.frame and h.frame[c].notna().any() for h in histories)]
        for k, h in enumerate(histories):
            colour = COLOURS[k % len(COLOURS)]
            for column, style in zip(columns, STYLES, strict=False):
                if column in seen and column in h.frame:
                    _line(axes, h, column, colour, style, 100 if unit == "%" else 1)
            for epoch, _ in h.warnings:
                axes.axvline(epoch, color=colour, linewidth=0.8, alpha=0.35)
                axes.plot([epoch], [0], "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False)
        if logarithmic and any((h.frame[c] > 0).any() for h in histories for c in seen if c in h.frame):
            axes.set_yscale("log")
        elif unit == "%":
            axes.set_ylim(0, 102)
        elif seen == ["grad_nonzero"]:
            axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(seen) > 1:
            styles = dict(zip(columns, STYLES, strict=False))
            keys = [Line2D([], [], color="0.3", linestyle=styles[c], label=columns[c]) for c in seen]
            axes.legend(handles=keys, frameon=False, fontsize=8)
        if place > 3:
            axes.set_xlabel("epoch")
    keys = [
        Line2D([], [], color=COLOURS[k % len(COLOURS)], label=" " + one_line(h.name).replace("$", r"\$"))
        for k, h in enumerate(histories)
    ]
    keys.append(Line2D([], [], color="0.3", marker="o", linestyle="", label="chosen epoch"))
    if any(h.warnings for h in histories):
        keys.append(Line2D([], [], color="0.3", marker="x", linestyle="", label="warning"))
    figure.legend(handles=keys, loc="outside upper left", ncols=min(6, len(keys)), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    # No date, so that the same logs give the same bytes.
    figure.savefig(buffer, format=form, metadata={"CreationDate": None} if form == "pdf" else {"Software": None})
    return buffer.getvalue()


def _line(axes: Any, h: History, column: str, colour: str, style: str, factor: float) -> None:
    """One quantity of one training; a single epoch is a dot."""
    told = h.frame[["epoch", column]].dropna()
    lone = "." if len(told) == 1 else ""
    axes.plot(told["epoch"], factor * told[column], style, color=colour, linewidth=1.5, marker=lone)
    dot = told[told["epoch"] == h.chosen]
    axes.plot(dot["epoch"], factor * dot[column], "o", color=colour, markersize=5, markeredgecolor="white", zorder=3)
