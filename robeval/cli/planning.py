"""From the words of ``robeval attack`` to a plan: which attacks, on what, and what they may cost."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from robeval.cli.common import note, print_json
from robeval.core.errors import UsageError

if TYPE_CHECKING:
    from robeval.core.classifier import Classifier
    from robeval.core.images import Images
    from robeval.evaluate.settings import Settings

PRECISIONS = ("float32", "bfloat16", "float16")
#: Seconds from which a run counts as long.
LONG = 60.0


def settings_of(suite: str | None, names: list[str] | None, norm: str, eps: str | None, **run: Any) -> Any:
    """The settings of an attack run from the words of the command line.

    Raises:
        UsageError: both a suite and attacks, unknown names, bad radii or shard.
    """
    import re

    from robeval.core.ball import NORMS
    from robeval.core.choosing import choose
    from robeval.core.errors import unknown
    from robeval.core.numbers import radii
    from robeval.evaluate import suites
    from robeval.evaluate.settings import Settings

    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if run.get("precision", "float32") not in PRECISIONS:
        raise unknown("precision", run["precision"], PRECISIONS)
    if suite and names:
        raise UsageError("give --suite or --attack, not both", code="A04")
    if names:
        specs = choose("attacks", names, norm)
    else:
        specs, left_out, each = suites.suite(suite or "quick", norm)
        run["each"] = run["each"] or each
        if left_out:
            note(f"not in {norm}, left out: {', '.join(left_out)}")
    values = radii(eps, norm) if eps else []
    if 0.0 in values:
        note("note[A01] eps 0: robust accuracy equals clean accuracy")
    shard = run.get("shard") or ""
    if shard:
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--shard is i/n with 1 <= i <= n, got {shard}", code="A04", do="such as --shard 1/4")
    return Settings(specs, norm, values, **run)


def transferable(names: list[str] | None, **other: object) -> list[str]:
    """The attacks to craft on another model.

    Raises:
        UsageError: together with an option that means something else for attacks on the target itself.
    """
    for name, value in other.items():
        if value:
            raise UsageError(
                f"--{name.replace('_', '-')} does not go with --transfer-from",
                code="A04",
                do="name attacks: --attack pgd20",
            )
    return names or ["pgd20"]


def prepared(
    settings: Settings,
    classifier: Classifier,
    images: Images,
    skip_certified: str | None,
    channels_last: bool,
    compiled: bool,
) -> Settings:
    """The settings for this very model and these images, and the model as it shall run."""
    from dataclasses import replace

    from robeval.evaluate.certified import certified
    from robeval.models.accelerate import accelerate

    asked, settings = settings, settings.for_classes(classifier.classes)
    for before, now in zip(asked.specs, settings.specs, strict=True):
        if before is not now:
            note(f"with {classifier.classes} classes {before.label} runs as {now.label}")
    accelerate(classifier, channels_last=channels_last, compiled=compiled)
    if skip_certified:
        proofs = certified(skip_certified, classifier, images, settings.norm)
        note(f"{len(proofs.radius)} images have a proof in {skip_certified}")
        settings = replace(settings, certified=proofs)
    return settings


def announce(settings: Settings, classifier: Classifier, images: Images) -> None:
    """Say beforehand what a long run may take."""
    import torch

    from robeval.engine.backend import Backend
    from robeval.evaluate.attacking import clean_pass
    from robeval.evaluate.forecast import TIMED, forecast

    some = images[torch.arange(min(TIMED, len(images)))]
    backend = Backend(classifier, settings.batch_size, precision=settings.precision)
    clean = clean_pass(backend, some)
    correct = clean.argmax(1) == some.y
    if correct.any():
        cost = forecast(settings, some[correct], clean[correct], backend, count=len(images))
        if cost.seconds > LONG:
            note(str(cost))


def tell_plan(settings: Settings, classifier: Classifier, images: Images, out: str, json: bool) -> None:
    """What would run, and what it costs if every image stands."""
    from robeval.core.numbers import pretty
    from robeval.engine.backend import Backend
    from robeval.evaluate.attacking import clean_pass
    from robeval.evaluate.forecast import forecast

    backend = Backend(classifier, settings.batch_size, precision=settings.precision)
    clean = clean_pass(backend, images)
    correct = clean.argmax(1) == images.y
    if not correct.any():
        raise UsageError("the model classifies none of these images correctly", code="C16", do="check labels and data")
    cost = forecast(settings, images[correct], clean[correct], backend)
    facts = {
        "attacks": [s.label for s in settings.specs],
        "norm": settings.norm,
        "eps": [pretty(e) for e in settings.radii],
        "images": len(images),
        "correct": int(correct.sum()),
        "device": str(classifier.device),
        "folder": out,
        "forwards_per_image": cost.forwards,
        "backwards_per_image": cost.backwards,
        "seconds_if_all_stand": round(cost.seconds, 1),
    }
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        sys.stdout.write(f"{name:20} {', '.join(value) if isinstance(value, list) else value}\n")
    for each in cost.costs:
        sys.stdout.write(f"  {each.label:30} {each.forwards:>8,} forward {each.backwards:>8,} backward an image\n")
    sys.stdout.write(f"{cost}\n")
