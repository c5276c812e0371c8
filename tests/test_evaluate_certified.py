"""Images that a proof covers are not attacked, and every record and table says so."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robeval.core.catalogue import parse
from robeval.core.classifier import Classifier
from robeval.core.errors import FileRefused
from robeval.core.images import Images
from robeval.core.records import CERTIFIED, Certificate
from robeval.evaluate.attacking import attack_run
from robeval.evaluate.certified import Certified, certified
from robeval.evaluate.settings import Settings
from robeval.reports.frames import AttackFacts
from robeval.reports.tables import attacks_table
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore
from tests.problems import network

EPS = 0.02


def proofs(root: Path, model: Classifier, these: Images, radii: list[float], kind: str = "proof", **other: str) -> None:
    """A finished run of certificates, as robeval certify writes them."""
    manifest = new_manifest(
        "certify", model=model.facts() | {"fingerprint": other.get("fingerprint", model.fingerprint)},
        data=these.facts(), threat={"norm": other.get("norm", "linf"), "eps": []},
        methods=[{"label": "sound", "name": "sound", "settings": {}, "hash": "h", "source": "s"}], seed=0,
        settings={}, argv=[],
    )  # fmt: skip
    store = RunStore.create_or_open(str(root), manifest)
    store.append(
        [
            Certificate(
                index=int(i), label=int(y), prediction=int(y), clean_correct=True, bound="sound", kind=kind,
                norm="linf",
                eps=math.nan, status="verified", radius=r, margin_lower=math.nan, loss="cw", loss_value=-1.0,
                gradient_norm=0.0, curvature=math.nan, constant=1.0, domain="ball", arithmetic="float64",
                residual=math.nan, confidence=1.0, samples=0, forwards=1, backwards=0, seed=0, bound_config_hash="h",
            )
            for i, y, r in zip(these.ids, these.y, radii, strict=True)
        ],
        None,
    )  # fmt: skip


def test_proven_images_are_spared_within_their_radius(tmp_path: Path) -> None:
    model, these = network(rows=12)
    radii = [0.5] * 4 + [EPS] * 3 + [EPS / 2] * 5
    proofs(tmp_path / "proofs", model, these, radii)
    known = certified(str(tmp_path / "proofs"), model, these, "linf")
    assert known.radius == pytest.approx(dict(zip(these.ids.tolist(), radii, strict=True)))
    settings = Settings([parse("attacks", "pgd:steps=5"), parse("attacks", "fab-t:steps=5")], "linf", [EPS, 2 * EPS])
    plain = attack_run(model, these, settings, root=str(tmp_path / "runs"))
    spared = attack_run(model, these, replace(settings, certified=known), root=str(tmp_path / "runs"))
    assert plain.folder != spared.folder  # another run: other images are attacked
    frame = spared.frame()
    marked = frame[frame["attack"] == CERTIFIED]
    assert set(marked.loc[marked["eps"] == EPS, "index"]) == set(these.ids[:7].tolist())
    assert set(marked.loc[marked["eps"] == 2 * EPS, "index"]) == set(these.ids[:4].tolist())
    assert not marked["success"].any()
    assert not marked["forwards"].any()
    at_eps = frame[(frame["attack"] == "pgd:steps=5") & (frame["eps"] == EPS)]
    assert not set(at_eps["index"]) & set(these.ids[:7].tolist())
    facts = AttackFacts(spared)
    assert facts.complete
    assert facts.worst_case(EPS).k >= 7
    assert "7 images were not attacked: a proof covers them" in attacks_table(spared).notes[0]
    again = attack_run(model, these, replace(settings, certified=known), root=str(tmp_path / "runs"))
    assert len(again.frame()) == len(frame)


@pytest.mark.parametrize(
    "other", [{"kind": "estimate"}, {"kind": "probabilistic"}, {"fingerprint": "another"}, {"norm": "l2"}]
)
def test_only_proofs_about_these_images_count(tmp_path: Path, other: dict[str, str]) -> None:
    model, these = network(rows=4)
    proofs(tmp_path, model, these, [0.5] * 4, **other)
    with pytest.raises(FileRefused, match="no proof about this model"):
        certified(str(tmp_path), model, these, "linf")


def test_proofs_about_other_images_do_not_count(tmp_path: Path) -> None:
    model, these = network(rows=6)
    proofs(tmp_path, model, these, [0.5] * 6)
    with pytest.raises(FileRefused, match="no proof about this model"):
        certified(str(tmp_path), model, these[torch.arange(3)], "linf")


def test_a_radius_covers_itself_and_nothing_beyond() -> None:
    known = Certified({3: 0.1}, {3: "sound"}, "x")
    assert known.covers(3, 0.1)
    assert not known.covers(3, 0.1000001)
    assert not known.covers(4, 0.0)
