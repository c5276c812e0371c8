"""Hostile names in every form of a table, and tables of runs that are not the usual ones."""

from __future__ import annotations

import csv as csv_reader
import json
import math
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robeval.core.errors import UsageError
from robeval.core.records import CLEAN, AttackRecord, Certificate
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate
from robeval.reports.tables import Table, attacks_table, models_table
from robeval.reports.writers import csv, latex, markdown, terminal, write
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore

PLAIN = {"int": 0, "float": math.inf, "bool": False, "str": ""}
BREAKS = "a\n\\input{/etc/passwd}\n\x0b\x0c\r\x85\u2028b"


def table(name: str, note: str = "n") -> Table:
    return Table(name, ["model", "eps", "robust <="], [{"model": name, "eps": 0.5, "robust <=": Rate(3, 4)}], [note])


def open_run(root: Path, kind: str = "attack", norm: str = "l2", eps: tuple[float, ...] = (), **data: Any) -> RunStore:
    search = "fixed" if eps else "minimal"
    manifest = new_manifest(
        kind,
        model={"name": "m", "fingerprint": "a"},
        data={"name": "digits/test", "fingerprint": "d", "subset": "", "images": 3} | data,
        threat={"norm": norm, "eps": list(eps)},
        methods=[{"label": label, "search": search} for label in ("deepfool", "fmn")],
        seed=0,
        settings={"each": False},
        argv=[],
    )
    return RunStore.create_or_open(root, manifest)


def attacked(index: int, attack: str = CLEAN, distance: float = math.inf, eps: float = math.inf) -> AttackRecord:
    base = {f.name: PLAIN[str(f.type)] for f in fields(AttackRecord)}
    row = AttackRecord(
        **base | {"index": index, "clean_correct": True, "attack": attack, "norm": "l2", "eps": eps, "example": -1}
    )
    return replace(row, success=math.isfinite(distance), distance_l2=distance, forwards=3)


def bound(index: int, radius: float, norm: str) -> Certificate:
    base = {f.name: PLAIN[str(f.type)] for f in fields(Certificate)}
    facts = {"index": index, "bound": "l-bound", "kind": "estimate", "norm": norm, "eps": math.nan, "radius": radius}
    return Certificate(**base | facts)


def test_latex_comments_stay_on_their_line() -> None:
    for text in (latex(table("m", BREAKS)), latex(table(BREAKS))):
        head = text.split(r"\begin{tabular}")[0]
        assert all(line.startswith("%") for line in head.splitlines() if line)
        assert head.count("\n") == 2
        assert r"\input" not in text.split(r"\begin{tabular}")[1]


def test_latex_columns_of_numbers_hold_numbers_or_groups() -> None:
    odd = Table("t", ["x", "y"], [{"x": 0.5, "y": "a"}, {"x": math.nan, "y": 3}, {"x": None, "y": None}])
    lines = [line for line in latex(odd).splitlines() if line.endswith(r"\\")]
    assert lines == [r"{x} & {y} \\", r"0.5000 & {a} \\", r"{-} & {3} \\", r"{} & {} \\"]
    assert r"\begin{tabular}{Sl}" in latex(odd)


