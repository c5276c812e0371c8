"""Constants raised to what stored adversarial images prove, one per rival."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robeval.certification.repair import least_constants, repaired
from robeval.core import catalogue
from robeval.core.ball import DUAL, vector_norm
from robeval.core.choosing import facts
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore
from tests.problems import linear
from tests.test_bounds_local import bowl
from tests.test_certify_falsify import HIT


def plant(root: Path, model: Classifier, these: Images, moves: Tensor) -> RunStore:
    """An attack run whose adversarial images lie at the given moves from all the images."""
    found = (these.x + moves).float().numpy()
    manifest = new_manifest(
        "attack", model={"name": "m", "fingerprint": model.fingerprint}, threat={"norm": "l2", "eps": [1.0]},
        data={"name": these.name, "fingerprint": these.fingerprint, "images": len(these)}, seed=0, settings={}, argv=[],
        methods=[{"label": "pgd", "name": "pgd", "settings": {}, "hash": "", "source": ""}],
    )  # fmt: skip
    store = RunStore.create_or_open(root, manifest)
    records = [
        replace(HIT, index=int(i), label=int(y), clean_prediction=int(y), norm="l2", eps=1.0, example=k,
                distance_l2=float(np.linalg.norm(found[k] - these.x[k].numpy())))
        for k, (i, y) in enumerate(zip(these.ids, these.y, strict=True))
    ]  # fmt: skip
    store.append(records, found)
    store.close({"exit_code": 0})
    return RunStore.open(store.folder)


def method(text: str) -> dict[str, Any]:
    spec = catalogue.parse("bounds", text)
    return facts(spec) | {"order": spec.method.facts["order"]}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ["l-bound", "local-l-bound", "clever"])
def test_slopes_of_a_linear_model_are_what_witnesses_prove_at_most(tmp_path: Path, name: str, norm: str) -> None:
    model, these = linear(4)
    generator = torch.Generator().manual_seed(0)
    moves = 0.1 * (torch.rand(these.x.shape, generator=generator, dtype=torch.float64) - 0.5)
    run = plant(tmp_path, model, these, moves)
    least, seen = least_constants(model, these, method(name), norm, [run])
    w = model.module[1].weight.detach()  # type: ignore[index]
    v = ((these.x + moves).float().double() - these.x).flatten(1)
    rise = v @ w.T - (v * w[these.y]).sum(1, keepdim=True)
    each = rise / vector_norm(v, norm)[:, None]
    own = torch.nn.functional.one_hot(these.y, 4).bool()
    assert seen == len(these)
    torch.testing.assert_close(least, each.masked_fill(own, -torch.inf).amax(0), rtol=1e-9, atol=0)
    slope = vector_norm((w[:, None] - w[None]).flatten(0, 1), DUAL[norm]).max()
    assert float(least.max()) <= float(slope)
    assert repaired(model, these, method(name), norm, 1e9, [run]) == (1e9, seen)
    assert repaired(model, these, method(name), norm, 0.0, [run]) == (float(least.max()), seen)


@pytest.mark.parametrize("name", ["c-bound", "local-c-bound", "c-bound:loss=cw"])
def test_a_quadratic_margin_gives_its_curvature_away(tmp_path: Path, name: str) -> None:
    model, these, _ = bowl()
    moves = 0.2 * torch.randn(these.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).clamp(
        -1, 1
    )
    run = plant(tmp_path, model, these, moves)
    least, seen = least_constants(model, these, method(name), "l2", [run])
    assert seen == 6
    assert float(least.max()) == pytest.approx(4.0, rel=1e-9)
    assert float(least.max()) == repaired(model, these, method(name), "l2", 0.0, [run])[0]


def test_nothing_stored_proves_nothing() -> None:
    model, these = linear(3)
    assert repaired(model, these, method("l-bound"), "l2", 2.5, []) == (2.5, 0)
