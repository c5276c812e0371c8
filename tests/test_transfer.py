"""Transfer: closed forms on linear models, one answer however it is run, and runs that every reader understands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from robeval.core.catalogue import parse
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, FileRefused, UsageError
from robeval.core.images import Images
from robeval.evaluate.attacking import attack_run
from robeval.evaluate.settings import Settings
from robeval.evaluate.transferring import transfer_run, transfer_runs
from robeval.evaluate.verify import verify
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate
from robeval.reports.tables import models_table
from robeval.reports.transfer import transfer_table
from robeval.reports.writers import write
from robeval.store.runstore import RunStore
from tests.problems import linear, network

EPS = 0.03


def named(model: Classifier, name: str) -> Classifier:
    model.name = name
    return model


def halves(bias: float, tilt: float, name: str) -> Classifier:
    """Two classes in float32, split by the plane <w, x> = b."""
    layer = nn.Linear(16, 2)
    w = torch.ones(16) + tilt * torch.linspace(-1, 1, 16)
    layer.weight.data = torch.stack([w, -w])
    layer.bias.data = torch.tensor([-1.0, 1.0]) * (w.sum() / 2 + bias)
    return Classifier(nn.Sequential(nn.Flatten(), layer), 2, name)


def grey(rows: int = 40) -> Images:
    """Images away from the box; class 0 where the first model of :func:`pair` says so."""
    generator = torch.Generator().manual_seed(3)
    x = 0.5 + 0.3 * (torch.rand(rows, 1, 4, 4, generator=generator) - 0.5)
    return Images(x, halves(0.0, 0.3, "").logits(x).argmax(1), torch.arange(50, 50 + rows), "problem", ["0", "1"])


def pair() -> list[Classifier]:
    """Two models whose gradients have many signs in common, but not all."""
    return [halves(0.0, 0.3, "a"), halves(0.1, 3.0, "b")]


def runs(models: Sequence[Classifier], images: Images, root: Path, *attacks: str, **more: Any) -> list[RunStore]:
    settings = Settings([parse("attacks", a) for a in attacks], "linf", more.pop("radii", [EPS]))
    settings.batch_size, settings.seed = more.pop("batch_size", 256), more.pop("seed", 0)
    stores = transfer_runs(models, more.pop("sources", models), images, settings, root=str(root), **more)
    return [RunStore.open(s.folder) for s in stores]


def rows(store: RunStore) -> pd.DataFrame:
    frame = store.frame().drop(columns=["part", "example"])
    return frame.sort_values(["index", "attack", "eps"]).reset_index(drop=True)


def corner(source: Classifier, images: Images) -> Tensor:
    """Where sign steps on a source of two classes end: x - eps * sign of the slope of the margin."""
    assert isinstance(source.module, nn.Sequential)
    w = source.module[1].weight.detach()
    slope = (w[images.y] - w[1 - images.y]).view_as(images.x)
    return images.x - EPS * slope.sign()


@pytest.mark.parametrize("attack", ["fgsm", "pgd:steps=20,restarts=2"])
def test_the_matrix_of_linear_models_is_the_closed_form(tmp_path: Path, attack: str) -> None:
    models, images = pair(), grey()
    stores = runs(models, images, tmp_path, attack)
    table = transfer_table(stores).to_json()["rows"]
    assert table[0]["crafted on"] == "(clean images)"
    shares = []
    for row, source in zip(table[1:], models, strict=True):
        assert row["crafted on"] == source.name
        for target in models:
            stands = target.logits(images.x).argmax(1) == images.y
            stands &= target.logits(corner(source, images)).argmax(1) == images.y
            cell = row[f"on {target.name} <="]
            assert (cell["k"], cell["n"]) == (int(stands.sum()), 40)
            shares.append(cell["value"])
    assert len(set(shares)) == 4  # four different answers, so that none can stand in for another
    assert shares[0] < shares[2]  # a white-box point breaks more of its own model than a borrowed one
    assert shares[3] < shares[1]


def test_records_say_source_attempt_distance_and_passes(tmp_path: Path) -> None:
    models, images = pair(), grey()
    first, second = runs(models, images, tmp_path, "pgd:steps=4,restarts=3,step_size=0.004")
    frame = second.frame()
    mine = frame[frame["attack"] == "transfer:a/pgd:restarts=3,step_size=0.004,steps=4"]
    correct = models[1].logits(images.x).argmax(1) == images.y
    assert sorted(mine["index"]) == images.ids[correct].tolist()
    assert set(mine["forwards"]) == {6}
    assert set(mine["backwards"]) == {0}
    hits = mine[mine["success"]]
    assert 0 < len(hits) < len(mine)
    assert (hits["distance_linf"] <= EPS * (1 + 1e-6)).all()
    assert (hits["first_success_forward"] == 2 * hits["attempt"] + 1).all()
    assert set(hits["attempt"]) > {0}  # a later restart counts
    assert mine.loc[~mine["success"], "distance_l2"].map(math.isinf).all()
    stored = torch.from_numpy(second.examples(hits))
    assert (models[1].logits(stored).argmax(1).numpy() == hits["prediction"]).all()
    methods = second.manifest()["methods"]
    assert [m["crafted_on"]["fingerprint"] for m in methods] == [m.fingerprint for m in models]
    (session,) = first.sessions()
    one = 3 * 4 * int((models[0].logits(images.x).argmax(1) == images.y).sum())  # restarts * steps * images
    assert session["source_forwards"] == session["source_backwards"] == 2 * one
    assert f"took {2 * one} forward and {2 * one} backward passes on the sources" in transfer_table([first]).notes[-1]


def test_an_image_is_crafted_once_whoever_judges_it(tmp_path: Path) -> None:
    models, images = pair(), grey()
    first, second = runs(models, images, tmp_path, "pgd:steps=5")
    a, b = (s.frame()[lambda f: (f["attack"] == "transfer:a/pgd:steps=5") & f["success"]] for s in (first, second))
    both = sorted(set(a["index"]) & set(b["index"]))
    assert len(both) > 5
    pick = lambda f: f.set_index("index").loc[both].reset_index()
    assert (first.examples(pick(a)) == second.examples(pick(b))).all()


def test_early_success_on_the_source_does_not_stop_it(tmp_path: Path) -> None:
    """Every image is misclassified by the source from the start; the full corner is reached all the same."""
    source, images = halves(9.0, 0.3, "a"), grey()
    wrong = source.logits(images.x).argmax(1) != images.y
    target = halves(0.0, 0.3, "t")
    (store,) = runs([target], images, tmp_path, "pgd:steps=20", sources=[source])
    frame = store.frame()
    hits = frame[(frame["attack"] != "clean") & frame["success"]]
    hit = target.logits(corner(source, images)).argmax(1) != images.y
    assert sorted(hits["index"]) == images.ids[hit].tolist()
    assert int((hit & wrong).sum()) > 0
    assert hits["distance_linf"].to_numpy() == pytest.approx(EPS, rel=1e-5)


@pytest.fixture(scope="module")
def networks() -> tuple[list[Classifier], Images]:
    models = [named(network(seed=s, rows=21, dtype=torch.float32)[0], f"n{s}") for s in range(3)]
    return models, network(seed=0, rows=21, dtype=torch.float32)[1]


WORDS = ("pgd:steps=4,restarts=3", "apgd-ce:steps=6")


@pytest.fixture(scope="module")
def whole(networks: tuple[list[Classifier], Images], tmp_path_factory: pytest.TempPathFactory) -> list[pd.DataFrame]:
    frames = [rows(s) for s in runs(*networks, tmp_path_factory.mktemp("whole"), *WORDS, radii=[0.01, 0.02])]
    attacked = frames[0][frames[0]["attack"] != "clean"]
    assert 0 < attacked["success"].mean() < 1
    assert len(attacked) == 21 * 3 * 2 * 2
    return frames


@pytest.mark.parametrize("batch", [1, 7])
def test_the_batch_size_changes_nothing(
    networks: tuple[list[Classifier], Images], whole: list[pd.DataFrame], tmp_path: Path, batch: int
) -> None:
    stores = runs(*networks, tmp_path, *WORDS, radii=[0.01, 0.02], batch_size=batch)
    for store, frame in zip(stores, whole, strict=True):
        pd.testing.assert_frame_equal(rows(store), frame, check_exact=True)


def test_neighbours_and_other_targets_change_nothing(
    networks: tuple[list[Classifier], Images], whole: list[pd.DataFrame], tmp_path: Path
) -> None:
    models, images = networks
    some = images[torch.tensor([13, 2, 8])]
    specs = [parse("attacks", w) for w in WORDS]
    store = transfer_run(models[2], models, some, specs, "linf", [0.01, 0.02], root=str(tmp_path))
    frame = whole[2][whole[2]["index"].isin(some.ids.tolist())].reset_index(drop=True)
    pd.testing.assert_frame_equal(rows(RunStore.open(store.folder)), frame, check_exact=True)


def test_interrupted_it_goes_on_and_done_it_does_nothing(
    networks: tuple[list[Classifier], Images], whole: list[pd.DataFrame], tmp_path: Path
) -> None:
    models, images = networks

    def stop_at(limit: int) -> Callable[[int, int, str], None]:
        def told(done: int, total: int, text: str) -> None:
            if done >= limit:
                raise KeyboardInterrupt

        return told

    radii = {"radii": [0.01, 0.02]}
    for limit in (30, 100):
        with pytest.raises(KeyboardInterrupt):
            runs(models, images, tmp_path, *WORDS, **radii, batch_size=16, on_progress=stop_at(limit))
    stores = runs(models, images, tmp_path, *WORDS, **radii)
    for store, frame in zip(stores, whole, strict=True):
        pd.testing.assert_frame_equal(rows(store), frame, check_exact=True)
    spent = [s["source_backwards"] for s in stores[0].sessions()]
    assert all(s > 0 for s in spent)
    assert sum(spent) == 21 * 3 * 2 * (4 * 3 + 6)  # no image of this target was crafted twice
    assert [s["exit_code"] for s in stores[0].sessions()] == [130, 130, 0]
    (again, *_) = runs(models, images, tmp_path, *WORDS, **radii)
    last = again.sessions()[-1]
    assert (last["source_forwards"], last["source_backwards"], last["forwards"]) == (0, 0, 21)


def test_every_reader_understands_the_runs(tmp_path: Path) -> None:
    models, images = pair(), grey()
    stores = runs(models, images, tmp_path, "fgsm", "pgd:steps=5")
    for model, store in zip(models, stores, strict=True):
        facts = AttackFacts(store)
        assert facts.complete
        result = verify(store, model, images)
        assert result.confirmed == result.checked == int(facts.attacks["success"].sum()) > 0
        worst = facts.worst_case(EPS)
        assert worst.k <= min(a.robust.k for a in facts.per_attack(EPS))
    row = models_table(stores).rows[0]
    assert {"transfer:b/fgsm <=", "transfer:a/pgd:steps=5 <=", "worst case <="} <= {*row}
    settings = Settings([parse("attacks", "pgd:steps=5")], "linf", [EPS])
    plain = attack_run(models[0], images, settings, root=str(tmp_path))
    matrix = transfer_table([*stores, RunStore.open(plain.folder)])  # a run without transfer is left out
    assert [r["attack"] for r in matrix.rows[1:]] == ["fgsm", "pgd:steps=5"] * 2
    for form in ("terminal", "markdown", "latex", "csv", "json"):
        assert "crafted on" in write(matrix, form)


def test_a_matrix_with_images_left_to_judge_has_empty_cells(tmp_path: Path) -> None:
    models, images = pair(), grey()

    def stop(done: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs(models, images, tmp_path, "fgsm", on_progress=stop)
    table = transfer_table([RunStore.open(p) for p in sorted(tmp_path.iterdir())])
    assert isinstance(table.rows[1]["on a <="], Rate)
    assert table.rows[2]["on a <="] is None
    assert "INCOMPLETE" in table.notes[-1]


def test_a_target_that_answers_nan_is_an_error_not_a_success(tmp_path: Path) -> None:
    images, (whole, source) = grey(), pair()  # the first classifies all images correctly

    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            far = (x - images.x[0]).abs().amax((1, 2, 3), keepdim=True)[:, :, 0, 0]
            return torch.where((far > 0) & (far <= EPS * 1.01), torch.nan, whole.logits(x))

    target = Classifier(Fragile(), 2, "fragile")
    (store,) = runs([target], images, tmp_path, "fgsm", sources=[source])
    frame = store.frame()
    row = frame[(frame["index"] == 50) & (frame["attack"] != "clean")].iloc[0]
    assert row["error"] == "the model gave NaN or Inf logits under attack"
    assert not row["success"]
    assert AttackFacts(store).not_evaluated(EPS) == 1


OWN = """
from robeval.core.catalogue import attack
from robeval.core.questions import Gradient, Logits

