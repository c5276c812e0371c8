"""What an attack run is asked to do, and the manifest that says so."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from robeval.core.ball import ABS, REL
from robeval.core.catalogue import Spec
from robeval.core.choosing import facts
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.engine.run import Plan
from robeval.store.manifest import new_manifest


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
    about = spec.method.facts
    attempts = int(spec.settings.get(about.get("attempts", ""), 1))
    start = partial(spec.method.load(), **spec.settings)
    return Plan(spec.method.name, start, attempts, about.get("access") == "black-box")


def searches_nearest(spec: Spec) -> bool:
    """The attack looks for the nearest adversarial image instead of one within eps."""
    return bool(spec.method.facts.get("search") == "minimal")


def manifest_of(classifier: Classifier, images: Images, settings: Settings, argv: list[str]) -> dict[str, Any]:
    """The manifest of an attack run; its identity is what decides whether a command resumes it."""
    methods = [facts(s) | {"search": "minimal" if searches_nearest(s) else "fixed"} for s in settings.specs]
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
