"""Images that stay in their files: same pixels as loaded ones, read only when asked for."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from robeval.core import catalogue
from robeval.core.classifier import Classifier
from robeval.core.errors import RobevalError
from robeval.core.images import Images
from robeval.data import streamed
from robeval.data.image_files import decoded as decoded_image
from robeval.data.load import load
from robeval.data.streamed import ImageFiles, Streamed
from robeval.data.subset import holdout, shard, subset
from robeval.evaluate.attacking import attack_run
from robeval.evaluate.settings import Settings
from robeval.train.fit import fit
from robeval.train.recipe import Recipe

COUNT = 12


def write(
    root: Path, sides: Any = lambda i: (8, 6), mode: str = "RGB", splits: tuple[str, ...] = ("train", "test")
) -> Path:
    """Twelve images in three classes; the red of the corner names the image."""
    for s, split in enumerate(splits):
        random = np.random.RandomState(s)
        for i in range(COUNT):
            height, width = sides(i)
            pixels = random.randint(0, 256, (height, width, 3)).astype(np.uint8)
            pixels[0, 0, 0] = i
            file = root / split / "abc"[i // 4] / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert(mode).save(file)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "set")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded, in order."""
    seen: list[str] = []

    def counted(image: Any, name: str, i: int, colour: str) -> Any:
        seen.append(name)
        return decoded_image(image, name, i, colour)

    monkeypatch.setattr(streamed, "decoded", counted)
    return seen


def both(root: Path, more: str = "", split: str = "test") -> tuple[Images, Images]:
    return load(f"folder:path={root},stream=false{more}", split), load(f"folder:path={root},stream=true{more}", split)


@pytest.mark.parametrize("mode, more", [("RGB", ""), ("L", ""), ("RGB", ",size=5"), ("L", ",colour=rgb"), ("P", "")])
def test_the_same_pixels_as_loaded(tmp_path: Path, mode: str, more: str) -> None:
    loaded, lazy = both(write(tmp_path, mode=mode), more)
    assert isinstance(lazy.x, Streamed) and not isinstance(loaded.x, Streamed)
    assert (lazy.x.shape, lazy.x.dtype, lazy.x.device) == (loaded.x.shape, torch.float32, torch.device("cpu"))
    assert (len(lazy), lazy.x.dim(), lazy.name, lazy.classes) == (COUNT, 4, loaded.name, loaded.classes)
    assert torch.equal(lazy.y, loaded.y) and torch.equal(lazy.ids, loaded.ids)
    for key in (
        0, -1, slice(2, 7), slice(None, None, 3), [3, 3, 1], torch.tensor([11, 0]), torch.tensor(4), lazy.y == 1,
        torch.tensor([[0, 1], [2, 3]]), ..., None, (slice(1, 4), 0), (2, 0), (torch.tensor([1, 5]), slice(None), 0),
        (..., 1), (), slice(0, 0),
    ):  # fmt: skip
        rows = lazy.x[key]
        assert type(rows) is torch.Tensor and torch.equal(rows, loaded.x[key]), key
    for wrong in (COUNT, [COUNT], torch.tensor([-COUNT - 1])):
        with pytest.raises(IndexError):
            lazy.x[wrong]


def test_every_operation_of_a_tensor_works(root: Path) -> None:
    loaded, lazy = both(root)
    x = lazy.x
    assert torch.equal(x.clone(), loaded.x) and torch.equal(x.double(), loaded.x.double())
    assert torch.equal(torch.cat([x, x[:2]]), torch.cat([loaded.x, loaded.x[:2]]))
    assert torch.equal(x.mean((0, 2, 3)), loaded.x.mean((0, 2, 3))) and torch.equal(1 - x, 1 - loaded.x)
    assert torch.equal(x.to(torch.float64), loaded.x.double())
    assert [int(i[0, 0, 0] * 255) for i in x] == list(range(COUNT))
    for twin in (pickle.loads(pickle.dumps(x)), copy.deepcopy(x)):
        assert isinstance(twin, Streamed) and torch.equal(twin[:], loaded.x)
    assert "12, 3, 8, 6" in repr(x)
    assert x.to("meta").device.type == "meta"


def test_choosing_reads_nothing(root: Path, reads: list[str]) -> None:
    _, lazy = both(root)
    reads.clear()
    train, held = holdout(lazy, 3)
    few = subset(lazy, "4")
    assert all(isinstance(p.x, Streamed) for p in (train, held, few, shard(lazy, 1, 2), lazy.to("cpu")))
    assert (len(train), len(few.fingerprint), reads) == (9, 64, [])
    lazy.x.files.kept.clear()  # type: ignore[attr-defined]
    assert torch.equal((few.x[:2][:, 0, 0, 0] * 255).long(), few.ids[:2])
    assert reads == [f"test/{'abc'[i // 4]}/{i:02}.png" for i in few.ids[:2].tolist()]


