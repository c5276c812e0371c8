"""Does the answer lead back to the input?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, FAILED, Finding
from robeval.diagnose.slopes import without_gradient
from robeval.diagnose.subject import Subject


class _FirstCut(TorchFunctionMode):
    """Notes the first operation that takes a tensor with a gradient and gives numbers without one."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        asks = any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if not self.name and asks and isinstance(out, Tensor) and not out.requires_grad:
            full = resolve_name(func) or getattr(func, "__name__", "an operation")
            if not full.endswith("__get__"):  # shape, dtype, data and the like
                self.name = full.rpartition(".")[2]
        return out


@diagnostic(
    id="G3",
    group=2,
    level="quick",
    images=4,
    question="does the answer lead back to the input?",
    limit="a gradient",
    source="Pintor et al. 2022, Indicators of Attack Failure, arXiv:2106.09947, I1",
)
def graph(subject: Subject) -> Finding:
    """Takes one gradient; when there is none, names the first operation that gives none.

    A detach, a rounding by hand, a conversion to another library or a ``no_grad`` cuts the way back.

    Cost:
        1 backward pass on four images, and 1 forward pass to find the operation.
    Source:
        The indicator I1 of Pintor et al. 2022, arXiv:2106.09947.
    Departs:
        Only a missing graph counts, not any exception: another error of the model is an error of the diagnosis.
    """
    images, limit = subject.some(4), "a gradient"
    try:
        subject.gradient("ce", images.x, images.y)
    except RuntimeError as error:
        if not without_gradient(error):
            raise
        cut = _FirstCut()
        with cut, torch.enable_grad():
            subject.classifier.logits(images.x.detach().clone().requires_grad_())
        where = cut.name or "unknown"
        return Finding(
            FAILED,
            measured=f"none; cut at {where}",
            limit=limit,
            n_images=len(images),
            flagged=images.ids.tolist(),
            what_to_do="replace that operation by one with a gradient in attacks (BPDA), and attack without gradients",
            why=f"the logits have no gradient with respect to the input; the first operation without one is {where}",
            data={"operation": where},
        )
    return Finding(CLEAR, measured="a gradient", limit=limit, n_images=len(images))
