"""``robeval certify`` end to end on real digits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robeval.store.runstore import RunStore
from tests.command import here as robeval
from tests.problems import trained


def train(path: Path, act: str) -> None:
    trained(path, "mlp", act=act, hidden=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a smooth and a ReLU network, and one attack run on the smooth one."""
    folder = tmp_path_factory.mktemp("certify")
    train(folder / "smooth.pt", "smooth")
    train(folder / "relu.pt", "relu")
    code, _, err = robeval(
        "attack",
        "smooth.pt",
        "--no-diagnose",
        "--attack",
        "deepfool:steps=20",
        "--norm",
        "l2",
        "--eps",
        "0.5",
        "--images",
        "40",
        cwd=folder,
    )
    assert code == 0, err
    (run,) = (folder / "runs").iterdir()
    assert len(RunStore.open(run).done("deepfool:steps=20", math.inf)) > 35
    return folder


TWO = ("--bound", "l-bound", "--bound", "c-bound:tolerance=1e-3", "--norm", "l2", "--images", "40")


def test_both_bounds_against_the_attack_records(place: Path) -> None:
    code, out, err = robeval("certify", "smooth.pt", *TWO, "--json", cwd=place)
    assert code == 0, err
    document = json.loads(out)
    first, second = document["bounds"]
    assert (first["bound"], second["bound"]) == ("l-bound", "c-bound")
    for row in (first, second):
        assert row["kind"] == "estimate"
        assert row["images"] == 40
        assert 35 <= row["attacked"] <= row["correct"] <= 40
        assert 0 < row["broken"] <= row["attacked"]
        assert 0 < row["mean_radius"] < 1
        assert row["worst_ratio"] > 0
        assert row["share"] == pytest.approx(row["falsified"] / row["attacked"])
        assert row["checked_against"] == row["broken"]
        assert row["repaired_constant"] >= row["constant"] > 0
    assert second["passes"] > 24 * 40
    assert (place / document["folder"] / "manifest.json").is_file()


def test_the_screen_says_estimate_and_the_same_command_is_finished(place: Path) -> None:
    code, out, err = robeval("certify", "smooth.pt", *TWO, cwd=place)
    assert code == 0, err
    assert "ESTIMATE l-bound" in out
    assert "ESTIMATE c-bound" in out
    assert "certified" not in (out + err).lower()
    assert "attacked images" in out
    again, out, _ = robeval("certify", "smooth.pt", *TWO, cwd=place)
    assert again == 0
    assert "s, float32, rounding not enclosed" in out or "finished earlier" in out
    runs = [p for p in (place / "runs").iterdir() if p.name.startswith("certify-")]
    one = [p for p in runs if len(json.loads((p / "manifest.json").read_text())["methods"]) == 2]
    assert len(one) == 1
    assert len(list((one[0] / "records").glob("*.parquet"))) == 2  # nothing was computed twice


def test_other_images_do_not_touch_the_run(place: Path) -> None:
    code, out, _ = robeval("certify", "smooth.pt", "--images", "10", "--runs", "nowhere", "--json", cwd=place)
    assert code == 0
    (row,) = json.loads(out)["bounds"]
    assert (row["images"], row["attacked"], row["share"]) == (10, 0, None)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("relu.pt", "--bound", "c-bound"), 4, "error[B01] c-bound needs a twice differentiable network; not smooth:"),
        (("smooth.pt", "--bound", "smoothing", "--norm", "l1"), 2, "error[A06] smoothing has no l1 form"),
        (("smooth.pt", "--bound", "c-bond"), 2, 'error[A04] unknown bound "c-bond"; did you mean c-bound'),
        (("smooth.pt", "--norm", "l3"), 2, 'error[A04] unknown norm "l3"'),
        (("smooth.pt", "--bound", "c-bound:tolerence=1"), 2, "did you mean tolerance?"),
        (("smooth.pt", "--bound", "c-bound:loss=cw"), 4, "error[B01] cw is a maximum over 9 classes"),
        (("missing.pt",), 3, "error[M01]"),
    ],
)
def test_refusals_are_one_sentence(place: Path, words: tuple[str, ...], code: int, text: str) -> None:
    before = sorted((place / "runs").rglob("*"))
    got, out, err = robeval("certify", *words, "--images", "20", cwd=place)
    assert (got, "Traceback" in err, out) == (code, False, "")
    assert text in err
    assert sorted((place / "runs").rglob("*")) == before


def test_the_way_out_is_named(place: Path) -> None:
    _, _, err = robeval("certify", "relu.pt", "--bound", "c-bound", cwd=place)
    assert "act=smooth" in err
    assert "l-bound" in err
    assert "network.2 (ReLU)" in err


