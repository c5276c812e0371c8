"""Records of many parts as one table with one row per key."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from robeval.core.errors import ContractBroken
from robeval.core.records import AttackRecord, Certificate, Diagnosis

#: What names a row of each record.
KEYS: dict[type, tuple[str, ...]] = {
    AttackRecord: ("index", "attack", "norm", "eps"),
    Certificate: ("index", "bound", "norm", "eps"),
    Diagnosis: ("id",),
}
_PLACE = ("part", "example")
#: Two computations of the same number may differ by this much: batches of other shapes sum in another order.
REL, ABS = 1e-4, 1e-6


def same_eps(column: pd.Series[float], eps: float) -> pd.Series[bool]:
    """Rows at this eps; nan is equal to nan, inf to inf."""
    return column.isna() if math.isnan(eps) else column == eps


def settle(frame: pd.DataFrame, key: Sequence[str], model: str) -> pd.DataFrame:
    """One row per key. The first record of a key stands; a record without error goes before one with an error.

    Raises:
        ContractBroken: two records of a key disagree.
    """
    twice = frame.duplicated(list(key), keep=False)
    if not twice.any():
        return frame.reset_index(drop=True)
    failed = frame["error"] != "" if "error" in frame else pd.Series(False, index=frame.index)
    order = failed.sort_values(kind="stable").index
    frame = frame.loc[order]
    for _, group in frame[twice.loc[order]].groupby(list(key), dropna=False, sort=True):
        good = group[~failed.loc[group.index]]
        for name in frame.columns:
            if name not in _PLACE and len(good) > 1 and not _agree(good[name]):
                raise _not_repeatable(model, good, name)
    return frame[~frame.duplicated(list(key))].sort_index().reset_index(drop=True)


def _agree(column: pd.Series) -> bool:
    first = column.iloc[0]
    if column.dtype.kind == "f":
        return bool(np.isclose(column.to_numpy(), first, rtol=REL, atol=ABS, equal_nan=True).all())
    return bool((column == first).all())


def _not_repeatable(model: str, group: pd.DataFrame, column: str) -> ContractBroken:
    a, b = group.iloc[0], group[[not _agree(group[column].iloc[[0, k]]) for k in range(len(group))]].iloc[0]
    return ContractBroken(
        f"the model is not repeatable: {column} of image {a['index']} is {a[column]} in {a['part']}"
        f" and {b[column]} in {b['part']}",
        code="C12",
        where=model,
        why="the same image, attack or bound, and seed were computed twice; both records are kept",
        do="remove one of the two parts, or compute the run again in a new folder",
    )
