"""The second look: it finds what the records get wrong, whatever the checksums say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from robeval.core.choosing import choose
from robeval.core.errors import ContractBroken
from robeval.core.records import AttackRecord
from robeval.evaluate.attacking import attack_run
from robeval.evaluate.settings import Settings
from robeval.evaluate.verify import verify
from robeval.reports.tables import attacks_table
from robeval.store.runstore import RunStore
from tests.problems import linear

EPS = 0.1


@pytest.fixture
def honest(tmp_path: Path) -> tuple[RunStore, AttackRecord, np.ndarray]:
    """A real run, and one of its successes with its image."""
    model, these = linear(2, rows=20)
    settings = Settings(choose("attacks", ["pgd"], "linf"), "linf", [EPS])
    store = attack_run(model, these, settings, root=str(tmp_path))
    assert verify(store, model, these).failures == []
    row = store.frame().query("success and attack == 'pgd'").iloc[:1]
    fields = {k: row.iloc[0][k] for k in AttackRecord.__dataclass_fields__}
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in fields.items()}
    return store, AttackRecord(**plain), store.examples(row)


def planted(tmp_path: Path, store: RunStore, record: AttackRecord, image: np.ndarray) -> list[str]:
    """What the second look says of one record and image, written as any part is, with right checksums."""
    model, these = linear(2, rows=20)
    forged = RunStore.create_or_open(tmp_path / "forged", store.manifest())
    forged.append([replace(record, example=0)], image.astype(np.float32))
    forged.close({})
    result = verify(forged, model, these)
    assert result.checked == 1
    assert result.confirmed == 1 - len(result.failures)
    if result.failures:
        with pytest.raises(ContractBroken, match="1 of 1 stored adversarial images do not hold"):
            result.insist()
    return result.failures


Honest = tuple[RunStore, AttackRecord, np.ndarray]


def test_a_record_from_before_the_relative_distance_holds(honest: Honest, tmp_path: Path) -> None:
    store, record, image = honest
    assert planted(tmp_path, store, replace(record, relative_l2=math.nan), image) == []


def test_distances_are_also_told_relative_to_the_image(tmp_path: Path) -> None:
    model, these = linear(2, rows=20)
    store = attack_run(model, these, Settings(choose("attacks", ["deepfool"], "l2"), "l2", []), root=str(tmp_path))
    frame = store.frame().query("attack == 'deepfool'").set_index("index")
    length = dict(zip(these.ids.tolist(), these.x.flatten(1).norm(dim=1).tolist(), strict=True))
    assert len(frame) == 20
    for index, row in frame.iterrows():
        assert row["relative_l2"] == pytest.approx(row["distance_l2"] / length[index], rel=1e-12)
    (told,) = [row for row in attacks_table(store).rows if row["attack"] == "deepfool"]
    assert told["rho_adv"] == pytest.approx(frame["relative_l2"].mean())
    assert verify(store, model, these).confirmed == 20


def test_an_honest_record_holds(honest: Honest, tmp_path: Path) -> None:
    assert planted(tmp_path, *honest) == []


def test_a_clean_image_is_no_adversarial_one(honest: Honest, tmp_path: Path) -> None:
    store, record, _ = honest
    _, these = linear(2, rows=20)
    clean = these.x[these.ids == record.index].numpy()
    (said,) = planted(tmp_path, store, replace(record, distance_linf=0.0), clean)
    assert "it is classified correctly" in said


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eps": EPS / 100}, "exceeds eps"),
        ({"distance_linf": EPS / 2}, "the recorded distance is another one"),
        ({"prediction": 7}, "recorded 7"),
        ({"relative_l2": 0.5}, "the recorded relative distance is another one"),
    ],
)
def test_a_wrong_number_is_named(honest: Honest, tmp_path: Path, change: dict[str, float], says: str) -> None:
    store, record, image = honest
    (said,) = planted(tmp_path, store, replace(record, **change), image)  # type: ignore[arg-type]
    assert says in said


@pytest.mark.parametrize("bad", [math.nan, 1.5, -0.5])
def test_pixels_outside_the_box_are_named(honest: Honest, tmp_path: Path, bad: float) -> None:
    store, record, image = honest
    image = image.copy()
    image[0, 0, 0, 0] = bad
    (said,) = planted(tmp_path, store, record, image)
    assert "pixels leave [0, 1]" in said or "logits are not finite" in said


def test_another_model_or_other_images_are_refused(honest: Honest) -> None:
    store, _, _ = honest
    model, these = linear(2, rows=20)
    with pytest.raises(ContractBroken, match="this model is not the run's"):
        verify(store, linear(2, rows=20, seed=1)[0], these)
    with pytest.raises(ContractBroken, match="these images are not the run's"):
        verify(store, model, these[torch.arange(10)])
