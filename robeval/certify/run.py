"""Bound a classifier image by image and write a certificate row as each bound is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from robeval.core.catalogue import Spec
from robeval.core.choosing import facts, insist_on_norm
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, MachineError
from robeval.core.images import Images
from robeval.core.records import Certificate
from robeval.core.streams import Streams
from robeval.models.activations import nonsmooth_layers
from robeval.store.manifest import folder_name, new_manifest
from robeval.store.runstore import RunStore
from robeval.store.session import session

if TYPE_CHECKING:
    from robeval.bounds.expansion import Reading

OnProgress = Callable[[int, int, str], None]


@dataclass
class Settings:
    """What to compute.

    Args:
        specs: Bounds in order.
        norm: Norm of the radii.
        seed: Seed of every image's random stream.
        batch_size: Most images in one model call.
    """

    specs: list[Spec]
    norm: str
    seed: int = 0
    batch_size: int = 256


def refuse_nonsmooth(classifier: Classifier, specs: list[Spec]) -> None:
    """Refuse bounds that need second derivatives of a network that has none, before anything is computed.

    Raises:
        ContractBroken: with the layers' paths and the way out.
    """
    if not isinstance(classifier.module, nn.Module):
        return
    layers = nonsmooth_layers(classifier.module)
    for s in specs:
        if s.method.facts.get("smooth") and layers:
            more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
            raise ContractBroken(
                f"{s.method.name} needs a twice differentiable network; not smooth: {', '.join(layers[:3])}{more}",
                code="B01",
                where=classifier.name,
                why="the Hessian of a piecewise linear function is 0 almost everywhere and ignores its kinks",
                do="robeval train ... --model-arg act=smooth, or --bound l-bound",
            )


def manifest_of(classifier: Classifier, images: Images, settings: Settings, argv: list[str]) -> dict[str, Any]:
    """The manifest of a certify run; its identity decides whether a command resumes it."""
    methods = [
        facts(s) | {"kind": s.method.facts["kind"], "order": s.method.facts.get("order")} for s in settings.specs
    ]
    return new_manifest(
        "certify",
        model=classifier.facts(),
        data=images.facts(),
        threat={"norm": settings.norm, "eps": []},
        methods=methods,
        seed=settings.seed,
        settings={},
        argv=argv,
    )


def certify(
    classifier: Classifier,
    images: Images,
    settings: Settings,
    *,
    root: str,
    argv: list[str] | None = None,
    on_progress: OnProgress | None = None,
) -> RunStore:
    """Compute the bounds, skip those that an earlier run of the same identity finished, and return the store.

    The constants of the estimates are taken over all given images, so a bound is written whole or not at all.

    Args:
        classifier: Pixels in [0, 1] to logits.
        images: The chosen images.
        settings: What to compute.
        root: Folder of runs.
        argv: The command, for the manifest.
        on_progress: Told (done, total, text).

    Raises:
        UsageError: a bound that does not exist in this norm.
        ContractBroken: a network that the bound refuses, NaN logits or gradients.
        MachineError: disk or memory.
    """
    insist_on_norm(settings.specs, settings.norm)
    refuse_nonsmooth(classifier, settings.specs)
    started = time.monotonic()
    images = images.to(classifier.device)
    manifest = manifest_of(classifier, images, settings, argv or [])
    seconds: dict[str, Any] = {}
    first: list[Certificate] = []
    if not (Path(root) / folder_name(manifest)).exists():
        # A network that is refused leaves no folder behind.
        first = _bound(settings.specs[0], classifier, images, settings, seconds, on_progress)
    store = RunStore.create_or_open(root, manifest)
    with session(store, argv, started) as notes:
        notes |= {
            "bounds": seconds,
            "batch_size": settings.batch_size,
            "device": str(classifier.device),
            "threads": torch.get_num_threads(),
        }
        store.append(first)
        for spec in settings.specs:
            if not store.done(spec.label) >= set(images.ids.tolist()):
                store.append(_bound(spec, classifier, images, settings, seconds, on_progress))
    return store


def _bound(
    spec: Spec,
    classifier: Classifier,
    images: Images,
    settings: Settings,
    seconds: dict[str, Any],
    on_progress: OnProgress | None,
) -> list[Certificate]:
    """All rows of one bound; ``seconds`` learns how long it took."""
    started = time.monotonic()

    def rng(ids: list[int], number: int) -> Streams:
        return Streams(settings.seed, ids, spec.method.name, [number] * len(ids), device=images.x.device)

    compute = partial(spec.method.load(), classifier, images, settings.norm, rng)
    size = settings.batch_size
    while True:
        try:
            readings: list[Reading] = compute(size, on_progress, **spec.settings)
            break
        except (torch.OutOfMemoryError, MemoryError):
            if size == 1:
                raise MachineError("out of memory with one image in a batch", code="E01", do="--device cpu") from None
            size //= 2  # changes no result beyond rounding
    kind = spec.method.facts["kind"]
    seconds[spec.label] = {"seconds": round(time.monotonic() - started, 3)}
    return [_certificate(r, spec, kind, settings) for r in readings]


def _certificate(r: Reading, spec: Spec, kind: str, settings: Settings) -> Certificate:
    correct = r.prediction == r.label
    return Certificate(
        index=r.index,
        label=r.label,
        prediction=r.prediction,
        clean_correct=correct,
        bound=spec.label,
        kind=kind,
        norm=settings.norm,
        eps=math.nan,
        status=kind if correct else "clean_error",
        radius=r.radius,
        margin_lower=math.nan,
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
    )
