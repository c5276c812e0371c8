"""One part of a run as bytes: a Parquet file of records, and the images that belong to it as safetensors."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from robeval.core.records import SCHEMA

_TYPES = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "str": pa.string()}
_HASH = b"robeval.file_sha256"
_EMPTY = b"0" * 64


class Damaged(Exception):
    """The bytes are not what was written; the text says how that shows."""


def arrow_schema(record: type) -> pa.Schema:
    """The columns of a record, with sentence and unit as field metadata."""
    columns = []
    for f in fields(record):
        notes = {"doc": f.metadata["doc"], "unit": f.metadata["unit"]}
        columns.append(pa.field(f.name, _TYPES[str(f.type)], nullable=False, metadata=notes))
    return pa.schema(columns)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def encode(records: Sequence[Any], run: str, examples_sha256: str) -> bytes:
    """Records of one type as a Parquet file that knows the hash of its own bytes and of its examples file.

    The hash is taken with zeros in its own place, so that a single changed byte anywhere in the file shows.
    """
    schema = arrow_schema(type(records[0]))
    table = pa.Table.from_arrays(
        [pa.array([getattr(r, f.name) for r in records], type=f.type) for f in schema], schema=schema
    )
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(
            {
                "robeval.schema": str(SCHEMA),
                "robeval.run": run,
                "robeval.examples_sha256": examples_sha256,
                _HASH.decode(): _EMPTY.decode(),
            }
        )
    raw = buffer.getvalue()
    at = _place(raw)
    if raw[at : at + 64] != _EMPTY:
        raise RuntimeError("this version of pyarrow writes file metadata in another way")
    return raw[:at] + sha256(raw).encode() + raw[at + 64 :]


def _place(raw: bytes) -> int:
    """Where the file's own hash stands: a two-byte header (type and length 64) lies between key and value."""
    at = raw.rfind(_HASH)
    if at < 0 or at + len(_HASH) + 2 + 64 > len(raw):
        raise Damaged("it is cut short or is no part of a run")
    return at + len(_HASH) + 2


def decode(raw: bytes, record: type, run: str) -> tuple[pa.Table, str]:
    """The records and the hash of the examples file (empty when there is none).

    Raises:
        Damaged: a byte differs from what was written, or the part is of another run.
    """
    at = _place(raw)
    if sha256(raw[:at] + _EMPTY + raw[at + 64 :]).encode() != raw[at : at + 64]:
        raise Damaged("it fails its checksum")
    try:
        file = pq.ParquetFile(io.BytesIO(raw), page_checksum_verification=True)
        table, notes = file.read(), file.metadata.metadata
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"it cannot be read ({type(error).__name__})") from None
    if notes.get(b"robeval.run", b"").decode() != run:
        raise Damaged("it belongs to another run")
    if table.column_names != arrow_schema(record).names:
        table = _with_later_columns(table, record)
    return table, notes[b"robeval.examples_sha256"].decode()


def _with_later_columns(table: pa.Table, record: type) -> pa.Table:
    """Rows of an earlier version, with the defaults of the columns that it did not have."""
    schema, known = arrow_schema(record), table.column_names
    later = fields(record)[len(known) :]
    if known != schema.names[: len(known)] or any(f.default is MISSING for f in later):
        raise Damaged("its columns are not those of this run")
    for f in later:
        table = table.append_column(schema.field(f.name), pa.array([f.default] * len(table), type=_TYPES[str(f.type)]))
    return table


def encode_examples(x: NDArray[np.float32]) -> bytes:
    """Images (m, C, H, W) float32 as a safetensors file."""
    return safetensors.numpy.save({"x": np.ascontiguousarray(x)})


def decode_examples(raw: bytes, expected_sha256: str) -> NDArray[np.float32]:
    """Images (m, C, H, W) float32.

    Raises:
        Damaged: the file is not the one that the records name.
    """
    if sha256(raw) != expected_sha256:
        raise Damaged("its examples fail their checksum")
    try:
        return safetensors.numpy.load(raw)["x"]
    except (SafetensorError, KeyError) as error:
        raise Damaged(f"its examples cannot be read ({type(error).__name__})") from None
