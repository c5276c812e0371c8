"""Attack a classifier image by image and write a record as each image is decided."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from robeval.core.ball import ABS, REL, Ball
from robeval.core.catalogue import Spec
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, RobevalError, UsageError
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.records import CLEAN, AttackRecord
from robeval.engine.backend import Backend
from robeval.engine.judge import Outcome
from robeval.engine.run import Plan, run
from robeval.store.manifest import new_manifest
from robeval.store.runstore import RunStore

OnProgress = Callable[[int, int, str], None]
FLUSH_SECONDS = 5.0


@dataclass
class Settings:
    """What to run.

    Args:
        specs: Attacks in order.
        norm: Norm of the threat model.
        radii: Values of eps in pixel units; empty for minimal-norm attacks alone.
        seed: Seed of every image's random stream.
        each: Run every attack on every correctly classified image, instead of only on those still standing.
        batch_size: Most images in one model call; never changes a result.
        shard: ``i/n``, or empty for all images.
    """

    specs: list[Spec]
    norm: str
    radii: list[float]
    seed: int = 0
    each: bool = False
    batch_size: int = 256
    shard: str = ""


def plan(spec: Spec) -> Plan:
    """The engine's plan for a catalogued attack."""
    facts = spec.method.facts
    attempts = int(spec.settings.get(facts.get("attempts", ""), 1))
    start = partial(spec.method.load(), **spec.settings)
    return Plan(spec.method.name, start, attempts, facts.get("access") == "black-box")


def searches_nearest(spec: Spec) -> bool:
    """The attack looks for the nearest adversarial image instead of one within eps."""
    return bool(spec.method.facts.get("search") == "minimal")


def manifest_of(classifier: Classifier, images: Images, settings: Settings, argv: list[str]) -> dict[str, Any]:
    """The manifest of an attack run; its identity is what decides whether a command resumes it."""
    methods = [
        {
            "label": s.label,
            "name": s.method.name,
            "settings": s.settings,
            "hash": s.config_hash,
            "source": s.method.facts["source"],
            "search": "minimal" if searches_nearest(s) else "fixed",
        }
        for s in settings.specs
    ]
    return new_manifest(
        "attack",
        model=classifier.facts(),
        data=images.facts(),
        threat={"norm": settings.norm, "eps": settings.radii, "tolerance": f"eps * (1 + {REL:g}) + {ABS:g}, float64"},
        methods=methods,
        seed=settings.seed,
        settings={"each": settings.each},
        argv=argv,
    )


@dataclass
class _Writer:
    """Turns outcomes into records and puts them on disk every few seconds."""

    store: RunStore
    records: list[AttackRecord] = field(default_factory=list)
    examples: list[np.ndarray] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def add(self, record: AttackRecord, example: torch.Tensor | None = None) -> None:
        self.records.append(record)
        if example is not None:
            self.examples.append(example.detach().cpu().float().numpy())
        if time.monotonic() - self.since > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.records:
            self.store.append(self.records, np.stack(self.examples) if self.examples else None)
        self.records, self.examples, self.since = [], [], time.monotonic()


def clean_pass(backend: Backend, images: Images) -> torch.Tensor:
    """Logits of all images. (N, C, H, W) -> (N, K).

    Raises:
        ContractBroken: NaN or Inf logits on a clean image.
    """
    z = backend.logits(images.x, Untargeted(images.y))
    bad = ~z.isfinite().all(1)
    if bad.any():
        ids = ", ".join(str(i) for i in images.ids[bad][:5].tolist())
        raise ContractBroken(
            f"NaN or Inf logits on {int(bad.sum())} clean images", code="C07", where=f"image ids {ids}"
        )
    return z


def attack_run(
    classifier: Classifier,
    images: Images,
    settings: Settings,
    *,
    root: str,
    argv: list[str] | None = None,
    on_progress: OnProgress | None = None,
) -> RunStore:
    """Run the attacks, resume where an earlier run of the same identity stopped, and return the store.

    Args:
        classifier: Pixels in [0, 1] to logits.
        images: The chosen images; a shard takes its part of them.
        settings: What to run.
        root: Folder of runs.
        argv: The command, for the manifest.
        on_progress: Told (decided, total, text).

    Raises:
        UsageError: no eps for a fixed-eps attack.
        ContractBroken: NaN logits on clean images, a model that fails.
        MachineError: disk or memory.
    """
    from robeval.data.subset import shard as shard_of

    if not settings.radii and not all(searches_nearest(s) for s in settings.specs):
        fixed = next(s.label for s in settings.specs if not searches_nearest(s))
        raise UsageError(f"{fixed} needs a radius", code="A02", do="give one, such as --eps 8/255")
    started = time.monotonic()
    backend = Backend(classifier, settings.batch_size)
    manifest = manifest_of(classifier, images, settings, argv or [])
    mine = images
    if settings.shard:
        part, parts = (int(p) for p in settings.shard.split("/"))
        mine = shard_of(images, part, parts)
    mine = mine.to(classifier.device)
    z = clean_pass(backend, mine)
    store = RunStore.create_or_open(root, manifest, settings.shard.replace("/", "of"))
    writer = _Writer(store)
    session: dict[str, Any] = {"argv": argv or [], "exit_code": 0}
    try:
        _Evaluation(classifier, mine, z, settings, backend, store, writer, on_progress).run()
    except RobevalError as error:
        session["exit_code"] = error.exit_code
        raise
    except BaseException:
        session["exit_code"] = 130
        raise
    finally:
        writer.flush()
        counts = backend.counts
        session |= {
            "seconds": round(time.monotonic() - started, 3),
            "forwards": counts.forwards,
            "backwards": counts.backwards,
            "calls": counts.calls,
            "fill": round(counts.fill, 4),
            "batch_size": backend.capacity,
            "device": str(classifier.device),
            "threads": torch.get_num_threads(),
        }
        store.close(session)
    return store


