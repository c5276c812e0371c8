"""What ``robeval diagnose`` and the end of ``robeval attack`` share: the runs that belong together, and the words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robeval.cli.common import note, progress
from robeval.core.errors import ContractBroken

if TYPE_CHECKING:
    from robeval.core.classifier import Classifier
    from robeval.core.images import Images
    from robeval.diagnose.run import Settings
    from robeval.evaluate.settings import Settings as AttackSettings
    from robeval.reports.diagnoses import Diagnosed
    from robeval.store.runstore import RunStore


def runs_about(folder: str, classifier: Classifier, images: Images, norm: str, kind: str) -> list[RunStore]:
    """Runs of a kind in a folder on the same weights and data set; attack runs in the same norm, made by attacks."""
    from robeval.reports.diagnoses import is_counterexamples
    from robeval.store.find import runs

    path = Path(folder)
    if not (path / "manifest.json").is_file() and not any(path.glob("*/manifest.json")):
        return []
    found = []
    for store in runs(path):
        m = store.manifest()
        same = m["model"]["fingerprint"] == classifier.fingerprint and m["data"]["name"] == images.name
        fits = m["kind"] == "certify" or (m["threat"]["norm"] == norm and not is_counterexamples(m))
        if m["kind"] == kind and same and fits:
            found.append(store)
    return found


def run_diagnosis(
    classifier: Classifier,
    images: Images,
    settings: Settings,
    *,
    out: str,
    runs: str,
    surrogates: list[Classifier] | None = None,
    stores: list[RunStore] | None = None,
) -> RunStore:
    """Diagnose with everything that lies in a folder of runs, and show progress."""
    from robeval.diagnose.run import diagnose

    if stores is None:
        stores = runs_about(runs, classifier, images, settings.norm, "attack")
    proofs = runs_about(runs, classifier, images, settings.norm, "certify")
    with progress("diagnose") as on_progress:
        return diagnose(
            classifier, images, settings, root=out, stores=stores, surrogates=surrogates or [], certificates=proofs,
            argv=sys.argv[1:], on_progress=on_progress,
        )  # fmt: skip


def beside(folder: str, diagnosis: RunStore) -> list[RunStore]:
    """The diagnosis and the run of what it broke."""
    from robeval.store.find import runs

    run = diagnosis.manifest()["run"]
    mine = [s for s in runs(folder) if s.manifest()["settings"].get("counterexamples_of") == run]
    return [diagnosis, *mine]


def after_attack(
    store: RunStore, classifier: Classifier, images: Images, attacked: AttackSettings, out: str
) -> list[RunStore]:
    """The quick diagnosis at the end of an attack run, at its largest radius."""
    from robeval.diagnose.run import Settings

    settings = Settings(
        attacked.norm, max(attacked.radii), seed=attacked.seed, batch_size=attacked.batch_size,
        randomised=attacked.randomised,
    )  # fmt: skip
    diagnosis = run_diagnosis(classifier, images, settings, out=out, runs=out, stores=[store])
    warn([diagnosis])
    return beside(out, diagnosis)


def insist_on_contract(classifier: Classifier, images: Images, settings: AttackSettings) -> None:
    """Stop before anything is spent on attacks whose number could not be quoted.

    Raises:
        ContractBroken: a test of the model's contract fails (C22).
    """
    from robeval.diagnose.run import contract
    from robeval.diagnose.subject import Subject

    subject = Subject(
        classifier, images, settings.norm, max(settings.radii), settings.seed, randomised=settings.randomised,
        batch_size=settings.batch_size,
    )  # fmt: skip
    failed = contract(subject)
    if failed:
        raise ContractBroken(
            "; ".join(f"{key} {one.why}" for key, one in failed),
            code="C22",
            where=classifier.name,
            why="a robust accuracy of this model could not be quoted, so no attack was run",
            do="; ".join(one.what_to_do for _, one in failed) + "; --no-diagnose attacks all the same",
        )


def tell(diagnosis: RunStore, runs: list[Diagnosed], headlines: list[str]) -> dict[str, Any]:
    """The diagnosis on the screen, and as a document for machines."""
    from robeval.reports.verdict import document, lines, ordered, verdict_of

    rows, level = ordered(diagnosis), str(diagnosis.manifest()["settings"]["level"])
    lost = max((d.facts.not_evaluated(eps) for d in runs for eps in d.facts.radii), default=0)
    end = verdict_of(diagnosis, lost)
    text = [*headlines, "", *lines(rows, level, end, int(diagnosis.manifest()["data"]["images"]))]
    return {"lines": text} | document(rows, level, end, headlines) | {"folder": str(diagnosis.folder)}


def headlines_of(runs: list[Diagnosed]) -> list[str]:
    """One line per run and radius."""
    return [d.headline(eps) for d in runs for eps in d.facts.radii]


def say_remedies(diagnosis: RunStore) -> list[str]:
    """What the remedies did, a line each."""
    import json

    path = diagnosis.folder / "evidence" / "remedies.json"
    if not path.is_file():
        return []
    said = []
    for one in json.loads(path.read_text(encoding="utf-8")):
        why = f"; {one['why']}" if one["why"] else ""
        said.append(
            f" {one['remedy']} for {', '.join(one['tests'])}: {', '.join(one['attacks'])} on {one['attacked']} images, "
            f"broke {one['broken']}{why}"
        )
    return said or [" no remedy was called for"]


def warn(stores: list[RunStore]) -> None:
    """Parts that were set aside."""
    for store in stores:
        for warning in store.warnings:
            note(warning)
