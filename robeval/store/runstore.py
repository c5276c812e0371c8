"""A run on disk: immutable parts, each written whole, whose name is its key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from robeval.core.errors import ContractBroken, FileRefused, UsageError
from robeval.core.records import SCHEMA, AttackRecord, Certificate
from robeval.store.files import lock, make_folder, write_json, write_whole
from robeval.store.manifest import folder_name, identity

Record = AttackRecord | Certificate
ARROW = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "str": pa.string()}
KEYS = {"attack": ("index", "attack", "eps"), "certify": ("index", "bound", "norm", "eps")}
RECORDS = {"attack": AttackRecord, "certify": Certificate}


def arrow_schema(record: type[Record]) -> pa.Schema:
    """The Parquet schema, from the record's own declaration."""
    return pa.schema([pa.field(f.name, ARROW[str(f.type)]) for f in fields(record)])


@dataclass
class RunStore:
    """One run folder.

    Args:
        folder: Where it lies.
        shard: Prefix of the parts that this process writes, such as ``1of2``.
        warnings: What was found damaged and set aside.
    """

    folder: Path
    shard: str = ""
    warnings: list[str] = field(default_factory=list)
    _lock: IO[bytes] | None = None

    @classmethod
    def create_or_open(cls, root: str | Path, manifest: dict[str, Any], shard: str = "") -> RunStore:
        """The folder of this run under ``root``, made if it is not there.

        Raises:
            UsageError: the folder holds another run, or one of a newer schema.
            MachineError: it cannot be written.
        """
        store = cls(Path(root) / folder_name(manifest), shard)
        file = store.folder / "manifest.json"
        if file.is_file():
            there = store.manifest()
            differs = [k for k, v in identity(manifest).items() if identity(there).get(k) != v]
            if differs:
                raise UsageError(f"{store.folder} holds a run with another {', '.join(differs)}", code="R01")
        else:
            for part in ("records", "examples", "sessions"):
                make_folder(store.folder / part)
            write_json(file, manifest)
        store._lock = lock(store.folder / f".lock-{shard or 'all'}")
        store._tidy()
        return store

    @classmethod
    def open(cls, folder: str | Path) -> RunStore:
        """An existing run.

        Raises:
            FileRefused: not a run folder.
            UsageError: written by a newer robeval.
        """
        store = cls(Path(folder))
        if not (store.folder / "manifest.json").is_file():
            raise FileRefused(f"no run in {folder}", code="R05", do="give a folder that robeval attack or certify made")
        store.manifest()
        return store

    def manifest(self) -> dict[str, Any]:
        """What was run.

        Raises:
            UsageError: the schema is newer than this robeval's.
            FileRefused: the manifest is damaged.
        """
        try:
            manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            schema = manifest["schema"]
        except (ValueError, KeyError, TypeError):
            raise FileRefused(f"{self.folder}/manifest.json is damaged", code="R05") from None
        if schema > SCHEMA:
            raise UsageError(f"written by robeval {manifest.get('robeval')}", code="R03", do="update robeval")
        return manifest

    def append(self, records: Sequence[Record], examples: np.ndarray | None = None) -> None:
        """Write one part: first the images, then the records that point at them.

        Args:
            records: Rows of one type.
            examples: (m, C, H, W) float32; a record's ``example`` is its row here.

        Raises:
            MachineError: the disk refuses; nothing half-written stays.
        """
        prefix = f"part-{self.shard}-" if self.shard else "part-"
        taken = [int(p.stem.removeprefix(prefix)) for p in self._parts() if p.stem.removeprefix(prefix).isdigit()]
        name = f"{prefix}{max(taken, default=-1) + 1:06d}"
        digest = ""
        if examples is not None:
            file = self.folder / "examples" / f"{name}.safetensors"
            write_whole(file, lambda p: save_file({"x": np.ascontiguousarray(examples, np.float32)}, p))
            digest = _sha256(file)
        schema = arrow_schema(type(records[0])).with_metadata({"examples_sha256": digest, "schema": str(SCHEMA)})
        table = pa.Table.from_pylist([asdict(r) for r in records], schema=schema)
        write_whole(
            self.folder / "records" / f"{name}.parquet", lambda p: pq.write_table(table, p, write_page_checksum=True)
        )

    def frame(self) -> pd.DataFrame:
        """All records, each key once, in the order of their parts; the column ``part`` says where each stands.

        Raises:
            ContractBroken: two parts disagree on the same image and method.
        """
        kind = self.manifest()["kind"]
        frames = []
        for path in self._parts():
            table = self._read(path)
            if table is not None:
                frames.append(table.to_pandas().assign(part=path.stem))
        if not frames:
            return pd.DataFrame({f.name: pd.Series(dtype=_dtype(str(f.type))) for f in fields(RECORDS[kind])}).assign(
                part=pd.Series(dtype=str)
            )
        frame = pd.concat(frames, ignore_index=True)
        key = list(KEYS[kind])
        content = [c for c in frame.columns if c not in ("part", "example")]
        unique = frame.drop_duplicates(content)
        clash = unique[unique.duplicated(key)]
        if len(clash):
            raise ContractBroken(
                f"two results for image {clash['index'].iloc[0]}: the model is not repeatable",
                code="C12",
                where=f"{self.folder}: {', '.join(sorted(set(clash['part'])))}",
            )
        return unique.reset_index(drop=True)

    def examples(self, rows: pd.DataFrame) -> np.ndarray:
        """Stored images of some rows of :meth:`frame`, in their order. -> (m, C, H, W) float32.

        Raises:
            FileRefused: a part's images are missing or damaged.
        """
        images: dict[str, np.ndarray] = {}
        for part in rows["part"].unique():
            file = self.folder / "examples" / f"{part}.safetensors"
            expected = (pq.read_schema(self.folder / "records" / f"{part}.parquet").metadata or {}).get(b"examples_sha256")
            if not file.is_file() or _sha256(file).encode() != expected:
                raise FileRefused(f"{file} fails its checksum", code="R02", do="run the attack again into another --out")
            try:
                images[part] = load_file(file)["x"]
            except (SafetensorError, KeyError):
                raise FileRefused(f"{file} is damaged", code="R02") from None
        picked = [images[part][example] for part, example in zip(rows["part"], rows["example"], strict=True)]
        return np.stack(picked) if picked else np.empty((0, 0, 0, 0), np.float32)

    def close(self, session: dict[str, Any]) -> None:
        """Note one invocation: command, seconds, passes, exit code."""
        folder = self.folder / "sessions"
        name = f"{self.shard + '-' if self.shard else ''}{len(list(folder.glob('*.json'))):04d}.json"
        write_json(folder / name, session)
        if self._lock:
            self._lock.close()
            self._lock = None

    def sessions(self) -> list[dict[str, Any]]:
        """All invocations so far."""
        return [json.loads(p.read_text(encoding="utf-8")) for p in sorted((self.folder / "sessions").glob("*.json"))]

    def _parts(self) -> list[Path]:
        return sorted(p for p in (self.folder / "records").glob("part-*.parquet") if not p.is_symlink())

    def _read(self, path: Path) -> pa.Table | None:
        """A part whose checksums hold, else None after setting it aside."""
        try:
            return pq.ParquetFile(path, page_checksum_verification=True).read()
        except (OSError, pa.ArrowException):
            path.rename(path.with_suffix(".damaged"))
            self.warnings.append(f"warning[R02] {path.name} fails its checksum; its images are run again")
            return None

    def _tidy(self) -> None:
        """Remove what a killed process of this shard left behind."""
        mine = f"part-{self.shard}-" if self.shard else "part-"
        for folder in ("records", "examples"):
            for path in (self.folder / folder).glob(f".{mine}*.tmp"):
                path.unlink(missing_ok=True)
        whole = {p.stem for p in self._parts()}
        for path in (self.folder / "examples").glob(f"{mine}*.safetensors"):
            if path.stem not in whole and path.stem.removeprefix(mine).isdigit():
                path.unlink(missing_ok=True)


def _dtype(name: str) -> str:
    return {"int": "int64", "float": "float64", "bool": "bool", "str": "str"}[name]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
