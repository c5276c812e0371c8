"""How good is the model on clean images, and does it use its classes?"""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding, wilson
from robeval.diagnose.subject import Subject

#: Share of one answer that is taken for a constant model.
CONSTANT = 0.95


@diagnostic(
    id="D8",
    group=1,
    level="quick",
    images="all",
    question="right on clean images, in more than one class?",
    limit="one class 95 %",
    source="robeval",
)
def clean_accuracy(subject: Subject) -> Finding:
    """Measures clean accuracy and the share of the most frequent answer.

    One class on more than 95 % of images fails where the labels are balanced, and warns where they are not.

    Cost:
        1 forward pass per image.
    Source:
        None published.
    Departs:
        Nothing.
    """
    images, z = subject.images, subject.clean_logits()
    n, answers = len(images), z.argmax(1)
    k = int((answers == images.y)[z.isfinite().all(1)].sum())
    counts, labels = answers.bincount(), images.y.bincount()
    share, common = float(counts.max()) / n, float(labels.max()) / n
    constant = share > CONSTANT and n > 1
    balanced = common <= max(0.5, 2 / len(images.classes))
    return Finding(
        (FAILED if balanced else WARNING) if constant else CLEAR,
        measured=f"accuracy {100 * k / n:.1f} %, one class {100 * share:.1f} %",
        limit="one class 95 %",
        n_images=n,
        flagged=images.ids[answers == int(counts.argmax())].tolist() if constant else (),
        interval=wilson(k, n),
        why=f"{100 * share:.1f} % of answers are class {int(counts.argmax())}" if constant else "",
        what_to_do="check labels and normalisation; innocent when nearly all images are of that class"
        if constant
        else "",
        data={"correct": k, "images": n, "answers": counts.tolist(), "labels": labels.tolist()},
    )
