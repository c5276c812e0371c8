"""How long the gradient of each loss is."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.ball import vector_norm
from robeval.core.catalogue import diagnostic
from robeval.diagnose.evidence import ids
from robeval.diagnose.finding import CLEAR, WARNING, Finding
from robeval.diagnose.slopes import losses_for, taken
from robeval.diagnose.subject import Subject

SATURATED = 1e-6


@diagnostic(
    id="G5",
    group=2,
    level="quick",
    images=256,
    question="one loss saturated?",
    limit="1e-6",
    source="Pintor et al. 2022, Indicators of Attack Failure, arXiv:2106.09947; gradient norm tracker of secml-torch",
)
def gradient_norms(subject: Subject) -> Finding:
    """Median length of the input gradient of each loss, in three norms.

    A cross-entropy gradient that is a millionth of the margin's is saturated: rounding decides its sign.

    Cost:
        4 backward passes per image, shared with the zero gradient test.
    Source:
        The gradient norm tracker of secml-torch (Pintor et al.).
    Departs:
        The ratio is judged image by image, and the median of it decides.
    """
    norms: dict[str, dict[str, float]] = {}
    lengths: dict[str, Tensor] = {}
    for loss in losses_for(subject.classifier.classes):
        images, _, grad = taken(subject, loss, "image")
        norms[loss] = {norm: float(vector_norm(grad, norm).median()) for norm in ("l1", "l2", "linf")}
        lengths[loss] = vector_norm(grad.double(), "l2")
    ratio = torch.where(lengths["margin"] > 0, lengths["ce"] / lengths["margin"].clamp_min(1e-300), 1.0)
    middle = float(ratio.median())
    seen = middle < SATURATED
    return Finding(
        WARNING if seen else CLEAR,
        measured=f"ce / margin {middle:.1e}; l2 " + ", ".join(f"{loss} {at['l2']:.1e}" for loss, at in norms.items()),
        limit="ce / margin 1e-6",
        n_images=len(images),
        flagged=ids(images, ratio < SATURATED) if seen else (),
        what_to_do="attack with the margin loss; innocent cause: a very confident model" if seen else "",
        why="cross-entropy is saturated: its gradient drowns in rounding" if seen else "",
        data={"median": norms, "ratio": middle},
    )
