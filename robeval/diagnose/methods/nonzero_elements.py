"""The share of gradient entries that are not zero."""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import ids
from robeval.diagnose.finding import CLEAR, WARNING, Finding
from robeval.diagnose.slopes import taken
from robeval.diagnose.subject import Subject

LEAST = 0.9


@diagnostic(
    id="G2",
    group=2,
    level="quick",
    images=256,
    question="gradient on all pixels?",
    limit="90 %",
    source="Ma, Faghri, Papernot, Farahmand 2020, SOAR: Second-Order Adversarial Regularization, arXiv:2004.01832,"
    " appendix E.11",
)
def nonzero_elements(subject: Subject) -> Finding:
    """Mean share of the entries of the cross-entropy gradient that are not exactly zero.

    A masked model has a gradient on few pixels. It never fails: SOAR itself and shattered gradients have one
    everywhere.

    Cost:
        2 backward passes per image, shared with the zero gradient test.
    Source:
        Ma et al. 2020, arXiv:2004.01832, appendix E.11.
    Departs:
        Taken at a random start besides, and warns only when both lie below 90 %: black pixels and dead regions of the
        image cannot explain a gradient that is missing where no pixel is black.
    """
    images, _, at_image = taken(subject, "ce", "image")
    _, _, at_start = taken(subject, "ce", "start")
    shares = (at_image != 0).flatten(1).double().mean(1)
    mean, started = float(shares.mean()), float((at_start != 0).double().mean())
    seen = max(mean, started) < LEAST
    histogram = shares.histc(bins=20, min=0, max=1).int().tolist()
    return Finding(
        WARNING if seen else CLEAR,
        measured=f"{100 * mean:.1f} % at the images, {100 * started:.1f} % at random starts",
        limit="90 % at either",
        n_images=len(images),
        flagged=ids(images, shares < LEAST) if seen else (),
        what_to_do="attack with the margin loss, and without gradients; innocent causes: parts of the image that the"
        " network ignores, many dead units, cross-entropy saturated on a confident model"
        if seen
        else "",
        why="the cross-entropy gradient is exactly zero on many pixels" if seen else "",
        data={"histogram": histogram},
    )
