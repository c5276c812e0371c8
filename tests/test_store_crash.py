"""What the run folder survives: kills, damage, full disks, links and two writers. Nothing acknowledged is lost."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robeval.core.errors import FileRefused, MachineError
from robeval.core.records import AttackRecord
from robeval.store.files import write_whole
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore

PLAIN = {"int": 0, "float": 0.5, "bool": True, "str": ""}
BASE = {f.name: PLAIN[str(f.type)] for f in fields(AttackRecord)} | {"attack": "pgd", "norm": "linf", "eps": 0.1}


def record(index: int, example: int = -1) -> AttackRecord:
    return AttackRecord(**BASE | {"index": index, "example": example})


def manifest() -> dict[str, Any]:
    return new_manifest(
        "attack",
        model={"name": "m", "fingerprint": "aa"},
        data={"name": "digits/test", "fingerprint": "bb", "images": 6},
        threat={"norm": "linf", "eps": [0.1]},
        methods=[{"label": "pgd"}],
        seed=0,
        settings={},
        argv=[],
    )


def image(index: int) -> np.ndarray:
    return np.full((1, 1, 2, 2), index / 4096, np.float32)


def filled(root: Path, n: int = 4) -> RunStore:
    store = RunStore.create_or_open(root, manifest())
    for i in range(n):
        store.append([record(i, 0)], image(i))
    store.close({"exit_code": 0})
    return store


def insist_on(store: RunStore, ids: list[int]) -> None:
    """Exactly these images, each once, each with its own adversarial image."""
    frame = store.frame().sort_values("index")
    assert list(frame["index"]) == ids
    if ids:
        np.testing.assert_array_equal(store.examples(frame), np.concatenate([image(i) for i in ids]))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".lock" not in p.name)


@pytest.mark.parametrize("which", ["records", "examples"])
@pytest.mark.parametrize("tenths", range(10))
def test_a_truncated_part_is_set_aside_and_its_images_are_not_done(tmp_path: Path, which: str, tenths: int) -> None:
    folder = filled(tmp_path).folder
    victim = sorted((folder / which).iterdir())[1]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) * tenths // 10])
    store = RunStore.create_or_open(tmp_path, manifest())
    assert [w.split(":")[0] for w in store.warnings] == ["warning[R02] part-all-000002"]
    assert store.done("pgd", 0.1) == {0, 2, 3}
    assert victim.with_name(victim.name + ".damaged").exists()
    assert store.append([record(1, 0)], image(1)) == "part-all-000005"  # a name is never used twice
    insist_on(store, [0, 1, 2, 3])
    insist_on(RunStore.open(folder), [0, 1, 2, 3])
    assert RunStore.open(folder).warnings == []


@pytest.mark.parametrize("which", ["records", "examples"])
def test_every_flipped_bit_is_noticed(tmp_path: Path, which: str) -> None:
    folder = filled(tmp_path, 1).folder
    (victim,) = (folder / which).iterdir()
    whole, rng = victim.read_bytes(), random.Random(0)
    name = victim.name
    for _ in range(100):
        raw = bytearray(whole)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        victim.write_bytes(bytes(raw))
        store = RunStore.open(folder)
        assert len(store.frame()) == 0
        assert len(store.warnings) == 1
        for path in folder.glob("*/*.damaged"):  # undo
            path.rename(path.with_name(path.name.removesuffix(".damaged")))
    (folder / which / name).write_bytes(whole)
    insist_on(RunStore.open(folder), [0])


def test_a_reader_that_skips_the_images_still_refuses_damaged_ones(tmp_path: Path) -> None:
    folder = filled(tmp_path, 2).folder
    victim = sorted((folder / "examples").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    store = RunStore.open(folder, check_examples=False)
    frame = store.frame()
    assert list(frame["index"]) == [0, 1]
    assert store.examples(frame[frame["index"] == 1]).shape == (1, 1, 2, 2)
    with pytest.raises(FileRefused, match="damaged"):
        store.examples(frame)


def test_a_part_of_another_run_is_no_part_of_this_one(tmp_path: Path) -> None:
    other = RunStore.create_or_open(tmp_path / "other", manifest() | {"seed": 1})
    other.append([record(9)])
    store = filled(tmp_path, 1)
    (part,) = (other.folder / "records").iterdir()
    (store.folder / "records" / "part-all-000009.parquet").write_bytes(part.read_bytes())
    again = RunStore.open(store.folder)
    insist_on(again, [0])
    assert "another run" in again.warnings[0]


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    folder = filled(tmp_path, 2).folder
    before = files(folder)
    (folder / "records" / ".part-all-000003.parquet.all.tmp").write_bytes(b"half")
    (folder / "examples" / ".part-all-000003.safetensors.all.tmp").write_bytes(b"half")
    (folder / "examples" / "part-all-000003.safetensors").write_bytes(b"its records were never written")
    live = RunStore.create_or_open(tmp_path, manifest(), "2/2")
    busy = folder / "examples" / ".part-2of2-000001.safetensors.2of2.tmp"
    busy.write_bytes(b"being written")
    insist_on(RunStore.open(folder), [0, 1])
    assert files(folder) == sorted([*before, str(busy.relative_to(folder))])
    live.close({})
    RunStore.open(folder)
    assert busy.name not in {Path(f).name for f in files(folder)}


CHILD = """
import sys
sys.path.insert(0, {here!r})
import test_store_crash as t
store = t.RunStore.create_or_open({root!r}, t.manifest(), {shard!r})
for i in range({start}, {start} + 1000):
    if i not in store.done("pgd", 0.1):
        store.append([t.record(i, 0)], t.image(i))
    print(i, flush=True)
