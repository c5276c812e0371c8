"""Do attacks without gradients find what gradient attacks miss?"""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import (
    BY_LOSS,
    LEAD_FAIL,
    LEAD_WARN,
    attacked,
    by_gradients,
    by_loss,
    either,
    ids,
    images_of,
    points,
    stored,
)
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding, share_failed, surely
from robeval.diagnose.subject import Subject


@diagnostic(
    id="X1",
    group=4,
    level="standard",
    images=1000,
    question="broken only by black-box or transfer?",
    limit="0; FAILED when surely above 0.2 %",
    source="Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse"
    " parameter-free attacks, arXiv:2003.01690; Athalye, Carlini, Wagner 2018, arXiv:1802.00420, section 3.1",
)
def black_box_only(subject: Subject, *, queries: int = 1000, draws: int = 100) -> Finding:
    """Counts images that Square, noise or transfer break and that no gradient attack breaks.

    The stored runs count on both sides. Only survivors of the attack on cross-entropy are tried. A second count holds
    the same finds against cross-entropy alone: there a lead of more than 8 points of all images warns and one of more
    than 15 fails, the marks of the disagreement of losses.

    Args:
        queries: Queries of Square.
        draws: Draws of uniform noise.

    Cost:
        ``queries`` + ``draws`` forward passes per image that survives cross-entropy, besides the shared attacks.
    Source:
        The Square flag of Croce and Hein 2020; Athalye et al. 2018, arXiv:1802.00420, section 3.1.
    Departs:
        AutoAttack flags when Square lowers the accuracy that the whole cascade left by more than 0.2 points. That tells
        whether the headline is too high and misses a masked cross-entropy that another loss makes up for, so both
        questions are asked. The marks are one-sided exact bounds.
    """
    everyone, total = subject.correct(images_of(subject)), len(subject.some(images_of(subject)))
    n, left = len(everyone), (~by_loss(subject, everyone)["ce"]).nonzero().squeeze(1)
    if not len(left):
        return Finding(CLEAR, f"0 of {n}; no image survives cross-entropy", "0", n)
    images = everyone[left]
    finds = {
        "square": attacked(subject, f"square:queries={queries}", images).broken,
        "noise": attacked(subject, f"noise:draws={draws}", images).broken,
        "stored": stored(subject, images, black_box=True),
    }
    for source in subject.sources:
        finds[f"transfer {source.name}"] = attacked(subject, BY_LOSS["margin"], images, on=source).broken
    black = either(finds.values())
    only, led = black & ~by_gradients(subject, images), points(black.sum(), total)
    count = int(only.sum())
    failed = share_failed(count, n, 0.002) or led > LEAD_FAIL
    seen = failed or count > 0 or led > LEAD_WARN
    return Finding(
        FAILED if failed else WARNING if seen else CLEAR,
        measured=f"{count} of {n}; {led:.1f} points missed by cross-entropy: "
        + ", ".join(f"{name} {int(mask.sum())}" for name, mask in finds.items() if name != "stored" or mask.any()),
        limit="0; FAILED when surely above 0.2 %, or 15 points against cross-entropy",
        n_images=n,
        flagged=ids(images, only if count else black) if seen else (),
        interval=_interval(count, n),
        what_to_do=_advice(count) if seen else "",
        why=_why(count, led) if seen else "",
        data={name: int(mask.sum()) for name, mask in finds.items()} | {"only": count, "lead_points": led},
    )


def _interval(count: int, n: int) -> tuple[float, float]:
    """Clopper-Pearson, 95 % two-sided, of the share."""
    return surely(count, n, 0.975), 1 - surely(n - count, n, 0.975)


def _advice(count: int) -> str:
    if count:
        return (
            "quote the minimum over all attacks; attack with more losses, or through a smooth stand-in (BPDA, EOT);"
            " innocent cause of a few images: a weak gradient attack"
        )
    return "do not quote the result of cross-entropy alone; attack with the margin loss and without gradients"


def _why(count: int, led: float) -> str:
    told = [f"{count} images fall to attacks without gradients alone"] if count else []
    return "; ".join([*told, f"attacks without gradients lead cross-entropy by {led:.1f} points"])
