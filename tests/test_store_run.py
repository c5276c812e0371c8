"""The run folder: what is written is whole, found again once, and never mixed with another run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robeval.core.errors import ContractBroken, FileRefused, RobevalError, UsageError
from robeval.core.records import AttackRecord, Certificate, col
from robeval.store import parts
from robeval.store.find import runs
from robeval.store.manifest import folder_name, new_manifest, run_id
from robeval.store.runstore import RunStore

PLAIN = {"int": 0, "float": 0.5, "bool": True, "str": ""}


def record(**values: Any) -> AttackRecord:
    base = {f.name: PLAIN[str(f.type)] for f in fields(AttackRecord)} | {"attack": "pgd", "norm": "linf", "eps": 0.1}
    return AttackRecord(**base | {"example": -1} | values)


def manifest(**changed: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": {"name": "digits_cnn", "fingerprint": "aa"},
        "data": {"name": "digits/test", "fingerprint": "bb", "images": 6},
        "threat": {"norm": "linf", "eps": [8 / 255]},
        "methods": [{"label": "pgd", "hash": "h"}],
        "seed": 0,
        "settings": {"each": False},
        "argv": ["attack", "m.pt"],
    }
    return new_manifest("attack", **facts | changed)


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 1, 3, 3), dtype=np.float32)


def filled(root: Path, n: int = 6, shard: str = "") -> RunStore:
    """A store with one part per image."""
    store = RunStore.create_or_open(root, manifest(), shard)
    for i in range(n):
        store.append([record(index=i, example=0)], images(1, i))
    return store


def test_records_and_images_come_back_as_they_were(tmp_path: Path) -> None:
    store = RunStore.create_or_open(tmp_path, manifest())
    rows = [
        record(index=0, distance_l2=math.inf, error="said 'no', \n"),
        record(index=7, example=1, margin=-math.inf),
        record(index=3, example=0, distance_l1=math.nan),
    ]
    x = images(2)
    name = store.append(rows, x)
    store.close({"exit_code": 0, "seconds": 1.5})
    again = RunStore.open(store.folder)
    frame = again.frame()
    assert list(frame.columns) == [f.name for f in fields(AttackRecord)] + ["part"]
    assert set(frame["part"]) == {name}
    assert list(frame["index"]) == [0, 7, 3]
    for k, row in enumerate(rows):
        for f in fields(AttackRecord):
            there, was = frame[f.name].iloc[k], getattr(row, f.name)
            assert there == was or (math.isnan(there) and math.isnan(was)), f.name
    back = frame[frame["example"] >= 0].iloc[::-1]  # in the order that is asked for
    np.testing.assert_array_equal(again.examples(back), x[[0, 1]])
    assert again.sessions() == [{"exit_code": 0, "seconds": 1.5}]
    assert again.manifest() == store.manifest()


def test_an_empty_run_has_the_columns_and_types(tmp_path: Path) -> None:
    store = RunStore.create_or_open(tmp_path, manifest())
    filled_frame = filled(tmp_path / "other").frame()
    assert len(store.frame()) == 0
    assert store.frame().dtypes.to_dict() == filled_frame.dtypes.to_dict()
    assert store.examples(store.frame()).shape == (0, 0, 0, 0)


def test_done_knows_infinite_and_missing_radii(tmp_path: Path) -> None:
    store = RunStore.create_or_open(tmp_path, manifest())
    store.append([record(index=1), record(index=2, eps=math.inf), record(index=3, attack="square")])
    assert store.done("pgd", 0.1) == {1}
    assert store.done("pgd", math.inf) == {2}
    assert store.done("pgd", 0.2) == set()
    base = {f.name: PLAIN[str(f.type)] for f in fields(Certificate)}
    bounds = RunStore.create_or_open(
        tmp_path,
        new_manifest(
            "certify", **{k: manifest()[k] for k in ("model", "data", "threat", "methods", "seed", "settings", "argv")}
        ),
    )
    rows = [Certificate(**base | {"index": i, "bound": "l-bound", "eps": math.nan}) for i in (4, 5)]
    bounds.append(rows)
    bounds.append(rows)  # nan is the same key as nan
    assert bounds.done("l-bound") == {4, 5}
    assert list(bounds.frame()["index"]) == [4, 5]


def test_two_shards_and_a_reader_see_one_run(tmp_path: Path) -> None:
    one = RunStore.create_or_open(tmp_path, manifest(), "1/2")
    two = RunStore.create_or_open(tmp_path, manifest(), "2/2")
    assert one.folder == two.folder
    one.append([record(index=0, example=0)], images(1, 0))
    two.append([record(index=1, example=0)], images(1, 1))
    one.append([record(index=2)])
    two.close({"exit_code": 0})
    one.close({"exit_code": 0})
    for store in (one, two, RunStore.open(one.folder)):
        assert sorted(store.frame()["index"]) == [0, 1, 2]
    frame = two.frame().query("example >= 0").sort_values("index")
    np.testing.assert_array_equal(two.examples(frame), np.concatenate([images(1, 0), images(1, 1)]))
    assert len(two.sessions()) == 2


def test_the_same_command_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    first = filled(tmp_path, 2)
    again = RunStore.create_or_open(tmp_path, manifest(argv=["attack", "--batch-size", "7"]))
    assert again.folder == first.folder
    assert again.done("pgd", 0.1) == {0, 1}
    again.append([record(index=2)])
    assert sorted(first.frame()["index"]) == [0, 1, 2]
    assert len(list((first.folder / "records").iterdir())) == 3


def test_equal_duplicates_count_once_and_unequal_ones_are_told(tmp_path: Path) -> None:
    store = RunStore.create_or_open(tmp_path, manifest())
    store.append([record(index=0), record(index=1)])
    store.append([replace(record(index=1), example=0)], images(1))  # another place on disk is no other content
    assert list(store.frame()["index"]) == [0, 1]
    store.append([record(index=1, success=False)])
    with pytest.raises(ContractBroken, match="not repeatable: success of image 1") as told:
        store.frame()
    assert told.value.exit_code == 4


def test_a_rounding_difference_is_no_conflict_but_a_distance_is(tmp_path: Path) -> None:
    store = RunStore.create_or_open(tmp_path, manifest())
    store.append([record(index=0, distance_l2=1.0)])
    store.append([record(index=0, distance_l2=1.0 + 1e-7)])
    assert list(store.frame()["distance_l2"]) == [1.0]
    store.append([record(index=0, distance_l2=1.01)])
    with pytest.raises(ContractBroken, match="distance_l2 of image 0"):
        store.frame()


def test_a_result_goes_before_a_failure_of_the_same_image(tmp_path: Path) -> None:
    store = RunStore.create_or_open(tmp_path, manifest())
    store.append([record(index=0, error="NaN logits", success=False)])
    store.append([record(index=0, success=True)])
    frame = store.frame()
    assert list(frame["success"]) == [True]
    assert list(frame["error"]) == [""]


CHANGES = [
    ({"threat": {"norm": "linf", "eps": [4 / 255]}}, "eps 8/255, you gave 4/255"),
    ({"threat": {"norm": "l2", "eps": [8 / 255]}}, "norm linf, you gave l2"),
    ({"model": {"name": "digits_cnn", "fingerprint": "cc"}}, "model aa, you gave cc"),
    ({"data": {"name": "digits/test", "fingerprint": "cc", "images": 6}}, "data.fingerprint bb, you gave cc"),
    ({"seed": 1}, "seed 0, you gave 1"),
    ({"methods": [{"label": "square", "hash": "k"}]}, "methods"),
    ({"settings": {"each": True}}, "settings.each False, you gave True"),
]


@pytest.mark.parametrize(("change", "says"), CHANGES, ids=[c[1].split()[0] for c in CHANGES])
def test_other_settings_are_another_run(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    store = filled(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="this run used") as told:
        RunStore.create_or_open(tmp_path, manifest(**change), name=store.folder.name)
    assert (told.value.code, told.value.exit_code) == ("R01", 2)
    assert says in told.value.what
    assert sorted(tmp_path.rglob("*")) == before
    assert RunStore.create_or_open(tmp_path, manifest(**change)).folder != store.folder


def test_the_command_and_the_clock_are_not_part_of_the_identity() -> None:
    a, b = manifest(), manifest(argv=["other"]) | {"created": "1970-01-01", "packages": {}}
    assert run_id(a) == run_id(b)
    assert folder_name(a) == folder_name(b) == f"attack-digits_cnn-{run_id(a)[:8]}"


@pytest.mark.parametrize("name", ["../../x", "CON", "a/b\\c:d", "\n\x00", "ü" * 300, ""])
def test_a_hostile_model_name_stays_inside_the_root(tmp_path: Path, name: str) -> None:
    store = RunStore.create_or_open(tmp_path / "runs", manifest(model={"name": name, "fingerprint": "aa"}))
    assert store.folder.resolve().parent == (tmp_path / "runs").resolve()
    assert store.folder.name.replace("-", "").replace("_", "").isascii()
    assert len(store.folder.name) < 80
    assert store.manifest()["model"]["name"] == name


def test_a_manifest_holds_only_plain_json(tmp_path: Path) -> None:
    made = manifest(threat={"norm": "l2", "eps": (math.inf, 0.1), "file": Path("a")})
    assert made["threat"] == {"norm": "l2", "eps": ["inf", 0.1], "file": "a"}
    json.loads(json.dumps(made, allow_nan=False))
    assert made["packages"]["numpy"] == np.__version__


def test_newer_damaged_and_missing_runs_are_refused(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    file = store.folder / "manifest.json"
    cases: list[tuple[str, type[RobevalError], str]] = [
        (json.dumps(manifest() | {"schema": 99, "robeval": "2.0"}), UsageError, "R03"),
        (file.read_text()[:50], FileRefused, "R05"),
        ("[]", FileRefused, "R05"),
        (json.dumps(manifest() | {"kind": "cake"}), FileRefused, "R05"),
    ]
    for text, kind, code in cases:
        file.write_text(text)
        with pytest.raises(kind) as told:
            RunStore.open(store.folder)
        assert told.value.code == code
    with pytest.raises(FileRefused, match="no run"):
        RunStore.open(tmp_path)
    with pytest.raises(FileRefused, match="no run found"):
        runs(tmp_path / "gone")


def test_runs_of_a_folder_and_a_run_by_itself(tmp_path: Path) -> None:
    a = filled(tmp_path, 1)
    b = RunStore.create_or_open(tmp_path, manifest(seed=1))
    assert {s.folder for s in runs(tmp_path)} == {a.folder, b.folder}
    assert [s.folder for s in runs(a.folder)] == [a.folder]


def test_rows_must_fit_the_run_and_their_images(tmp_path: Path) -> None:
    store = RunStore.create_or_open(tmp_path, manifest())
    with pytest.raises(ValueError, match="AttackRecord"):
        store.append(["no record"])
    with pytest.raises(ValueError, match="example"):
        store.append([record(example=2)], images(2))
    assert store.append([]) == ""
    with pytest.raises(RuntimeError, match="opened to read"):
        RunStore.open(store.folder).append([record()])
    assert len(store.frame()) == 0


def test_rows_of_an_earlier_version_read_with_the_defaults_of_later_columns(tmp_path: Path) -> None:
    """A later version only adds columns at the end, each with a default; anything else is another record."""

    @dataclass(frozen=True)
    class Before:
        index: int = col("id")
        radius: float = col("radius")

    @dataclass(frozen=True)
    class Now(Before):
        rival: int = col("rival", default=-1)
        plain: float = col("without the fit", default=math.nan)

    @dataclass(frozen=True)
    class Other(Before):
        rival: int = col("rival")

    raw = parts.encode([Before(3, 0.5), Before(4, 0.25)], "run", "")
    table, _ = parts.decode(raw, Now, "run")
    assert table.schema == parts.arrow_schema(Now)
    assert table.column("radius").to_pylist() == [0.5, 0.25]
    assert table.column("rival").to_pylist() == [-1, -1]
    assert all(math.isnan(v) for v in table.column("plain").to_pylist())
    with pytest.raises(parts.Damaged, match="columns"):
        parts.decode(raw, Other, "run")
    with pytest.raises(parts.Damaged, match="columns"):
        parts.decode(parts.encode([Now(3, 0.5)], "run", ""), Before, "run")
