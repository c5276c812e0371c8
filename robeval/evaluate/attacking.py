"""Attack a classifier image by image and write a record as each image is decided."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from robeval.core.ball import ABS, REL, Ball
from robeval.core.catalogue import Spec
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.records import CERTIFIED, CLEAN
from robeval.data.subset import shard as shard_of
from robeval.engine.backend import Backend
from robeval.engine.run import run
from robeval.evaluate.recording import Recorder
from robeval.evaluate.references import insist, run_reference
from robeval.evaluate.settings import Settings, manifest_of, plan, searches_nearest
from robeval.store.runstore import RunStore
from robeval.store.session import session

OnProgress = Callable[[int, int, str], None]


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
    if not settings.radii and not all(searches_nearest(s) for s in settings.specs):
        fixed = next(s.label for s in settings.specs if not searches_nearest(s))
        raise UsageError(f"{fixed} needs a radius", code="A02", do="give one, such as --eps 8/255")
    settings = settings.for_classes(classifier.classes)
    insist(settings.specs)
    started = time.monotonic()
    backend = Backend(classifier, settings.batch_size, precision=settings.precision)
    manifest = manifest_of(classifier, images, settings, argv or [])
    mine = images
    if settings.shard:
        part, parts = (int(p) for p in settings.shard.split("/"))
        mine = shard_of(images, part, parts)
    mine = mine.to(classifier.device)
    z = clean_pass(backend, mine)
    store = RunStore.create_or_open(root, manifest, settings.shard.replace("/", "of"))
    recorder = Recorder(store, mine, settings.norm, settings.seed, z)
    with session(store, argv, started) as notes:
        try:
            _Evaluation(mine, settings, backend, recorder, on_progress).run()
        finally:
            recorder.flush()
            counts = backend.counts
            notes |= {
                "forwards": counts.forwards,
                "backwards": counts.backwards,
                "calls": counts.calls,
                "fill": round(counts.fill, 4),
                "batch_size": backend.capacity,
                "device": str(classifier.device),
                "threads": torch.get_num_threads(),
            }
    return store


class _Evaluation:
    """One invocation over one shard: what is known, what is left, and the records of what is decided."""

    def __init__(
        self,
        images: Images,
        settings: Settings,
        backend: Backend,
        recorder: Recorder,
        on_progress: OnProgress | None,
    ):
        self.images, self.settings, self.backend = images, settings, backend
        self.recorder, self.on_progress = recorder, on_progress
        frame = recorder.store.frame()
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
                self.recorder.clean(position)
            for eps in self.settings.radii:
                if self.settings.certified.covers(index, eps) and (index, CERTIFIED, eps) not in self.known:
                    self.recorder.certified(position, eps)
        self.recorder.flush()

    def _attack(self, spec: Spec, eps: float) -> None:
        radius = math.inf if searches_nearest(spec) else eps
        limit = eps * (1 + REL) + ABS
        rows = [
            position
            for position, index in enumerate(self.images.ids.tolist())
            if self.recorder.correct[position]
            and (index, spec.label, radius) not in self.known
            and not self.settings.certified.covers(index, eps)
            and (self.settings.each or not self.settings.radii or self.distance.get(index, math.inf) > limit)
        ]
        if not rows:
            return
        chosen = torch.tensor(rows, device=self.images.x.device)
        images = self.images[chosen]
        goal, ball = Untargeted(images.y), Ball(self.settings.norm, radius)
        how: dict[str, Any] = {"seed": self.settings.seed, "on_batch": self.on_progress}
        clean = self.recorder.logits[chosen]
        if spec.method.kind == "references":
            outcomes = run_reference(spec, images, goal, ball, self.backend, **how)
        else:
            outcomes = run(plan(spec), images, goal, ball, self.backend, clean=clean, **how)
        for outcome in outcomes:
            position = rows[outcome.position]
            self.recorder.attacked(spec, radius, position, outcome)
            index = int(self.images.ids[position])
            self.known.add((index, spec.label, radius))
            if outcome.success:
                self._found(index, outcome.distances[self.settings.norm])
        self.recorder.flush()
