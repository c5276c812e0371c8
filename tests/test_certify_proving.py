"""The runner of proofs, driven by toy proofs whose answers are known in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from robeval.certification import chunks, proving
from robeval.certification.run import certify
from robeval.certification.settings import Settings
from robeval.core.catalogue import Spec, parse
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, MachineError, UsageError
from robeval.core.images import Images
from robeval.evaluate.certified import certified
from robeval.store.runstore import RunStore
from tests.problems import exact_distance, linear

TOY = '''
import torch
from robeval.bounds.proof import Proof
from robeval.core.ball import DUAL, vector_norm
from robeval.core.catalogue import bound

SEEN = []

def margins(graph, region, y):
    size = region.x[0].numel()
    rows = torch.eye(size, dtype=torch.float64).view(size, *region.x.shape[1:])
    w = (graph.logits(rows) - graph.logits(torch.zeros_like(rows[:1]))).T
    w = w[y][:, None] - w
    z = graph.logits(region.x)
    return z.gather(1, y[:, None]) - z, w


@bound(source="algebra", norms=("linf", "l2", "l1"), kind="proof", domain="whole space")
def exact(graph, region, y, *, memory: int = 1000, dies: int = 0, constant: bool = False):
    """The exact margin of a linear network over a ball without its box."""
    SEEN.append(len(y))
    if len(y) > memory:
        raise MemoryError
    if dies and len(SEEN) == dies:
        raise KeyboardInterrupt
    gap, w = margins(graph, region, y)
    slope = vector_norm(w.flatten(0, 1), DUAL[region.norm]).view_as(gap)
    lower = (gap - region.eps[:, None] * slope).scatter(1, y[:, None], torch.inf)
    return Proof(lower, slope.amax(1) if constant else None)


@bound(source="algebra", norms=("linf", "l2", "l1"), kind="proof")
def wavering(graph, region, y):
    """Proves nothing at odd multiples of 0.01, everything elsewhere."""
    odd = (region.eps / 0.01).round() % 2 == 1
    lower = torch.where(odd, -1.0, 2.0)[:, None].expand(-1, graph.classes).clone()
    return Proof(lower.scatter(1, y[:, None], torch.inf))


@bound(source="algebra", norms=("linf",), kind="proof")
def overflowing(graph, region, y):
    """Gives no number."""
    lower = torch.full((len(y), graph.classes), torch.nan, dtype=torch.float64)
    return Proof(lower.scatter(1, y[:, None], torch.inf))


@bound(source="algebra", norms=("linf", "l2"), kind="proof")
def showing(graph, region, y, *, reach: float = 1.0, proves: bool = False):
    """Proves nothing and shows points towards the class 0, at a multiple of eps."""
    gap, w = margins(graph, region, y)
    step = -w[:, 0].sign() * region.eps.view(-1, 1) * reach
    point = region.x + step.view_as(region.x)
    point[::2] = torch.nan
    return Proof(torch.full_like(gap, 1.0 if proves else -1.0).scatter(1, y[:, None], torch.inf), witness=point)
'''


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(TOY)
    return path


def bound(toy: Path, text: str) -> Spec:
    return parse("bounds", f"{toy}:{text}")


def problem(classes: int = 4, rows: int = 24) -> tuple[Classifier, Images]:
    """A float32 linear model, as models are."""
    model, these = linear(classes, rows=rows)
    assert isinstance(model.module, nn.Sequential)
    x = these.x.float()
    model = Classifier(model.module.float(), classes)
    return model, Images(x, model.logits(x).argmax(1), these.ids, these.name, these.classes)


def exact(model: Classifier, these: Images, norm: str) -> dict[int, float]:
    assert isinstance(model.module, nn.Sequential)
    double = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, model.classes).double()), model.classes)
    double.module.load_state_dict(model.module.state_dict())  # type: ignore[attr-defined]
    distances = exact_distance(double, Images(these.x.double(), these.y, these.ids, "", these.classes), norm)
    return dict(zip(these.ids.tolist(), distances.tolist(), strict=True))


def radii(store: RunStore) -> dict[int, float]:
    frame = store.frame()
    return dict(zip(frame["index"], frame["radius"], strict=True))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_radius_of_a_linear_model_is_its_exact_distance(tmp_path: Path, toy: Path, norm: str) -> None:
    model, these = problem()
    store = certify(model, these, Settings([bound(toy, "exact:constant=true")], norm), root=str(tmp_path))
    frame, true = store.frame(), exact(model, these, norm)
    for index, radius, margin in zip(frame["index"], frame["radius"], frame["margin_lower"], strict=True):
        assert true[index] * (1 - 1.1 * proving.TOLERANCE) <= radius <= true[index]
        assert margin > 0
    assert set(frame["status"]) == {"verified"}
    assert set(frame["kind"]) == {"proof"}
    assert set(frame["domain"]) == {"whole space"}
    assert frame["eps"].isna().all()
    assert (frame["constant"] > 0).all()
    assert (frame["confidence"] == 1).all()
    assert (frame["forwards"] < 40).all()


def test_the_radius_does_not_depend_on_the_company(tmp_path: Path, toy: Path) -> None:
    model, these = problem()
    alone = certify(model, these, Settings([bound(toy, "exact")], "l2", batch_size=1), root=str(tmp_path / "a"))
    together = certify(model, these, Settings([bound(toy, "exact")], "l2"), root=str(tmp_path / "b"))
    assert radii(alone) == radii(together)
    assert len(list((alone.folder / "records").glob("*.parquet"))) == len(these)


def test_radii_asked_for_are_decided_one_by_one(tmp_path: Path, toy: Path) -> None:
    model, these = problem()
    true = exact(model, these, "linf")
    middle = sorted(true.values())[len(true) // 2]
    eps = [middle / 4, middle * 1.001, middle * 4]
    store = certify(model, these, Settings([bound(toy, "exact")], "linf", eps=eps), root=str(tmp_path))
    frame = store.frame()
    assert len(frame) == 3 * len(these)
    for row in frame.itertuples():
        proven = true[row.index] > row.eps  # type: ignore[index]
        assert (row.status, row.radius) == (("verified", row.eps) if proven else ("unknown", 0.0))
        assert (row.margin_lower > 0) == proven
    assert 0 < (frame["status"] == "verified").sum() < len(frame)
    known = certified(str(tmp_path), model, these, "linf")
    for index, distance in true.items():
        assert known.radius.get(index, 0.0) == max([e for e in eps if e < distance], default=0.0)


def test_eps_and_top_k_make_other_runs(tmp_path: Path, toy: Path) -> None:
    model, these = problem()
    plain = Settings([bound(toy, "exact")], "linf", eps=[0.01])
    asked = [plain, replace(plain, eps=[0.01, 0.02]), replace(plain, eps=[]), replace(plain, top_k=2)]
    stores = [certify(model, these, settings, root=str(tmp_path)) for settings in asked]
    assert len({store.folder for store in stores}) == 4
    assert [store.manifest()["threat"]["eps"] for store in stores] == [[0.01], [0.01, 0.02], [], [0.01]]


def test_what_holds_of_a_ball_holds_of_the_smaller_ones(tmp_path: Path, toy: Path) -> None:
    model, these = problem()
    settings = Settings([bound(toy, "wavering")], "linf", eps=[0.01, 0.02, 0.03])
    frame = certify(model, these, settings, root=str(tmp_path)).frame()
    status = frame.groupby("eps")["status"].unique().map(list).to_dict()
    assert status == {0.01: ["verified"], 0.02: ["verified"], 0.03: ["unknown"]}
    assert (frame.loc[frame["eps"] == 0.01, "margin_lower"] == 2).all()


def test_a_bound_without_numbers_proves_nothing(tmp_path: Path, toy: Path) -> None:
    model, these = problem(rows=4)
    frame = certify(model, these, Settings([bound(toy, "overflowing")], "linf"), root=str(tmp_path)).frame()
    assert (frame["radius"] == 0).all()
    assert set(frame["status"]) == {"unknown"}
    assert frame["margin_lower"].isna().all()


def test_misclassified_images_are_not_proven(tmp_path: Path, toy: Path) -> None:
    model, these = problem()
    y = these.y.clone()
    y[3] = (y[3] + 1) % 4
    these = Images(these.x, y, these.ids, these.name, these.classes)
    frame = certify(model, these, Settings([bound(toy, "exact")], "linf"), root=str(tmp_path)).frame()
    wrong = frame[frame["status"] == "clean_error"]
    assert wrong["index"].tolist() == [int(these.ids[3])]
    assert (float(wrong["radius"].iloc[0]), bool(wrong["clean_correct"].iloc[0])) == (0.0, False)
    assert int(wrong["forwards"].iloc[0]) == 1


def test_top_k_lets_k_minus_one_rivals_pass(tmp_path: Path, toy: Path) -> None:
    model, these = problem()
    y = model.logits(these.x).topk(2, dim=1).indices[:, 1]  # all images are second best
    second = Images(these.x, y, these.ids, these.name, these.classes)
    first = certify(model, second, Settings([bound(toy, "exact")], "l2"), root=str(tmp_path)).frame()
    two = certify(model, second, Settings([bound(toy, "exact")], "l2", top_k=2), root=str(tmp_path)).frame()
    assert set(first["status"]) == {"clean_error"}
    assert set(two["status"]) == {"verified"}
    assert set(two["loss"]) == {"cw-top2"}
    one = certify(model, these, Settings([bound(toy, "exact")], "l2"), root=str(tmp_path))
    wide = certify(model, these, Settings([bound(toy, "exact")], "l2", top_k=2), root=str(tmp_path))
    assert all(radii(wide)[index] > radius for index, radius in radii(one).items())
    with pytest.raises(UsageError, match="always true"):
        certify(model, these, Settings([bound(toy, "exact")], "l2", top_k=4), root=str(tmp_path))
    both = Settings([parse("bounds", "l-bound")], "l2", top_k=2)
    with pytest.raises(UsageError, match="speak of different things"):
        certify(model, these, both, root=str(tmp_path))


def test_a_top_k_proof_spares_no_image_an_attack(tmp_path: Path, toy: Path) -> None:
    model, these = problem()
    certify(model, these, Settings([bound(toy, "exact")], "l2", top_k=2), root=str(tmp_path))
    with pytest.raises(Exception, match="no proof about this model"):
        certified(str(tmp_path), model, these, "l2")


def test_a_kill_loses_one_chunk_and_the_same_command_goes_on(
    tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, these = problem()
    monkeypatch.setattr(proving, "FIRST", 4)
    monkeypatch.setattr(chunks, "TARGET", 0.0)  # chunks stay small
    spec = bound(toy, "exact:dies=60")
    function = spec.method.load()
    seen: list[int] = function.__globals__["SEEN"]
    monkeypatch.setattr(type(spec.method), "load", lambda self: function)  # one module, one counter
    told: list[tuple[int, int]] = []
    settings = Settings([spec], "l2")
    with pytest.raises(KeyboardInterrupt):
        certify(model, these, settings, root=str(tmp_path), on_progress=lambda d, t, text: told.append((d, t)))
    (folder,) = tmp_path.iterdir()
    saved = RunStore.open(folder)
    count = len(saved.frame())
    assert 0 < count < len(these)
    assert told == [(done, len(these)) for done in sorted({d for d, _ in told})]
    assert saved.sessions()[-1]["exit_code"] == 130
    store = certify(model, these, settings, root=str(tmp_path))
    assert sum(seen[60:]) < sum(seen[:60]) * len(these) / count  # what was saved is not computed again
    computed = len(seen)
    assert certify(model, these, settings, root=str(tmp_path)).folder == store.folder
    assert len(seen) == computed
    fresh = certify(model, these, Settings([bound(toy, "exact")], "l2"), root=str(tmp_path / "fresh"))
    assert radii(store) == radii(fresh)
    assert len(store.frame()) == len(these)


def test_shards_together_are_the_whole(tmp_path: Path, toy: Path) -> None:
    model, these = problem()
    settings = Settings([bound(toy, "exact")], "l2")
    whole = certify(model, these, settings, root=str(tmp_path / "whole"))
    for part in ("1/3", "3/3", "2/3"):
        store = certify(model, these, replace(settings, shard=part), root=str(tmp_path / "parts"))
    assert radii(store) == radii(whole)
    assert store.folder.name == whole.folder.name
    with pytest.raises(UsageError, match="has no shards"):
        certify(model, these, Settings([parse("bounds", "l-bound")], "l2", shard="1/2"), root=str(tmp_path))


def test_memory_halves_the_chunk_and_changes_nothing(tmp_path: Path, toy: Path) -> None:
    model, these = problem()
    tight = certify(model, these, Settings([bound(toy, "exact:memory=3")], "l2"), root=str(tmp_path))
    plain = certify(model, these, Settings([bound(toy, "exact")], "l2"), root=str(tmp_path))
    assert radii(tight) == radii(plain)
    with pytest.raises(MachineError, match="one image"):
        certify(model, these, Settings([bound(toy, "exact:memory=0")], "l2"), root=str(tmp_path))


def test_a_witness_counts_when_the_network_itself_is_wrong_there(tmp_path: Path, toy: Path) -> None:
    model, these = problem(classes=2)
    far = max(exact(model, these, "linf").values()) * 1.01
    for norm, reach, expected in (("linf", 1.0, True), ("linf", 0.0, False)):
        settings = Settings([bound(toy, f"showing:reach={reach}")], norm, eps=[far / 1000, far])
        frame = certify(model, these, settings, root=str(tmp_path)).frame().set_index("index")
        rival = these.y == 1  # the witness goes towards class 0
        for place, index in enumerate(these.ids.tolist()):
            near, wide = frame.loc[index, "status"]
            shown = expected and bool(rival[place]) and place % 2 == 1
            assert wide == ("falsified" if shown else "unknown")
            assert near == "unknown"  # the same direction, but nothing is misclassified there
        assert (frame["radius"] == 0).all()


def test_a_proof_that_contradicts_itself_is_never_written(tmp_path: Path, toy: Path) -> None:
    model, these = problem(classes=2)
    far = max(exact(model, these, "linf").values()) * 1.01
    settings = Settings([bound(toy, "showing:proves=true")], "linf", eps=[far])
    with pytest.raises(ContractBroken, match="shows a point of that ball") as told:
        certify(model, these, settings, root=str(tmp_path))
    assert told.value.code == "P02"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_layer_is_refused_by_name_before_anything_is_written(tmp_path: Path, toy: Path) -> None:
    _, these = problem()
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.LogSigmoid())
    with pytest.raises(ContractBroken) as told:
        certify(Classifier(net, 4), these, Settings([bound(toy, "exact")], "l2"), root=str(tmp_path))
    assert told.value.code == "B03"
    assert told.value.exit_code == 4
    assert "LogSigmoid" in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_estimates_and_proofs_share_a_run(tmp_path: Path, toy: Path) -> None:
    model, these = problem()
    settings = Settings([parse("bounds", "l-bound:loss=cw"), bound(toy, "exact")], "l2", eps=[0.001])
    frame = certify(model, these, settings, root=str(tmp_path)).frame()
    assert frame.groupby("kind").size().to_dict() == {"estimate": len(these), "proof": len(these)}
    assert frame.loc[frame["kind"] == "estimate", "eps"].map(math.isnan).all()
