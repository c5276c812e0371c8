"""Was the loss still moving at the end?"""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.core.errors import ContractBroken
from robeval.diagnose.evidence import BY_LOSS, points
from robeval.diagnose.finding import DOES_NOT_APPLY, Finding, not_run
from robeval.diagnose.path import path
from robeval.diagnose.slopes import IMAGES, without_gradient
from robeval.diagnose.subject import Subject

LAST, MOVES = 10, 0.05


@diagnostic(
    id="K7",
    group=3,
    level="standard",
    images=256,
    question="loss still moving at the end?",
    limit="none, a number only",
    source="Pintor et al. 2022, Indicators of Attack Failure, arXiv:2106.09947, I4",
)
def incomplete_optimisation(subject: Subject) -> Finding:
    """Share of survivors whose best loss, rescaled over the path, still moved in the last 10 steps.

    The loss of each image is rescaled to [0, 1] over its path; the best so far must not move by more than 0.05.

    Cost:
        40 backward passes per image.
    Source:
        The indicator I4 of Pintor et al. 2022, arXiv:2106.09947, with the mark of its code.
    Departs:
        Shown, never judged: rescaling stretches a flat path, and 5 to 31 % of survivors of honest models are flagged.
        Whether the attack has converged is judged by its accuracy at more steps.
    """
    images = subject.correct(IMAGES)
    try:
        walked = path(subject, BY_LOSS["ce"], images)
    except (RuntimeError, ContractBroken) as error:
        if not without_gradient(error):
            raise
        return not_run("the model gives no gradient, so that no attack walks", "does not apply")
    alive = ~walked.hit.any(0)
    low, high = walked.loss.amin(0), walked.loss.amax(0)
    best = ((walked.loss - low) / (high - low).clamp_min(1e-12)).cummax(0).values
    moving = alive & (best[-1] - best[-LAST] > MOVES)
    n, count = int(alive.sum()), int(moving.sum())
    return Finding(
        DOES_NOT_APPLY,
        measured=f"{points(count, n):.0f} % of {n} survivors",
        limit="none, a number only",
        n_images=len(images),
        why="fires on honest models; whether more steps find more says it better",
        data={"moving": count, "survivors": n, "loss": walked.loss.nanmedian(1).values.tolist()},
    )
