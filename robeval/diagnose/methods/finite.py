"""Does the model answer with finite numbers in the whole ball?"""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, FAILED, Finding, wilson
from robeval.diagnose.subject import Subject


@diagnostic(
    id="D6",
    group=1,
    level="quick",
    images=256,
    question="finite everywhere, input left alone?",
    limit="0 images",
    source="robeval; ART's loss_gradient_check looks at the gradient of clean images alone",
)
def finite(subject: Subject) -> Finding:
    """Looks for NaN and infinity in logits, loss and gradient on clean images, in the ball and at corners of the box.

    Also tells a model that overwrites its input, which would move the very images that are judged.

    Cost:
        3 forward and 1 backward pass per image.
    Source:
        None published.
    Departs:
        Nothing.
    """
    images = subject.some(256)
    x, rng = images.x, subject.rng("finite", images.ids)
    bad = {"clean": ~subject.clean_logits()[: len(x)].isfinite().all(1)}
    given = x.clone()
    bad["ball"] = _answers(subject, Ball(subject.norm, subject.eps).sample(x, rng))
    corner = (rng.sign(*x.shape[1:]) + 1) / 2
    corner[0], corner[-1] = 0, 1
    bad["corners"] = _answers(subject, corner)
    overwritten = False
    try:
        value, grad = subject.gradient("ce", given, images.y)
        bad["loss"], bad["gradient"] = ~value.isfinite(), ~grad.flatten(1).isfinite().all(1)
        overwritten = not torch.equal(given, x)
    except RuntimeError:
        pass  # no gradient at all is another test's matter
    with torch.no_grad():
        subject.classifier.logits(given)
    overwritten = overwritten or not torch.equal(given, x)
    any_bad = torch.stack(list(bad.values())).any(0)
    flagged, n = images.ids[any_bad].tolist(), len(images)
    where = ", ".join(f"{name} {int(rows.sum())}" for name, rows in bad.items() if rows.any())
    said = [f"NaN or Inf on {len(flagged)} of {n} images ({where})"] * bool(flagged)
    said += ["the model overwrites its input"] * overwritten
    return Finding(
        FAILED if said else CLEAR,
        measured=f"{len(flagged)} of {n}",
        limit="0",
        n_images=n,
        flagged=flagged,
        interval=wilson(len(flagged), n),
        why="; ".join(said),
        what_to_do="look for divisions, logarithms and in-place operations inside the model" if said else "",
        data={name: int(rows.sum()) for name, rows in bad.items()},
    )


def _answers(subject: Subject, x: Tensor) -> Tensor:
    return ~subject.logits(x).isfinite().all(1)
