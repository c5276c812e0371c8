"""Tables from planted records: every number follows from the rows."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from scipy.stats import binomtest

from robeval.core.errors import FileRefused, UsageError
from robeval.core.records import CLEAN, AttackRecord, Certificate
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate, wilson
from robeval.reports.tables import Table, attacks_table, models_table
from robeval.reports.writers import csv, latex, latex_text, markdown, terminal, write
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore

BASE = AttackRecord(
    index=0, label=1, clean_prediction=1, clean_correct=True, attack=CLEAN, norm="linf", eps=0.0, success=False,
    prediction=1, distance_linf=math.inf, distance_l2=math.inf, distance_l1=math.inf, distance_l0=math.inf, margin=1.0,
    attempt=-1, iterations=0, forwards=1, backwards=0, first_success_forward=-1, survives_8bit=False, seed=0,
    attack_config_hash="",
)  # fmt: skip


def clean(index: int, correct: bool = True) -> AttackRecord:
    distance = math.inf if correct else 0.0
    return replace(
        BASE, index=index, clean_correct=correct, success=not correct, distance_linf=distance, distance_l2=distance
    )


def hit(index: int, attack: str, eps: float, distance: float | None, error: str = "") -> AttackRecord:
    d = math.inf if distance is None else distance
    return replace(
        BASE, index=index, attack=attack, eps=eps, success=distance is not None, distance_linf=d, distance_l2=d,
        prediction=2, forwards=10, backwards=5, error=error,
    )  # fmt: skip


def run(
    root: Path, records: list[AttackRecord], *, model: str = "m", sha: str = "a", norm: str = "linf",
    eps: tuple[float, ...] = (0.1, 0.2), each: bool = False, images: int = 5,
) -> RunStore:  # fmt: skip
    methods = [
        {"label": "pgd", "name": "pgd", "settings": {}, "hash": "1", "source": "A 2018", "search": "fixed"},
        {"label": "deepfool", "name": "deepfool", "settings": {}, "hash": "2", "source": "B 2016", "search": "minimal"},
    ]
    manifest = new_manifest(
        "attack", model={"name": model, "fingerprint": sha}, threat={"norm": norm, "eps": list(eps)}, methods=methods,
        data={"name": "digits/test", "fingerprint": "d", "subset": "", "images": images, "ids": list(range(images))},
        seed=0, settings={"each": each}, argv=["attack"],
    )  # fmt: skip
    store = RunStore.create_or_open(root, manifest)
    store.append([replace(r, norm=norm) for r in records])
    store.close({"seconds": 1.5, "exit_code": 0})
    return RunStore.open(store.folder)


@pytest.fixture
def cascade(tmp_path: Path) -> RunStore:
    """Image 4 is misclassified; pgd breaks 0 at 0.1 and 1 at 0.2; deepfool finds 1..3 at 0.15, 0.19, 0.5."""
    return run(
        tmp_path,
        [
            *(clean(i) for i in range(4)), clean(4, correct=False),
            hit(0, "pgd", 0.1, 0.1), *(hit(i, "pgd", 0.1, None) for i in (1, 2, 3)),
            hit(1, "deepfool", math.inf, 0.15), hit(2, "deepfool", math.inf, 0.19), hit(3, "deepfool", math.inf, 0.5),
            hit(3, "pgd", 0.2, None),
        ],
    )  # fmt: skip


def test_facts_of_a_cascade(cascade: RunStore) -> None:
    facts = AttackFacts(cascade)
    assert facts.clean_accuracy == Rate(4, 5)
    assert [facts.worst_case(e) for e in (0.01, 0.1, 0.15, 0.2, 0.5)] == [Rate(k, 5) for k in (4, 3, 2, 1, 0)]
    first, second = facts.per_attack(0.1)
    assert (first.robust, first.alone, first.broken, first.attacked) == (Rate(3, 5), True, 1, 4)
    assert (second.robust, second.alone, second.broken, second.first) == (Rate(3, 5), False, 0, 0)
    first, second = facts.per_attack(0.2)
    assert (first.robust, first.alone, first.attacked, first.first) == (Rate(1, 5), False, 1, 0)
    assert (second.robust, second.broken, second.first) == (Rate(1, 5), 2, 0)
    assert facts.distances().tolist() == [0.1, 0.15, 0.19, 0.5, 0.0]
    mean, found = facts.mean_distance()
    assert mean == pytest.approx(0.188)
    assert found == 5
    assert facts.complete
    assert facts.cost() == {"forwards": 5 + 80, "backwards": 40, "seconds": 1.5}


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    store = run(tmp_path, [clean(0), clean(1), hit(0, "pgd", 0.1, None)])
    assert not AttackFacts(store).complete
    assert "INCOMPLETE: 2 of 5 images seen" in models_table([store]).notes[-1]


def test_images_without_an_answer_give_both_readings(tmp_path: Path) -> None:
    store = run(tmp_path, [clean(0), clean(1), hit(0, "pgd", 0.1, None, "NaN"), hit(1, "pgd", 0.1, None)], images=2)
    assert AttackFacts(store).not_evaluated(0.1) == 1
    notes = " ".join(models_table([store]).notes)
    assert "between 50.0 % (rest all broken) and 100.0 % (rest all robust), 1 of 2 evaluated" in notes


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["pgd", "deepfool"]), st.floats(0.001, 0.6)), max_size=12,
        unique_by=lambda t: (t[0], t[1]),
    ),
    st.lists(st.floats(0.001, 0.7), min_size=2, max_size=4),
)  # fmt: skip
@quick(max_examples=40, deadline=None)
def test_worst_case_falls_with_eps_and_is_under_every_attack(
    hits: list[tuple[int, str, float]], radii: list[float]
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        eps = tuple(sorted(set(radii)))
        rows = [
            hit(i, a, math.inf if a == "deepfool" else max(eps), d)
            for i, a, d in hits
            if a == "deepfool" or d <= max(eps)
        ]
        facts = AttackFacts(run(Path(folder), [*(clean(i) for i in range(5)), *rows], eps=eps))
        worst = [facts.worst_case(e).k for e in eps]
        assert worst == sorted(worst, reverse=True)
        for e in eps:
            assert all(facts.worst_case(e).k <= a.robust.k for a in facts.per_attack(e))


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 17), (351, 360), (1, 1)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    theirs = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert Rate(0, 0).interval == (0.0, 1.0)


def test_estimates_stand_beside_the_attacks_that_refute_them(cascade: RunStore, tmp_path: Path) -> None:
    manifest = new_manifest(
        "certify", model={"name": "m", "fingerprint": "a"}, threat={"norm": "linf", "eps": []},
        methods=[
            {"label": "l-bound", "name": "l-bound", "settings": {}, "hash": "3", "source": "C", "kind": "estimate"}
        ],
        data=cascade.manifest()["data"], seed=0, settings={}, argv=[],
    )  # fmt: skip
    store = RunStore.create_or_open(tmp_path, manifest)
    store.append(
        [
            Certificate(
                index=i, label=1, prediction=1, clean_correct=True, bound="l-bound", kind="estimate", norm="linf",
                eps=math.nan, status="estimate", radius=0.16, margin_lower=math.nan, loss="cw", loss_value=-1.0,
                gradient_norm=1.0, curvature=math.nan, constant=2.0, domain="test set", arithmetic="f32",
                residual=math.nan, confidence=math.nan, samples=0, forwards=1, backwards=1, seed=0,
                bound_config_hash="3",
            )
            for i in range(4)
        ]
    )  # fmt: skip
    store.close({})
    table = models_table([cascade, RunStore.open(store.folder)])
    row = table.rows[0]
    assert row["l-bound (ESTIMATE) mean"] == pytest.approx(0.16)
    assert row["l-bound attacked inside"] == Rate(2, 4)  # 0.1 and 0.15 lie under 0.16
    for form in ("terminal", "markdown", "latex", "csv", "json"):
        text = write(table, form)
        assert "ESTIMATE" in text
        assert "certified" not in text.lower()


def test_what_may_not_share_a_table(tmp_path: Path) -> None:
    one = run(tmp_path, [clean(0)])
    other_norm = run(tmp_path, [clean(0)], norm="l2")
    with pytest.raises(UsageError, match="different threat models") as caught:
        models_table([one, other_norm])
    assert caught.value.code == "T01"
    assert len(models_table([one, other_norm], "l2").rows) == 2
    with pytest.raises(UsageError, match="two models are called") as caught:
        models_table([one, run(tmp_path, [clean(0)], sha="b")])
    assert caught.value.code == "T02"
    with pytest.raises(FileRefused, match="no attack run"):
        models_table([], "l1")


HOSTILE = r"\input{/etc/passwd} $x$ 50% a_b & c#d {e} ~ ^ <script>"


def hostile(name: str) -> Table:
    return Table("t", ["model", "robust <="], [{"model": name, "robust <=": Rate(3, 4)}], ["note 100 %"])


def test_latex_prints_hostile_names_and_runs_nothing() -> None:
    text = latex(hostile(HOSTILE))
    body = text.split(r"\toprule")[1]
    assert r"\input" not in body
    assert r"\textbackslash{}input\{/etc/passwd\} \$x\$ 50\% a\_b \& c\#d \{e\}" in body
    assert r"$\leq$" in body
    assert latex_text("a\nb\x1b[31m") == "a b[31m"
    assert "75.0 [30.1, 95.4]" in text
    assert r"$\pm$" in latex(hostile("m"), "pm")
    assert "[" not in latex(hostile("m"), "none").split("midrule")[1].split("bottomrule")[0]
    with pytest.raises(UsageError):
        latex(hostile("m"), "bold")


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1+1", "-cmd", "@x"])
def test_csv_never_starts_a_formula(name: str) -> None:
    from io import StringIO

    frame = pd.read_csv(StringIO(csv(hostile(name))))
    assert frame["model"].tolist() == [f"'{name}"]
    assert frame["robust <="].tolist() == [0.75]
    assert frame["robust <= k"].tolist() == [3]
    negative = Table("t", ["x"], [{"x": -0.5}])
    assert pd.read_csv(StringIO(csv(negative)))["x"].tolist() == [-0.5]


def test_terminal_and_markdown_strip_what_could_harm() -> None:
    assert "\x1b" not in terminal(hostile("a\x1b[31mb\u202e"))
    assert "<script>" not in markdown(hostile("<script>|"))
    assert "3" in terminal(hostile("m"))
    wide = Table(
        "t", [f"a long column name {k}" for k in range(12)], [{f"a long column name {k}": k for k in range(12)}]
    )
    assert len(terminal(wide).splitlines()) >= 12  # turned on its side


def test_json_is_strict(cascade: RunStore) -> None:
    document = json.loads(write(attacks_table(cascade), "json"), parse_constant=lambda c: pytest.fail(c))
    assert document["rows"][0]["robust <="]["k"] == 3
    with pytest.raises(UsageError, match="unknown format"):
        write(attacks_table(cascade), "docx")


def test_reports_and_store_import_no_torch() -> None:
    code = "import sys, robeval.reports.writers, robeval.store.find; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path), "PATH": ""})
