"""Was normalisation forgotten?"""

from __future__ import annotations

import torch
from scipy.stats import binomtest

from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, FAILED, Finding, not_run
from robeval.diagnose.subject import Subject


@diagnostic(
    id="D10",
    group=1,
    level="quick",
    images=256,
    question="better on normalised images?",
    limit="10 points",
    source="robeval",
)
def preprocessing(subject: Subject, *, points: float = 10.0) -> Finding:
    """Compares accuracy on the images with accuracy on the same images minus their mean, over their deviation.

    Much better answers on normalised images mean that the model wants a normalisation that nobody put into it, so that
    attacks would move in the wrong units.

    Args:
        points: Gain in percentage points from which the test fails, where a paired test agrees at 5 %.

    Cost:
        1 forward pass per image.
    Source:
        None published.
    Departs:
        Mean and deviation are those of the chosen images, channel by channel.
    """
    images = subject.some(256)
    x, n = images.x, len(images)
    mean, std = (f(dim=(0, 2, 3), keepdim=True) for f in (subject.images.x.mean, subject.images.x.std))
    try:
        with torch.no_grad():
            answers = subject.logits((x - mean) / std.clamp_min(1e-3)).argmax(1)
    except (RuntimeError, ValueError, AssertionError):
        return not_run("the model refuses pixels outside [0, 1]", DOES_NOT_APPLY)
    plain, other = subject.clean_logits()[:n].argmax(1) == images.y, answers == images.y
    gained, lost = int((other & ~plain).sum()), int((plain & ~other).sum())
    gain = 100 * (gained - lost) / n
    forgotten = gain > points and binomtest(gained, gained + lost).pvalue < 0.05
    return Finding(
        FAILED if forgotten else CLEAR,
        measured=f"{int(plain.sum())} of {n} right, normalised {int(other.sum())}",
        limit=f"{points:g} points better",
        n_images=n,
        flagged=images.ids[other & ~plain].tolist() if forgotten else (),
        why=f"accuracy rises by {gain:.1f} points on normalised images" if forgotten else "",
        what_to_do="--normalise MEANS/STDS, so that normalisation lies inside the model" if forgotten else "",
        data={"plain": int(plain.sum()), "normalised": int(other.sum()), "images": n},
    )
