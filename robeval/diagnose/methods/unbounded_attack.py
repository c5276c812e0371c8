"""Does an attack without limit reach 0 %?"""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import attacked, ids, images_of, whole_box
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding
from robeval.diagnose.subject import Subject


@diagnostic(
    id="K5",
    group=3,
    level="quick",
    images=256,
    question="attack without limit reaches 0 %?",
    limit="0 survivors of the margin attack",
    source="Carlini et al. 2019, On Evaluating Adversarial Robustness, arXiv:1902.06705; Pintor et al. 2022, Indicators"
    " of Attack Failure, arXiv:2106.09947, I6; Ma et al. 2020, SOAR, arXiv:2004.01832, appendix E.11",
)
def unbounded_attack(subject: Subject, *, steps: int = 50, length: float = 0.04) -> Finding:
    """Attacks with the whole pixel box allowed; whoever survives that was not attacked at all.

    On cross-entropy and on the margin, from the image and from a random start. A random start in the whole box is a
    random image, which hides the fault, so the attack on the margin from the image decides. Survivors of
    cross-entropy alone are a warning: the margin cures a saturated loss.

    Args:
        steps: Gradient steps.
        length: Length of a step as a share of the whole box.

    Cost:
        4 times ``steps`` backward passes for images that survive, a few for others.
    Source:
        Carlini et al. 2019, arXiv:1902.06705; the indicator I6 of Pintor et al. 2022; SOAR's attack with eps = 1.
    Departs:
        ART calls gradients masked when accuracy stays above 1 / classes; here any correctly classified image that
        survives counts. SOAR's 20 steps of 2/255 cannot cross the box, and its start is random: here they can, and
        both starts are told apart. In l2 and l1 the radius is that of the whole box too.
    """
    images = subject.correct(min(256, images_of(subject)))
    most = whole_box(subject.norm, images.x[0].numel())
    left = {}
    for loss in ("ce", "cw"):
        for start in (False, True):
            text = f"pgd:steps={steps},relative_step={length},loss={loss},random_start={str(start).lower()}"
            left[loss, start] = ~attacked(subject, text, images, eps=most).broken
    counts = {key: int(mask.sum()) for key, mask in left.items()}
    decides, n = left["cw", False], len(images)
    worst = decides if decides.any() else left["ce", False] | left["ce", True]
    seen = bool(worst.any())
    return Finding(
        FAILED if decides.any() else WARNING if seen else CLEAR,
        measured=f"{counts['cw', False]} of {n}; with a random start {counts['cw', True]}; cross-entropy"
        f" {counts['ce', False]}, with a random start {counts['ce', True]}",
        limit="0 survivors of the margin attack",
        n_images=n,
        flagged=ids(images, worst),
        what_to_do=(
            "attack without gradients, by transfer, or through a smooth stand-in (BPDA, EOT)"
            if decides.any()
            else "attack with the margin loss; innocent cause: cross-entropy saturated in single precision"
        )
        if seen
        else "",
        why="the attack may draw any image at all and does not change the answer" if seen else "",
        data={f"{loss}{'+start' if start else ''}": count for (loss, start), count in counts.items()},
    )