class _Evaluation:
    """One invocation over one shard: what is known, what is left, and the records of what is decided."""

    def __init__(
        self,
        classifier: Classifier,
        images: Images,
        z: torch.Tensor,
        settings: Settings,
        backend: Backend,
        store: RunStore,
        writer: _Writer,
        on_progress: OnProgress | None,
    ):
        self.images, self.settings, self.backend = images, settings, backend
        self.writer, self.on_progress = writer, on_progress
        self.prediction = z.argmax(1)
        self.margin = Untargeted(images.y).margin(z)
        self.correct = self.prediction == images.y
        frame = store.frame()
        self.known = set(zip(frame["index"], frame["attack"], frame["eps"], strict=True)) if len(frame) else set()
        self.distance: dict[int, float] = {}
        column = f"distance_{settings.norm}"
        if len(frame):
            hits = frame[frame["success"] & (frame["attack"] != CLEAN)]
            for index, distance in zip(hits["index"], hits[column], strict=True):
                self._found(int(index), float(distance))

    def _found(self, index: int, distance: float) -> None:
        self.distance[index] = min(distance, self.distance.get(index, math.inf))

    def run(self) -> None:
        self._clean()
        for eps in self.settings.radii or [math.inf]:
            for spec in self.settings.specs:
                self._attack(spec, eps)

    def _clean(self) -> None:
        for position, index in enumerate(self.images.ids.tolist()):
            if (index, CLEAN, 0.0) not in self.known:
                self.writer.add(self._clean_record(position))
        self.writer.flush()

    def _attack(self, spec: Spec, eps: float) -> None:
        radius = math.inf if searches_nearest(spec) else eps
        limit = eps * (1 + REL) + ABS
        rows = [
            position
            for position, index in enumerate(self.images.ids.tolist())
            if self.correct[position]
            and (index, spec.label, radius) not in self.known
            and (self.settings.each or self.distance.get(index, math.inf) > limit)
        ]
        if not rows:
            return
        chosen = torch.tensor(rows, device=self.images.x.device)
        images = self.images[chosen]
        outcomes = run(
            plan(spec),
            images,
            Untargeted(images.y),
            Ball(self.settings.norm, radius),
            self.backend,
            seed=self.settings.seed,
            on_batch=self.on_progress,
        )
        for outcome in outcomes:
            position = rows[outcome.position]
            self.writer.add(self._record(spec, radius, position, outcome), outcome.example)
            index = int(self.images.ids[position])
            self.known.add((index, spec.label, radius))
            if outcome.success:
                self._found(index, outcome.distances[self.settings.norm])
        self.writer.flush()

    def _record(self, spec: Spec, radius: float, position: int, outcome: Outcome) -> AttackRecord:
        return AttackRecord(
            index=int(self.images.ids[position]),
            label=int(self.images.y[position]),
            clean_prediction=int(self.prediction[position]),
            clean_correct=True,
            attack=spec.label,
            norm=self.settings.norm,
            eps=radius,
            success=outcome.success,
            prediction=outcome.prediction,
            **{f"distance_{norm}": distance for norm, distance in outcome.distances.items()},
            margin=outcome.margin,
            attempt=outcome.attempt,
            iterations=outcome.iterations,
            forwards=outcome.forwards,
            backwards=outcome.backwards,
            first_success_forward=outcome.first_success_forward,
            survives_8bit=outcome.survives_8bit,
            seed=self.settings.seed,
            attack_config_hash=spec.config_hash,
            error=outcome.error,
            example=len(self.writer.examples) if outcome.example is not None else -1,
        )

    def _clean_record(self, position: int) -> AttackRecord:
        correct = bool(self.correct[position])
        distance = math.inf if correct else 0.0
        return AttackRecord(
            index=int(self.images.ids[position]),
            label=int(self.images.y[position]),
            clean_prediction=int(self.prediction[position]),
            clean_correct=correct,
            attack=CLEAN,
            norm=self.settings.norm,
            eps=0.0,
            success=not correct,
            prediction=int(self.prediction[position]),
            distance_linf=distance,
            distance_l2=distance,
            distance_l1=distance,
            distance_l0=distance,
            margin=float(self.margin[position]),
            attempt=-1,
            iterations=0,
            forwards=1,
            backwards=0,
            first_success_forward=-1 if correct else 1,
            survives_8bit=False,
            seed=self.settings.seed,
            attack_config_hash="",
        )
