"""From per-image records to facts about a model: what was broken at which radius, by what, and at which distance."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from robeval.core.records import CERTIFIED, CLEAN, COUNTEREXAMPLES
from robeval.reports.stats import Rate
from robeval.store.runstore import RunStore

# The verdict's tolerance, as the manifest of every run states it: eps * (1 + REL) + ABS.
REL, ABS = 1e-6, 1e-9


@dataclass(frozen=True)
class Attacked:
    """What one attack did at one radius.

    Args:
        label: The attack with its settings.
        robust: Images still standing, of all images of the run, misclassified ones counted as broken.
        alone: The attack saw every correctly classified image; otherwise only those that earlier attacks had left, and
            ``robust`` counts what stands after all attacks so far.
        broken: Images that this attack broke.
        first: Images that it was the first to break.
        attacked: Images that it saw.
    """

    label: str
    robust: Rate
    alone: bool
    broken: int
    first: int
    attacked: int


class AttackFacts:
    """Everything that the tables say about one attack run.

    Args:
        store: The run.
        more: Runs on the same model, data and norm whose finds count too: what diagnostics broke.
        struck: Successes that do not hold and count for nothing: folder, image, attack and radius.
    """

    def __init__(
        self,
        store: RunStore,
        more: Sequence[RunStore] = (),
        struck: Collection[tuple[str, int, str, float]] = (),
    ):
        self.store, self.manifest = store, store.manifest()
        self.norm: str = self.manifest["threat"]["norm"]
        frame = store.frame()
        self.clean = frame[frame["attack"] == CLEAN].set_index("index")
        self.attacks = frame[~frame["attack"].isin([CLEAN, CERTIFIED])]
        if struck:
            keys = zip(self.attacks["index"], self.attacks["attack"], self.attacks["eps"], strict=True)
            held = [(store.folder.name, *key) not in struck for key in keys]
            self.attacks = self.attacks.assign(success=self.attacks["success"] & np.array(held, bool))
        for found in (other.frame() for other in more):
            found = found[found["attack"].str.startswith(COUNTEREXAMPLES) & found["index"].isin(self.clean.index)]
            self.attacks = pd.concat([self.attacks, found], ignore_index=True) if len(found) else self.attacks
        self.certified = frame[frame["attack"] == CERTIFIED]
        self.planned = int(self.manifest["data"]["images"])
        self.labels: list[str] = [m["label"] for m in self.manifest["methods"]]
        self.radii: list[float] = list(self.manifest["threat"]["eps"])

    @property
    def ids(self) -> set[int]:
        """Ids of the images that the run was made for."""
        return set(self.manifest["data"].get("ids") or self.clean.index)

    @property
    def complete(self) -> bool:
        """Every image has been decided by every attack that had to see it."""
        if len(self.clean) < self.planned:
            return False
        if "counterexamples_of" in self.manifest["settings"]:  # a diagnostic stops when its question is answered
            return True
        for method in self.manifest["methods"]:
            for eps in self.radii or [math.inf]:
                mine = self.attacks[self.attacks["attack"] == method["label"]]
                mine = mine[np.isinf(mine["eps"]) if method["search"] == "minimal" else mine["eps"] == eps]
                seen = set(mine["index"]) | self.proven(eps)
                left = self.clean.index[self.clean["clean_correct"]].difference(pd.Index(sorted(seen)))
                standing = self.distances().reindex(left) > eps * (1 + REL) + ABS
                every = self.manifest["settings"]["each"] or not self.radii
                if (every and len(left)) or bool(standing.any()):
                    return False
        return True

    def proven(self, eps: float) -> set[int]:
        """Images that a proof covers at this radius, so that no attack was run on them there."""
        return set(self.certified.loc[self.certified["eps"] >= eps, "index"])

    @property
    def clean_accuracy(self) -> Rate:
        """Correctly classified images."""
        return Rate(int(self.clean["clean_correct"].sum()), len(self.clean))

    def hits(self, eps: float) -> pd.DataFrame:
        """Records that break an image at this radius: a verified image in the ball, whatever eps it was sought at."""
        close = self.attacks[f"distance_{self.norm}"] <= eps * (1 + REL) + ABS
        return self.attacks[self.attacks["success"] & close]

    def standing(self, eps: float) -> pd.Series:
        """Per image: correct and broken by none of the attacks. Indexed by image id, bool."""
        return self.clean["clean_correct"] & ~self.clean.index.isin(self.hits(eps)["index"])

    def worst_case(self, eps: float) -> Rate:
        """Upper bound on robust accuracy: images that no attack broke."""
        return Rate(int(self.standing(eps).sum()), len(self.clean))

    def lost(self, eps: float) -> list[int]:
        """Ids of images that stand only because the model gave no answer under attack."""
        failed = self.attacks[(self.attacks["error"] != "") & (self.attacks["eps"] >= eps)]
        standing = self.standing(eps).reindex(failed["index"].unique())
        return [int(index) for index in standing.index[standing]]

    def not_evaluated(self, eps: float) -> int:
        """How many images stand only because the model gave no answer under attack."""
        return len(self.lost(eps))

    def lowered(self, eps: float) -> int:
        """Images that diagnostics broke at this radius and no attack did."""
        hits = self.hits(eps)
        found = hits["attack"].str.startswith(COUNTEREXAMPLES)
        return len(set(hits.loc[found, "index"]) - set(hits.loc[~found, "index"]))

    def ran(self, label: str, eps: float) -> pd.DataFrame:
        """Records of an attack that was run at this radius, or that searched the nearest point."""
        own = (self.attacks["eps"] == eps) | np.isinf(self.attacks["eps"])
        return self.attacks[(self.attacks["attack"] == label) & own]

    def per_attack(self, eps: float) -> list[Attacked]:
        """One entry per attack, in the order in which they ran."""
        correct = set(self.clean.index[self.clean["clean_correct"]])
        to_see = correct - self.proven(eps)
        hits = self.hits(eps)
        # Radii ran in ascending order, nearest-point searches at the first: what they found was known before.
        earlier = (hits["eps"] < eps) | (np.isinf(hits["eps"]) & (eps > min(self.radii, default=eps)))
        fallen = set(hits.loc[earlier, "index"])
        found = []
        for label in self.labels:
            mine = self.ran(label, eps)
            broken = set(mine["index"]) & set(hits.loc[hits["attack"] == label, "index"])
            alone = to_see <= set(mine["index"])
            left = correct - broken - (set() if alone else fallen)
            rate = Rate(len(left), len(self.clean))
            found.append(Attacked(label, rate, alone, len(broken), len(broken - fallen), len(mine)))
            fallen |= broken
        return found

    def distances(self) -> pd.Series:
        """Smallest verified distance per image over all attacks; 0 where misclassified, inf where nothing was found."""
        column = f"distance_{self.norm}"
        nearest = self.attacks[self.attacks["success"]].groupby("index")[column].min()
        distance = nearest.reindex(self.clean.index).fillna(math.inf)
        return distance.where(self.clean["clean_correct"], 0.0)

    def mean_distance(self) -> tuple[float, int]:
        """Mean of the finite distances, and how many images have one."""
        finite = self.distances()
        finite = finite[np.isfinite(finite)]
        return (float(finite.mean()) if len(finite) else math.nan), len(finite)

    def median_distance(self) -> float:
        """Median over all images; inf where half of them or more have no distance."""
        return float(self.distances().median())

    def cost(self) -> dict[str, Any]:
        """Passes over all records, and seconds over all invocations."""
        sessions = self.store.sessions()
        return {
            "forwards": int(self.clean["forwards"].sum() + self.attacks["forwards"].sum()),
            "backwards": int(self.attacks["backwards"].sum()),
            "seconds": round(sum(s.get("seconds", 0.0) for s in sessions), 1),
        }
