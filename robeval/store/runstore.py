"""A run on disk: ``manifest.json``, ``records/part-*.parquet``, ``examples/part-*.safetensors``, ``sessions/*.json``.

A part is written once and never changed: the images first, then the records that name their hash, so that records
without their images cannot exist. What is acknowledged survives ``kill -9``; what is not leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from robeval.core.errors import FileRefused, MachineError, UsageError
from robeval.store import parts
from robeval.store.files import Lock, cannot_write, make_folder, write_whole
from robeval.store.frame import KEYS, same_eps, settle
from robeval.store.manifest import RECORDS, difference, folder_name, read_manifest, run_id
from robeval.store.tidy import tidy

_PART = re.compile(r"part-(?P<shard>[A-Za-z0-9_]+)-(?P<seq>\d{6})")


class RunStore:
    """One run folder. Made by :meth:`create_or_open` to write, or by :meth:`open` to read.

    Attributes:
        folder: The run folder.
        warnings: Lines for the person: parts that were damaged and set aside.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shard: str | None, check_examples: bool):
        self.folder = folder
        self.warnings: list[str] = []
        self._manifest = manifest
        self._shard = shard
        self._check_examples = check_examples
        self._record = RECORDS[manifest["kind"]]
        self._run = run_id(manifest)
        self._parts: dict[str, tuple[pa.Table, str]] = {}
        self._refused: set[str] = set()

    @classmethod
    def create_or_open(
        cls, root: str | Path, manifest: Mapping[str, Any], shard: str = "", *, name: str = ""
    ) -> RunStore:
        """Open ``root/NAME`` to write, and make it when it is not there.

        Args:
            manifest: From :func:`robeval.store.manifest.new_manifest`.
            shard: Such as ``1/4``; writers of different shards may work on one run at the same time.
            name: Name of the folder; by default the one that the manifest's identity gives.

        Raises:
            UsageError: the folder holds another run (R01), or one of a newer robeval (R03).
            FileRefused: the folder's manifest is damaged (R05), or a file in it is a link (R06).
            MachineError: the folder cannot be written (E03), or another process is writing this shard (E04).
        """
        folder = Path(root) / (name or folder_name(manifest))
        tag = re.sub(r"[^A-Za-z0-9]+", "of", shard).strip("_") or "all"
        for kind in ("records", "examples", "sessions"):
            make_folder(folder / kind)
            if (folder / kind).is_symlink():
                raise FileRefused(f"{folder / kind} is a link; refused", code="R06")
        lock = Lock(folder / f".lock-{tag}")
        try:
            if not lock.acquire(patience=2.0):
                raise MachineError(
                    "another robeval is writing this run",
                    code="E04",
                    where=str(folder),
                    do="wait for it, or use --shard",
                )
            if not (folder / "manifest.json").exists():
                write_whole(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode(), tag)
        except OSError as error:
            raise cannot_write(error, folder) from None
        found = read_manifest(folder)
        differs = difference(found, manifest)
        if differs:
            lock.release()
            what, old, new = differs
            raise UsageError(
                f"this run used {what} {old}, you gave {new}",
                code="R01",
                where=str(folder),
                do="use the same settings, or another folder",
            )
        store = cls(folder, found, tag, True)
        tidy(folder, tag)
        store._scan()
        return store

    @classmethod
    def open(cls, folder: str | Path, *, check_examples: bool = True) -> RunStore:
        """Open a run to read.

        Args:
            check_examples: Also check the hash of every examples file now; otherwise when its images are read.

        Raises:
            FileRefused: no run there or a damaged manifest (R05), or a file in it is a link (R06).
            UsageError: written by a newer robeval (R03).
        """
        folder = Path(folder)
        store = cls(folder, read_manifest(folder), None, check_examples)
        tidy(folder)
        store._scan()
        return store

    def manifest(self) -> dict[str, Any]:
        return self._manifest

    def append(self, records: Sequence[Any], examples: NDArray[np.float32] | None = None) -> str:
        """Save records as one part; when this returns, they are safe. Gives the name of the part.

        Args:
            records: Rows of this run's record type; ``example`` of a row, where it is >= 0, is a row of ``examples``.
            examples: (m, C, H, W) float32.

        Raises:
            MachineError: disk full, read-only or over quota; nothing of this part is left (E03).
        """
        if self._shard is None:
            raise RuntimeError("this run was opened to read")
        if not records:
            return ""
        stored = 0 if examples is None else len(examples)
        if any(type(r) is not self._record or getattr(r, "example", -1) >= stored for r in records):
            raise ValueError(f"rows must be {self._record.__name__}, and their example a row of the {stored} examples")
        name = self._next_name()
        images = b"" if examples is None or not stored else parts.encode_examples(examples)
        digest = parts.sha256(images) if images else ""
        raw = parts.encode(records, self._run, digest)
        try:
            if images:
                write_whole(self._examples(name), images, self._shard)
            write_whole(self._records(name), raw, self._shard)
        except BaseException as error:
            for path in (self._records(name), self._examples(name)):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                count = sum(t.num_rows for t, _ in self._parts.values())
                raise cannot_write(error, self.folder, f"{count} records") from None
            raise
        self._parts[name] = parts.decode(raw, self._record, self._run)
        return name

    def frame(self) -> pd.DataFrame:
        """All records, those of other shards too, one row per key: the columns of their dataclass, and ``part``.

        Raises:
            ContractBroken: two records of the same key disagree: the model is not repeatable.
        """
        self._scan()
        tables = [t.append_column("part", pa.array([n] * t.num_rows, pa.string())) for n, (t, _) in self._in_order()]
        empty = parts.arrow_schema(self._record).append(pa.field("part", pa.string(), nullable=False)).empty_table()
        frame = pa.concat_tables(
            [empty.replace_schema_metadata(None), *tables], promote_options="permissive"
        ).to_pandas()
        return settle(frame, KEYS[self._record], self._manifest["model"].get("name", "the model"))

    def done(self, method: str, eps: float = math.nan) -> set[int]:
        """Ids of the images that have a record of this attack or bound at this eps (nan: where a radius was sought)."""
        self._scan()
        column = "attack" if "attack" in parts.arrow_schema(self._record).names else "bound"
        ids: set[int] = set()
        for table, _ in self._parts.values():
            frame = table.select(["index", column, "eps"]).to_pandas()
            ids.update(frame.loc[(frame[column] == method) & same_eps(frame["eps"], eps), "index"].tolist())
        return ids

    def examples(self, rows: pd.DataFrame) -> NDArray[np.float32]:
        """Stored images of rows of :meth:`frame`, (n, C, H, W) float32 in the order of the rows.

        Raises:
            FileRefused: a row has no stored image, or the images are damaged.
        """
        if not len(rows):
            return np.zeros((0, 0, 0, 0), np.float32)
        if (rows["example"] < 0).any():
            raise FileRefused("a row has no stored image", code="R05", where=str(self.folder))
        out: list[Any] = [None] * len(rows)
        for name, at in rows.reset_index(drop=True).groupby("part").groups.items():
            try:
                x = self._load_examples(str(name), self._parts[str(name)][1])
            except parts.Damaged as error:
                raise FileRefused(f"part {name} is damaged: {error}", code="R02", where=str(self.folder)) from None
            for k in at:
                out[k] = x[int(rows["example"].iloc[k])]
        return np.stack(out)

    def close(self, session: Mapping[str, Any]) -> Path:
        """Write down how this session went (argv, started, seconds, exit code, ...) and let other writers in.

        Raises:
            MachineError: the file cannot be written (E03).
        """
        if self._shard is None:
            raise RuntimeError("this run was opened to read")
        folder = self.folder / "sessions"
        numbers = [int(p.stem.rpartition("-")[2]) for p in folder.glob(f"{self._shard}-*.json")]
        path = folder / f"{self._shard}-{max(numbers, default=0) + 1}.json"
        try:
            write_whole(path, (json.dumps(session, indent=2, default=str) + "\n").encode(), self._shard)
        except OSError as error:
            raise cannot_write(error, self.folder) from None
        finally:
            Lock(self.folder / f".lock-{self._shard}").release()
        return path

    def sessions(self) -> list[dict[str, Any]]:
        """What each session wrote when it ended, in order; a killed session wrote nothing."""
        order = sorted((self.folder / "sessions").glob("*-*.json"), key=lambda p: (len(p.stem), p.stem))
        return [json.loads(p.read_text(encoding="utf-8")) for p in order]

    # --- names and files ---

    def _records(self, name: str) -> Path:
        return self.folder / "records" / f"{name}.parquet"

    def _examples(self, name: str) -> Path:
        return self.folder / "examples" / f"{name}.safetensors"

    def _next_name(self) -> str:
        used = [
            int(match["seq"])
            for kind in ("records", "examples")
            for path in (self.folder / kind).iterdir()
            if (match := _PART.match(path.name)) and match["shard"] == self._shard
        ]
        return f"part-{self._shard}-{max(used, default=0) + 1:06d}"

    def _in_order(self) -> list[tuple[str, tuple[pa.Table, str]]]:
        return sorted(self._parts.items())

    def _scan(self) -> None:
        """Take in parts that are new since the last look, and set damaged ones aside."""
        for path in sorted((self.folder / "records").glob("part-*.parquet")):
            name = path.name.removesuffix(".parquet")
            if name in self._parts or name in self._refused or not _PART.fullmatch(name):
                continue
            if path.is_symlink() or self._examples(name).is_symlink():
                raise FileRefused(f"part {name} is a link; refused", code="R06", where=str(path))
            try:
                table, digest = parts.decode(path.read_bytes(), self._record, self._run)
                if digest and self._check_examples:
                    self._load_examples(name, digest)
                self._parts[name] = (table, digest)
            except parts.Damaged as error:
                self._set_aside(name, str(error))
            except OSError as error:
                raise MachineError(f"cannot read {path}: {error.strerror}", code="E03") from None

    def _load_examples(self, name: str, digest: str) -> NDArray[np.float32]:
        try:
            return parts.decode_examples(self._examples(name).read_bytes(), digest)
        except FileNotFoundError:
            raise parts.Damaged("its examples are missing") from None

    def _set_aside(self, name: str, reason: str) -> None:
        self._refused.add(name)
        self.warnings.append(f"warning[R02] {name}: {reason}; set aside, its images count as not done")
        for path in (self._records(name), self._examples(name)):
            with contextlib.suppress(OSError):
                path.rename(path.with_name(path.name + ".damaged"))
