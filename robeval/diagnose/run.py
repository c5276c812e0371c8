"""Run the diagnostics of a level on one model, a row as each ends, and keep what they break."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import robeval
from robeval.core import catalogue
from robeval.core.catalogue import Spec
from robeval.core.choosing import facts
from robeval.core.classifier import Classifier
from robeval.core.errors import RobevalError, unknown
from robeval.core.images import Images
from robeval.core.records import CLEAN, COUNTEREXAMPLES, DOES_NOT_APPLY, FAILED, Diagnosis
from robeval.diagnose.finding import Finding, not_run
from robeval.diagnose.remedies import applied, called_for
from robeval.diagnose.subject import Subject
from robeval.evaluate.recording import Recorder
from robeval.store.files import cannot_write, make_folder, write_whole
from robeval.store.manifest import folder_name, new_manifest
from robeval.store.runstore import RunStore
from robeval.store.session import session

OnProgress = Callable[[int, int, str], None]
REMEDIES = "evidence/remedies.json"
LEVELS = ("quick", "standard", "full")
#: A set of images without a single member, which is how a test learns that no image is classified correctly.
NO_IMAGE = "D13"
#: Group of the tests without which no number may be quoted.
CONTRACT = 1


@dataclass
class Settings:
    """What to test.

    Args:
        norm: Norm of the threat model.
        eps: Radius in pixel units.
        level: ``quick``, ``standard`` or ``full``; each holds the tests of those before it.
        groups: Only tests of these groups, all when empty.
        seed: Seed of every random stream.
        batch_size: Most images in one model call.
        randomised: The model answers at random.
        remedy: Attack again, with what mends it, where a test found an attack that cannot work.
    """

    norm: str
    eps: float
    level: str = "quick"
    groups: tuple[int, ...] = ()
    seed: int = 0
    batch_size: int = 256
    randomised: bool = False
    remedy: bool = False


def diagnostics(groups: Sequence[int] = ()) -> list[Spec]:
    """All diagnostics in the order of the report: by group, then by number."""
    specs = [catalogue.parse("diagnostics", name) for name in catalogue.methods("diagnostics")]
    chosen = [s for s in specs if not groups or s.method.facts["group"] in groups]
    return sorted(chosen, key=lambda s: place(s.method.facts))


def place(about: Mapping[str, Any]) -> tuple[int, str, int]:
    """Where a test stands in the report: by group, letter and number."""
    return about["group"], about["id"][0], int(about["id"][1:])


def manifest_of(
    classifier: Classifier,
    images: Images,
    settings: Settings,
    stores: Sequence[RunStore],
    surrogates: Sequence[Classifier],
    argv: list[str],
) -> dict[str, Any]:
    """The manifest of a diagnosis; its identity decides whether a command resumes it."""
    how: dict[str, Any] = {
        "level": settings.level,
        "runs": sorted(s.folder.name for s in stores),
        "sources": [s.fingerprint for s in surrogates],
    }
    if settings.randomised:
        how["randomised"] = True
    return new_manifest(
        "diagnose",
        model=classifier.facts(),
        data=images.facts(),
        threat={"norm": settings.norm, "eps": [settings.eps]},
        methods=[
            facts(s) | {"id": s.method.facts["id"], "group": s.method.facts["group"]}
            for s in diagnostics(settings.groups)
        ],
        seed=settings.seed,
        settings=how,
        argv=argv,
    )


def diagnose(
    classifier: Classifier,
    images: Images,
    settings: Settings,
    *,
    root: str,
    stores: Sequence[RunStore] = (),
    surrogates: Sequence[Classifier] = (),
    certificates: Sequence[RunStore] = (),
    argv: list[str] | None = None,
    on_progress: OnProgress | None = None,
) -> RunStore:
    """Run the tests that are not done yet, and return the store of their rows.

    A test that fails to run is a row that says so. Images that the tests break, and that no stored attack had broken,
    become records of an attack run beside this one, so that they count in every table.

    Args:
        classifier: Pixels in [0, 1] to logits.
        images: The chosen images.
        settings: What to test.
        root: Folder of runs.
        stores: Attack runs on the same model, images and norm.
        surrogates: Models to craft transferred images on.
        certificates: Runs of bounds on the same model and images.
        argv: The command, for the manifest.
        on_progress: Told (done, total, text).

    Raises:
        UsageError: no such level, or another run in this folder.
        MachineError: disk.
    """
    if settings.level not in LEVELS:
        raise unknown("level", settings.level, LEVELS)
    started = time.monotonic()
    manifest = manifest_of(classifier, images, settings, stores, surrogates, argv or [])
    subject = Subject(
        classifier, images, settings.norm, settings.eps, settings.seed, settings.level, stores, surrogates,
        settings.randomised, settings.batch_size, certificates,
    )  # fmt: skip
    with ExitStack() as stack:
        store = RunStore.create_or_open(root, manifest)
        notes = stack.enter_context(session(store, argv, started))
        broken = _Counterexamples(subject, manifest, root, argv, stack)
        frame = store.frame()
        done, chosen = set(frame["id"]), diagnostics(settings.groups)
        for number, spec in enumerate(chosen):
            if spec.method.facts["id"] not in done:
                if on_progress:
                    on_progress(number, len(chosen), f"{spec.method.facts['id']} {spec.method.name}")
                _one(spec, subject, store, broken)
        if settings.remedy and not (store.folder / REMEDIES).exists():
            results = {str(row.id): str(row.result) for row in store.frame().itertuples()}
            said = []
            for remedy in called_for(results):
                said.append(applied(remedy, subject))
                broken.write(chosen[0], f"remedy:{remedy.name}")
            _save(store, REMEDIES, json.dumps(said))
        notes |= {"forwards": subject.passes.forwards, "backwards": subject.passes.backwards}
    return store


def contract(subject: Subject) -> list[tuple[str, Finding]]:
    """The tests of the model's contract that fail, for a look before anything is spent on attacks."""
    found = [(str(s.method.facts["id"]), _finding(s, subject)) for s in diagnostics((CONTRACT,))]
    return [(key, one) for key, one in found if one.result == FAILED]


