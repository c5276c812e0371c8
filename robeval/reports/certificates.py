"""From certificate rows to facts about a model: what is proven at which radius, by which bound."""

from __future__ import annotations

import pandas as pd

from robeval.reports.stats import Rate
from robeval.store.runstore import RunStore


class CertificateFacts:
    """Everything that the tables say about one certify run.

    An image is certified at eps by a bound that is no estimate, where it is classified correctly and the bound holds at
    a radius of at least eps. Estimates have radii, and no certified accuracy.

    Args:
        store: The run.
    """

    def __init__(self, store: RunStore):
        self.store, self.manifest = store, store.manifest()
        self.norm: str = self.manifest["threat"]["norm"]
        self.radii: list[float] = list(self.manifest["threat"]["eps"])
        self.top_k: int = self.manifest["settings"].get("top_k", 1)
        self.frame = store.frame()
        tops = {m["label"]: m.get("settings", {}).get("top", 1) for m in self.manifest["methods"]}
        self.kinds: dict[str, str] = self.frame.drop_duplicates("bound").set_index("bound")["kind"].to_dict()
        self.top = {bound: max(self.top_k, tops.get(bound, 1)) for bound in self.kinds}

    def of_kind(self, kind: str) -> list[str]:
        """Labels of the bounds of a kind, in their order."""
        return [label for label, k in self.kinds.items() if k == kind]

    def rows(self, label: str) -> pd.DataFrame:
        """One row per image: the one with the largest radius, indexed by image id."""
        mine = self.frame[self.frame["bound"] == label]
        largest = mine.sort_values("radius", ascending=False, kind="stable").drop_duplicates("index")
        return largest.set_index("index").sort_index()

    def reach(self, label: str) -> pd.Series:
        """Radius per image id; for proofs and probabilistic bounds 0 wherever nothing is certified."""
        rows = self.rows(label)
        if self.kinds[label] == "estimate":
            return rows["radius"]
        return rows["radius"].where(rows["clean_correct"] & (rows["status"] == "verified"), 0.0)

    def certified(self, label: str, eps: float) -> Rate:
        """Images certified at eps, of all images that the bound has seen.

        Raises:
            ValueError: the bound is an estimate.
        """
        if self.kinds[label] == "estimate":
            raise ValueError(f"{label} is an estimate and certifies nothing")
        rows, reach = self.rows(label), self.reach(label)
        return Rate(int(((reach >= eps) & rows["clean_correct"]).sum()), len(rows))

    def statuses(self, label: str, eps: float | None = None) -> dict[str, int]:
        """How many images have which status, at one of the radii that were asked for."""
        mine = self.frame[self.frame["bound"] == label]
        mine = mine[mine["eps"] == eps] if eps is not None else mine[mine["eps"].isna()]
        return {str(k): int(v) for k, v in mine["status"].value_counts().sort_index().items()}

    def seconds(self, label: str) -> float:
        """Time that the bound took over all invocations; nan where no session ended."""
        took = [s["bounds"][label]["seconds"] for s in self.store.sessions() if label in s.get("bounds", {})]
        return float(sum(took)) if took else float("nan")
