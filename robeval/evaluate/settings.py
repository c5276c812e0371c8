"""What an attack run is asked to do, and the manifest that says so."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from robeval.core.ball import ABS, REL
from robeval.core.catalogue import Method, Spec
from robeval.core.choosing import facts, for_classes
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.engine.run import Plan
from robeval.evaluate.certified import Certified
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
        batch_size: Most images in one model call; never changes a result, except of references.
        shard: ``i/n``, or empty for all images.
        precision: Arithmetic in which fixed-eps attacks search: float32, or bfloat16 or float16 by autocast. Verdicts
            are always in float32.
        randomised: The model answers at random: a success is one answer of two, and a later look need not repeat it.
        certified: Proofs that spare images the attacks within their radius.
    """

    specs: list[Spec]
    norm: str
    radii: list[float]
    seed: int = 0
    each: bool = False
    batch_size: int = 256
    shard: str = ""
    precision: str = "float32"
    randomised: bool = False
    certified: Certified = field(default_factory=Certified)

    def for_classes(self, classes: int) -> Settings:
        """The same with every attack as it runs on so many classes."""
        return replace(self, specs=[for_classes(s, classes) for s in self.specs])


def attempts_of(method: Method, settings: Mapping[str, Any]) -> int:
    """Attempts per image: the product of the settings that the method's fact ``attempts`` names, 0 counting as 1."""
    named = method.facts.get("attempts", ())
    names = (named,) if isinstance(named, str) else named
    return math.prod(max(1, int(settings[name])) for name in names)


def plan(spec: Spec) -> Plan:
    """The engine's plan for a catalogued attack."""
    about = spec.method.facts
    attempts = attempts_of(spec.method, spec.settings)
    start = partial(spec.method.load(), **spec.settings)
    return Plan(spec.method.name, start, attempts, about.get("access") == "black-box")


def searches_nearest(spec: Spec) -> bool:
    """The attack looks for the nearest adversarial image instead of one within eps."""
    return bool(spec.method.facts.get("search") == "minimal")


def manifest_of(classifier: Classifier, images: Images, settings: Settings, argv: list[str]) -> dict[str, Any]:
    """The manifest of an attack run; its identity is what decides whether a command resumes it."""
    how: dict[str, Any] = {"each": settings.each}
    if settings.precision != "float32":
        how["precision"] = settings.precision
    if settings.randomised:
        how["randomised"] = True
    how |= {fact: True for fact in ("channels_last", "compiled") if classifier.info.get(fact)}
    if settings.certified.source:
        radii = sorted(settings.certified.radius.items())
        digest = hashlib.sha256(repr(radii).encode()).hexdigest()[:16]
        how["skip_certified"] = {"from": settings.certified.source, "images": len(radii), "sha256": digest}
    methods = [facts(s) | {"search": "minimal" if searches_nearest(s) else "fixed"} for s in settings.specs]
    return new_manifest(
        "attack",
        model=classifier.facts(),
        data=images.facts(),
        threat={"norm": settings.norm, "eps": settings.radii, "tolerance": f"eps * (1 + {REL:g}) + {ABS:g}, float64"},
        methods=methods,
        seed=settings.seed,
        settings=how,
        argv=argv,
    )