def test_help_lists_every_bound_and_loads_no_torch(place: Path) -> None:
    probe = "import sys; sys.argv = ['robeval', 'certify', '--help']\nfrom robeval.cli.app import app\n"
    probe += "try:\n    app(prog_name='robeval')\nfinally:\n    sys.stderr.write('torch' * ('torch' in sys.modules))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "COLUMNS": "160"}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=env, check=False)
    assert done.stderr == ""
    for text in ("l-bound", "c-bound", "estimate", "tolerance=0.001", "--runs"):
        assert text in done.stdout


PROOFS = ("relu.pt", "--bound", "ibp", "--bound", "crown", "--norm", "linf", "--images", "30")


def test_proofs_at_given_radii(place: Path) -> None:
    code, out, err = robeval("certify", *PROOFS, "--eps", "1/255,8/255", "--json", cwd=place)
    assert code == 0, err
    ibp, crown = json.loads(out)["bounds"]
    for row in (ibp, crown):
        assert row["kind"] == "proof"
        near, far = row["certified"]
        assert near["eps"] == pytest.approx(1 / 255)
        assert 0 <= far["k"] < near["k"] <= row["correct"] <= near["n"] == 30
        assert near["low"] < near["value"] < near["high"]
        assert "falsified" not in row
    assert all(c["k"] >= i["k"] for i, c in zip(ibp["certified"], crown["certified"], strict=True))
    code, screen, err = robeval("certify", *PROOFS, "--eps", "1/255,8/255", cwd=place)
    assert code == 0, err
    assert screen.count("PROOF ") == 2
    assert f">= {ibp['certified'][0]['k']}/30" in screen
    assert "at linf 1/255" in screen


def test_kinds_share_a_screen_and_only_proofs_are_certified(place: Path) -> None:
    words = ("smooth.pt", "--bound", "crown", "--bound", "l-bound", "--bound", "smoothing:n=200,n0=20", "--norm", "l2")
    code, out, err = robeval("certify", *words, "--images", "8", "--eps", "0.1", cwd=place)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines() if line[:5].isupper()] == [
        "PROOF", "ESTIMATE", "PROBABILISTIC"
    ]  # fmt: skip
    estimate = out.split("ESTIMATE")[1].split("PROBABILISTIC")[0]
    assert "certified" not in estimate.lower()
    assert "SMOOTHED" in out.split("PROBABILISTIC")[1]


def test_the_radius_sought_and_the_attacks_make_a_sandwich(place: Path) -> None:
    words = ("smooth.pt", "--bound", "crown", "--norm", "l2", "--images", "40")
    code, out, err = robeval("certify", *words, "--json", cwd=place)
    assert code == 0, err
    (row,) = json.loads(out)["bounds"]
    assert 0 < row["mean_radius"] < 1
    assert row["certified"] == []
    code, out, err = robeval("sandwich", "runs", "--norm", "l2", "--images", "im.csv", "--json", cwd=place)
    assert code == 0, err
    rows = json.loads(out)["sandwich"]["rows"]
    for r in rows:
        assert r["certified >="]["k"] <= r["attacked <="]["k"]
        assert r["between"]["k"] == r["attacked <="]["k"] - r["certified >="]["k"]
    assert len((place / "im.csv").read_text().splitlines()) == 41
    spared = ("smooth.pt", "--attack", "pgd:steps=3", "--norm", "l2", "--eps", "0.05", "--images", "40")
    code, _, err = robeval("attack", *spared, "--no-diagnose", "--skip-certified", "runs", cwd=place)
    assert code == 0, err
    assert "images have a proof" in err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--eps", "8"), 2, "error[A03] eps 8 covers every image"),
        (("--shard", "3/2"), 2, "error[A04]"),
        (("--top-k", "10"), 2, "--top-k 10 of 10 classes is always true"),
        (("--bound", "l-bound", "--shard", "1/2"), 2, "has no shards"),
    ],
)
def test_bad_words_about_proofs(place: Path, words: tuple[str, ...], code: int, text: str) -> None:
    before = sorted((place / "runs").rglob("*"))
    got, out, err = robeval("certify", *PROOFS, *words, cwd=place)
    assert (got, out) == (code, "")
    assert text in err
    assert sorted((place / "runs").rglob("*")) == before


def test_top_k_counts_more(place: Path) -> None:
    asked = (*PROOFS, "--eps", "8/255", "--json")
    _, one, _ = robeval("certify", *asked, cwd=place)
    code, five, err = robeval("certify", *asked, "--top-k", "5", cwd=place)
    assert code == 0, err
    for a, b in zip(json.loads(one)["bounds"], json.loads(five)["bounds"], strict=True):
        assert b["certified"][0]["k"] > a["certified"][0]["k"]
