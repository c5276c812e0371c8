"""Transfer: images crafted on one model, at full length and unseen by the target, are judged on another."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from robeval.core.ball import Ball, vector_norm
from robeval.core.catalogue import Spec
from robeval.core.choosing import insist_on_norm
from robeval.core.classifier import Classifier
from robeval.core.errors import UsageError
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.questions import Question
from robeval.core.records import CLEAN
from robeval.core.streams import Streams
from robeval.engine.backend import Backend
from robeval.engine.judge import Outcome
from robeval.engine.verdict import Verdicts, judge_points
from robeval.evaluate.attacking import OnProgress, clean_pass
from robeval.evaluate.recording import Recorder
from robeval.evaluate.settings import Settings, manifest_of, plan, searches_nearest
from robeval.store.manifest import run_id
from robeval.store.runstore import RunStore
from robeval.store.session import session


def insist_on_transferable(specs: Sequence[Spec]) -> None:
    """Only an attack that climbs the source's gradient within a given radius leaves a point worth carrying over.

    Raises:
        UsageError: a black-box attack, a search for the nearest point, or another package's attack (A06).
    """
    for spec in specs:
        why = ""
        if spec.method.kind != "attacks":
            why = "another package runs it as a whole"
        elif spec.method.facts.get("access") == "black-box":
            why = "it follows no gradient of the source"
        elif searches_nearest(spec):
            why = "it stops at the source's own boundary"
        if why:
            raise UsageError(
                f"{spec.label} has no transfer form: {why}",
                code="A06",
                do="choose a gradient attack with a fixed eps, such as pgd20",
            )


def craft(spec: Spec, images: Images, ball: Ball, backend: Backend, *, seed: int) -> Tensor:
    """The last point of every attempt, unjudged: the attack runs to its own end whatever the source says.

    Shapes:
        (n, C, H, W) images to (n, attempts, C, H, W).
    Cost:
        The attack's full length per attempt and image, early successes included.
    """
    how = plan(spec)
    rows = torch.arange(len(images), device=images.x.device).repeat_interleave(how.attempts)
    x0, goal = images.x[rows], Untargeted(images.y[rows])
    tries = list(range(how.attempts)) * len(images)
    rng = Streams(seed, images.ids[rows].tolist(), how.name, tries, dtype=x0.dtype, device=x0.device)
    attack = how.start(x0, goal, ball, rng)
    asked: Question | None = None
    try:
        asked = next(attack)
        while True:
            asked = attack.send(backend.evaluate(asked, goal))
    except StopIteration as end:
        last = end.value if end.value is not None or asked is None else asked.points
    if last is None or last.shape != x0.shape:
        raise UsageError(f"{spec.label} has no transfer form: it ends without one last image per row", code="A06")
    return last.detach().view(len(images), how.attempts, *x0.shape[1:])


def transfer_run(
    target: Classifier,
    sources: Sequence[Classifier],
    images: Images,
    specs: list[Spec],
    norm: str,
    radii: list[float],
    seed: int = 0,
    batch_size: int = 256,
    root: str = "runs",
    argv: list[str] | None = None,
    on_progress: OnProgress | None = None,
) -> RunStore:
    """Judge one target on images crafted on other models; see :func:`transfer_runs`."""
    settings = Settings(specs, norm, radii, seed=seed, batch_size=batch_size)
    return transfer_runs([target], sources, images, settings, root=root, argv=argv, on_progress=on_progress)[0]


def transfer_runs(
    targets: Sequence[Classifier],
    sources: Sequence[Classifier],
    images: Images,
    settings: Settings,
    *,
    root: str,
    argv: list[str] | None = None,
    on_progress: OnProgress | None = None,
) -> list[RunStore]:
    """Craft once per source, judge on every target, and return one attack run per target.

    Each run holds one record per correctly classified image, source, attack and radius, under the label
    ``transfer:SOURCE/ATTACK``. The same call resumes: an image is crafted again only for targets that lack its record.

    Args:
        targets: The models that are judged.
        sources: The models that the images are crafted on; a target among them gives the white-box case.
        images: The chosen images.
        settings: Attacks, norm, radii, seed and batch size; every attack sees every image.
        root: Folder of runs.
        argv: The command, for the manifests.
        on_progress: Told (done, total, text).

    Raises:
        UsageError: an attack that cannot transfer (A06), no radius (A02), two models of one name (T02).
        ContractBroken, MachineError: as in an attack run.
    """
    insist_on_transferable(settings.specs)
    insist_on_norm(settings.specs, settings.norm)
    if not settings.radii:
        raise UsageError(f"{settings.specs[0].label} needs a radius", code="A02", do="give one, such as --eps 8/255")
    _insist_on_names(targets, sources)
    settings = settings.for_classes(targets[0].classes)
    started, done = time.monotonic(), 0
    total = len(sources) * len(settings.radii) * len(settings.specs) * len(images)
    with ExitStack() as stack:
        judging = [stack.enter_context(_judging(t, sources, images, settings, root, argv, started)) for t in targets]
        for source in sources:
            backend = Backend(source, settings.batch_size, precision=settings.precision)
            here = images.to(source.device)
            for eps in settings.radii:
                for spec in settings.specs:
                    for now in _transfer(_named(spec, source), eps, here, backend, judging, settings):
                        if on_progress:
                            counts = backend.counts
                            text = f"{source.name} {spec.label}  {counts.forwards + counts.backwards:,} passes"
                            on_progress(done + now, total, text)
                    done += len(images)
    return [target.recorder.store for target in judging]


def _named(spec: Spec, source: Classifier) -> Spec:
    return replace(spec, label=f"transfer:{source.name}/{spec.label}")


def _insist_on_names(targets: Sequence[Classifier], sources: Sequence[Classifier]) -> None:
    """A name in a label must mean one model."""
    weights = dict.fromkeys((m.name, m.fingerprint) for m in (*targets, *sources))
    for names in ([m.name for m in targets], [m.name for m in sources], [name for name, _ in weights]):
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f'two models are called "{name}"', code="T02", do="rename one file")


@dataclass
class _Target:
    """One target: what its run still lacks, and the verdict on what the sources crafted."""

    images: Images
    backend: Backend
    recorder: Recorder
    crafting: dict[str, int] = field(default_factory=lambda: {"source_forwards": 0, "source_backwards": 0})

    def lacks(self, label: str, eps: float) -> set[int]:
        """Positions of correctly classified images without a record."""
        known = self.recorder.store.done(label, eps)
        correct = self.recorder.correct.tolist()
        return {p for p, index in enumerate(self.images.ids.tolist()) if correct[p] and index not in known}

    def judge(self, spec: Spec, ball: Ball, rows: list[int], points: Tensor) -> None:
        """Record the verdict on each image: the first attempt that stands decides.

        Shapes:
            points (n, attempts, C, H, W).
        Cost:
            2 forward passes per attempt and image.
        """
        attempts = points.shape[1]
        points = points.to(self.images.x.device)
        clean = self.images[torch.tensor(rows, device=points.device).repeat_interleave(attempts)]
        verdicts = judge_points(self.backend, clean.x, points.flatten(0, 1), Untargeted(clean.y), ball)
        for k, row in enumerate(rows):
            self.recorder.attacked(spec, ball.eps, row, self._outcome(row, points[k], verdicts, k * attempts))

    def _outcome(self, row: int, points: Tensor, verdicts: Verdicts, start: int) -> Outcome:
        attempts = len(points)
        mine = slice(start, start + attempts)
        hits, evaluable = verdicts.adversarial[mine], verdicts.evaluable[mine]
        success, first = bool(hits.any()), int(hits.int().argmax())
        at = start + first
        distances = dict.fromkeys(("linf", "l2", "l1", "l0"), math.inf)
        error = ""
        if success:
            change = (points[first].double() - self.images.x[row].double())[None]
            distances = {norm: float(vector_norm(change, norm)) for norm in distances}
        elif not points.isfinite().all():
            error = "the source gave no finite image"
        elif not evaluable.all():
            error = "the model gave NaN or Inf logits under attack"
        least = verdicts.margin[mine].double().masked_fill(~evaluable, math.inf).amin()
        return Outcome(
            row,
            success=success,
            prediction=int(verdicts.prediction[at] if success else self.images.y[row]),
            margin=float(verdicts.margin[at] if success else least),
            attempt=first if success else -1,
            iterations=attempts,
            forwards=2 * attempts,
            backwards=0,
            first_success_forward=2 * first + 1 if success else -1,
            survives_8bit=success and bool(verdicts.survives_8bit[at]),
            distances=distances,
            example=points[first] if success else None,
            error=error,
        )


@contextmanager
def _judging(
    target: Classifier,
    sources: Sequence[Classifier],
    images: Images,
    settings: Settings,
    root: str,
    argv: list[str] | None,
    started: float,
) -> Iterator[_Target]:
    """A target with its run open and its clean pass recorded; closed with notes however the block ends."""
    backend, mine = Backend(target, settings.batch_size), images.to(target.device)
    logits = clean_pass(backend, mine)
    store = RunStore.create_or_open(root, _manifest(target, sources, images, settings, argv or []))
    with session(store, argv, started) as notes:
        one = _Target(mine, backend, Recorder(store, mine, settings.norm, settings.seed, logits))
        try:
            seen = store.done(CLEAN, 0.0)
            for position, index in enumerate(mine.ids.tolist()):
                if index not in seen:
                    one.recorder.clean(position)
            yield one
        finally:
            one.recorder.flush()
            notes |= {
                "forwards": backend.counts.forwards,
                "backwards": backend.counts.backwards,
                "calls": backend.counts.calls,
                "fill": round(backend.counts.fill, 4),
                "batch_size": backend.capacity,
                "device": str(target.device),
                "threads": torch.get_num_threads(),
            } | one.crafting


def _manifest(
    target: Classifier, sources: Sequence[Classifier], images: Images, settings: Settings, argv: list[str]
) -> dict[str, Any]:
    """An attack run's manifest in which every method names the model that it was crafted on."""
    pairs = [(source, _named(spec, source)) for source in sources for spec in settings.specs]
    manifest = manifest_of(target, images, replace(settings, specs=[s for _, s in pairs], each=True), argv)
    for method, (source, _) in zip(manifest["methods"], pairs, strict=True):
        method["crafted_on"] = {"name": source.name, "fingerprint": source.fingerprint}
    return manifest | {"run": run_id(manifest)}


def _transfer(
    spec: Spec, eps: float, images: Images, backend: Backend, targets: Sequence[_Target], settings: Settings
) -> Iterator[int]:
    """One attack of one source at one radius, chunk by chunk: crafted once, judged by every target that lacks it."""
    lacking = [target.lacks(spec.label, eps) for target in targets]
    rows = sorted(set().union(*lacking))
    width = max(1, settings.batch_size // plan(spec).attempts)
    for start in range(0, len(rows), width):
        chunk = rows[start : start + width]
        chosen = images[torch.tensor(chunk, device=images.x.device)]
        before = (backend.counts.forwards, backend.counts.backwards)
        points = craft(spec, chosen, Ball(settings.norm, eps), backend, seed=settings.seed)
        spent = (backend.counts.forwards - before[0], backend.counts.backwards - before[1])
        for target, lacks in zip(targets, lacking, strict=True):
            mine = [k for k, row in enumerate(chunk) if row in lacks]
            if mine:
                target.judge(spec, Ball(settings.norm, eps), [chunk[k] for k in mine], points[mine])
                for name, passes in zip(target.crafting, spent, strict=True):
                    target.crafting[name] += passes * len(mine) // len(chunk)  # every image cost the same
        yield min(start + width, len(rows))
