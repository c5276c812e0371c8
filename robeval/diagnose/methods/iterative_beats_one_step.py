"""Does an iterative attack find what one step finds?"""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import BY_LOSS, attacked, ids, images_of, one_step
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding, share_failed
from robeval.diagnose.subject import Subject


@diagnostic(
    id="K1",
    group=3,
    level="quick",
    images=1000,
    question="many steps at least as good as one?",
    limit="0; FAILED when surely above 0.2 %",
    source="Athalye, Carlini, Wagner 2018, Obfuscated Gradients Give a False Sense of Security, arXiv:1802.00420,"
    " section 3.1; Carlini et al. 2019, On Evaluating Adversarial Robustness, arXiv:1902.06705",
)
def iterative_beats_one_step(subject: Subject) -> Finding:
    """Counts images that one gradient step breaks and 40 steps on the same loss do not.

    One step from the image, of the length eps, against projected gradient ascent from a random start.

    Cost:
        1 backward pass and the 40 of the shared attack per image.
    Source:
        Athalye et al. 2018, arXiv:1802.00420, section 3.1; Carlini et al. 2019, arXiv:1902.06705, section 5.
    Departs:
        Counted per image, not as a difference of two accuracies. In l2 and l1 the one step is that of the norm.
    """
    images = subject.correct(images_of(subject))
    once, often = attacked(subject, one_step(), images).broken, attacked(subject, BY_LOSS["ce"], images).broken
    only = once & ~often
    count, n = int(only.sum()), len(images)
    return Finding(
        FAILED if share_failed(count, n, 0.002) else WARNING if count else CLEAR,
        measured=f"{count} of {n} by one step only; one step {int(once.sum())}, 40 steps {int(often.sum())}",
        limit="0; FAILED when surely above 0.2 %",
        n_images=n,
        flagged=ids(images, only),
        what_to_do="attack with other losses, restarts and without gradients; innocent cause of a single image: the"
        " luck of the random start"
        if count
        else "",
        why="the gradient misleads after the first step" if count else "",
        data={"one_step": int(once.sum()), "steps": int(often.sum())},
    )