def test_decoded_images_are_kept_while_there_is_room(root: Path, reads: list[str]) -> None:
    names = [f"test/{'abc'[i // 4]}/{i:02}.png" for i in range(COUNT)]
    x = Streamed(ImageFiles(root, names, room=3 * 8 * 6 * 3))
    first, second = x[:], x[:]
    assert torch.equal(first, second)
    assert len(reads) == 1 + 11 + 9  # one for the shape, three kept


def test_large_sets_are_streamed_unless_told_otherwise(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(load(str(root)).x) is torch.Tensor
    monkeypatch.setattr("robeval.data.sources.folder.LOADED", 4 * COUNT * 3 * 8 * 6 - 1)
    assert isinstance(load(str(root)).x, Streamed)
    assert type(load(f"folder:path={root},stream=false").x) is torch.Tensor
    monkeypatch.setattr(streamed, "WHOLE", 4 * 5 * 3 * 8 * 6)
    lazy = load(str(root))
    assert len(lazy.x[:5]) == 5
    with pytest.raises(RobevalError, match="12 streamed images at once would take") as caught:
        lazy.x.clone()
    assert (caught.value.exit_code, caught.value.code) == (5, "E01")


def test_size_resizes_the_shorter_side_and_cuts_the_centre(tmp_path: Path) -> None:
    loaded, lazy = both(write(tmp_path, lambda i: (30 + i, 40 - i)), ",size=16")
    assert lazy.x.shape == (COUNT, 3, 16, 16)
    with Image.open(tmp_path / "test" / "a" / "00.png") as image:  # 40 x 30, int(16 * 1.14) = 18
        wanted = np.asarray(image.resize((24, 18), Image.Resampling.BILINEAR).crop((4, 1, 20, 17)))
    assert np.array_equal((lazy.x[0] * 255).round().byte().permute(1, 2, 0).numpy(), wanted)
    assert torch.equal(lazy.x[:], loaded.x)
    flat = write(tmp_path / "flat", lambda i: (4, 4))
    assert load(f"folder:path={flat},size=100").x.shape == (COUNT, 3, 100, 100)


def test_fingerprints_cover_rows_sizes_contents_and_reading(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, lazy = both(root)
    assert lazy.fingerprint == both(root)[1].fingerprint != loaded.fingerprint
    rows = [torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0, 2])]
    prints = {lazy[r].fingerprint for r in rows} | {both(root, ",size=4")[1].fingerprint, lazy.fingerprint}
    assert len(prints) == 5
    few = lazy[torch.tensor([0, 1])].fingerprint
    file = root / "test" / "a" / "02.png"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(bytes(data))
    whole = lazy.fingerprint
    assert whole not in prints and lazy[torch.tensor([0, 1])].fingerprint == few
    monkeypatch.setattr(streamed, "FULL", 5)
    monkeypatch.setattr(streamed, "SAMPLE", 2)
    sampled = lazy.fingerprint
    data[-20] ^= 1
    file.write_bytes(bytes(data))  # the documented gap: another content of the same size, not among the sampled
    assert lazy.fingerprint == sampled != whole
    file.write_bytes(bytes(data) + b"x")
    assert lazy.fingerprint != sampled
    file.unlink()
    with pytest.raises(RobevalError, match="an image file is gone"):
        _ = lazy.fingerprint


@pytest.mark.parametrize("break_it, more, exit_code, code, words", [
    (lambda p: p.write_bytes(p.read_bytes()[:60]), "", 4, "D03", r"image 5 cannot be read \(test/b/05.png\)"),
    (lambda p: p.write_bytes(b""), ",size=4", 4, "D03", "image 5 cannot be read"),
    (lambda p: p.unlink(), "", 4, "D03", "image 5 cannot be read"),
    (lambda p: Image.new("RGB", (7, 8)).save(p), "", 4, "D05", "image 5 is 7x8, the first is 6x8"),
    (lambda p: Image.new("L", (6, 8)).save(p), "", 4, "D04", "image 5 is grey, the first is not"),
    (lambda p: Image.new("RGBA", (6, 8)).save(p), ",colour=rgb", 4, "D04", "image 5 has 4 channels"),
    (lambda p: Image.new("L", (9000, 1)).save(p), "", 3, "S12", "image 5 claims 9000x1"),
])  # fmt: skip
def test_bad_images_are_told_when_they_are_read(
    root: Path, break_it: Any, more: str, exit_code: int, code: str, words: str
) -> None:
    lazy = load(f"folder:path={root},stream=true{more}")
    break_it(root / "test" / "b" / "05.png")
    assert len(lazy.x[:5]) == 5
    with pytest.raises(RobevalError, match=words) as caught:
        lazy.x[4:7]
    assert (caught.value.exit_code, caught.value.code) == (exit_code, code)