@attack(source="test", norms=("linf",))
def broken(x0, goal, ball, rng):
    at = yield Gradient(x0, "ce")
    return x0 / 0

@attack(source="test", norms=("linf",))
def asks_last(x0, goal, ball, rng):
    at = yield Gradient(x0, "ce")
    yield Logits(ball.project(x0, x0 + ball.eps * at.grad.sign()))

@attack(source="test", norms=("linf",))
def scattered(x0, goal, ball, rng):
    yield Logits(x0[:1])
"""


def test_attacks_from_outside_end_with_an_image_or_are_refused(tmp_path: Path) -> None:
    models, images, file, root = pair(), grey(), tmp_path / "own.py", tmp_path / "runs"
    file.write_text(OWN)
    (store, _) = runs(models, images, root, f"{file}:broken")
    attacked = store.frame()[lambda f: f["attack"] != "clean"]
    assert set(attacked["error"]) == {"the source gave no finite image"}
    assert AttackFacts(store).not_evaluated(EPS) == 40
    assert "between 0.0 % (rest all broken) and 100.0 %" in transfer_table([store]).notes[-1]
    (asked, _), (known, _) = runs(models, images, root, f"{file}:asks_last"), runs(models, images, root, "fgsm")
    same = lambda s: s.frame()[lambda f: f["attack"].str.startswith("transfer:b")][["index", "success", "margin"]]
    pd.testing.assert_frame_equal(same(asked), same(known))  # the last question counts where nothing is returned
    with pytest.raises(UsageError, match="without one last image per row"):
        runs(models, images, root, f"{file}:scattered")


@pytest.mark.parametrize(
    "attack, says", [("deepfool", "boundary"), ("square", "no gradient"), ("noise", "no gradient")]
)
def test_what_cannot_transfer(tmp_path: Path, attack: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        runs(pair(), grey(), tmp_path, "fgsm", attack)
    assert caught.value.code == "A06"
    assert not list(tmp_path.iterdir())


def test_names_radii_and_gradients_are_needed(tmp_path: Path) -> None:
    a, b = pair()
    with pytest.raises(UsageError, match="needs a radius"):
        runs([a, b], grey(), tmp_path, "fgsm", radii=[])
    for targets, sources in (([a, named(b, "a")], [a]), ([a], [b]), ([a], [a, a])):
        with pytest.raises(UsageError, match='two models are called "a"') as caught:
            runs(targets, grey(), tmp_path, "fgsm", sources=sources)
        assert caught.value.code == "T02"
    assert not list(tmp_path.iterdir())
    blind = Classifier(lambda x: a.logits(x.detach()), 2, "blind")
    with pytest.raises(ContractBroken) as broken:
        runs([a], grey(), tmp_path, "fgsm", sources=[blind])
    assert broken.value.code == "C19"


def test_a_matrix_needs_transfer_runs_in_one_norm(tmp_path: Path) -> None:
    models, images = pair(), grey()
    stores = runs(models, images, tmp_path, "fgsm")
    specs = [parse("attacks", "fgm")]
    other = transfer_run(models[0], models, images, specs, "l2", [0.1], root=str(tmp_path))
    with pytest.raises(UsageError, match="different threat models"):
        transfer_table([*stores, RunStore.open(other.folder)])
    assert len(transfer_table([*stores, RunStore.open(other.folder)], "l2").rows) == 3
    with pytest.raises(FileRefused, match="no transfer run"):
        transfer_table(stores, "l1")


def test_few_classes_have_few_targets_each_an_attempt(tmp_path: Path) -> None:
    model, images = linear(3)
    store = transfer_run(
        model, [model], images, [parse("attacks", "apgd-t:steps=3")], "linf", [0.05], root=str(tmp_path)
    )
    attacked = store.frame()[lambda f: f["attack"] != "clean"]
    (label,) = set(attacked["attack"])
    assert "targets=2" in label
    assert set(attacked["forwards"]) == {4}


def test_float64_and_faces_of_the_box(tmp_path: Path) -> None:
    model, images = linear(5)
    edge = Images(images.x.round(), model.logits(images.x.round()).argmax(1), images.ids, "edge", images.classes)
    other = named(linear(5, seed=1)[0], "other")
    store = transfer_run(
        model, [model, other], edge, [parse("attacks", "pgd:steps=3")], "linf", [0.2], root=str(tmp_path)
    )
    assert verify(RunStore.open(store.folder), model, edge).failures == []