"""


def child(root: Path, start: int, shard: str) -> subprocess.Popen[str]:
    code = CHILD.format(here=str(Path(__file__).parent), root=str(root), start=start, shard=shard)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)


def test_R1_kill_9_between_any_two_instructions(tmp_path: Path) -> None:
    """Two shards write at once, both are killed at a random moment, three times over; nothing acknowledged is lost."""
    rng, acknowledged = random.Random(0), set[int]()
    for _ in range(3):
        both = [child(tmp_path, 0, "1/2"), child(tmp_path, 2000, "2/2")]
        said: list[list[int]] = []
        for process in both:
            assert process.stdout
            said.append([int(process.stdout.readline()) for _ in range(3)])
        time.sleep(rng.random() * 0.3)
        for process in both:
            process.send_signal(signal.SIGKILL)
        for process, lines in zip(both, said, strict=True):
            assert process.stdout
            lines += [int(line) for line in process.stdout.read().split("\n") if line]
            assert process.wait() == -signal.SIGKILL
            acknowledged.update(lines)
        (folder,) = tmp_path.iterdir()
        store = RunStore.open(folder)
        assert store.warnings == []
        kept = sorted(store.frame()["index"])
        assert acknowledged <= set(kept)
        assert len(kept) <= len(acknowledged) + 2 * 3  # at most one unit more per kill and writer
        insist_on(store, kept)
        assert not [f for f in files(folder) if f.endswith(".tmp")]
        assert len(list((folder / "examples").iterdir())) == len(kept)


def test_R16_a_second_writer_of_the_same_shard_is_refused(tmp_path: Path) -> None:
    process = child(tmp_path, 0, "")
    assert process.stdout
    process.stdout.readline()
    try:
        with pytest.raises(MachineError, match="another robeval") as told:
            RunStore.create_or_open(tmp_path, manifest())
        assert (told.value.code, told.value.exit_code) == ("E04", 5)
        RunStore.create_or_open(tmp_path, manifest(), "2/2").close({})
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    RunStore.create_or_open(tmp_path, manifest()).close({})  # the lock died with its holder


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
@pytest.mark.parametrize("moment", [0, 1, 2, 3])
def test_R7_an_error_of_the_disk_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, moment: int
) -> None:
    """The ``moment``-th call fails, in the images, the records or the folder; what was there before is untouched."""
    store = RunStore.create_or_open(tmp_path, manifest())
    store.append([record(0, 0)], image(0))
    before = files(store.folder)
    real, calls = getattr(os, call), iter(range(100))

    def failing(*args: Any, **named: Any) -> Any:
        if next(calls) == moment:
            raise OSError(code, os.strerror(code))
        return real(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        happens = moment < (4 if call == "fsync" else 2)  # open: the two folders that are made durable
        if not happens:
            store.append([record(1, 0)], image(1))
        else:
            with pytest.raises(MachineError) as told:
                store.append([record(1, 0)], image(1))
            assert (told.value.code, told.value.exit_code) == ("E03", 5)
            assert "after 1 records; all of them are safe" in told.value.what
            assert told.value.what.startswith("disk full") == (code in (errno.ENOSPC, errno.EDQUOT))
    if happens:
        assert files(store.folder) == before
        insist_on(store, [0])
        store.append([record(1, 0)], image(1))  # space was freed
    insist_on(store, [0, 1])
    insist_on(RunStore.open(store.folder), [0, 1])


def test_a_folder_that_cannot_be_made_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError) as told:
        RunStore.create_or_open(tmp_path / "file", manifest())
    assert told.value.code == "E03"


@pytest.mark.parametrize("what", ["records", "examples", "manifest", "folder"])
def test_links_inside_a_run_are_refused(tmp_path: Path, what: str) -> None:
    store = filled(tmp_path, 1)
    victim = {
        "records": next((store.folder / "records").iterdir()),
        "examples": next((store.folder / "examples").iterdir()),
        "manifest": store.folder / "manifest.json",
        "folder": store.folder / "records",
    }[what]
    victim.rename(tmp_path / "elsewhere")
    victim.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileRefused, match="link") as told:
        RunStore.create_or_open(tmp_path, manifest())
    assert told.value.code == "R06"


def test_the_run_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    store = filled(tmp_path / "there", 2)
    (tmp_path / "here").symlink_to(store.folder)
    insist_on(RunStore.open(tmp_path / "here"), [0, 1])


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.csv"
    write_whole(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match="full"):
            write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_R8_the_order_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is durable before it gets its name, and the name is durable before the call returns."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle: int) -> None:
        done.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "fsync file")
        fsync(handle)

    def spy_replace(a: Any, b: Any) -> None:
        done.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_whole(tmp_path / "a", b"x")
    assert done == ["fsync file", "rename", "fsync folder"]
