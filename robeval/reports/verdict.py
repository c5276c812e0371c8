"""What a diagnosis says in the end, from its stored rows alone: one of four verdicts, and what none of them shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from robeval.core.numbers import pretty
from robeval.core.records import CLEAR, DOES_NOT_APPLY, FAILED, NOT_RUN, WARNING
from robeval.reports.stats import Rate
from robeval.store.runstore import RunStore

#: Stands under every verdict, whatever it is.
FOOT = (
    "These tests can show that an evaluation is weak. They cannot show that it is strong, or that the model is robust. "
    "An attack made for this model may still lower the number."
)
#: What a number without a diagnosis carries.
UNDIAGNOSED = "not run"
NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
CONTRACT, PICTURES = 1, 6
#: Rows of this group are pictures: they look for no sign, so no verdict counts them.
PICTURES = 6


@dataclass(frozen=True)
class Verdict:
    """The end of a diagnosis.

    Args:
        number: 1 not usable, 2 signs of a weak evaluation, 3 warnings only, 4 no sign found.
        text: The verdict in its fixed wording.
        short: For headlines and tables: ``standard, no failure, 1 warning``.
        failed: Ids of tests that failed.
        warned: Ids of tests that warned.
    """

    number: int
    text: str
    short: str
    failed: tuple[str, ...]
    warned: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """The robust accuracy may be quoted, with its verdict."""
        return self.number != 1

    @property
    def comparable(self) -> bool:
        """No test failed, so that a paired test against another such model has a meaning."""
        return self.number >= 3


def plural(count: int, noun: str) -> str:
    """``1 warning``, ``2 warnings``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def verdict(rows: pd.DataFrame, level: str, *, planned: int = 0, unevaluated: int = 0) -> Verdict:
    """The verdict over the rows of a diagnosis.

    Args:
        rows: Columns of :class:`robeval.core.records.Diagnosis`, in the order of the report.
        level: Level of the diagnosis.
        planned: Tests that the diagnosis has; fewer rows mean that it stopped half-way.
        unevaluated: Images on which the model gave no finite answer under attack; they forbid the fourth verdict.
    """
    rows = rows[rows["group"] != PICTURES]
    failed, warned = rows[rows["result"] == FAILED], rows[rows["result"] == WARNING]
    broken = failed[failed["group"] == CONTRACT]
    ids = (tuple(failed["id"]), tuple(warned["id"]))
    silent = rows[rows["result"].isin([NOT_RUN, DOES_NOT_APPLY])]
    ran, total = len(rows) - len(silent), max(len(rows), planned)
    open_ = f" {plural(unevaluated, 'image')} could not be evaluated." if unevaluated else ""
    if total > len(rows):
        open_ += f" INCOMPLETE: {total - len(rows)} of {total} tests are still to run."
    if len(broken):
        reasons = "; ".join(f"{r.id} {r.why}" for r in broken.itertuples())
        text = f"NOT USABLE: the robust accuracy above must not be quoted. Reason: {reasons}."
        return Verdict(1, text + open_, f"{level}, NOT USABLE ({', '.join(broken['id'])})", *ids)
    if len(failed):
        names = ", ".join(failed["id"])
        text = (
            f"SIGNS OF A WEAK EVALUATION: {len(failed)} of {plural(ran, 'test')} failed ({names}). The true robust "
            "accuracy is very likely lower than the number above."
        )
        return Verdict(2, text + open_, f"{level}, {len(failed)} failed ({names})", *ids)
    if len(warned) or open_:
        text = f"NO FAILURE, {plural(len(warned), 'WARNING').upper()} in {plural(ran, 'test')}."
        return Verdict(3, text + open_, f"{level}, no failure, {plural(len(warned), 'warning')}", *ids)
    left = f" ({len(silent)} {_reasons(silent)})" if len(silent) else ""
    short = f"{level}, no sign found by {ran} of {plural(total, 'test')}"
    return Verdict(4, f"NO SIGN FOUND by {ran} of {plural(total, 'test')}{left}.", short, *ids)


def _reasons(silent: pd.DataFrame) -> str:
    """Which tests were left out and why, tests of the same reason together."""
    groups: dict[str, list[str]] = {}
    for row in silent.itertuples():
        why = "does not apply" if row.result == DOES_NOT_APPLY else str(row.why).split(";")[0]
        groups.setdefault(why, []).append(str(row.id))
    return "not run: " + ", ".join(f"{' '.join(ids)} {why}" for why, ids in groups.items())


