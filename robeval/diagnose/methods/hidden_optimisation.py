"""Does the model optimise while it answers?"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, FAILED, Finding
from robeval.diagnose.subject import Subject


class _Backwards(TorchDispatchMode):
    """Notices every operation that autograd runs, and counts the backward executions that they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.executions: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        execution = torch._C._current_graph_task_id()
        if execution >= 0:
            self.executions.add(execution)
        return func(*args, **(kwargs or {}))


@diagnostic(
    id="D5",
    group=1,
    level="quick",
    images=64,
    question="backward passes while it answers?",
    limit="0 backward executions",
    source="Croce and Hein 2020, arXiv:2003.01690, flag of optimisation at inference in the authors' code",
)
def hidden_optimisation(subject: Subject) -> Finding:
    """Counts executions of autograd's backward graph during a forward pass, with and without gradients recorded.

    A model that optimises while it answers, as purifiers do, is attacked wrongly by a plain gradient. A search without
    autograd is missed: the time per image is then the only clue, so it is shown.

    Cost:
        2 forward passes of one batch of 64 images.
    Source:
        AutoAttack's flag of optimisation at inference.
    Departs:
        AutoAttack traces Python calls by the names grad, backward and _make_grads. Here operations that run inside
        a backward execution are seen themselves, so names do not matter and debuggers keep working.
    """
    x = subject.some(64).x
    counts = []
    for recorded in (False, True):
        with _Backwards() as mode, torch.set_grad_enabled(recorded):
            subject.classifier.logits(x.clone().requires_grad_(recorded))
        counts.append(len(mode.executions))
    started = time.perf_counter()
    with torch.no_grad():
        subject.model.logits(x)
    each = 1000 * (time.perf_counter() - started) / len(x)
    most = max(counts)
    return Finding(
        FAILED if most else CLEAR,
        measured=f"{most} backward executions, {each:.2g} ms an image",
        limit="0",
        n_images=len(x),
        why=f"the model optimises while it answers ({most} backward executions in one call)" if most else "",
        what_to_do="attack through the whole procedure, or with the identity in its place (BPDA)" if most else "",
        data={"executions": counts, "milliseconds_per_image": each},
    )
