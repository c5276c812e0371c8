"""Do attacks on different losses agree?"""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import BY_LOSS, LEAD_FAIL, LEAD_WARN, by_loss, ids, images_of, is_black_box, points
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding
from robeval.diagnose.subject import Subject


@diagnostic(
    id="X2",
    group=4,
    level="standard",
    images=1000,
    question="losses agree?",
    limit="8 points; FAILED above 15",
    source="robeval; marks from the honest models in Ma, Faghri, Papernot, Farahmand 2020, SOAR: Second-Order"
    " Adversarial Regularization, arXiv:2004.01832",
)
def loss_disagreement(subject: Subject) -> Finding:
    """Accuracy under the gradient attack on cross-entropy against the lowest of those on margin, DLR, targeted margin.

    Beside the gap: for each pair of losses the images that one breaks and the other does not. A reported list of
    gradient attacks with one loss alone warns, and fails where the gap is above the mark of honest models.

    Cost:
        40 backward passes per image on cross-entropy, margin and DLR, 120 on the targeted margin, fewer where they
        succeed; shared with other tests.
    Source:
        None; in the SOAR paper the gap is 35 points for SOAR and 0.8 to 5.8 for five honest models.
    Departs:
        Cross-entropy alone is held against the strongest, as in the table that the marks come from. Margin and DLR
        without a target lie up to 10 points above the targeted margin on honest models too. One reported loss is a
        failure only where the losses do disagree: on an honest model it costs little, and the report says how much.
    """
    images = subject.correct(images_of(subject))
    total, broken = len(subject.some(images_of(subject))), by_loss(subject, images)
    standing = {loss: len(images) - int(hit.sum()) for loss, hit in broken.items()}
    accuracy = {loss: points(count, total) for loss, count in standing.items()}
    strongest = min(accuracy, key=accuracy.__getitem__)
    gap = accuracy["ce"] - accuracy[strongest]
    alone = _reported(subject)
    single = len(alone) == 1
    result = FAILED if gap > (LEAD_WARN if single else LEAD_FAIL) else WARNING if gap > LEAD_WARN or single else CLEAR
    why = [f"{strongest} breaks {gap:.1f} points more than cross-entropy"] if gap > LEAD_WARN else []
    why += [f"the reported gradient attacks all use one loss, {next(iter(alone))}"] if single else []
    return Finding(
        result,
        measured=", ".join(f"{loss} {a:.1f}" for loss, a in accuracy.items()) + f" %; gap {gap:.1f}",
        limit="8 points; FAILED above 15, or above 8 with one reported loss",
        n_images=len(images),
        flagged=ids(images, broken[strongest] & ~broken["ce"]) if gap > LEAD_WARN else (),
        what_to_do="report the minimum over losses; attack with margin and targeted losses besides"
        if result != CLEAR
        else "",
        why="; ".join(why),
        data={
            "accuracy": accuracy,
            "broken_by_row_not_column": {a: {b: int((broken[a] & ~broken[b]).sum()) for b in broken} for a in broken},
            "attacks": {loss: BY_LOSS[loss] for loss in broken},
        },
    )


def _reported(subject: Subject) -> set[str]:
    """Losses of the gradient attacks in the stored runs; an attack that names none counts as a loss of its own."""
    methods = [m for store in subject.stores for m in store.manifest()["methods"] if not is_black_box(m)]
    return {str(m["settings"].get("loss", m["name"])) for m in methods}
