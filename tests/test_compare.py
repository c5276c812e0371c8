"""Two runs image by image: every number follows from planted records, every interval from its definition."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from math import comb, factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from robeval.cli.compare import compare
from robeval.core.errors import FileRefused, UsageError
from robeval.core.records import CLEAN, AttackRecord, Diagnosis
from robeval.reports.compare import Comparison
from robeval.reports.paired import cochran, holm, mcnemar, newcombe
from robeval.reports.pairs import Pairs
from robeval.reports.stats import Rate
from robeval.reports.writers import write
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore

BASE = AttackRecord(
    index=0, label=1, clean_prediction=1, clean_correct=True, attack=CLEAN, norm="linf", eps=0.0, success=False,
    prediction=1, distance_linf=math.inf, distance_l2=math.inf, distance_l1=math.inf, distance_l0=math.inf, margin=1.0,
    attempt=-1, iterations=0, forwards=1, backwards=0, first_success_forward=-1, survives_8bit=False, seed=0,
    attack_config_hash="",
)  # fmt: skip
ERROR = "the model gave NaN or Inf logits under attack"


def diagnosis(root: Path, about: Any, result: str) -> None:
    """A diagnosis of one test about gradients, in the folder of the runs."""
    manifest = new_manifest(
        "diagnose", **about, methods=[{"label": "G1", "id": "G1", "group": 2}], seed=0, argv=["diagnose"],
        settings={"level": "quick", "runs": [], "sources": []},
    )  # fmt: skip
    store = RunStore.create_or_open(root, manifest)
    texts = dict.fromkeys((f for f in Diagnosis.__dataclass_fields__), "")
    numbers = dict.fromkeys(("n_images", "n_flagged", "counterexamples", "forwards", "backwards", "seed"), 0)
    floats = dict.fromkeys(("interval95_low", "interval95_high", "eps", "seconds"), math.nan)
    store.append([Diagnosis(**{**texts, **numbers, **floats, "id": "G1", "result": result, "group": 2})])  # type: ignore[arg-type]
    store.close({"seconds": 1.0, "exit_code": 0})


def run(
    root: Path, found: dict[int, float | None], *, attack: str = "pgd", eps: tuple[float, ...] = (0.1,),
    model: str = "m", data: str = "d", norm: str = "linf", wrong: tuple[int, ...] = (), errors: tuple[int, ...] = (),
    verdict: str = "clear", name: str = "digits/test", label: int = 1,
) -> RunStore:  # fmt: skip
    """A run of one attack over images 0, 1, ...: the distance found for each at the largest eps, or none.

    Beside it lies a diagnosis of the model, of one test that ended as ``verdict`` says; none where that is empty.
    """
    about: Any = {"model": {"name": model, "fingerprint": model * 8}, "threat": {"norm": norm, "eps": list(eps)}}
    about["data"] = {"name": name, "fingerprint": data, "subset": "", "images": len(found), "ids": list(found)}
    if verdict:
        diagnosis(root, about, verdict)
    search = "minimal" if not eps else "fixed"
    manifest = new_manifest(
        "attack", **about, seed=0, settings={"each": True}, argv=["attack"],
        methods=[{"label": attack, "name": attack, "settings": {}, "hash": attack, "source": "A", "search": search}],
    )  # fmt: skip
    records = []
    for i, distance in found.items():
        clean = replace(BASE, index=i, label=label, norm=norm, clean_correct=i not in wrong, success=i in wrong)
        records.append(clean)
        for radius in (eps or (math.inf,)) if i not in wrong else ():
            d = distance if distance is not None and distance <= radius else math.inf
            records.append(
                replace(
                    clean, attack=attack, eps=radius, success=math.isfinite(d), distance_linf=d, distance_l2=d,
                    forwards=10, backwards=4, error=ERROR if i in errors else "",
                )
            )  # fmt: skip
    store = RunStore.create_or_open(root, manifest)
    store.append(records)
    store.close({"seconds": 1.5, "exit_code": 0})
    return RunStore.open(store.folder)


@pytest.fixture
def pair(tmp_path: Path) -> Comparison:
    """Two attacks on one model; image 5 is misclassified, 0 and 1 fall to both, 2 to A, 3 to B, 4 to none."""
    a = run(tmp_path, {0: 0.05, 1: 0.08, 2: 0.1, 3: None, 4: None, 5: None}, attack="pgd", wrong=(5,))
    b = run(tmp_path, {0: 0.1, 1: 0.04, 2: None, 3: 0.09, 4: None, 5: None}, attack="square", wrong=(5,))
    return Comparison(a, b)


def test_every_image_has_its_place(pair: Comparison) -> None:
    (x,) = pair.agreements
    assert (x.both, x.only_a, x.only_b, x.neither, x.unknown) == ([0, 1, 5], [2], [3], [4], 0)
    assert x.robust == (Rate(2, 6), Rate(2, 6))
    assert pair.same_model
    assert "Two attack runs on m in linf: A pgd; B square" in pair.title
    rows = pair.tables()["images"].rows
    assert [(r["image"], r["broken in"], r["by"], r["distance"]) for r in rows] == [
        (2, "A", "pgd", 0.1), (3, "B", "square", 0.09),
    ]  # fmt: skip


def test_distances_are_compared_where_both_have_one(pair: Comparison) -> None:
    a, b = pair.tables()["runs"].rows
    assert (a["closer"], b["closer"]) == (Rate(1, 2), Rate(1, 2))
    assert a["ratio"] == pytest.approx((0.05 / 0.1 + 0.08 / 0.04) / 2)
    assert (a["forwards"], a["backwards"], a["seconds"]) == (6 + 5 * 10, 5 * 4, 1.5)


def test_two_models_and_several_radii(tmp_path: Path) -> None:
    found: dict[int, float | None] = dict.fromkeys(range(40), None)
    a = run(tmp_path, found | dict.fromkeys(range(20), 0.2), model="a", eps=(0.1, 0.2))
    b = run(tmp_path, found | dict.fromkeys(range(4), 0.05), model="b", eps=(0.05, 0.1, 0.2))
    comparison = Comparison(a, b)
    assert [x.eps for x in comparison.agreements] == [0.1, 0.2]
    assert not comparison.same_model
    small, large = comparison.tables()["agreement"].rows
    assert [row["A - B"] for row in (small, large)] == pytest.approx([0.1, -0.4])
    assert [large[name] for name in ("only A", "only B", "p")] == pytest.approx([16, 0, 2 * 0.5**16])
    assert large["p (Holm)"] == pytest.approx(2 * 2 * 0.5**16)
    assert isinstance(large["low"], float) and isinstance(large["high"], float)
    assert large["low"] < -0.4 < large["high"] < 0
    notes = " ".join(comparison.tables()["agreement"].notes)
    assert "eps 0.1: 4 images differ; under 6 no split reaches p < 0.05" in notes
    assert "eps 0.2: 16 images" not in notes
    assert "diagnostics: A quick, no sign found by 1 of 1 test; B quick, no sign found by 1 of 1 test" in notes


@pytest.mark.parametrize(
    ("verdict", "said"),
    [("", "B not run"), ("FAILED", "B quick, 1 failed (G1)"), ("warning", "B quick, no failure, 1 warning")],
)
def test_p_is_withheld_where_a_diagnosis_failed_or_nobody_looked(tmp_path: Path, verdict: str, said: str) -> None:
    """A model that hides its gradients wins a paired test unfairly."""
    found: dict[int, float | None] = dict.fromkeys(range(40), None)
    a = run(tmp_path, found | dict.fromkeys(range(20), 0.1), model="a")
    b = run(tmp_path, found, model="b", verdict=verdict)
    comparison = Comparison(a, b)
    table = comparison.tables()["agreement"]
    assert comparison.tested == (verdict == "warning")
    assert table.rows[0]["p"] == (pytest.approx(2 * 0.5**20) if verdict == "warning" else "withheld")
    assert said in " ".join(table.notes)
    assert ("p is withheld" in " ".join(table.notes)) != comparison.tested
    alone = Comparison(b, run(tmp_path, found, attack="square", model="b", verdict=verdict))
    assert alone.tested  # two attacks on one model: nobody hides more than the other


def test_images_that_both_runs_have(tmp_path: Path) -> None:
    a = run(tmp_path, dict.fromkeys(range(30), 0.1), attack="pgd", data="first 30")
    b = run(tmp_path, dict.fromkeys(range(10, 50), None), attack="square", data="others")
    comparison = Comparison(a, b)
    (x,) = comparison.agreements
    assert (comparison.dropped, x.images, x.only_a, x.unknown) == (30, 20, list(range(10, 30)), 0)
    assert "30 images that only one of the runs has are left out" in " ".join(comparison.tables()["agreement"].notes)


def test_several_runs_pair_by_pair(tmp_path: Path) -> None:
    found: dict[int, float | None] = dict.fromkeys(range(40), None)
    runs = [run(tmp_path, found | dict.fromkeys(range(n), 0.1), model=m) for m, n in (("a", 20), ("b", 4), ("c", 4))]
    table = Pairs(runs).tables()["pairs"]
    assert [row["pair"] for row in table.rows] == ["A - B", "A - C", "B - C"]
    assert [row["p"] for row in table.rows] == pytest.approx([2 * 0.5**16, 2 * 0.5**16, 1.0])
    assert [row["p (Holm)"] for row in table.rows] == pytest.approx([6 * 0.5**16, 6 * 0.5**16, 1.0])
    assert [row["difference"] for row in table.rows] == pytest.approx([-0.4, -0.4, 0.0])
    notes = " ".join(table.notes)
    assert "Cochran's Q 32.00 over 40 images that all runs decided" in notes  # 16 images, each lost by A alone
    assert "3 attack runs in linf: A a, B b, C c" in table.title
    masked = run(tmp_path, found, model="d", verdict="FAILED")
    table = Pairs([*runs[:2], masked]).tables()["pairs"]
    assert [isinstance(row["p"], float) for row in table.rows] == [True, False, False]
    assert "Cochran" not in " ".join(table.notes)


def test_cochrans_q_is_mcnemars_chi_squared_for_two_and_blind_to_names() -> None:
    rng = np.random.default_rng(0)
    stands = rng.random((200, 2)) < (0.6, 0.4)
    b, c = int((stands[:, 0] & ~stands[:, 1]).sum()), int((~stands[:, 0] & stands[:, 1]).sum())
    q, p = cochran(stands)
    assert q == pytest.approx((b - c) ** 2 / (b + c))
    assert p == pytest.approx(math.erfc(math.sqrt(q / 2)))
    more = rng.random((200, 4)) < (0.6, 0.4, 0.5, 0.5)
    assert cochran(more) == pytest.approx(cochran(more[:, [2, 0, 3, 1]]))
    mean = more.mean(0) * 200 - more.sum() / 4
    each = more.sum(1)
    assert cochran(more)[0] == pytest.approx(4 * 3 * (mean**2).sum() / (each * (4 - each)).sum())
    assert cochran(np.ones((5, 3), bool)) == (0.0, 1.0)


def test_a_search_of_the_nearest_image_answers_at_every_radius(tmp_path: Path) -> None:
    a = run(tmp_path, {0: 0.09, 1: 0.3, 2: None}, attack="deepfool", eps=())
    b = run(tmp_path, {0: None, 1: None, 2: None}, attack="pgd", eps=(0.1,))
    (x,) = Comparison(a, b).agreements
    assert (x.only_a, x.neither) == ([0], [1, 2])
    alone = Comparison(a, a)
    assert alone.agreements == []
    assert alone.tables()["runs"].rows[0]["closer"] == Rate(0, 2)


def test_images_without_an_answer_count_for_nobody(tmp_path: Path) -> None:
    a = run(tmp_path, {0: 0.1, 1: None, 2: None}, attack="pgd", errors=(2,))
    b = run(tmp_path, {0: 0.1, 1: None, 2: None}, attack="square")
    comparison = Comparison(a, b)
    assert (comparison.agreements[0].images, comparison.agreements[0].unknown) == (2, 1)
    assert "eps 0.1: 1 images are left out" in " ".join(comparison.tables()["agreement"].notes)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    base = run(tmp_path, {0: None})
    for other, code in (
        (run(tmp_path, {0: None}, data="other", name="cifar10/test"), "T04"),
        (run(tmp_path, {1: None}, data="other"), "T04"),
        (run(tmp_path, {0: None}, data="another", label=2), "T04"),
        (run(tmp_path, {0: None}, norm="l2"), "T01"),
        (run(tmp_path, {0: None}, eps=(0.3,)), "T05"),
    ):
        with pytest.raises(UsageError) as caught:
            Comparison(base, other)
        assert caught.value.code == code
        assert len(str(caught.value).splitlines()) <= 4


@pytest.mark.parametrize("b, c", [(0, 0), (5, 0), (6, 0), (30, 12), (12, 30), (7, 7)])
def test_mcnemar_is_the_binomial_test_by_its_definition(b: int, c: int) -> None:
    n, least = b + c, min(b, c)
    tail = sum(comb(n, k) for k in range(least + 1)) / 2**n
    assert mcnemar(b, c) == pytest.approx(min(1.0, 2 * tail))
    if n:
        assert mcnemar(b, c) == pytest.approx(binomtest(b, n).pvalue)


#: Newcombe 1998, Statistics in Medicine 17, 2635-2650, table III, method 10: cells and 95 % limits.
TABLE_III = {
    (36, 12, 2, 0): (0.0569, 0.3404), (20, 12, 2, 16): (0.0562, 0.3292), (18, 12, 2, 18): (0.0562, 0.3290),
    (36, 14, 0, 0): (0.1528, 0.4167), (35, 14, 0, 1): (0.1461, 0.4175), (18, 14, 0, 18): (0.1441, 0.3963),
    (2, 97, 1, 0): (0.8721, 0.9854), (1, 97, 1, 1): (0.8736, 0.9850), (0, 30, 0, 0): (0.8395, 1.0),
    (54, 0, 0, 0): (-0.0664, 0.0664), (30, 0, 0, 24): (-0.0358, 0.0358),
}  # fmt: skip


@pytest.mark.parametrize("cells", TABLE_III, ids=str)
def test_newcombes_interval_is_the_published_one(cells: tuple[int, int, int, int]) -> None:
    assert newcombe(*cells) == pytest.approx(TABLE_III[cells], abs=1e-4)


def test_newcombes_interval_turns_with_the_table_and_covers_the_truth() -> None:
    both, only_a, only_b, neither = 30, 9, 4, 17
    low, high = newcombe(both, only_a, only_b, neither)
    assert newcombe(both, only_b, only_a, neither) == pytest.approx((-high, -low))
    assert newcombe(neither, only_a, only_b, both) == pytest.approx((low, high))
    assert newcombe(0, 0, 0, 0) == (-1.0, 1.0)
    n, p = 24, (0.4, 0.2, 0.1, 0.3)
    covered = 0.0
    for a, b, c in product(range(n + 1), repeat=3):  # every possible table, with its probability
        d = n - a - b - c
        if d >= 0:
            low, high = newcombe(a, b, c, d)
            ways = factorial(n) // (factorial(a) * factorial(b) * factorial(c) * factorial(d))
            chance = ways * p[0] ** a * p[1] ** b * p[2] ** c * p[3] ** d
            covered += chance * (low <= p[1] - p[2] <= high)
    assert 0.93 < covered < 0.97


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("form", ["terminal", "markdown", "latex", "csv", "json"])
def test_every_form_writes_every_table(pair: Comparison, form: str) -> None:
    for table in pair.tables().values():
        text = write(table, form)
        assert all(str(row[table.columns[0]]) in text for row in table.rows)


def test_the_command(pair: Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (str(f.store.folder) for f in (pair.a, pair.b))
    compare([a, b], form="terminal", which="all", ci="bracket", out=None, json=False, quiet=True)
    shown = capsys.readouterr().out
    assert "Two attack runs on m" in shown and "Distances and costs" in shown
    compare([a, b], form="terminal", which="all", ci="bracket", out=None, json=True, quiet=True)
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["agreement", "images", "runs"]
    assert document["agreement"]["rows"][0]["only A"] == 1
    target = tmp_path / "t.csv"
    compare([a, b], form="csv", which="agreement", ci="bracket", out=str(target), json=False, quiet=True)
    assert target.read_text().startswith("eps,A robust <=,A robust <= k")
    for which, form, code in (("all", "csv", "T03"), ("both", "terminal", "A04")):
        with pytest.raises(UsageError) as caught:
            compare([a, b], form=form, which=which, ci="bracket", out=None, json=False, quiet=True)
        assert caught.value.code == code
    with pytest.raises(UsageError, match="holds 2 attack runs, give one"):
        compare([str(pair.a.store.folder.parent), b], form="terminal", which="all", ci="bracket", out=None)
    with pytest.raises(UsageError, match="takes 2 to 26 runs, got 1"):
        compare([a], form="terminal", which="all", ci="bracket", out=None)
    with pytest.raises(FileRefused, match="no run found"):
        compare([str(tmp_path / "gone"), b], form="terminal", which="all", ci="bracket", out=None)


def test_a_long_list_of_images_is_cut_on_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = run(tmp_path, dict.fromkeys(range(30), 0.1), attack="pgd")
    b = run(tmp_path, dict.fromkeys(range(30), None), attack="square")
    words = {"ci": "bracket", "out": None, "json": False, "quiet": True}
    compare([str(a.folder), str(b.folder)], form="terminal", which="all", **words)  # type: ignore[arg-type]
    assert "and 10 more: --table images" in capsys.readouterr().out
    compare([str(a.folder), str(b.folder)], form="terminal", which="images", **words)  # type: ignore[arg-type]
    assert "more" not in capsys.readouterr().out
