"""Pixels that stay in their files until somebody asks for rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from robeval.core.errors import ContractBroken, MachineError
from robeval.data.image_files import LARGE, Box, Bytes, as_bytes, cut, decoded, each, fitted, opened

#: Bytes of decoded images that are kept, first come first kept, and of pixels that are made at once at most.
KEPT, WHOLE = 2**30, 8 * 2**30
#: A fingerprint reads the content of every file up to so many, and of so many beyond that.
FULL, SAMPLE = 10_000, 1_000


@dataclass
class ImageFiles:
    """The image files of a split.

    Args:
        root: Folder of the data set.
        names: Files, relative to it, in the order of ids.
        size: Side of the square that every image becomes; 0 leaves them as they are, all of one shape.
        colour: ``auto``, ``rgb`` or ``grey``, see `decoded`.
    """

    root: Path
    names: Sequence[str]
    size: int = 0
    colour: str = "auto"
    shape: tuple[int, ...] = ()
    kept: dict[int, Bytes] = field(default_factory=dict, repr=False)
    room: int = KEPT
    large: bool = False

    def __post_init__(self) -> None:
        if not self.shape:
            each(self._measure, [0], threads=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}, "room": self.room + sum(p.nbytes for p in self.kept.values())}

    def _measure(self, i: int) -> None:
        self.shape, sides = self.read(i).shape, self.sides(i)
        self.large = sides[0] * sides[1] > LARGE

    def read(self, i: int, box: Box | None = None) -> Bytes:
        """Image ``i`` as (C, H, W) bytes, or a part of the file's full image at the same size.

        Raises:
            ContractBroken: broken (D03), of another kind (D04) or shape (D05) than the first.
            FileRefused: too large (S12).
        """
        if box is None and i in self.kept:
            return self.kept[i]
        name = self.names[i]
        with opened(self.root, name, i) as image:
            plain = decoded(image, name, i, self.colour)
            if box is not None:
                plain = cut(plain, box, (self.shape[2], self.shape[1]))
            elif self.size:
                plain = fitted(plain, self.size)
            pixels = as_bytes(plain)
        if self.shape:
            _same(pixels, self.shape, i, name)
        if box is None and self.room >= pixels.nbytes:
            pixels = pixels.copy()
            self.room -= pixels.nbytes
            self.kept[i] = pixels
        return pixels

    def sides(self, i: int) -> tuple[int, int]:
        """Height and width in the file."""
        with opened(self.root, self.names[i], i) as image:
            return image.size[1], image.size[0]


def _same(image: Bytes, first: tuple[int, ...], i: int, name: str) -> None:
    """Refuse an image whose shape is not that of the first."""
    if image.shape[1:] != first[1:]:
        sizes = [f"{s[2]}x{s[1]}" for s in (image.shape, first)]
        raise ContractBroken(
            f"image {i} is {sizes[0]}, the first is {sizes[1]} ({name})",
            code="D05",
            do="write size=224 or another side",
        )
    if image.shape[0] != first[0]:
        raise ContractBroken(
            f"image {i} is {'grey' if image.shape[0] == 1 else 'RGB'}, the first is not ({name})",
            code="D04",
            do="write colour=rgb or colour=grey",
        )


class Streamed(Tensor):
    """(N, C, H, W) floating-point pixels in [0, 1] of image files, read when rows are asked for.

    ``[rows]`` with anything that indexes a tensor returns a plain tensor of those rows; `chosen` and ``to`` another
    device read nothing. Any other operation works on a plain tensor of all rows, which is refused where it would be too
    large. A byte divided by 255 is a number in [0, 1], so that pixels need no other check than the decoder's.

    Args:
        files: The files.
        rows: (N,) numbers of the files, all if None.
        device: Where the pixels go once they are read.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    files: ImageFiles
    rows: Tensor

    @staticmethod
    def __new__(cls, files: ImageFiles, rows: Tensor | None = None, device: torch.device | str = "cpu") -> Streamed:
        count = len(files.names) if rows is None else len(rows)
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, (count, *files.shape), dtype=torch.float32, device=torch.empty(0, device=device).device
        )
        made.files, made.rows = files, torch.arange(count) if rows is None else rows.cpu()
        return made  # type: ignore[no-any-return]

    def __getitem__(self, key: Any) -> Tensor:
        key = key.cpu() if isinstance(key, Tensor) else key
        if isinstance(key, tuple):
            rows_only = len(key) > 0 and key[0] is not None and key[0] is not ...
            part = self[key[0]] if rows_only else self[:]
            rest = key if not rows_only else key[1:] if part.dim() == 3 else (slice(None), *key[1:])
            return part[rest]
        rows: Tensor = self.rows[key]
        return self.pixels(rows.flatten().tolist()).view(*rows.shape, *self.shape[1:])

    def chosen(self, rows: Any) -> Streamed:
        """The same of some rows only, unread."""
        return Streamed(self.files, self.rows[rows.cpu() if isinstance(rows, Tensor) else rows], self.device)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """On a device, still unread; of another type, read."""
        if len(args) == 1 and not kwargs and isinstance(args[0], str | torch.device):
            return Streamed(self.files, self.rows, args[0])
        return self[:].to(*args, **kwargs)

    def pixels(self, numbers: Sequence[int], boxes: Sequence[Box] | None = None) -> Tensor:
        """Files by number as (n, C, H, W) on the device, decoded by several threads."""
        size = 4 * len(numbers) * prod(self.files.shape)
        if size > WHOLE:
            raise MachineError(
                f"{len(numbers)} streamed images at once would take {size / 1e9:.0f} GB of memory",
                code="E01",
                do="choose fewer, such as --images 1000",
            )
        out = np.empty((len(numbers), *self.files.shape), dtype=np.uint8)

        def one(place: int) -> None:
            out[place] = self.files.read(numbers[place], boxes[place] if boxes else None)

        each(one, range(len(numbers)), threads=self.files.large)
        return torch.from_numpy(out).to(self.device).float().div_(255)

    def cut(self, rows: Tensor, boxes: Callable[[Tensor], Tensor]) -> Tensor:
        """Parts of the full images in the files, resized to the shape of the set.

        Args:
            rows: (n,) rows of this set.
            boxes: From heights and widths (n, 2) to parts (n, 4): left, top, right, bottom in pixels.

        Returns:
            (n, C, H, W) on the device.
        """
        numbers = self.rows[rows.cpu()].tolist()
        sides: list[Any] = [None] * len(numbers)

        def one(place: int) -> None:
            sides[place] = self.files.sides(numbers[place])

        each(one, range(len(numbers)), threads=self.files.large)
        found = boxes(torch.tensor(sides, dtype=torch.int64, device=self.device)).tolist()
        return self.pixels(numbers, [tuple(b) for b in found])

    def digest(self) -> bytes:
        """sha256 over how images are read, and name and size of every chosen file in order, and file contents.

        Up to 10,000 files all contents count. Beyond that those of 1,000 evenly spaced ones do: then a change of
        another file that keeps its size goes unnoticed.
        """
        files, numbers = self.files, self.rows.tolist()
        total = hashlib.sha256(f"{files.size} {files.colour} {files.shape}".encode())
        count = len(numbers)
        places = range(count) if count <= FULL else [i * (count - 1) // (SAMPLE - 1) for i in range(SAMPLE)]
        read = [b""] * count

        def one(place: int) -> None:
            with open(files.root / files.names[numbers[place]], "rb") as file:
                read[place] = hashlib.file_digest(file, "sha256").digest()

        try:
            each(one, places, threads=files.large)
            for number, content in zip(numbers, read, strict=True):
                size = os.stat(files.root / files.names[number]).st_size
                total.update(f"{files.names[number]}\0{size}\0".encode() + content)
        except OSError as error:
            raise ContractBroken(f"an image file is gone: {error.filename}", code="D03") from None
        return total.digest()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Streamed({tuple(self.shape)} in {self.files.root}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Streamed, (self.files, self.rows, str(self.device))

    def __deepcopy__(self, memo: Any) -> Streamed:
        return Streamed(self.files, self.rows, self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        read = lambda value: value[:] if isinstance(value, Streamed) else value
        return function(*tree_map(read, args), **tree_map(read, kwargs or {}))
