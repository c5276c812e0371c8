"""Bounds held against attacks, on planted cases with known answers."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from robeval.certification.repair import repaired
from robeval.certification.run import certify
from robeval.certification.settings import Settings
from robeval.core.choosing import choose
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.core.records import AttackRecord, Certificate
from robeval.reports.falsify import attack_runs, falsify, hits, nearest, summary
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore
from tests.problems import linear

CERTIFICATE = Certificate(
    index=0, label=1, prediction=1, clean_correct=True, bound="l-bound", kind="estimate", norm="l2", eps=math.nan,
    status="estimate", radius=0.5, margin_lower=math.nan, loss="cw_prob", loss_value=-0.5, gradient_norm=1.0,
    curvature=math.nan, constant=1.0, domain="test set", arithmetic="float32", residual=math.nan, confidence=math.nan,
    samples=0, forwards=1, backwards=1, seed=0, bound_config_hash="",
)  # fmt: skip
HIT = AttackRecord(
    index=0, label=1, clean_prediction=1, clean_correct=True, attack="pgd", norm="linf", eps=0.1, success=True,
    prediction=2, distance_linf=0.1, distance_l2=0.4, distance_l1=1.0, distance_l0=9.0, margin=-1.0, attempt=0,
    iterations=1, forwards=1, backwards=1, first_success_forward=1, survives_8bit=True, seed=0, attack_config_hash="",
)  # fmt: skip
MISS = {"success": False, "distance_linf": math.inf, "distance_l2": math.inf, "distance_l1": math.inf}


def frame(*records: object) -> pd.DataFrame:
    return pd.DataFrame([asdict(r) for r in records])  # type: ignore[call-overload]


def test_the_planted_table() -> None:
    certificates = frame(
        CERTIFICATE,  # r .5, nearest hit .25: falsified, ratio 2
        replace(CERTIFICATE, index=1, radius=0.3),  # nearest hit .4: holds
        replace(CERTIFICATE, index=2, radius=0.9),  # attacked in vain
        replace(CERTIFICATE, index=3, radius=9.0),  # never attacked
        replace(CERTIFICATE, index=4, radius=0.0, clean_correct=False, prediction=0),
        replace(CERTIFICATE, index=5, radius=9.0),  # an image of that id but with another label was attacked
        replace(CERTIFICATE, bound="c-bound", radius=0.2),
    )
    attacks = frame(
        HIT,
        replace(HIT, attack="deepfool", norm="l2", eps=math.inf, distance_l2=0.25),
        replace(HIT, index=1),
        replace(HIT, index=2, **MISS),
        replace(HIT, index=4, distance_l2=0.01),
        replace(HIT, index=5, label=7, distance_l2=0.01),
    )
    first, second = falsify(certificates, attacks).to_dict("records")
    assert first == {
        "bound": "l-bound", "norm": "l2", "attacked": 3, "broken": 2, "falsified": 1, "share": pytest.approx(1 / 3),
        "worst_ratio": pytest.approx(2.0), "witness": 0, "attacks": "deepfool, pgd",
    }  # fmt: skip
    assert (second["bound"], second["attacked"], second["falsified"]) == ("c-bound", 1, 0)
    assert second["worst_ratio"] == pytest.approx(0.8)
    joined = nearest(certificates, attacks).set_index(["bound", "index"])
    assert joined.loc[("l-bound", 0), "distance"] == 0.25
    assert joined.loc[("l-bound", 2), "ratio"] == 0
    assert int(joined.loc[("l-bound", 2), "closest"]) == -1


def test_a_distance_equal_to_the_radius_falsifies_nothing() -> None:
    table = falsify(frame(replace(CERTIFICATE, radius=0.4)), frame(HIT))
    assert table["falsified"].tolist() == [0]


def test_every_norm_looks_at_its_own_distance() -> None:
    certificates = frame(replace(CERTIFICATE, norm="linf", radius=0.11), replace(CERTIFICATE, radius=0.11))
    assert falsify(certificates, frame(HIT))["falsified"].tolist() == [1, 0]


def test_without_attacks_nothing_is_claimed() -> None:
    row = falsify(frame(CERTIFICATE), hits([])).iloc[0]
    assert (row["attacked"], row["falsified"], row["witness"]) == (0, 0, -1)
    assert math.isnan(row["share"])
    assert math.isnan(row["worst_ratio"])


def plant(root: Path, model: Classifier, these: Images, steps: torch.Tensor) -> RunStore:
    """An attack run whose one adversarial image lies at ``steps`` from the first image."""
    found = (these.x[:1] + steps).float().numpy()
    move = found[0].astype(np.float64) - these.x[0].numpy()
    manifest = new_manifest(
        "attack", model={"name": "m", "fingerprint": model.fingerprint}, threat={"norm": "l2", "eps": [1.0]},
        data={"name": these.name, "fingerprint": these.fingerprint, "images": len(these)}, seed=0, settings={}, argv=[],
        methods=[{"label": "pgd", "name": "pgd", "settings": {}, "hash": "", "source": ""}],
    )  # fmt: skip
    store = RunStore.create_or_open(root, manifest)
    y, z = int(these.y[0]), model.logits(torch.from_numpy(found).double())
    record = replace(
        HIT, index=int(these.ids[0]), label=y, clean_prediction=y, prediction=int(z.argmax()), norm="l2", eps=1.0,
        distance_l2=float(np.linalg.norm(move)), distance_linf=float(np.abs(move).max()),
        distance_l1=float(np.abs(move).sum()), example=0,
    )  # fmt: skip
    store.append([record], found)
    store.close({"exit_code": 0})
    return RunStore.open(store.folder)


@pytest.mark.parametrize("name", ["l-bound", "c-bound"])
def test_the_repaired_constant_contradicts_no_witness(tmp_path: Path, name: str) -> None:
    model, these = linear(2)
    w = model.module[1].weight.detach()  # type: ignore[index]
    slope = (w[1 - int(these.y[0])] - w[int(these.y[0])]).view(1, 1, 4, 4)
    distance = -float(
        (model.logits(these.x[:1])[0, 1 - int(these.y[0])] - model.logits(these.x[:1]).max()) / slope.norm()
    )
    run = plant(tmp_path, model, these, slope / slope.norm() * distance * 1.01)
    store = certify(model, these, Settings(choose("bounds", [f"{name}:loss=cw"], "l2"), "l2"), root=str(tmp_path))
    method, true = store.manifest()["methods"][0], float(store.frame()["constant"].iloc[0])
    right, seen = repaired(model, these, method, "l2", true, [run])
    assert seen == 1
    assert right == pytest.approx(true, rel=1e-5, abs=1e-4)  # a true constant needs no repair, up to rounding
    wrong = true / 2 if name == "l-bound" else -50.0
    mended, _ = repaired(model, these, method, "l2", wrong, [run])
    assert mended == pytest.approx(true, rel=1e-5, abs=1e-4)


def test_runs_of_other_models_do_not_count(tmp_path: Path) -> None:
    model, these = linear(2)
    plant(tmp_path, model, these, torch.full((1, 1, 4, 4), 0.1, dtype=torch.float64))
    store = certify(model, these, Settings(choose("bounds", ["l-bound"], "l2"), "l2"), root=str(tmp_path))
    manifest = store.manifest()
    assert len(attack_runs(tmp_path, manifest)) == 1
    assert attack_runs(tmp_path, manifest | {"model": {**manifest["model"], "fingerprint": "other"}}) == []
    assert attack_runs(tmp_path, manifest | {"data": {**manifest["data"], "name": "other/test"}}) == []
    assert attack_runs(tmp_path / "nothing", manifest) == []


def test_certificates_are_stored_once_and_summed_up(tmp_path: Path) -> None:
    model, these = linear(2)
    wrong = these.y.clone()
    wrong[0] = 1 - wrong[0]
    these = Images(these.x, wrong, these.ids, these.name, these.classes)
    settings = Settings(choose("bounds", ["l-bound:loss=cw", "c-bound:loss=cw"], "l2"), "l2")
    store = certify(model, these, settings, root=str(tmp_path))
    again = certify(model, these, settings, root=str(tmp_path))
    assert again.folder == store.folder
    assert again.sessions()[-1]["bounds"] == {}
    frame_ = again.frame()
    assert len(frame_) == 2 * len(these)
    assert set(frame_["kind"]) == {"estimate"}
    assert set(frame_["status"]) == {"estimate", "clean_error"}
    assert (frame_["index"].tolist()) == these.ids.tolist() * 2
    rows = summary(again, hits([]))
    assert [r["bound"] for r in rows] == ["l-bound:loss=cw", "c-bound:loss=cw"]
    for row in rows:
        own = frame_[frame_["bound"] == row["bound"]]
        assert row["mean_radius"] == pytest.approx(own["radius"].mean())
        assert (row["images"], row["correct"]) == (len(these), len(these) - 1)
        assert row["seconds"] >= 0
        assert row["passes"] >= 2 * len(these)