def test_threads_read_the_same_and_tell_the_first_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robeval.data.image_files.LARGE", 10)
    monkeypatch.setattr(streamed, "LARGE", 10)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    loaded, lazy = both(write(tmp_path))
    assert lazy.x.files.large  # type: ignore[attr-defined]
    assert torch.equal(lazy.x[:], loaded.x)
    lazy.x.files.kept.clear()  # type: ignore[attr-defined]
    for i in (9, 6):
        (tmp_path / "test" / "abc"[i // 4] / f"{i:02}.png").write_text("no")
    with pytest.raises(RobevalError, match="image 6 cannot be read"):
        lazy.x[:]


def test_colours_and_mixed_folders(root: Path) -> None:
    Image.new("L", (6, 8), 77).save(root / "test" / "c" / "11.png")
    Image.new("CMYK", (6, 8)).save(root / "test" / "c" / "10.jpg")
    (root / "test" / "c" / "10.png").unlink()
    lazy = load(f"folder:path={root},stream=true,colour=rgb")
    assert lazy.x[11].unique().tolist() == [pytest.approx(77 / 255)]
    assert lazy.x[10].unique().tolist() == [1.0]
    assert load(f"folder:path={root},colour=grey").x.shape == (COUNT, 1, 8, 6)
    with pytest.raises(RobevalError, match="did you mean rgb"):
        load(f"folder:path={root},colour=rbg")
    with pytest.raises(RobevalError, match="size of folder must be 0 to 8192"):
        load(f"folder:path={root},size=-1")


def test_val_stands_in_for_test(tmp_path: Path) -> None:
    root = write(tmp_path / "imagenet", splits=("train", "val"))
    assert (load(str(root)).name, len(load(str(root), "train"))) == ("imagenet/val", COUNT)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


def net() -> Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Linear()


def test_training_on_streamed_images_ends_with_the_same_weights(root: Path, tmp_path: Path) -> None:
    ends = []
    for k, images in enumerate(both(root, split="train")):
        module = net()
        train, validation = holdout(images, 3)
        recipe = Recipe(epochs=2, batch_size=4, augment="crop-flip", eps=0.01)
        fit(module, train, method=catalogue.parse("trainers", "standard"), folder=tmp_path / str(k), recipe=recipe,
            validation=validation)  # fmt: skip
        ends.append(module.layer.weight.detach().clone())
    assert torch.equal(*ends) and not torch.equal(ends[0], net().layer.weight)


def test_training_crops_streamed_images_in_their_files(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resized crop is cut from the file's full image, not from the shrunken one."""
    rows: list[int] = []
    cut = Streamed.cut

    def seen(self: Streamed, which: torch.Tensor, boxes: Any) -> torch.Tensor:
        rows.extend(which.tolist())
        return cut(self, which, boxes)

    monkeypatch.setattr(Streamed, "cut", seen)
    _, images = both(root, split="train")
    recipe = Recipe(epochs=1, batch_size=4, augment="resized-crop-flip:scale=0.5", eps=0.01)
    fit(net(), images, method=catalogue.parse("trainers", "standard"), folder=tmp_path / "t", recipe=recipe)
    assert sorted(rows) == list(range(len(images)))


def test_attacks_on_a_streamed_subset_find_the_same(root: Path, tmp_path: Path, reads: list[str]) -> None:
    frames = []
    for k, images in enumerate(both(root)):
        module = net().eval()
        for p in module.parameters():
            p.requires_grad_(False)
        images = Images(images.x, module(images.x[:]).argmax(1), images.ids, images.name, images.classes)
        if k:
            images.x.files.kept.clear()  # type: ignore[attr-defined]
            reads.clear()
        specs = [catalogue.parse("attacks", "pgd:steps=3")]
        settings = Settings(specs, "linf", [0.05])
        store = attack_run(
            Classifier(module, 3, name="linear", fingerprint="f"),
            subset(images, "6"),
            settings,
            root=str(tmp_path / str(k)),
        )
        frames.append(store.frame().drop(columns=["example"]))
    assert frames[0].equals(frames[1])
    assert len(set(reads)) == len(reads) == 6
