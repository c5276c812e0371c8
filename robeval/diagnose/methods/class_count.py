"""Do the attacks fit the number of classes?"""

from __future__ import annotations

from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, FAILED, Finding
from robeval.diagnose.subject import Subject


@diagnostic(
    id="D7",
    group=1,
    level="quick",
    images=0,
    question="enough classes for each loss?",
    limit="dlr 3, dlr-targeted 4, targets at most classes - 1",
    source="Croce and Hein 2020, arXiv:2003.01690, check of the class count in the authors' code",
)
def class_count(subject: Subject) -> Finding:
    """Compares the stored attacks with the number of classes.

    The DLR loss divides by a gap that needs three classes, or four towards a target, and there are no more targets than
    rivals. Attacks of the house fall back to the margin by themselves; the plan after that fallback is shown.

    Cost:
        None.
    Source:
        AutoAttack's warning.
    Departs:
        AutoAttack warns and runs; here an attack that was run so fails.
    """
    classes = subject.classifier.classes
    wrong = []
    for store in subject.stores:
        for method in store.manifest()["methods"]:
            settings = method.get("settings", {})
            targets = int(settings.get("targets") or settings.get("n_target_classes") or 0)
            needs = 4 if targets else 3
            if (str(settings.get("loss")) == "dlr" and classes < needs) or targets > classes - 1:
                wrong.append(method["label"])
    dlr = "dlr" if classes >= 4 else "dlr untargeted alone" if classes == 3 else "margin instead of dlr"
    return Finding(
        FAILED if wrong else CLEAR,
        measured=f"{classes} classes: {dlr}, at most {classes - 1} targets",
        limit="dlr 3, dlr-targeted 4",
        n_images=0,
        why=f"{', '.join(wrong)} needs more than {classes} classes" if wrong else "",
        what_to_do="run the attack of the house, which falls back to the margin" if wrong else "",
        data={"classes": classes, "wrong": wrong},
    )
