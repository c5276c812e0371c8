"""Proofs against attacks, on planted records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from robeval.core.errors import Contradicted, FileRefused, UsageError
from robeval.core.records import Certificate
from robeval.reports.bounds import bounds_table
from robeval.reports.certificates import CertificateFacts
from robeval.reports.groups import groups
from robeval.reports.plots.certified import steps
from robeval.reports.plots.kinds import pictures
from robeval.reports.sandwich import estimates_table, images_csv, insist, sandwich_table, sandwiches, smoothed_table
from robeval.reports.stats import Rate
from robeval.reports.tables import models_table
from robeval.reports.writers import latex
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore
from tests.command import here as robeval
from tests.test_reports_tables import clean, hit, run

PROOF = Certificate(
    index=0, label=1, prediction=1, clean_correct=True, bound="crown", kind="proof", norm="linf", eps=math.nan,
    status="verified", radius=0.05, margin_lower=0.1, loss="cw", loss_value=-1.0, gradient_norm=math.nan,
    curvature=math.nan, constant=math.nan, domain="ball", arithmetic="float64, rounding enclosed", residual=math.nan,
    confidence=1.0, samples=0, forwards=1, backwards=0, seed=0, bound_config_hash="",
)  # fmt: skip


def proofs(
    root: Path, records: list[Certificate], *, model: str = "m", sha: str = "a", norm: str = "linf",
    eps: tuple[float, ...] = (), top_k: int = 1, data: str = "digits/test",
) -> RunStore:  # fmt: skip
    labels = list(dict.fromkeys(r.bound for r in records))
    manifest = new_manifest(
        "certify", model={"name": model, "fingerprint": sha}, threat={"norm": norm, "eps": list(eps)},
        methods=[{"label": b, "name": b, "settings": {}, "hash": "", "source": "", "kind": ""} for b in labels],
        data={"name": data, "fingerprint": "d", "subset": "", "images": 5, "ids": list(range(5))}, seed=0,
        settings={"top_k": top_k} if top_k > 1 else {}, argv=[],
    )  # fmt: skip
    store = RunStore.create_or_open(root, manifest)
    store.append([replace(r, norm=norm) for r in records])
    store.close({"seconds": 1.0, "exit_code": 0})
    return RunStore.open(store.folder)


def image(index: int, radius: float, **more: object) -> Certificate:
    status = "verified" if radius > 0 else "unknown"
    return replace(PROOF, **{"index": index, "radius": radius, "status": status, **more})  # type: ignore[arg-type]


WRONG = image(4, 0.0, clean_correct=False, prediction=0, status="clean_error")


def attacks(root: Path) -> RunStore:
    """Image 4 is misclassified; 0 broken at 0.1, 1 at 0.15, 2 and 3 not at all."""
    return run(
        root,
        [
            *(clean(i) for i in range(4)), clean(4, correct=False), hit(0, "pgd", 0.1, 0.1), hit(1, "pgd", 0.2, 0.15),
            hit(0, "deepfool", math.inf, 0.3), hit(2, "pgd", 0.2, None), hit(3, "pgd", 0.2, None),
        ],
    )  # fmt: skip


@pytest.fixture
def stores(tmp_path: Path) -> list[RunStore]:
    crown = proofs(
        tmp_path,
        [
            image(0, 0.08), image(1, 0.05), image(2, 0.12), image(3, 0.0), WRONG,
            *(image(i, 0.02, bound="ibp") for i in range(4)), replace(WRONG, bound="ibp"),
        ],
    )  # fmt: skip
    return [crown, attacks(tmp_path)]


def test_every_image_takes_its_best_proof_and_its_nearest_attack(stores: list[RunStore]) -> None:
    (found,) = sandwiches(stores)
    images = found.images.set_index("index")
    assert images["proof"].tolist() == [0.08, 0.05, 0.12, 0.02, 0.0]
    assert images["proof_by"].tolist() == ["crown", "crown", "crown", "ibp", ""]
    assert images["attack"].tolist() == [0.1, 0.15, math.inf, math.inf, 0.0]
    assert images["attack_by"].tolist() == ["pgd", "pgd", "", "", ""]
    assert images["correct"].tolist() == [True] * 4 + [False]
    assert not images["alarm"].any()
    insist([found])


def test_the_table_brackets_robust_accuracy(stores: list[RunStore]) -> None:
    table = sandwich_table(sandwiches(stores))
    told = [(r["eps"], r["certified >="], r["attacked <="], r["between"]) for r in table.rows]
    assert told == [
        ("0.1", Rate(1, 5), Rate(3, 5), Rate(2, 5)),
        ("51/255", Rate(0, 5), Rate(2, 5), Rate(2, 5)),
    ]
    (row,) = sandwich_table(sandwiches(stores), [0.02]).rows
    assert (row["certified >="], row["attacked <="]) == (Rate(4, 5), Rate(4, 5))
    assert r"certified $\geq$" in latex(table)
    assert "5 images that both sides saw" in table.notes[0]


def test_a_proof_at_given_radii_covers_the_largest_one(tmp_path: Path) -> None:
    rows = [image(i, e if i < 2 else 0.0, eps=e) for e in (0.01, 0.05) for i in range(4)]
    store = proofs(tmp_path, [*rows, replace(WRONG, eps=0.01), replace(WRONG, eps=0.05)], eps=(0.01, 0.05))
    facts = CertificateFacts(store)
    assert facts.certified("crown", 0.05) == facts.certified("crown", 0.03) == Rate(2, 5)
    assert facts.certified("crown", 0.06) == Rate(0, 5)
    assert facts.statuses("crown", 0.05) == {"clean_error": 1, "unknown": 2, "verified": 2}
    (found,) = sandwiches([store, attacks(tmp_path)])
    assert found.certified(0.05) == Rate(2, 5)
    assert found.radii == [0.01, 0.05, 0.1, 0.2]


def test_an_attack_inside_a_proof_is_an_alarm_that_names_both_records(tmp_path: Path) -> None:
    forged = proofs(tmp_path, [image(0, 0.11), image(1, 0.16), image(2, 0.1), image(3, 0.0), WRONG])
    attacked = attacks(tmp_path)
    found = sandwiches([forged, attacked])
    assert found[0].alarms["index"].tolist() == [0, 1]
    with pytest.raises(Contradicted) as told:
        insist(found)
    assert (told.value.code, told.value.exit_code) == ("P01", 8)
    assert "on 2 images of m" in told.value.what
    for part in (str(forged.folder), str(attacked.folder), "image 0", "0.11", "broke it at 0.1"):
        assert part in told.value.where
    code, out, err = robeval("sandwich", str(tmp_path), "--images", "im.csv", "--quiet", cwd=tmp_path)
    assert (code, out) == (8, "")
    assert "error[P01] ALARM" in err
    kept = pd.read_csv(tmp_path / "im.csv")
    assert kept.loc[kept["alarm"] == 1, "index"].tolist() == [0, 1]
    assert len(RunStore.open(forged.folder).frame()) == 5
    assert len(RunStore.open(attacked.folder).frame()) == 10


@pytest.mark.parametrize("distance, alarm", [(0.05, False), (0.05 * (1 - 5e-7), False), (0.049, True)])
def test_the_alarm_allows_for_the_tolerance_of_a_verdict(tmp_path: Path, distance: float, alarm: bool) -> None:
    attacked = run(tmp_path, [clean(0), hit(0, "pgd", 0.1, distance)])
    (found,) = sandwiches([proofs(tmp_path, [image(0, 0.05)]), attacked])
    assert bool(found.images["alarm"].any()) == alarm


def test_a_misclassified_image_raises_no_alarm(tmp_path: Path) -> None:
    attacked = run(tmp_path, [clean(0), clean(4, correct=False)])
    (found,) = sandwiches([proofs(tmp_path, [image(0, 0.05), WRONG]), attacked])
    assert not found.images["alarm"].any()


def test_other_models_data_norms_and_labels_are_kept_apart(tmp_path: Path) -> None:
    attacked = attacks(tmp_path)
    for number, other in enumerate(({"sha": "b"}, {"data": "other/test"})):
        store = proofs(tmp_path / str(number), [image(0, 0.5)], **other)  # type: ignore[arg-type]
        with pytest.raises(FileRefused, match="no attack run on the model"):
            sandwiches([store, attacked])
    with pytest.raises(FileRefused, match="no attack run"):
        sandwiches([proofs(tmp_path / "label", [image(0, 0.5, label=2)]), attacked])
    with pytest.raises(FileRefused, match="no proof among these in l2"):
        sandwiches([proofs(tmp_path / "linf", [image(0, 0.05)]), attacked], "l2")
    two = [proofs(tmp_path / "two", [image(0, 0.05)], norm=norm) for norm in ("linf", "l2")]
    with pytest.raises(UsageError, match="different threat models"):
        sandwiches([*two, attacked])
    with pytest.raises(FileRefused, match="no proof"):
        sandwiches([proofs(tmp_path / "top", [image(0, 0.5)], top_k=5), attacked])


def test_estimates_are_falsified_and_never_certified(tmp_path: Path) -> None:
    guess = [image(i, 0.12, bound="l-bound", kind="estimate", status="estimate") for i in range(4)]
    store = proofs(tmp_path, [image(0, 0.05), image(1, 0.05), *guess])
    facts = CertificateFacts(store)
    with pytest.raises(ValueError, match="certifies nothing"):
        facts.certified("l-bound", 0.1)
    found = sandwiches([store, attacks(tmp_path)])
    insist(found)  # an estimate above an attack is no alarm
    (row,) = estimates_table(found).rows
    assert row["falsified"] == Rate(1, 4)
    assert row["worst radius / distance"] == pytest.approx(1.2)
    assert found[0].certified(0.1) == Rate(0, 2)


def test_probabilistic_bounds_stand_apart(tmp_path: Path) -> None:
    smooth = [image(i, 0.3, bound="smoothing", kind="probabilistic", confidence=0.999) for i in range(3)]
    smooth.append(image(3, 0.0, bound="smoothing", kind="probabilistic", confidence=0.999, status="abstain"))
    found = sandwiches([proofs(tmp_path, [image(0, 0.05), *smooth]), attacks(tmp_path)])
    insist(found)  # 0.3 is beyond the attack at 0.1, of another classifier
    rows = smoothed_table(found).rows
    assert [(r["eps"], r["certified >="]) for r in rows] == [("0.1", Rate(3, 4)), ("51/255", Rate(3, 4))]
    assert rows[0]["abstained"] == Rate(1, 4)
    assert "SMOOTHED" in smoothed_table(found).title


def test_the_file_of_images_has_both_ends(stores: list[RunStore]) -> None:
    lines = images_csv(sandwiches(stores)).splitlines()
    assert lines[0].startswith("model,norm,index,label,correct,proof,proof_by,proof_run,attack,")
    assert len(lines) == 6


def test_certified_accuracy_stands_beside_the_attacks(stores: list[RunStore]) -> None:
    near, far = models_table(stores).rows
    assert (near["certified >="], far["certified >="]) == (Rate(1, 5), Rate(0, 5))
    assert near["worst case <="] == Rate(3, 5)


def test_a_table_with_a_contradiction_is_not_made(tmp_path: Path) -> None:
    forged = proofs(tmp_path, [image(0, 0.11)])
    with pytest.raises(Contradicted):
        models_table([forged, attacks(tmp_path)])


def test_the_table_of_bounds_keeps_kinds_apart(tmp_path: Path) -> None:
    mixed = [
        *(image(i, 0.05 if i < 2 else 0.0, eps=0.05) for i in range(4)),
        *(image(i, 0.12, bound="l-bound", kind="estimate", status="estimate") for i in range(4)),
        *(image(i, 0.3, bound="smoothing", kind="probabilistic", confidence=0.999) for i in range(4)),
    ]
    store = proofs(tmp_path, mixed, eps=(0.05,))
    crown, guess, smooth = bounds_table([store, attacks(tmp_path)]).rows
    assert (crown["kind"], crown["certified >="]) == ("proof", Rate(2, 4))
    assert (guess["kind"], guess["falsified"]) == ("ESTIMATE", Rate(1, 4))
    assert guess["mean radius"] == pytest.approx(0.12)
    assert "certified >=" not in guess
    assert "mean radius" not in crown
    assert (smooth["kind"], smooth["certified >="]) == ("probabilistic", Rate(4, 4))
    notes = " ".join(bounds_table([store]).notes)
    assert "SMOOTHED" in notes
    assert "falsified" not in bounds_table([store]).columns
    two = proofs(tmp_path, [image(0, 0.1)], norm="l2")
    with pytest.raises(UsageError, match="different threat models"):
        bounds_table([store, two])
    with pytest.raises(FileRefused, match="in l1"):
        bounds_table([store], "l1")


def test_the_picture_of_certified_accuracy_steps_down_at_the_radii(stores: list[RunStore]) -> None:
    facts = CertificateFacts(stores[0])
    assert steps(facts, "crown") == [(0.0, Rate(4, 5)), (0.05, Rate(3, 5)), (0.08, Rate(2, 5)), (0.12, Rate(1, 5))]
    (picture,) = pictures("certified", groups(stores), {})
    assert picture.draw("png") == picture.draw("png")
    assert picture.draw("pdf").startswith(b"%PDF")
    assert picture.csv().splitlines()[0].startswith("model,bound,eps,certified >=")
    assert len(picture.csv().splitlines()) == 1 + 4 + 2
    assert pictures("certified", groups(stores[1:]), {}) == []
