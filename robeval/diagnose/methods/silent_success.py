"""Is a success on the way kept?"""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.core.errors import ContractBroken
from robeval.diagnose.evidence import BY_LOSS, attacked, ids
from robeval.diagnose.finding import CLEAR, FAILED, Finding, not_run
from robeval.diagnose.path import path
from robeval.diagnose.slopes import IMAGES, without_gradient
from robeval.diagnose.subject import Subject


@diagnostic(
    id="K6",
    group=3,
    level="standard",
    images=256,
    question="successes on the way kept?",
    limit="0",
    source="Pintor et al. 2022, Indicators of Attack Failure, arXiv:2106.09947, I3",
)
def silent_success(subject: Subject) -> Finding:
    """Counts images with a misclassified point on the path of the attack that the attack run reports as unbroken.

    The same attack is run twice: once by the engine, once to its very end with every point looked at here. It also
    tells how many successes an attack that returns its last point would have lost.

    Cost:
        40 backward passes per image, besides the shared attack.
    Source:
        The indicator I3 of Pintor et al. 2022, arXiv:2106.09947.
    Departs:
        Holds our own engine to its promise that every point counts; points that rounding decides are left out.
    """
    if subject.randomised:
        return not_run("two runs on a randomised model see different answers", "does not apply")
    images = subject.correct(IMAGES)
    try:
        walked = path(subject, BY_LOSS["ce"], images)
    except (RuntimeError, ContractBroken) as error:
        if not without_gradient(error):
            raise
        return not_run("the model gives no gradient, so that no attack walks", "does not apply")
    kept = attacked(subject, BY_LOSS["ce"], images).broken
    ever = walked.hit.any(0)
    silent, undone = ever & ~kept, ever & ~walked.hit[-1]
    count, n = int(silent.sum()), len(images)
    return Finding(
        FAILED if count else CLEAR,
        measured=f"{count} of {n} lost; the last point alone would have lost {int(undone.sum())}",
        limit="0",
        n_images=n,
        flagged=ids(images, silent),
        what_to_do="judge every point of the attack, not its last one; see whether the model repeats its answers"
        if count
        else "",
        why="the attack passed an adversarial image and reported none" if count else "",
        data={"silent": count, "undone": int(undone.sum())},
    )
