"""CIFAR-10 and CIFAR-100 in the two layouts that their authors publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robeval.core.catalogue import dataset
from robeval.core.errors import ContractBroken, FileRefused, UsageError
from robeval.core.images import Images
from robeval.data.arrays import make
from robeval.data.batch_files import is_tar, read_files
from robeval.data.unpickle import unpickle

PIXELS = 3 * 32 * 32
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


@dataset(source="Krizhevsky 2009, Learning multiple layers of features from tiny images")
def cifar10(split: str, *, path: str = "") -> Images:
    """CIFAR-10, 50,000 + 10,000 colour images of 32x32 pixels, 10 classes.

    Read from the python version (pickles, read without running anything that they name) or the binary version, each as
    the unpacked folder or as the .tar.gz itself, which is not unpacked to disk.

    Args:
        path: The folder ``cifar-10-batches-py`` or ``cifar-10-batches-bin``, the archive, or the folder that holds one.

    Shapes:
        x (N, 3, 32, 32).
    Cost:
        A second or two; 600 MB for the training images.
    Source:
        Krizhevsky 2009.
    """
    place = _place("cifar10", path, "cifar-10", split)
    names = [*BATCHES[split], *(f"{b}.bin" for b in BATCHES[split])]
    files = read_files(place, {*names, "batches.meta", "batches.meta.txt"})
    present = [n for n in BATCHES[split] if n in files]
    binary = not present and any(n.endswith(".bin") for n in files)
    wanted = [f"{n}.bin" if binary else n for n in BATCHES[split]]
    lacking = [n for n in wanted if n not in files]
    if lacking:
        raise FileRefused(f"{place} has no {lacking[0]}", code="D01", do="give the folder with all batches of CIFAR-10")
    read = [
        (_binary(files[n], f"{place}/{n}", 1) if binary else _pickled(files[n], f"{place}/{n}", "labels"))
        for n in wanted
    ]
    classes = _names(files, "batches.meta", "batches.meta.txt", "label_names", place) or TEN
    x, y = (np.concatenate(part) for part in zip(*read, strict=True))
    return make(x, y, name=f"cifar10/{split}", classes=classes)


@dataset(source="Krizhevsky 2009, Learning multiple layers of features from tiny images")
def cifar100(split: str, *, path: str = "") -> Images:
    """CIFAR-100, 50,000 + 10,000 colour images of 32x32 pixels, 100 fine classes.

    Read from the python or the binary version as for cifar10; the 20 coarse labels are left out.

    Args:
        path: The folder ``cifar-100-python`` or ``cifar-100-binary``, the archive, or the folder that holds one.

    Shapes:
        x (N, 3, 32, 32).
    Cost:
        A second or two; 600 MB for the training images.
    Source:
        Krizhevsky 2009.
    """
    place = _place("cifar100", path, "cifar-100", split)
    files = read_files(place, {split, f"{split}.bin", "meta", "fine_label_names.txt"})
    if split in files:
        x, y = _pickled(files[split], f"{place}/{split}", "fine_labels")
    elif f"{split}.bin" in files:
        x, y = _binary(files[f"{split}.bin"], f"{place}/{split}.bin", 2)
    else:
        raise FileRefused(f"{place} has no {split} or {split}.bin", code="D01", do="give the folder of CIFAR-100")
    numbers = [str(i) for i in range(100)]
    classes = _names(files, "meta", "fine_label_names.txt", "fine_label_names", place) or numbers
    return make(x, y, name=f"cifar100/{split}", classes=classes)


def _place(name: str, path: str, stem: str, split: str) -> Path:
    """The folder of batches or the archive: the path itself, or what the authors' names find inside it.

    Raises:
        UsageError: another split than train and test (A04).
        FileRefused: nothing there (D01).
    """
    if split not in BATCHES:
        raise UsageError(f'{name} has the splits train and test, not "{split}"', code="A04")
    given = Path(path)
    if not path or not (given.is_dir() or is_tar(given)):
        raise FileRefused(f'no {name} at "{path}"', code="D01", do=f"write {name}:/path/to/its/folder/or/archive")
    tails = ("batches-py", "batches-bin", "python", "binary", "python.tar.gz", "binary.tar.gz")
    inside = [given / f"{stem}-{tail}" for tail in tails]
    return next((p for p in inside if p.is_dir() or is_tar(p)), given)


def _pickled(data: bytes, path: str, key: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels (N, 3, 32, 32) and labels (N,) of one pickled batch.

    Raises:
        FileRefused: see `unpickle`; keys that are not there (D01), rows of another length (D02).
    """
    batch = unpickle(data, path)
    if "data" not in batch or key not in batch:
        raise FileRefused(f"{path} has no {key if 'data' in batch else 'data'}", code="D01")
    x = batch["data"]
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.shape[1] != PIXELS or x.dtype != np.uint8:
        raise FileRefused(f"{path}: images are not rows of {PIXELS} bytes", code="D02")
    y = batch[key]
    if isinstance(y, list):
        if not all(type(k) is int and abs(k) < 2**31 for k in y):
            raise FileRefused(f"{path}: {key} are not whole numbers", code="D02")
        y = np.array(y, dtype=np.int64)
    if not isinstance(y, np.ndarray) or y.shape != (len(x),):
        count = len(y) if isinstance(y, np.ndarray) and y.ndim else "other"
        raise ContractBroken(f"{len(x)} images, {count} labels", code="D12", where=path)
    return x.reshape(-1, 3, 32, 32), y.astype(np.int64)


def _binary(data: bytes, path: str, labels: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The same of a binary batch, whose records are ``labels`` bytes, the last of them the label, and the pixels.

    Raises:
        FileRefused: its size is no multiple of a record (D02).
    """
    record = labels + PIXELS
    if not data or len(data) % record:
        raise FileRefused(f"{path}: {len(data)} bytes are not whole records of {record}", code="D02")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    return rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1].astype(np.int64)


def _names(files: dict[str, bytes], pickled: str, text: str, key: str, place: Path) -> list[str]:
    """Class names from the file that holds them, or none.

    Raises:
        FileRefused: see `unpickle`; names that cannot be read (D02).
    """
    if pickled in files:
        found = unpickle(files[pickled], f"{place}/{pickled}").get(key)
        if not isinstance(found, list) or not all(isinstance(n, str | bytes) for n in found):
            raise FileRefused(f"{place}/{pickled} has no list of {key}", code="D02")
        return [n.decode("latin1") if isinstance(n, bytes) else n for n in found]
    return files[text].decode("latin1").split() if text in files else []
