"""Do images made for a stand-in work on the model?"""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import BY_LOSS, points
from robeval.diagnose.finding import DOES_NOT_APPLY, Finding, not_run
from robeval.diagnose.path import path
from robeval.diagnose.slopes import IMAGES
from robeval.diagnose.subject import Subject


@diagnostic(
    id="K8",
    group=3,
    level="standard",
    images=256,
    question="do images made for a stand-in work here?",
    limit="none, a number only",
    source="Pintor et al. 2022, Indicators of Attack Failure, arXiv:2106.09947, I5",
)
def transfer_failure(subject: Subject) -> Finding:
    """Share of the images that fool a source model and do not fool this one.

    It says how much of an attack on a surrogate, a stand-in layer or an average is lost on the way to the real model.

    Cost:
        40 backward passes per image on each source, 1 forward pass here.
    Source:
        The indicator I5 of Pintor et al. 2022, arXiv:2106.09947.
    Departs:
        Shown, never judged: most transferred images fail on an honest model too. It matters only where a headline
        rests on transferred images alone.
    """
    if not subject.sources:
        return not_run("no source model")
    images = subject.correct(IMAGES)
    told, shares = [], {}
    for source in subject.sources:
        walked = path(subject, BY_LOSS["margin"], images, on=source)
        fooled = walked.logits.argmax(1).to(images.y.device) != images.y
        z = subject.logits(walked.last.to(images.x.device))
        lost = fooled & (z.argmax(1) == images.y)
        shares[source.name] = points(lost.sum(), int(fooled.sum()))
        told.append(f"{source.name} {int(lost.sum())} of {int(fooled.sum())}")
    return Finding(
        DOES_NOT_APPLY,
        measured="; ".join(told) + " lost",
        limit="none, a number only",
        n_images=len(images),
        why="matters only where a headline rests on transferred images",
        data=shares,
    )
