"""A diagnosis as a run: rows as tests end, resume, crashes, counterexamples in every table, struck successes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robeval.core import catalogue
from robeval.core.choosing import choose
from robeval.core.classifier import Classifier
from robeval.core.errors import UsageError
from robeval.diagnose import run as diagnosing
from robeval.diagnose.finding import CLEAR, FAILED, Finding
from robeval.diagnose.run import Settings, diagnose
from robeval.diagnose.subject import Subject
from robeval.evaluate.attacking import attack_run
from robeval.evaluate.settings import Settings as Attacks
from robeval.evaluate.verify import verify
from robeval.reports.diagnoses import diagnosed, insist_on_diagnosis
from robeval.reports.tables import models_table
from robeval.store.find import runs
from robeval.store.runstore import RunStore
from tests import planted

EPS = planted.EPS


@pytest.fixture
def attacked(tmp_path: Path) -> RunStore:
    """A weak attack on an honest model: one that leaves most images standing."""
    settings = Attacks(choose("attacks", ["pgd:steps=1,relative_step=0.2"], "linf"), "linf", [EPS])
    return attack_run(planted.model("honest-standard"), planted.chosen(40), settings, root=str(tmp_path))


@pytest.fixture
def tests(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two tests of the house replaced by functions of our own."""
    chosen: dict[str, Any] = {}
    order = [catalogue.parse("diagnostics", name) for name in ("clean-accuracy", "class-count")]
    monkeypatch.setattr(diagnosing, "diagnostics", lambda groups=(): order)
    real = catalogue.Method.load
    mine = lambda self: chosen[self.facts["id"]] if self.kind == "diagnostics" else real(self)
    monkeypatch.setattr(catalogue.Method, "load", mine)
    chosen |= {"D7": lambda subject: Finding(CLEAR, "1", "2", 3), "D8": lambda subject: Finding(CLEAR, "1", "2", 3)}
    return chosen


def test_the_headline_falls_by_what_the_diagnostics_break(attacked: RunStore, tmp_path: Path) -> None:
    model, these = planted.model("honest-standard"), planted.chosen(40)
    store = diagnose(
        model, these, Settings("linf", EPS, groups=(1, 3)), root=str(tmp_path), stores=[RunStore.open(attacked.folder)]
    )
    (before,) = diagnosed([attacked])
    found = diagnosed(runs(tmp_path))
    (after,) = found
    broken = after.facts.lowered(EPS)
    assert broken > 5
    assert after.facts.worst_case(EPS).k == before.facts.worst_case(EPS).k - broken
    assert f"the diagnostics broke {broken} more" in after.headline(EPS)
    assert int(store.frame()["counterexamples"].sum()) == broken
    (extra,) = (s for s in runs(tmp_path) if "counterexamples_of" in s.manifest()["settings"])
    second = verify(extra, model, these)
    assert (second.checked, second.failures) == (broken, [])
    table = models_table(runs(tmp_path))
    assert len(table.rows) == 1
    assert str(table.rows[0]["diagnostics"]).startswith("quick, ")


def test_a_second_call_computes_nothing_and_a_crash_is_a_row(tmp_path: Path, tests: dict[str, Any]) -> None:
    def crash(subject: Subject) -> Finding:
        raise ZeroDivisionError("by nothing")

    calls = []

    def seen(subject: Subject) -> Finding:
        calls.append(1)
        return Finding(FAILED, "1 of 3", "0", 3, flagged=[5, 7], interval=(0.1, 0.2), why="a", data={"x": [1.0]})

    tests |= {"D8": crash, "D7": seen}
    for _ in range(2):
        store = diagnose(
            planted.model("honest-standard"), planted.chosen(10), Settings("linf", EPS), root=str(tmp_path)
        )
    rows = store.frame().set_index("id")
    assert len(calls) == 1
    assert rows.loc["D8", "result"] == "not run"
    assert rows.loc["D8", "why"] == "the test stopped with ZeroDivisionError: by nothing"
    assert rows.loc["D7", ["n_flagged", "interval95_low", "interval95_high"]].tolist() == [2, 0.1, 0.2]
    assert (store.folder / rows.loc["D7", "image_ids_file"]).read_text() == "5\n7\n"
    assert json.loads((store.folder / "evidence" / "D7.json").read_text()) == {"x": [1.0]}


def test_a_killed_diagnosis_goes_on_with_its_counterexamples(tmp_path: Path, tests: dict[str, Any]) -> None:
    model, these = planted.model("honest-standard"), planted.chosen(20)

    def finds(subject: Subject) -> Finding:
        subject.attack("pgd:steps=20,loss=cw", subject.correct(20))
        return Finding(CLEAR, "1", "0", 3)

    def killed(subject: Subject) -> Finding:
        raise KeyboardInterrupt

    tests |= {"D8": finds, "D7": killed}
    with pytest.raises(KeyboardInterrupt):
        diagnose(model, these, Settings("linf", EPS), root=str(tmp_path))
    tests["D7"] = finds
    store = diagnose(model, these, Settings("linf", EPS), root=str(tmp_path))
    rows = store.frame().set_index("id")
    assert rows.loc["D8", "counterexamples"] > 3
    assert rows.loc["D7", "counterexamples"] == 0  # the same images, known from the first session
    (extra,) = (s for s in runs(tmp_path) if s.manifest()["kind"] == "attack")
    assert extra.frame()["success"].sum() == rows["counterexamples"].sum() + (extra.frame()["clean_correct"] == 0).sum()


