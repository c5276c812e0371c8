"""Data sets: facts, formats, and files that are refused."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from robeval.core import catalogue
from robeval.core.errors import RobevalError
from robeval.data.load import load
from robeval.data.sources.idx import CLOTHES

RANDOM = np.random.RandomState(0)
PIXELS = RANDOM.randint(0, 256, (6, 5, 4)).astype(np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2], dtype=np.uint8)


def test_digits_facts() -> None:
    train, test = load("digits", "train"), load("digits")
    assert (train.x.shape, test.x.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (train.name, test.name, test.x.dtype) == ("digits/train", "digits/test", torch.float32)
    assert test.ids.tolist() == list(range(360))
    assert torch.equal((test.x * 16).round(), test.x * 16)
    whole = train.y.bincount() + test.y.bincount()
    assert whole.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert float((test.y.bincount() - whole * 360 / 1797).abs().max()) <= 1
    images = {bytes(i.numpy()) for i in train.x}
    assert sum(bytes(i.numpy()) in images for i in test.x) == 0
    assert test.fingerprint == load("digits").fingerprint


def test_blobs_ignore_all_but_two_inputs() -> None:
    data = load("blobs:count=2000,irrelevant=5,noise=0.05")
    assert data.x.shape == (2000, 1, 1, 7)
    means = torch.stack([data.x[data.y == k].mean((0, 1, 2)) for k in (0, 1)])
    torch.testing.assert_close(means[1] - means[0], torch.tensor([0.4, 0.4, 0, 0, 0, 0, 0]), atol=0.02, rtol=0)
    assert not torch.equal(data.x, load("blobs:count=2000,irrelevant=5,noise=0.05", "train").x)
    assert load("blobs:count=4,irrelevant=1").x.shape == (4, 1, 1, 3)  # a width of 3 is not taken for channels


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, *, packed: bool = False, images: bytes | None = None) -> None:
    folder.mkdir(exist_ok=True)
    for stem in ("train", "t10k"):
        for what, data in (("images-idx3", images or idx_bytes(PIXELS)), ("labels-idx1", idx_bytes(LABELS))):
            path = folder / f"{stem}-{what}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefix", ["idx:", ""])
def test_idx_folders(tmp_path: Path, packed: bool, prefix: str) -> None:
    write_idx(tmp_path / "kmnist", packed=packed)
    data = load(f"{prefix}{tmp_path}/kmnist", "train")
    assert torch.equal(data.x, torch.from_numpy(PIXELS)[:, None] / 255)
    assert data.y.tolist() == LABELS.tolist()
    assert (data.name, len(data.classes)) == ("kmnist/train", 10)


def test_fashion_mnist() -> None:
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
    data = load("fashion-mnist")
    assert data.x.shape == (10_000, 1, 28, 28)
    assert data.y.bincount().tolist() == [1000] * 10
    assert data.classes == CLOTHES
    assert CLOTHES[int(data.y[0])] == "ankle boot"


def test_fashion_mnist_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(RobevalError, match="Fashion-MNIST is not at") as caught:
        load(f"fashion-mnist:{tmp_path}/none")
    assert "dataset-fashion-mnist" in caught.value.do
    write_idx(tmp_path / "copy")
    assert load(f"fashion-mnist:{tmp_path}/copy").classes == CLOTHES


def write_npz(path: Path, **arrays: Any) -> None:
    np.savez_compressed(path, **arrays)


COLOUR = RANDOM.randint(0, 256, (6, 3, 5, 4)).astype(np.uint8)


@pytest.mark.parametrize("x, wanted", [
    (PIXELS, PIXELS[:, None] / 255),
    (PIXELS[..., None], PIXELS[:, None] / 255),
    (COLOUR, COLOUR / 255),
    (np.moveaxis(COLOUR, 1, 3), COLOUR / 255),
    (PIXELS / 255, PIXELS[:, None] / 255),
    ((COLOUR / 255).astype(np.float16), (COLOUR / 255).astype(np.float16)),
])  # fmt: skip
def test_npz_layouts_and_types(tmp_path: Path, x: Any, wanted: Any) -> None:
    path = tmp_path / "set.npz"
    write_npz(path, x_test=x, y_test=LABELS[:, None], x_train=x[:1], y_train=np.array([7]))
    data = load(str(path))
    assert data.x.dtype == torch.float32
    torch.testing.assert_close(data.x, torch.from_numpy(np.asarray(wanted, dtype=np.float32)))
    assert data.y.tolist() == LABELS.tolist()
    assert len(data.classes) == len(load(f"npz:{path}", "train").classes) == 8


def test_npz_with_one_split_is_a_test_set(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    write_npz(path, x=PIXELS, y=LABELS, classes=np.array(["cat", "dog", "eel"]))
    assert load(str(path)).classes == ["cat", "dog", "eel"]
    with pytest.raises(RobevalError, match="has no x_train for the train split") as caught:
        load(str(path), "train")
    assert caught.value.code == "D01"


def header_lies(path: Path) -> None:
    entry = io.BytesIO()
    np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": (20 * 10**9,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", entry.getvalue() + bytes(100))
        archive.writestr("y.npy", entry.getvalue())


def npz_of(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: write_npz(path, **{"x": PIXELS, "y": LABELS} | arrays)


def cut_npz(path: Path) -> None:
    write_npz(path, x=PIXELS, y=LABELS)
    path.write_bytes(path.read_bytes()[:-30])


def text(content: str) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        path.write_text(content)

    return do


BAD_NPZ: list[tuple[str, Callable[[Path], None], int, str, str]] = [
    ("missing", lambda path: None, 3, "D01", "no data at"),
    ("words", text("hello"), 3, "D01", "is not an .npz archive"),
    ("empty", lambda path: path.touch(), 3, "D02", "is empty"),
    ("cut", cut_npz, 3, "D02", "is cut short"),
    ("no keys", lambda path: write_npz(path, a=PIXELS), 3, "D01", "has no x_test for the test split"),
    ("objects", npz_of(x=np.array([{}] * 6)), 3, "S08", "holds Python objects; refused"),
    ("header", header_lies, 3, "D02", r"header of x.npy says 20000000000 bytes, file has 100"),
    ("bomb", npz_of(x=np.zeros((60, 500, 500), np.uint8)), 3, "S07", r"would expand \d+ times"),
    ("0..255 floats", npz_of(x=PIXELS.astype(np.float32)), 4, "D06", "images range 1 to 254, expected 0 to 1"),
    ("normalised", npz_of(x=PIXELS / 50 - 2), 4, "D07", "already normalised"),
    ("int64", npz_of(x=PIXELS.astype(np.int64)), 4, "D06", "images are int64"),
    ("nan", npz_of(x=np.full((6, 5, 4), np.nan)), 4, "D08", "6 images hold NaN or Inf"),
    ("ambiguous", npz_of(x=np.zeros((6, 3, 5, 3), np.uint8)), 4, "D05", "cannot tell which axis"),
    ("one hot", npz_of(y=np.eye(6)), 4, "D11", "labels are 6x6 of float64; give class numbers"),
    ("float labels", npz_of(y=LABELS / 2), 4, "D11", "give class numbers"),
    ("negative labels", npz_of(y=LABELS.astype(int) - 1), 4, "D10", "label -1 at image 0"),
    (
        "huge label",
        npz_of(y=LABELS.astype(int) * 10**12),
        4,
        "D10",
        "label 2000000000000 at image 2 is no class number",
    ),
    ("labels from 1", npz_of(y=LABELS + 1, classes=np.array(["a", "b", "c"])), 4, "D10", "label 3 at image 2"),
    ("lengths", npz_of(y=LABELS[:5]), 4, "D12", "6 images, 5 labels"),
    ("none", npz_of(x=PIXELS[:0], y=LABELS[:0]), 4, "D13", "no image is left"),
]


@pytest.mark.parametrize("write, exit_code, code, words", [b[1:] for b in BAD_NPZ], ids=[b[0] for b in BAD_NPZ])
def test_bad_npz(tmp_path: Path, write: Callable[[Path], None], exit_code: int, code: str, words: str) -> None:
    path = tmp_path / "set.npz"
    write(path)
    with pytest.raises(RobevalError, match=words) as caught:
        load(str(path))
    assert (caught.value.exit_code, caught.value.code) == (exit_code, code)


@pytest.mark.parametrize("packed, images, code, words", [
    (False, idx_bytes(PIXELS)[:-3], "D02", "header says 120 bytes of data, file has 117"),
    (True, idx_bytes(PIXELS)[:-3], "D02", "header says 120 bytes of data, file has 117"),
    (False, b"P5 5 4 255\n" + bytes(20), "D01", "is not an IDX file of bytes"),
    (False, idx_bytes(PIXELS)[:9], "D02", "cut short inside its header"),
    (True, struct.pack(">HBB3I", 0, 8, 3, 10**6, 28, 28) + bytes(99), "S07", "would expand"),
    (False, idx_bytes(PIXELS[:5]), "D12", "5 images, 6 labels"),
])  # fmt: skip
def test_bad_idx(tmp_path: Path, packed: bool, images: bytes, code: str, words: str) -> None:
    write_idx(tmp_path / "set", packed=packed, images=images)
    with pytest.raises(RobevalError, match=words) as caught:
        load(f"idx:{tmp_path}/set")
    assert caught.value.code == code


def test_idx_damaged_gzip(tmp_path: Path) -> None:
    write_idx(tmp_path / "set", packed=True)
    path = tmp_path / "set" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RobevalError, match="damaged or cut short") as caught:
        load(f"idx:{tmp_path}/set")
    assert caught.value.code == "D02"
    path.unlink()
    with pytest.raises(RobevalError, match="has no images of the test split"):
        load(f"idx:{tmp_path}/set")


def write_folder(root: Path, mode: str = "RGB") -> None:
    for split in ("train", "test"):
        for k, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (5, 4), (40 * k, 10 * i, 200)).convert(mode).save(root / split / name / f"{i}.png")


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1), ("P", 3), ("1", 1)])
def test_image_folders(tmp_path: Path, mode: str, channels: int) -> None:
    write_folder(tmp_path / "insects", mode)
    data = load(f"{tmp_path}/insects", "train")
    assert data.x.shape == (6, channels, 4, 5)
    assert (data.y.tolist(), data.classes, data.name) == ([0, 0, 0, 1, 1, 1], ["ant", "bee"], "insects/train")
    if mode == "RGB":
        torch.testing.assert_close(data.x[4, :, 0, 0], torch.tensor([40, 10, 200]) / 255)


def test_image_folder_without_splits_is_a_test_set_and_classes_come_from_train(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert len(load(f"folder:{tmp_path}/test")) == 6
    with pytest.raises(RobevalError, match="has no folder train/"):
        load(f"folder:{tmp_path}/test", "train")
    for file in (tmp_path / "test" / "ant").iterdir():
        file.unlink()
    (tmp_path / "test" / "ant").rmdir()
    assert load(f"folder:{tmp_path}").y.tolist() == [1, 1, 1]
    (tmp_path / "test" / "bee").rename(tmp_path / "test" / "wasp")
    with pytest.raises(RobevalError, match=r"'wasp' of .* does not occur in train") as caught:
        load(f"folder:{tmp_path}")
    assert caught.value.code == "D10"


def png_claims(path: Path, side: int) -> None:
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", __import__("zlib").crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("break_it, exit_code, code, words", [
    (lambda p: p.write_bytes(p.read_bytes()[:50]), 4, "D03", r"image 4 cannot be read \(test/bee/1.png\)"),
    (lambda p: p.write_text("no"), 4, "D03", "image 4 cannot be read"),
    (lambda p: png_claims(p, 9000), 3, "S12", "image 4 claims 9000x9000"),
    (lambda p: png_claims(p, 65000), 3, "S12", "image 4 claims"),
    (lambda p: Image.new("RGBA", (5, 4)).save(p), 4, "D04", "image 4 has 4 channels"),
    (lambda p: Image.new("I;16", (5, 4)).save(p), 4, "D04", "image 4 is of mode I;16"),
    (lambda p: Image.new("L", (5, 4)).save(p), 4, "D04", "image 4 is grey, the first is not"),
    (lambda p: Image.new("RGB", (6, 4)).save(p), 4, "D05", "image 4 is 6x4, the first is 5x4"),
    (lambda p: p.rename(p.with_name("a\nb.png")), 3, "S11", r"unusable file name 'a\\nb.png'"),
])  # fmt: skip
def test_bad_images(tmp_path: Path, break_it: Callable[[Path], Any], exit_code: int, code: str, words: str) -> None:
    write_folder(tmp_path)
    break_it(tmp_path / "test" / "bee" / "1.png")
    with pytest.raises(RobevalError, match=words) as caught:
        load(str(tmp_path))
    assert (caught.value.exit_code, caught.value.code) == (exit_code, code)


@pytest.mark.parametrize("text, exit_code, words", [
    ("digit", 2, "did you mean digits"),
    ("/nowhere/set", 3, "no data at /nowhere/set"),
    ("idx:/nowhere", 3, "no folder of IDX files"),
    ("npz:", 3, "no .npz file"),
    ("folder:/nowhere", 3, "no folder of images"),
    ("blobs:cuont=3", 2, "did you mean count"),
    ("blobs:count=1", 2, "count >= 2"),
    ("digits:/some/path", 2, "unknown setting of digits"),
])  # fmt: skip
def test_unknown_data(text: str, exit_code: int, words: str) -> None:
    with pytest.raises(RobevalError, match=words) as caught:
        load(text)
    assert caught.value.exit_code == exit_code


def test_unknown_splits_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(RobevalError, match="has the splits train and test"):
        load("digits", "val")
    with pytest.raises(RobevalError, match="neither IDX files nor class folders"):
        load(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(RobevalError, match="holds no image") as caught:
        load(str(tmp_path))
    assert caught.value.code == "D13"


@pytest.mark.parametrize("kind", ["data", "models"])
def test_every_source_and_architecture_is_documented(kind: str) -> None:
    found = catalogue.methods(kind)
    assert len(found) >= 6
    for method in found.values():
        assert method.summary.endswith(".")
        assert method.facts["source"]
        for section in ("Shapes:", "Cost:", "Source:"):
            assert section in method.doc
        assert all(s.doc for s in method.settings)
