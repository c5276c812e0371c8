"""Robust accuracy against eps: a step function of planted distances, and of distances known in closed form."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from typer.testing import CliRunner

from robeval.core.catalogue import parse
from robeval.core.errors import FileRefused, RobevalError, UsageError
from robeval.evaluate.attacking import attack_run
from robeval.evaluate.settings import Settings
from robeval.reports.curve import Curve, curve_csv, curve_json, curve_table, curves, draw, ticks
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate, wilson
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore
from tests.problems import exact_distance, linear
from tests.test_reports_tables import clean, hit, run

PGD = {"label": "pgd", "name": "pgd", "settings": {}, "hash": "1", "source": "A 2018", "search": "fixed"}


def fixed_only(root: Path, *, model: str = "m", sha: str = "a") -> RunStore:
    """Five images, one misclassified; pgd at 2/16 breaks 0 and 1, at 4/16 also 2."""
    manifest = new_manifest(
        "attack", model={"name": model, "fingerprint": sha}, threat={"norm": "linf", "eps": [2 / 16, 4 / 16]},
        data={"name": "digits/test", "fingerprint": "d", "subset": "", "images": 5, "ids": list(range(5))},
        methods=[PGD], seed=0, settings={"each": True}, argv=[],
    )  # fmt: skip
    store = RunStore.create_or_open(root, manifest)
    broken = {2 / 16: (0, 1), 4 / 16: (0, 1, 2)}
    hits = [hit(i, "pgd", e, e if i in which else None) for e, which in broken.items() for i in range(4)]
    store.append([*(clean(i) for i in range(4)), clean(4, correct=False), *hits])
    store.close({"seconds": 1.0, "exit_code": 0})
    return RunStore.open(store.folder)


def minimal(root: Path, distances: dict[int, float | None], *, norm: str = "linf", model: str = "m") -> RunStore:
    """A search of the nearest image over five images, of which those without a distance stand."""
    rows = [*(clean(i) for i in range(5)), *(hit(i, "deepfool", math.inf, d) for i, d in distances.items())]
    return run(root, rows, norm=norm, model=model, eps=())


def test_the_curve_is_the_share_of_images_farther_than_eps(tmp_path: Path) -> None:
    (curve,) = curves([minimal(tmp_path, {0: 0.1, 1: 0.25, 2: 0.25, 3: 0.7, 4: None})])
    assert [curve.robust(e).k for e in (0, 0.0999, 0.1, 0.2, 0.25, 0.5, 0.7, 9.0)] == [5, 5, 4, 4, 2, 2, 1, 1]
    assert curve.steps() == [(0.0, Rate(5, 5)), (0.1, Rate(4, 5)), (0.25, Rate(2, 5)), (0.7, Rate(1, 5))]
    assert curve.everywhere
    mean, finite = curve.mean()
    assert (mean, finite) == pytest.approx((1.3 / 4, 4))
    assert curve.median() == 0.25
    assert "mean 0.325 over the 4 of 5 images" in curve.notes[0]
    assert not any("informative only" in n for n in curve.notes)


@given(st.lists(st.none() | st.floats(0.001, 2.0), min_size=1, max_size=5), st.lists(st.floats(0, 2.5), max_size=5))
@quick(max_examples=15, deadline=None)
def test_it_agrees_with_the_tables_at_every_radius_and_never_rises(found: list[float | None], at: list[float]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = minimal(Path(folder), dict(enumerate(found)))
        (curve,) = curves([store])
        facts = AttackFacts(store)
        for eps in [*at, *(d for d in found if d)]:
            assert curve.robust(eps) == facts.worst_case(eps)
        steps = curve.steps()
        assert [r.k for _, r in steps] == sorted({r.k for _, r in steps}, reverse=True)
        frame = pd.read_csv(StringIO(curve_csv([curve])))
        for eps in at:  # the file alone gives the curve back: the last row at or below eps holds
            near = any(d and abs(eps - d) < 1e-5 for d in found)
            assert near or frame[frame["eps"] <= eps]["robust"].iloc[-1] == pytest.approx(curve.robust(eps).value)


def test_exact_distances_of_a_linear_model_give_the_exact_curve(tmp_path: Path) -> None:
    model, images = linear(5)
    model.name = "linear"
    settings = Settings([parse("attacks", "deepfool:overshoot=0.001")], "l2", [])
    store = attack_run(model, images, settings, root=str(tmp_path))
    (curve,) = curves([RunStore.open(store.folder)])
    exact = exact_distance(model, images, "l2").numpy()
    for eps in np.linspace(0, exact.max() * 1.1, 40):
        low, high = ((exact * factor > eps).sum() for factor in (1, 1.002))
        assert low <= curve.robust(float(eps)).k <= high
    assert curve.robust(float(np.median(exact))).k == pytest.approx(12, abs=1)


def test_runs_of_one_model_are_merged_image_by_image(tmp_path: Path) -> None:
    near = minimal(tmp_path, {0: 0.1, 1: None, 2: 0.3, 3: 0.4, 4: None})
    other = run(
        tmp_path, [*(clean(i) for i in range(5)), *(hit(i, "pgd", 0.2, d) for i, d in enumerate([0.2, 0.15, None]))],
        eps=(0.2,), each=True,
    )  # fmt: skip
    (both,) = curves([near, other])
    assert both.distances.tolist() == [0.1, 0.15, 0.3, 0.4, math.inf]
    assert both.radii == [0.2]
    assert both.everywhere
    assert all(str(s.folder) in " ".join(both.notes) for s in (near, other))


def test_fixed_eps_alone_is_informative_only_where_attacked(tmp_path: Path) -> None:
    (curve,) = curves([fixed_only(tmp_path)])
    assert not curve.everywhere
    assert curve.radii == [2 / 16, 4 / 16]
    (note,) = [n for n in curve.notes if "informative only" in n]
    assert "only attacks of a fixed eps ran" in note
    assert "(2/16, 4/16, marked)" in note
    table = curve_table([curve])
    assert [(r["eps"], r["m <="]) for r in table.rows] == [
        ("0", Rate(4, 5)),
        ("2/16", Rate(2, 5)),
        ("4/16", Rate(1, 5)),
    ]
    assert table.notes == curve.notes


def test_a_search_that_saw_some_images_only_says_how_many(tmp_path: Path) -> None:
    """In a cascade the nearest-point search sees what earlier attacks had left; an interrupted one sees less, too."""
    rows = [*(clean(i) for i in range(5)), hit(0, "pgd", 0.1, 0.1), *(hit(i, "pgd", 0.1, None) for i in range(1, 5))]
    rows += [hit(i, "deepfool", math.inf, 0.2) for i in range(1, 5)]
    (curve,) = curves([run(tmp_path, rows, eps=(0.1,))])
    assert not curve.everywhere
    assert any("saw 4 of 5 correct images" in n and "radii attacked (0.1, marked)" in n for n in curve.notes)
    (curve,) = curves([minimal(tmp_path, {0: 0.1, 1: 0.2})])
    assert any("saw 2 of 5 correct images" in n and "loose for the others" in n for n in curve.notes)
    assert len(curve_table([curve]).rows) > 5


def test_a_run_without_records_yet_is_an_empty_curve(tmp_path: Path) -> None:
    manifest = fixed_only(tmp_path).manifest()
    RunStore.create_or_open(tmp_path, manifest, name="empty").close({})
    (curve,) = curves([RunStore.open(tmp_path / "empty")])
    assert curve.robust(0.1) == Rate(0, 0)
    assert {row["m <="] for row in curve_table([curve]).rows} == {Rate(0, 0)}
    assert "INCOMPLETE: 0 of 5 images seen" in curve.notes[-1]
    assert curve_json([curve])["curves"][0]["robust"] == [None] * 3
    assert draw([curve], "png").startswith(b"\x89PNG")


def test_models_images_and_norms_are_kept_apart(tmp_path: Path) -> None:
    a = minimal(tmp_path, {0: 0.1})
    b = run(tmp_path, [clean(0), hit(0, "deepfool", math.inf, 0.3)], model="b", sha="b", eps=())
    l2 = minimal(tmp_path, {0: 0.9}, norm="l2")
    table = curve_table(curves([a, b]))
    assert table.columns == ["eps", "m <=", "b <="]
    with pytest.raises(UsageError, match="different threat models") as caught:
        curves([a, l2])
    assert caught.value.code == "T01"
    (only,) = curves([a, l2], "l2")
    assert only.distances[0] == 0.9
    with pytest.raises(UsageError, match="two models are called") as caught:
        curves([a, run(tmp_path, [clean(0)], sha="c", eps=())])
    assert caught.value.code == "T02"
    with pytest.raises(FileRefused, match="no attack run"):
        curves([a], "l1")
    manifest = a.manifest() | {"data": a.manifest()["data"] | {"fingerprint": "other", "images": 1}}
    other = RunStore.create_or_open(tmp_path, manifest, name="other")
    other.append([clean(0), hit(0, "deepfool", math.inf, 0.3)])
    other.close({})
    names = [c.name for c in curves([a, RunStore.open(other.folder)])]
    assert names == ["m on digits/test d, n=5", "m on digits/test other, n=1"]


def test_numbers_carry_their_interval(tmp_path: Path) -> None:
    curve = curves([minimal(tmp_path, {0: 0.1, 1: 0.2})])[0]
    frame = pd.read_csv(StringIO(curve_csv([curve, replace(curve, name="=second")])))
    assert frame.columns.tolist() == ["model", "eps", "robust", "n", "low", "high"]
    assert frame["model"].tolist() == ["m"] * 3 + ["'=second"] * 3
    for row in frame.itertuples():
        assert (row.low, row.high) == pytest.approx(wilson(round(row.robust * row.n), row.n))
    document = json.loads(json.dumps(curve_json([curve]), allow_nan=False))
    assert document["curves"][0]["eps"] == [0.0, 0.1, 0.2]
    assert document["curves"][0]["median_distance"] is None  # three of five images stand


@pytest.mark.parametrize(
    "norm, end, radii, want",
    [
        ("linf", 0.25, [2 / 16, 4 / 16], [k / 16 for k in range(5)]),
        ("linf", 8 / 255, [8 / 255], [k / 255 for k in range(9)]),
        ("linf", 0.2, [], [8 * k / 255 for k in range(7)]),
        ("l2", 2.0, [], [0.25 * k for k in range(9)]),
        ("linf", 0.001, [], [0.0002 * k for k in range(6)]),
        ("l1", 0.0, [], [0.0]),
    ],
)
def test_ticks_are_few_and_round(norm: str, end: float, radii: list[float], want: list[float]) -> None:
    assert ticks(norm, end, radii) == pytest.approx(want)


@given(st.floats(1e-6, 1e4), st.sampled_from(["linf", "l2", "l1"]))
def test_there_are_always_a_few_ticks(end: float, norm: str) -> None:
    found = ticks(norm, end)
    assert 2 <= len(found) <= 9
    assert found[0] == 0
    assert found[-1] <= end * (1 + 1e-6)


def test_the_plot_shows_steps_band_marks_and_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig

    def kept(self: Figure, *where: Any, **how: Any) -> None:
        drawn.append(self)
        save(self, *where, **how)

    monkeypatch.setattr(Figure, "savefig", kept)
    first = curves([fixed_only(tmp_path)])[0]
    hostile = Curve("_a$b$\\frac{", "linf", np.array([0.05, 0.2, math.inf]), [], 3, 3)
    assert draw([first, hostile], "png").startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == r"radius eps in $\ell_\infty$, pixels in [0, 1]"
    legend = axes.get_legend()
    assert legend is not None
    assert [t.get_text().strip() for t in legend.get_texts()] == ["m", r"_a\$b\$\frac{"]
    assert [t.get_text() for t in axes.get_xticklabels()][:3] == ["0", "0.0625\n1/16", "0.125\n2/16"]
    dots = next(line for line in axes.lines if line.get_marker() == "o")
    assert np.asarray(dots.get_xydata()).tolist() == [[2 / 16, 40.0], [4 / 16, 20.0]]
    steps = axes.lines[0]
    assert list(np.asarray(steps.get_ydata())) == [80.0, 40.0, 20.0, 20.0]
    assert steps.get_drawstyle() == "steps-post"
    (low, high) = (100 * v for v in wilson(4, 5))
    edges = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert {round(low, 6), round(high, 6)} <= set(np.round(edges[:, 1], 6).tolist())
    nothing = Curve("n", "l2", np.full(3, math.inf), [], 3, 3)  # a model that nobody broke
    assert draw([nothing], "pdf") == draw([nothing], "pdf")


# --- the command ---


def command(*words: str) -> tuple[str, str, BaseException | None]:
    from robeval.cli.curve import curve

    app = typer.Typer()
    app.command()(curve)
    result = CliRunner().invoke(app, list(words))
    return result.stdout, result.stderr, result.exception


def test_the_command_prints_a_table_or_writes_plot_and_numbers(tmp_path: Path) -> None:
    minimal(tmp_path / "runs", {0: 0.1, 1: 0.2, 2: None, 3: None, 4: None})
    text, _, error = command(str(tmp_path / "runs"))
    assert error is None
    assert "60.0 % [23.1, 88.2]" in text
    assert "mean 0.15 over the 2 of 5 images" in text
    for ending, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        plot = tmp_path / f"plot{ending}"
        text, _, error = command(str(tmp_path / "runs"), "--out", str(plot), "--json")
        assert error is None
        assert plot.read_bytes().startswith(start)
        assert json.loads(text)["files"] == [str(tmp_path / "plot.csv"), str(plot)]
    assert pd.read_csv(tmp_path / "plot.csv")["eps"].tolist() == [0.0, 0.1, 0.2]
    text, _, error = command(str(tmp_path / "runs"), "--csv", str(tmp_path / "only.csv"))
    assert (text, error) == ("", None)
    assert (tmp_path / "only.csv").read_bytes() == (tmp_path / "plot.csv").read_bytes()


@pytest.mark.parametrize(
    "words, code", [(["--out", "plot.docx"], "A04"), (["--norm", "l2"], "R05"), (["--out", "no/such/plot.png"], "E03")]
)
def test_bad_words_leave_nothing_behind(words: list[str], code: str, tmp_path: Path) -> None:
    minimal(tmp_path / "runs", {0: 0.1})
    before = sorted(tmp_path.rglob("*"))
    words = [str(tmp_path / w) if "/" in w else w for w in words]
    text, _, error = command(str(tmp_path / "runs"), *words)
    assert isinstance(error, RobevalError)
    assert (error.code, text) == (code, "")
    assert sorted(tmp_path.rglob("*")) == before