def test_markdown_rows_stay_rows() -> None:
    rows = [line for line in markdown(table("x\\|y\n| z\n](javascript:1)")).splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert "](" not in rows[2]
    bars = rows[2].replace("\\\\", "").replace("\\|", "").count("|")
    assert bars == 4


def test_a_table_wider_than_the_screen_breaks_headings_and_labels_but_no_number(monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    columns = ["eps", "attack", "robust <=", "attacked", "broken", "first to break", "forwards", "backwards", "as"]
    cells: list[Any] = ["0.02", "apgd-t:loss=cw,targets=1", Rate(21, 40), 37, 0, 0, 52_893, 21_000, "cumulative"]
    row = dict(zip(columns, cells, strict=True))
    lines = terminal(Table("t", columns, [row] * 5, [])).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("52.5 % [37.5, 67.1]" in line and "52,893" in line and "cumulative" in line for line in lines) == 5
    assert [line.split()[-1] for line in lines[1:4]] == ["first", "to", "as"]


def test_terminal_rows_stay_rows() -> None:
    assert len(terminal(table(BREAKS)).splitlines()) == len(terminal(table("m")).splitlines())


@pytest.mark.parametrize("name", ["\x00=1+1", " =1+1", "\n@x", "\t-1", 'a\x00b,"c"\nd'])
def test_csv_is_safe_and_reads_back(name: str) -> None:
    rows = list(csv_reader.reader(StringIO(csv(table(name)))))
    assert len(rows) == 2
    assert "\x00" not in rows[1][0]
    assert rows[1][0].startswith("'") or "b" in rows[1][0]
    heading = Table("t", ["=cmd <="], [{"=cmd <=": Rate(1, 2)}])
    assert next(csv_reader.reader(StringIO(csv(heading))))[0] == "'=cmd <="


def test_json_of_nothing_counted_is_strict() -> None:
    text = write(Table("t", ["x"], [{"x": Rate(0, 0)}]), "json")
    assert json.loads(text, parse_constant=lambda c: pytest.fail(c))["rows"][0]["x"]["value"] is None


def test_a_search_of_the_nearest_has_a_table_without_radii(tmp_path: Path) -> None:
    store = open_run(tmp_path)
    store.append([attacked(i) for i in range(3)])
    store.append([attacked(0, "deepfool", 0.4), attacked(1, "deepfool", 0.2), attacked(2, "deepfool")])
    assert not AttackFacts(store).complete  # fmn has not run
    assert "some attacks still have images to see" in models_table([store]).notes[-1]
    assert models_table([store]).rows[0]["model"] == "m (incomplete)"
    store.append([attacked(0, "fmn", 0.3), attacked(1, "fmn", 0.6), attacked(2, "fmn")])
    facts = AttackFacts(store)
    assert facts.complete
    assert facts.distances().tolist() == [0.3, 0.2, math.inf]
    mean, found = facts.mean_distance()
    assert (round(mean, 9), found) == (0.25, 2)
    assert facts.median_distance() == 0.3
    made = attacks_table(store)
    assert [(r["attack"], r["attacked"], r["broken"]) for r in made.rows] == [("deepfool", 3, 2), ("fmn", 3, 2)]
    assert made.rows[0]["mean distance"] == pytest.approx(0.3)
    assert "over the 2 of 3 images where one was found, median 0.3 over all" in made.notes[1]
    note = "m: the mean distance is over the 2 of 3 images where one was found"
    assert note in models_table([store]).notes


def test_bounds_alone_have_a_table(tmp_path: Path) -> None:
    store = open_run(tmp_path, "certify")
    store.append([bound(i, r, "l2") for i, r in enumerate((0.1, 0.3))])
    made = models_table([store])
    (row,) = made.rows
    assert (row["bound"], row["kind"]) == ("l-bound", "ESTIMATE")
    assert row["mean radius"] == pytest.approx(0.2)
    assert "certified" not in "".join(write(made, form) for form in ("terminal", "latex", "csv", "markdown", "json"))
    with pytest.raises(UsageError, match="different threat models"):
        models_table([store, open_run(tmp_path, "certify", "linf")])


def test_bounds_in_a_norm_that_nothing_attacked_are_named_not_mixed(tmp_path: Path) -> None:
    attack = open_run(tmp_path)
    attack.append([attacked(i) for i in range(3)])
    other = open_run(tmp_path, "certify", "linf")
    other.append([bound(0, 0.1, "linf")])
    made = models_table([attack, other])
    assert not [c for c in made.columns if "bound" in c]
    assert "bounds in linf are left out: nothing here was attacked in that norm" in made.notes


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_runs_of_a_bound_the_one_over_the_attacked_images_counts(tmp_path: Path, order: int) -> None:
    attack = open_run(tmp_path)
    attack.append([*(attacked(i) for i in range(3)), attacked(0, "deepfool", 0.15)])
    same, fewer = open_run(tmp_path, "certify"), open_run(tmp_path, "certify", fingerprint="other")
    same.append([bound(i, r, "l2") for i, r in enumerate((0.2, 0.2, 0.2))])
    fewer.append([bound(0, 0.1, "l2")])
    row = models_table([attack, *[same, fewer][::order]]).rows[0]
    assert row["l-bound (ESTIMATE) mean"] == pytest.approx(0.2)
    assert row["l-bound attacked inside"] == Rate(1, 3)


def test_table_command_writes_whole_files_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from robeval.cli.table import table as command

    store = open_run(tmp_path / "runs")
    store.append([attacked(0)])
    store.append([attacked(1), attacked(2)])
    part = sorted((store.folder / "records").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-1])
    target = tmp_path / "t.csv"
    command(
        [str(tmp_path / "runs")], form="csv", layout="models", norm=None, ci="bracket", out=str(target), quiet=False
    )
    assert "warning[R02] part-all-000001" in capsys.readouterr().err
    assert pd.read_csv(target)["model"].tolist() == ["m (incomplete)"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs", "t.csv"]
    with pytest.raises(UsageError, match="unknown layout"):
        command([str(tmp_path / "runs")], form="csv", layout="cake", norm=None, ci="none", out=None, quiet=True)