def _one(spec: Spec, subject: Subject, store: RunStore, broken: _Counterexamples) -> None:
    """Run one test and write down what it says: its evidence first, the row last."""
    about, before, started = spec.method.facts, replace(subject.passes), time.monotonic()
    subject.ran.clear()
    found = _finding(spec, subject)
    count = broken.write(spec)
    file, key = "", about["id"]
    if found.flagged:
        file = f"evidence/{key}-images.txt"
        _save(store, file, "\n".join(str(int(index)) for index in found.flagged) + "\n")
    if found.data is not None:
        _save(store, f"evidence/{key}.json", json.dumps(found.data))
    low, high = found.interval or (math.nan, math.nan)
    row = Diagnosis(
        id=key,
        test=spec.method.name,
        question=about["question"],
        result=found.result,
        measured=found.measured,
        limit=found.limit,
        n_images=found.n_images,
        n_flagged=len(found.flagged),
        interval95_low=float(low),
        interval95_high=float(high),
        image_ids_file=file,
        attack="; ".join(subject.ran),
        norm=subject.norm,
        eps=subject.eps,
        seed=subject.seed,
        counterexamples=count,
        forwards=subject.passes.forwards - before.forwards,
        backwards=subject.passes.backwards - before.backwards,
        seconds=round(time.monotonic() - started, 3),
        why=found.why,
        what_to_do=found.what_to_do,
        reference=about["source"],
        group=about["group"],
        tool_version=robeval.__version__,
    )
    store.append([row])


def _save(store: RunStore, name: str, text: str) -> None:
    path = store.folder / name
    try:
        make_folder(path.parent)
        write_whole(path, text.encode())
    except OSError as error:
        raise cannot_write(error, path) from None


def _finding(spec: Spec, subject: Subject) -> Finding:
    """What a test says; one that cannot run says why, and never ends the others."""
    level = spec.method.facts["level"]
    if LEVELS.index(level) > LEVELS.index(subject.level):
        return not_run(f"level {level}")
    try:
        found: Finding = spec.method.load()(subject, **spec.settings)
        return found
    except RobevalError as error:
        if error.code == NO_IMAGE:
            return not_run("no image is classified correctly", DOES_NOT_APPLY)
        return not_run(error.what)
    except Exception as error:  # whatever a strange model throws in the middle of a test
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        return not_run(f"the test stopped with {type(error).__name__}: {reason}")


class _Counterexamples:
    """The attack run that holds what the tests broke; it comes into being with the first such image."""

    def __init__(
        self, subject: Subject, diagnosis: dict[str, Any], root: str, argv: list[str] | None, stack: ExitStack
    ):
        self.subject, self.root, self.argv, self.stack = subject, root, argv, stack
        self.recorder: Recorder | None = None
        self.written = 0
        methods = [m | {"label": COUNTEREXAMPLES + m["id"], "search": "fixed"} for m in diagnosis["methods"]]
        self.manifest = new_manifest(
            "attack",
            model=diagnosis["model"],
            data=diagnosis["data"],
            threat=diagnosis["threat"],
            methods=methods,
            seed=diagnosis["seed"],
            settings={"each": False, "randomised": subject.randomised, "counterexamples_of": diagnosis["run"]},
            argv=diagnosis["argv"],
        )
        if (Path(root) / folder_name(self.manifest)).exists():  # an earlier command stopped half-way
            subject.stores = [*subject.stores, self._open().store]

    def _open(self) -> Recorder:
        if self.recorder is None:
            s = self.subject
            store = RunStore.create_or_open(self.root, self.manifest)
            self.stack.enter_context(session(store, self.argv, time.monotonic()))
            self.recorder = Recorder(store, s.images, s.norm, s.seed, s.clean_logits())
            seen = store.done(CLEAN, 0.0)
            for position, index in enumerate(s.images.ids.tolist()):
                if index not in seen and self.recorder.logits[position].isfinite().all():
                    self.recorder.clean(position)
            self.recorder.flush()
        return self.recorder

    def write(self, spec: Spec, name: str = "") -> int:
        """Record the images that a test, or a remedy of that name, was the first to break, and say how many."""
        found = self.subject.found[self.written :]
        self.written += len(found)
        if found:
            recorder = self._open()
            label = COUNTEREXAMPLES + (name or spec.method.facts["id"])
            for one in found:
                recorder.attacked(replace(spec, label=label), self.subject.eps, one.position, one.decided)
            recorder.flush()
        return len(found)
