"""What a certify run is asked to do, the manifest that says so, and what is refused before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from robeval.core.catalogue import Spec
from robeval.core.choosing import facts, insist_on_norm
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.images import Images
from robeval.models.activations import nonsmooth_layers
from robeval.store.manifest import new_manifest


@dataclass
class Settings:
    """What to compute.

    Args:
        specs: Bounds in order.
        norm: Norm of the radii.
        seed: Seed of every image's random stream.
        batch_size: Most images in one model call; proofs start with fewer.
        eps: Radii at which proofs are tried, in pixel units; empty to seek the largest radius of each image.
        top_k: A proof says that the true class stays among the k best.
        shard: ``i/n``, or empty for all images. Estimates take their constant over all images and have no shards.
    """

    specs: list[Spec]
    norm: str
    seed: int = 0
    batch_size: int = 256
    eps: list[float] = field(default_factory=list)
    top_k: int = 1
    shard: str = ""


def kind_of(spec: Spec) -> str:
    """``estimate``, ``proof`` or ``probabilistic``."""
    return str(spec.method.facts["kind"])


def refuse(classifier: Classifier, settings: Settings) -> None:
    """Refuse what cannot be computed, before anything is.

    Raises:
        UsageError: a bound that does not exist in this norm, or options that it does not have.
        ContractBroken: a network without the second derivatives that a bound needs.
    """
    insist_on_norm(settings.specs, settings.norm)
    for spec in settings.specs:
        kind = kind_of(spec)
        if settings.shard and kind == "estimate":
            raise UsageError(
                f"{spec.method.name} takes its constant over all images and has no shards",
                code="A04",
                do="leave --shard out, or give it its own run",
            )
        if kind != "proof" and spec.settings.get("top", 1) != settings.top_k:
            raise UsageError(
                f"{spec.label} and --top-k {settings.top_k} speak of different things",
                code="A04",
                do="give it its own run" if "top" not in spec.settings else f"set top={settings.top_k}",
            )
    if settings.top_k >= classifier.classes:
        raise UsageError(
            f"--top-k {settings.top_k} of {classifier.classes} classes is always true",
            code="A04",
            do=f"choose 1 to {classifier.classes - 1}",
        )
    _refuse_nonsmooth(classifier, settings.specs)


def _refuse_nonsmooth(classifier: Classifier, specs: list[Spec]) -> None:
    """Refuse bounds that need second derivatives of a network that has none, with the layers and the way out."""
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
    methods = [facts(s) | {"kind": kind_of(s), "order": s.method.facts.get("order")} for s in settings.specs]
    return new_manifest(
        "certify",
        model=classifier.facts(),
        data=images.facts(),
        threat={"norm": settings.norm, "eps": settings.eps},
        methods=methods,
        seed=settings.seed,
        settings={"top_k": settings.top_k} if settings.top_k > 1 else {},
        argv=argv,
    )
