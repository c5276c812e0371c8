"""Which diagnosis belongs to which attack run, and what the diagnostics broke brought into its numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from robeval.core.errors import UsageError
from robeval.core.numbers import pretty
from robeval.core.records import COUNTEREXAMPLES
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate
from robeval.reports.verdict import UNDIAGNOSED, Verdict, headline, verdict_of
from robeval.store.find import neighbours
from robeval.store.runstore import RunStore

LEVELS = ("quick", "standard", "full")
DAGGER = "†"


@dataclass(frozen=True)
class Diagnosed:
    """An attack run with what its diagnosis says.

    Args:
        facts: The run; images that diagnostics broke are among its attacks.
        diagnosis: The diagnosis that speaks of this model, if there is one.
    """

    facts: AttackFacts
    diagnosis: RunStore | None

    def verdict(self) -> Verdict | None:
        """The verdict, recomputed from the rows; none without a diagnosis."""
        lost = max((self.facts.not_evaluated(eps) for eps in self.facts.radii), default=0)
        return verdict_of(self.diagnosis, lost) if self.diagnosis else None

    @property
    def comparable(self) -> bool:
        """A diagnosis found no failure, so that a paired test against another such model has a meaning."""
        end = self.verdict()
        return end is not None and end.comparable

    def said(self, eps: float) -> str:
        """The verdict in a few words, for the number at this radius."""
        end = self.verdict()
        if end is None or self.diagnosis is None:
            return UNDIAGNOSED
        at = self.diagnosis.manifest()["threat"]["eps"][0]
        return end.short + (f", at eps {pretty(at)}" if at != eps else "")

    def headline(self, eps: float) -> str:
        """The line that stands for this run at a radius."""
        f = self.facts
        lost = f.lost(eps)
        standing = f.standing(eps).drop(lost)
        attacks = [a for a in f.per_attack(eps) if a.attacked and not a.label.startswith(COUNTEREXAMPLES)]
        return headline(
            Rate(int(standing.sum()), len(standing)),
            len(attacks),
            f.norm,
            eps,
            self.said(eps),
            lowered=f.lowered(eps),
            unevaluated=len(lost),
            proven=len(f.proven(eps)),
        )


def is_counterexamples(manifest: dict[str, Any]) -> bool:
    """The run holds what diagnostics broke."""
    return "counterexamples_of" in manifest["settings"]


def _about(manifest: dict[str, Any]) -> tuple[str, str, str]:
    return (
        manifest["model"]["fingerprint"] or manifest["model"]["name"],
        manifest["data"]["name"],
        manifest["threat"]["norm"],
    )


def diagnosed(stores: Iterable[RunStore]) -> list[Diagnosed]:
    """The attack runs among these with their diagnoses; what diagnostics broke is no row of its own.

    Of several diagnoses of one model the highest level counts, and of these the latest. Counterexamples without any
    attack run on their model stand for themselves.
    """
    stores = list(stores)
    attacks = [s for s in stores if s.manifest()["kind"] == "attack"]
    extra = [s for s in attacks if is_counterexamples(s.manifest())]
    plain = [s for s in attacks if not is_counterexamples(s.manifest())]
    attacked = {_about(s.manifest()) for s in plain}
    alone = [s for s in extra if _about(s.manifest()) not in attacked]
    found = []
    for store in [*plain, *alone]:
        about = _about(store.manifest())
        mine = [s for s in stores if s.manifest()["kind"] == "diagnose" and _about(s.manifest()) == about]
        more = [s for s in extra if _about(s.manifest()) == about and s is not store]
        found.append(Diagnosed(AttackFacts(store, more, _struck(mine)), max(mine, key=_rank, default=None)))
    return found


def beside(store: RunStore, *, lowered: bool = True) -> Diagnosed:
    """An attack run with what was diagnosed in the same folder of runs.

    Args:
        store: The run.
        lowered: Images that diagnostics broke count as broken; otherwise the run's own attacks speak alone.
    """
    about = _about(store.manifest())
    others = [
        s for s in neighbours(store)
        if _about(s.manifest()) == about
        and (s.manifest()["kind"] == "diagnose" or (lowered and is_counterexamples(s.manifest())))
    ]  # fmt: skip
    return diagnosed([store, *others])[0]


def _rank(store: RunStore) -> tuple[int, str]:
    manifest = store.manifest()
    return LEVELS.index(manifest["settings"]["level"]), manifest["created"]


def _struck(diagnoses: Sequence[RunStore]) -> set[tuple[str, int, str, float]]:
    """Stored successes that an audit struck out: folder, image, attack and radius."""
    struck = set()
    for store in diagnoses:
        path = store.folder / "evidence" / "K9.json"
        if path.is_file():
            for folder, index, attack, eps in json.loads(path.read_text(encoding="utf-8"))["struck"]:
                struck.add((str(folder), int(index), str(attack), float(eps)))
    return struck


def insist_on_diagnosis(runs: Iterable[Diagnosed]) -> None:
    """Refuse numbers that no diagnosis stands behind.

    Raises:
        UsageError: a run with a radius and without a diagnosis (T06).
    """
    bare = [d.facts for d in runs if d.diagnosis is None and d.facts.radii]
    if bare:
        name = bare[0].manifest["model"]["name"]
        raise UsageError(
            f"{len(bare)} attack runs here have no diagnosis, such as one of {name}",
            code="T06",
            why="a robust accuracy says little before somebody looked whether the attacks worked",
            do="robeval diagnose MODEL --eps EPS, or --allow-undiagnosed, which marks the numbers with a dagger",
        )
