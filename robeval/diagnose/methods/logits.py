"""Are the outputs logits?"""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding
from robeval.diagnose.subject import Subject


@diagnostic(
    id="D3",
    group=1,
    level="quick",
    images=256,
    question="are the outputs logits?",
    limit="logits",
    source="Croce and Hein 2020, arXiv:2003.01690, flag of probability outputs in the authors' code",
)
def logits(subject: Subject) -> Finding:
    """Says what kind of output the model gives: logits, probabilities, independent sigmoids, or one-hot answers.

    Losses on probabilities have vanishing gradients, so attacks stop early. Log-probabilities are logits up to a
    constant and do no harm.

    Cost:
        None; the clean logits are known.
    Source:
        AutoAttack's flag of probabilities: all in [-1e-5, 1 + 1e-5] and every row sums to 1 within 1e-5.
    Departs:
        A tolerance of 2e-3 in half precision, and the other kinds. Sigmoids only warn, since logits may happen to lie
        in [0, 1].
    """
    images = subject.some(256)
    z = subject.clean_logits()[: len(images)]
    kind = kind_of(z[z.isfinite().all(1)])
    result = {"probabilities": FAILED, "one-hot": FAILED, "sigmoids": WARNING}.get(kind, CLEAR)
    bad = result != CLEAR
    return Finding(
        result,
        measured=kind,
        limit="logits",
        n_images=len(images),
        flagged=images.ids.tolist() if result == FAILED else (),
        why=f"the outputs look like {kind}, not logits ({len(images)} images)" if bad else "",
        what_to_do="take the last softmax, sigmoid or argmax out of the model; robeval diagnose --remedy attacks the"
        " logarithm of probabilities" + ("; innocent when logits happen to lie in [0, 1]" if kind == "sigmoids" else "")
        if bad
        else "",
    )


def kind_of(z: Tensor) -> str:
    """Probabilities, one-hot, sigmoids, log-probabilities or logits. (n, K) -> a word."""
    if not len(z):
        return "no finite output"
    small = 2e-3 if z.dtype in (torch.float16, torch.bfloat16) else 1e-5
    z = z.double()
    inside = bool(((z >= -small) & (z <= 1 + small)).all())
    if bool(((z != 0).sum(1) == 1).all()):
        return "one-hot"
    if inside and bool(((z.sum(1) - 1).abs() <= small).all()):
        return "probabilities"
    if bool((z.logsumexp(1).abs() <= 1e-4).all()):
        return "log-probabilities"
    return "sigmoids" if inside else "logits"
