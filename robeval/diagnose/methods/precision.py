"""Does the arithmetic of the search resolve its steps?"""

from __future__ import annotations

import torch

from robeval.core.catalogue import diagnostic
from robeval.core.goal import Untargeted
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, WARNING, Finding, not_run, wilson
from robeval.diagnose.subject import Subject
from robeval.engine.backend import Backend

#: Steps that attacks end with: eps over so many.
FINEST = 100


@diagnostic(
    id="D9",
    group=1,
    level="quick",
    images=64,
    question="does a small step survive the arithmetic?",
    limit="0 labels change, 1 % of steps lost",
    source="robeval",
)
def precision(subject: Subject) -> Finding:
    """Compares single precision with the coarser arithmetic that a stored attack searched in.

    Counts labels that change, and pixels on which a step of eps / 100 disappears when it is rounded: there a search
    stands still without saying so. In bfloat16 a step of 0.1/255 is lost for every pixel of 0.3 and more.

    Cost:
        2 forward passes per image and arithmetic.
    Source:
        None published.
    Departs:
        Nothing.
    """
    used = {str(store.manifest()["settings"].get("precision", "float32")) for store in subject.stores} - {"float32"}
    weights = {str(p.dtype).removeprefix("torch.") for p in getattr(subject.model.module, "parameters", list)()}
    coarse = sorted(used | (weights & {"bfloat16", "float16"}))
    if not coarse:
        return not_run("every attack computed in single precision", DOES_NOT_APPLY)
    images = subject.some(64)
    z = subject.clean_logits()[: len(images)]
    rows, lost, step = torch.zeros(len(images), dtype=torch.bool, device=z.device), 0.0, subject.eps / FINEST
    for name in coarse:
        backend = Backend(subject.classifier, subject.batch_size, precision=name)
        rows |= backend.logits(images.x, Untargeted(images.y)).argmax(1) != z.argmax(1)
        kind = getattr(torch, name)
        lost = max(lost, float(((images.x + step).to(kind) == images.x.to(kind)).double().mean()))
    flips = int(rows.sum())
    seen = flips > 0 or lost > 0.01
    return Finding(
        WARNING if seen else CLEAR,
        measured=f"{flips} labels change, {100 * lost:.0f} % of steps lost in {', '.join(coarse)}",
        limit="0 labels, 1 % of steps",
        n_images=len(images),
        flagged=images.ids[rows].tolist(),
        interval=wilson(flips, len(images)),
        why=f"steps of {step:.2g} vanish in {', '.join(coarse)}: small-step attacks stand still" if seen else "",
        what_to_do="search in float32 as well; innocent when a float32 run of the same attacks breaks no more images"
        if seen
        else "",
        data={"arithmetic": coarse, "labels": flips, "lost": lost},
    )