def test_candidates_are_judged_before_they_count() -> None:
    subject = Subject(planted.model("honest-standard"), planted.chosen(20), "linf", EPS)
    images = subject.correct(20)
    outside = subject.attack("pgd:steps=20,loss=cw", images, eps=1.0)
    assert outside.broken.all()
    assert not subject.counterexample(images.ids, outside.x_adv, "too far away").any()
    assert not subject.counterexample(images.ids, images.x, "not adversarial").any()
    assert subject.found == []
    inside = subject.attack("pgd:steps=20,loss=cw", images)
    assert len(subject.found) == int(inside.broken.sum()) > 0


def test_an_attack_is_paid_for_once_and_per_image() -> None:
    subject = Subject(planted.model("honest-standard"), planted.chosen(30), "linf", EPS)
    few = subject.attack("pgd:steps=5,loss=cw", subject.correct(10))
    paid = subject.passes.forwards
    again = subject.attack("pgd:loss=cw,steps=5", subject.correct(10))
    assert subject.passes.forwards == paid
    assert torch.equal(few.x_adv, again.x_adv)
    more = subject.attack("pgd:steps=5,loss=cw", subject.correct(30))
    assert subject.passes.forwards > paid
    assert torch.equal(more.x_adv[: len(few.x_adv)], few.x_adv)


def test_carried_images_are_judged_on_the_target() -> None:
    subject = Subject(planted.model("honest-standard"), planted.chosen(30), "linf", EPS, surrogates=[planted.source()])
    images = subject.correct(30)
    out = subject.attack("pgd:steps=10,loss=cw", images, on=subject.sources[0])
    assert 0 < int(out.broken.sum()) < len(images)
    wrong = subject.logits(out.x_adv).argmax(1) != images.y
    assert torch.equal(wrong, out.broken)
    assert list(subject.ran) == ["transfer:plain-source/pgd:loss=cw,steps=10"]


def test_a_stored_success_that_does_not_hold_is_struck_out(attacked: RunStore, tmp_path: Path) -> None:
    these, honest = planted.chosen(40), planted.model("honest-standard")
    strong = Attacks(choose("attacks", ["pgd:steps=20"], "linf"), "linf", [EPS])
    store = attack_run(honest, these, strong, root=str(tmp_path / "a"))
    hit = store.frame()[lambda f: f["success"] & (f["attack"] != "clean")]
    victim = torch.from_numpy(store.examples(hit.iloc[:1]))[0]
    net = planted.standard()

    def forgetful(x: Tensor) -> Tensor:
        z = net(x)
        known = (x - victim).abs().flatten(1).amax(1) < 1e-6
        right = torch.nn.functional.one_hot(torch.tensor(int(hit["label"].iloc[0])), 10) * 100.0
        return torch.where(known[:, None], right, z)

    changed = Classifier(forgetful, 10, "honest-standard", honest.fingerprint)
    diagnosis = diagnose(
        changed, these, Settings("linf", EPS, groups=(3,)), root=str(tmp_path / "a"),
        stores=[RunStore.open(store.folder)],
    )  # fmt: skip
    row = diagnosis.frame().set_index("id").loc["K9"]
    assert row["result"] == FAILED
    assert row["n_flagged"] == 1
    (plain,) = diagnosed([store])
    (after,) = (d for d in diagnosed(runs(tmp_path / "a")) if d.facts.store.folder == store.folder)
    broken_again = after.facts.lowered(EPS)
    assert after.facts.hits(EPS)["attack"].eq("pgd").sum() == plain.facts.hits(EPS)["attack"].eq("pgd").sum() - 1
    assert after.facts.worst_case(EPS).k == plain.facts.worst_case(EPS).k + 1 - broken_again


def test_a_proof_that_an_attack_breaks_fails(attacked: RunStore) -> None:
    import pandas as pd

    class Proofs:
        """Stands for a run of bounds that claims every image up to twice eps."""

        def frame(self) -> pd.DataFrame:
            ids = planted.chosen(40).ids.numpy()
            columns = {"kind": "proof", "clean_correct": True, "norm": "linf"}
            return pd.DataFrame({"index": ids, "radius": np.full(len(ids), 2 * EPS), **columns})

    (method,) = (m for m in catalogue.methods("diagnostics").values() if m.facts["id"] == "X7")
    subject = Subject(
        planted.model("honest-standard"), planted.chosen(40), "linf", EPS, stores=[attacked],
        certificates=[Proofs()],  # type: ignore[list-item]
    )  # fmt: skip
    hit = attacked.frame()[lambda f: f["success"] & (f["attack"] != "clean")]
    finding = method.load()(subject)
    assert finding.result == FAILED
    assert list(finding.flagged) == sorted(hit["index"])
    assert len(finding.flagged) > 0


def test_numbers_without_a_diagnosis_are_refused_or_marked(attacked: RunStore) -> None:
    with pytest.raises(UsageError) as caught:
        insist_on_diagnosis(diagnosed([attacked]))
    assert caught.value.code == "T06"
    table = models_table([attacked])
    assert str(table.rows[0]["model"]).endswith("†")
    assert table.rows[0]["diagnostics"] == "not run"


def test_remedies_break_what_a_saturated_loss_hides(tmp_path: Path) -> None:
    model, these = planted.model("softmax-x1000"), planted.chosen(30)
    store = diagnose(model, these, Settings("linf", EPS, groups=(1, 2), remedy=True), root=str(tmp_path))
    said = {one["remedy"]: one for one in json.loads((store.folder / "evidence" / "remedies.json").read_text())}
    assert {"logarithm", "margin"} <= set(said)
    assert sum(one["broken"] for one in said.values()) > 10
    (run,) = diagnosed(runs(tmp_path))
    assert "NOT USABLE (D3)" in run.headline(EPS)
    (extra,) = (s for s in runs(tmp_path) if s.manifest()["kind"] == "attack")
    assert verify(extra, model, these).failures == []