def headline(
    rate: Rate,
    attacks: int,
    norm: str,
    eps: float,
    said: str,
    *,
    lowered: int = 0,
    unevaluated: int = 0,
    proven: int = 0,
) -> str:
    """The line that stands for a model: an upper bound with all that it rests on.

    Args:
        rate: Evaluated images that nothing broke.
        attacks: How many attacks ran.
        norm: Norm of the threat model.
        eps: Its radius.
        said: What the diagnostics say in a few words, see :class:`Verdict`.
        lowered: Images that the diagnostics broke and no attack had broken.
        unevaluated: Images without a finite answer; they are in neither number.
        proven: Images that were not attacked because a proof covers them.
    """
    by = f"any of {attacks} attacks" if attacks > 1 else "the one attack" if attacks else "the diagnostics alone"
    digits = 1 if rate.n < 10_000 else 2
    if not rate.n:
        return f"robust accuracy: no image could be evaluated; diagnostics: {said}"
    low, high = (f"{100 * end:.{digits}f}" for end in rate.interval)
    parts = [f"{rate.k} of {rate.n} images not broken by {by}"]
    parts += [f"the diagnostics broke {lowered} more than those"] if lowered and attacks else []
    parts += [f"{unevaluated} not evaluated"] if unevaluated else []
    parts += [f"{proven} not attacked: a proof covers them"] if proven else []
    parts += [f"95 % interval of the sample {low} to {high}", f"{NORM[norm]} eps {pretty(eps)}", f"diagnostics: {said}"]
    return f"robust accuracy <= {100 * rate.value:.{digits}f} % ({'; '.join(parts)})"


def verdict_of(store: RunStore, unevaluated: int = 0) -> Verdict:
    """The verdict of a stored diagnosis."""
    manifest = store.manifest()
    level = str(manifest["settings"]["level"])
    tests = sum(m["group"] != PICTURES for m in manifest["methods"])
    return verdict(ordered(store), level, planned=tests, unevaluated=unevaluated)


def ordered(store: RunStore) -> pd.DataFrame:
    """Rows of a diagnosis in the order of the report."""
    frame = store.frame()
    place = {m["id"]: k for k, m in enumerate(store.manifest()["methods"])}
    return frame.iloc[frame["id"].map(place).argsort()].reset_index(drop=True)


def lines(rows: pd.DataFrame, level: str, end: Verdict, chosen: int) -> list[str]:
    """The diagnosis for a screen: a line per test, the verdict, what to do, and the foot.

    Tests of a higher level share one line.

    Args:
        rows: As for :func:`verdict`.
        level: Level of the diagnosis.
        end: The verdict over these rows.
        chosen: Images that the diagnosis was made for; a test may count stored images of several attacks besides.
    """
    forwards, backwards = int(rows["forwards"].sum()), int(rows["backwards"].sum())
    images = min(int(rows["n_images"].max()), chosen) if len(rows) else 0
    cost = f"{_thousands(forwards)} forwards, {_thousands(backwards)} backwards, {rows['seconds'].sum():.0f} s"
    out = [f"Diagnostics ({level}, {images} images, {cost})"]
    rows = rows[(rows["group"] != PICTURES) | (rows["result"] != NOT_RUN)]
    higher = rows[(rows["result"] == NOT_RUN) & rows["why"].str.startswith("level ")]
    shown = rows.drop(higher.index)
    cells = [("id", "question", "measured", "limit", "result")]
    for row in shown.itertuples():
        reason = f": {row.why}" if row.result in (NOT_RUN, DOES_NOT_APPLY) else ""
        cells.append((row.id, row.question, row.measured, row.limit, row.result + reason))
    widths = [max(len(line[k]) for line in cells) for k in range(4)]
    for line in cells:
        out.append(" " + "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[4]]))
    if len(higher):
        out.append(f" {len(higher)} tests of higher levels not run: {', '.join(higher['id'])}")
    out += ["", end.text, FOOT]
    for row in rows[rows["result"].isin([FAILED, WARNING])].itertuples():
        out.append(f" {row.id}: {'. '.join(part for part in (row.why, row.what_to_do) if part)}")
    lowered = rows[rows["counterexamples"] > 0]
    if len(lowered):
        said = ", ".join(f"{row.id} {row.counterexamples}" for row in lowered.itertuples())
        out.append(f" {int(lowered['counterexamples'].sum())} images were broken by the diagnostics first ({said})")
    return out


def document(rows: pd.DataFrame, level: str, end: Verdict, headlines: Sequence[str]) -> dict[str, Any]:
    """The diagnosis for machines."""
    clean = rows.drop(columns="part", errors="ignore").astype(object)
    tests = clean.where(clean.notna(), None).to_dict("records")
    return {
        "level": level,
        "verdict": end.number,
        "text": end.text,
        "foot": FOOT,
        "headlines": list(headlines),
        "clear": int((rows["result"] == CLEAR).sum()),
        "tests": tests,
    }


def _thousands(count: int) -> str:
    return f"{count / 1000:.0f} k" if count >= 10_000 else str(count)
