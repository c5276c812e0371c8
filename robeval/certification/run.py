"""Bound a classifier image by image and write certificate rows as they are decided."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from robeval.bounds.graph import Graph, graph_of
from robeval.certification.chunks import OnProgress, in_chunks
from robeval.certification.proving import Prover
from robeval.certification.settings import Settings, kind_of, manifest_of, refuse
from robeval.core.catalogue import Spec
from robeval.core.classifier import Classifier
from robeval.core.errors import MachineError
from robeval.core.images import Images
from robeval.core.records import Certificate
from robeval.core.streams import Streams
from robeval.data.subset import read_shard
from robeval.data.subset import shard as shard_of
from robeval.engine.backend import out_of_memory
from robeval.store.manifest import folder_name
from robeval.store.runstore import RunStore
from robeval.store.session import session

if TYPE_CHECKING:
    from robeval.bounds.expansion import Reading

#: Images in the first chunk of a probabilistic bound, which may take 100,000 passes an image.
FIRST = 4


def certify(
    classifier: Classifier,
    images: Images,
    settings: Settings,
    *,
    root: str,
    argv: list[str] | None = None,
    on_progress: OnProgress | None = None,
) -> RunStore:
    """Compute the bounds, skip what an earlier run of the same identity finished, and return the store.

    Proofs and probabilistic bounds are decided image by image and saved chunk by chunk. The constants of the estimates
    are taken over all given images, so an estimate is written whole or not at all.

    Args:
        classifier: Pixels in [0, 1] to logits.
        images: The chosen images; a shard takes its part of them.
        settings: What to compute.
        root: Folder of runs.
        argv: The command, for the manifest.
        on_progress: Told (done, total, text).

    Raises:
        UsageError: a bound that does not exist in this norm, or options that it does not have.
        ContractBroken: a network that a bound refuses, NaN logits or gradients.
        MachineError: disk or memory.
    """
    refuse(classifier, settings)
    graph = None
    if any(kind_of(s) == "proof" for s in settings.specs):
        graph = graph_of(classifier.module, tuple(images.x.shape[1:]), classifier.name)
    started = time.monotonic()
    manifest = manifest_of(classifier, images, settings, argv or [])
    mine = shard_of(images, *read_shard(settings.shard)) if settings.shard else images
    work = _Work(classifier, mine.to(classifier.device), settings, graph, on_progress)
    # A network that is refused leaves no folder behind, so that the first rows are computed before there is one.
    first = [] if (Path(root) / folder_name(manifest)).exists() else next(work.rows, [])
    store = work.store = RunStore.create_or_open(root, manifest, settings.shard.replace("/", "of"))
    with session(store, argv, started) as notes:
        notes |= {
            "bounds": work.seconds,
            "batch_size": settings.batch_size,
            "device": str(classifier.device),
            "threads": torch.get_num_threads(),
        }
        store.append(first)
        for records in work.rows:
            store.append(records)
    return store


class _Work:
    """One invocation over one shard.

    Attributes:
        store: The run, once there is one; what it holds is not computed again.
        rows: Certificates in the portions in which they are saved.
        seconds: How long each bound took in this invocation.
    """

    def __init__(
        self,
        classifier: Classifier,
        images: Images,
        settings: Settings,
        graph: Graph | None,
        on_progress: OnProgress | None,
    ):
        self.classifier, self.images, self.settings = classifier, images, settings
        self.graph, self.on_progress = graph, on_progress
        self.store: RunStore | None = None
        self.seconds: dict[str, Any] = {}
        self.rows: Iterator[list[Certificate]] = self._rows()

    def _rows(self) -> Iterator[list[Certificate]]:
        for spec in self.settings.specs:
            left = self._left(spec)
            if not left:
                continue
            spent, started = 0.0, time.monotonic()
            for records in self._portions(spec, left):
                spent += time.monotonic() - started
                self.seconds[spec.label] = {"seconds": round(spent, 3)}
                yield records
                started = time.monotonic()

    def _left(self, spec: Spec) -> list[int]:
        """Places of the images that this bound has not decided."""
        ids = self.images.ids.tolist()
        if self.store is None:
            return list(range(len(ids)))
        radii = self.settings.eps if kind_of(spec) == "proof" and self.settings.eps else [math.nan]
        done = set.intersection(*(self.store.done(spec.label, eps) for eps in radii))
        return [place for place, index in enumerate(ids) if index not in done]

    def _portions(self, spec: Spec, left: list[int]) -> Iterator[list[Certificate]]:
        kind = kind_of(spec)
        if kind == "proof":
            assert self.graph is not None
            prover = Prover(spec, self.graph, self.classifier, self.images, self.settings)
            yield from prover.records(left, self.on_progress)
        elif kind == "probabilistic":
            compute = self._computation(spec)
            decide = lambda rows: compute(self._some(rows), self.settings.batch_size, None)
            most = self.settings.batch_size
            yield from in_chunks(left, FIRST, most, decide, label=spec.label, on_progress=self.on_progress)
        else:
            yield self._whole(spec)

    def _some(self, rows: list[int]) -> Images:
        return self.images[torch.tensor(rows, device=self.images.x.device)]

    def _computation(self, spec: Spec) -> Callable[[Images, int, OnProgress | None], list[Certificate]]:
        """The records of some images, by a bound that works on the classifier."""

        def rng(ids: list[int], number: int) -> Streams:
            device = self.images.x.device
            return Streams(self.settings.seed, ids, spec.method.name, [number] * len(ids), device=device)

        method = partial(spec.method.load(), **spec.settings)

        def compute(images: Images, size: int, on_batch: OnProgress | None) -> list[Certificate]:
            readings: list[Reading] = method(self.classifier, images, self.settings.norm, rng, size, on_batch)
            return [_certificate(r, spec, self.settings) for r in readings]

        return compute

    def _whole(self, spec: Spec) -> list[Certificate]:
        """All rows of an estimate."""
        compute, size = self._computation(spec), self.settings.batch_size
        while True:
            try:
                return compute(self.images, size, self.on_progress)
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if size == 1:
                    raise MachineError(
                        "out of memory with one image in a batch", code="E01", do="--device cpu"
                    ) from None
                size //= 2  # changes no result beyond rounding


def _certificate(r: Reading, spec: Spec, settings: Settings) -> Certificate:
    kind, correct = kind_of(spec), r.prediction == r.label
    status = "estimate" if kind == "estimate" else r.status or ("verified" if r.radius > 0 else "unknown")
    if not correct and status != "abstain":
        status = "clean_error"
    return Certificate(
        index=r.index,
        label=r.label,
        prediction=r.prediction,
        clean_correct=correct,
        bound=spec.label,
        kind=kind,
        norm=settings.norm,
        eps=math.nan,
        status=status,
        radius=r.radius,
        margin_lower=r.p_lower - 0.5,
        loss=r.loss,
        loss_value=r.loss_value,
        gradient_norm=r.gradient_norm,
        curvature=r.curvature,
        constant=r.constant,
        domain=r.domain,
        arithmetic=r.arithmetic,
        residual=r.residual,
        confidence=r.confidence,
        samples=r.samples,
        forwards=r.forwards,
        backwards=r.backwards,
        seed=settings.seed,
        bound_config_hash=spec.config_hash,
        rival=r.rival,
        curvature_least=r.curvature_least,
        reach=r.reach,
        blocks=r.blocks,
        plain=r.plain,
        p_value=r.p_value,
        p_lower=r.p_lower,
    )
