"""Do the stored adversarial images keep the rules?"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from robeval.core.catalogue import diagnostic
from robeval.core.classifier import Classifier
from robeval.core.records import CLEAN
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, FAILED, NOT_RUN, Finding, not_run, wilson
from robeval.diagnose.outcomes import reach
from robeval.diagnose.subject import Subject


@diagnostic(
    id="K9",
    group=3,
    level="quick",
    images="all",
    question="do stored adversarial images hold, alone?",
    limit="0 images",
    source="robeval; AutoAttack prints the largest norm and goes on",
)
def constraint_audit(subject: Subject) -> Finding:
    """Checks every stored adversarial image again on the CPU in single precision, alone in its batch.

    It must be finite, in [0, 1], within eps, and misclassified; one that is not is struck out of every table. How many
    survive rounding to 8 bits is shown beside it.

    Cost:
        2 forward passes per stored image.
    Source:
        None published.
    Departs:
        Nothing.
    """
    if not subject.stores:
        return not_run("no attack run to audit", NOT_RUN)
    model = _on_cpu(subject.classifier)
    struck, ids, count, coarse = [], [], 0, 0
    labels = dict(zip(subject.images.ids.tolist(), subject.images.y.tolist(), strict=True))
    for store in subject.stores:
        frame = store.frame()
        stored = frame["success"] & (frame["attack"] != CLEAN) & (frame["example"] >= 0)
        rows = frame[stored & frame["index"].isin(subject.place)]
        for start in range(0, len(rows), 64):
            part = rows.iloc[start : start + 64]
            images = store.examples(part)
            for x, row in zip(images, part.itertuples(index=False), strict=True):
                clean = subject.images.x[subject.place[row.index]].cpu().numpy()
                count += 1
                wrong = _wrong(model, x, labels[row.index]) or subject.randomised
                if not (wrong and _inside(clean, x, row.norm, row.eps)):
                    ids.append(int(row.index))
                    struck.append([store.folder.name, int(row.index), row.attack, float(row.eps)])
                rounded = np.round(x * 255) / 255
                coarse += _inside(clean, rounded, row.norm, row.eps) and _wrong(model, rounded, labels[row.index])
            subject.passes.forwards += 2 * len(part) * (model is not subject.classifier)
    if not count:
        return not_run("no attack stored an adversarial image", DOES_NOT_APPLY)
    return Finding(
        FAILED if struck else CLEAR,
        measured=f"{len(struck)} of {count} struck out; {coarse} survive 8 bits",
        limit="0",
        n_images=count,
        flagged=sorted(set(ids)),
        interval=wilson(len(struck), count),
        why=f"{len(struck)} of {count} stored adversarial images do not hold; they count for nothing" if struck else "",
        what_to_do="attack again on the machine that the model runs on; look at D1 and D2" if struck else "",
        data={"struck": struck, "stored": count, "survive_8bit": coarse},
    )


def _on_cpu(classifier: Classifier) -> Classifier:
    """The model on the CPU in single precision, as a copy where it lives elsewhere."""
    if classifier.device.type == "cpu" or not isinstance(classifier.module, nn.Module):
        return classifier
    module = copy.deepcopy(classifier.module).cpu().float()
    return Classifier(module, classifier.classes, classifier.name, classifier.fingerprint)


def _wrong(model: Classifier, x: np.ndarray, label: int) -> bool:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        z = model.logits(torch.from_numpy(x)[None].float())
    return bool(z.isfinite().all()) and int(z.argmax()) != label


def _inside(clean: np.ndarray, x: np.ndarray, norm: str, eps: float) -> bool:
    """Finite, in the box, and within eps in float64."""
    change = np.abs(x.astype(np.float64) - clean.astype(np.float64)).ravel()
    length = {"linf": change.max(), "l2": np.sqrt((change**2).sum()), "l1": change.sum()}[norm]
    return bool(np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1 and length <= reach(eps))
