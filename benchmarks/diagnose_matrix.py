"""Which diagnostic fires on which planted fault: the positive and negative controls of the diagnostics.

Seventeen models on the embedded digits (``tests/planted.py``): three honest ones, and planted faults. Every diagnostic
of the chosen level runs on 100 images at linf eps 0.15, with a plain source model for transfer. Prints one JSON line a
model with everything that was measured, then the matrix, F for FAILED and w for a warning. Exit code 7 when an honest
model gets a FAILED, or a planted fault gets none.

    python -m benchmarks.diagnose_matrix [--level standard] [--images 100] [--models noise,one-hot]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from robeval.core import catalogue
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, FAILED, NOT_RUN, WARNING, Finding, not_run
from robeval.diagnose.subject import Subject
from tests import planted

LEVELS = ("quick", "standard", "full")
SIGNS = {CLEAR: ".", WARNING: "w", FAILED: "F", NOT_RUN: "-", DOES_NOT_APPLY: " "}


def tests_of(level: str) -> list[catalogue.Method]:
    """The diagnostics of a level, in the order of the report."""
    upto = LEVELS[: LEVELS.index(level) + 1]
    chosen = [m for m in catalogue.methods("diagnostics").values() if m.facts["level"] in upto]
    return sorted(chosen, key=lambda m: (m.facts["group"], m.facts["id"][0], int(m.facts["id"][1:])))


def diagnosed(subject: Subject, level: str) -> dict[str, tuple[Finding, float, int, int]]:
    """Finding, seconds, forwards and backwards of each diagnostic by id; one that crashes is not run."""
    rows = {}
    for method in tests_of(level):
        before, start = (subject.passes.forwards, subject.passes.backwards), time.perf_counter()
        try:
            finding = method.load()(subject)
        except Exception as error:
            finding = not_run(f"{type(error).__name__}: {error}".splitlines()[0])
        spent = time.perf_counter() - start
        passes = subject.passes
        rows[method.facts["id"]] = (finding, spent, passes.forwards - before[0], passes.backwards - before[1])
    return rows


def subject_of(name: str, images: int, level: str) -> Subject:
    """A model of the suite, ready to be diagnosed."""
    torch.manual_seed(0)
    return Subject(
        planted.model(name), planted.chosen(images), planted.NORM, planted.EPS, 0, level, (), [planted.source()]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--level", choices=LEVELS, default="standard")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--models", default=",".join(planted.MODELS))
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    columns = [m.facts["id"] for m in tests_of(given.level)]
    lines, wrong = [], []
    for name in given.models.split(","):
        rows = diagnosed(subject_of(name, given.images, given.level), given.level)
        fired = [key for key, row in rows.items() if row[0].result == FAILED]
        if (name in planted.HONEST) == bool(fired):
            wrong.append(name)
        told: dict[str, Any] = {"model": name, "level": given.level, "images": given.images}
        for key, (finding, seconds, forwards, backwards) in rows.items():
            told[key] = {
                "result": finding.result, "measured": finding.measured, "why": finding.why,
                "seconds": round(seconds, 2), "forwards": forwards, "backwards": backwards,
            }  # fmt: skip
        print(json.dumps(told), flush=True)
        lines.append(f"{name:18}" + "".join(f"{SIGNS[rows[key][0].result]:>4}" for key in columns))
    print("\n".join([" " * 18 + "".join(f"{key:>4}" for key in columns), *lines]))
    print(f"wrong: {', '.join(wrong) or 'none'}")
    return 7 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
