"""Does a forward pass leave the model as it was?"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, FAILED, WARNING, Finding
from robeval.diagnose.subject import Subject

#: Layers that answer otherwise in train mode.
TWO_FACED = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.modules.instancenorm._InstanceNorm,
    nn.RNNBase,
)


@diagnostic(
    id="D4",
    group=1,
    level="quick",
    images=64,
    question="eval mode, and unchanged by a forward pass?",
    limit="nothing changes",
    source="robeval; foolbox and RobustBench warn of model.training alone",
)
def state(subject: Subject, *, forwards: int = 10) -> Finding:
    """Looks for layers in train mode, for weights and buffers that passes change, and for random numbers drawn.

    Changed state is put back. Layers in train mode and changed state fail; a random draw warns, because it may act so
    rarely that repeating an answer does not show it.

    Args:
        forwards: Passes between the two looks.

    Cost:
        10 forward passes of one batch of 64 images.
    Source:
        None published.
    Departs:
        Nothing.
    """
    x = subject.some(64).x
    module = subject.classifier.module
    live = [
        name or type(m).__name__
        for name, m in (module.named_modules() if isinstance(module, nn.Module) else ())
        if m.training and isinstance(m, TWO_FACED)
    ]
    before, draws = _copies(module), _generators()
    with torch.no_grad():
        for _ in range(forwards):
            subject.classifier.logits(x)
    drew = [name for name, was in draws.items() if not torch.equal(was, _generators()[name])]
    now = _tensors(module)
    changed = [name for name, was in before.items() if not torch.equal(was, now[name])]
    with torch.no_grad():
        for name in changed:
            now[name].copy_(before[name])
    drew = [] if subject.randomised else drew
    found = [f"{_some(live)} in train mode"] * bool(live) + [f"a pass changes {_some(changed)}"] * bool(changed)
    seen = found + [f"a pass draws from the random numbers of {', '.join(drew)}"] * bool(drew)
    return Finding(
        FAILED if found else WARNING if drew else CLEAR,
        measured=f"{len(live)} layers in train mode, {len(changed)} tensors changed, {len(drew)} generators moved",
        limit="0",
        n_images=len(x),
        why="; ".join(seen),
        what_to_do="call model.eval() in every submodule, keep running statistics fixed; a model that is random on"
        " purpose: --randomised"
        if seen
        else "",
        data={"train_mode": live, "changed": changed, "generators": drew},
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _tensors(module: object) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()]) if isinstance(module, nn.Module) else {}


def _copies(module: object) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in _tensors(module).items()}


def _generators() -> dict[str, Tensor]:
    """State of every source of random numbers that a model may draw from."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    inner = np.random.get_state(legacy=False)["state"]
    states["numpy"] = torch.tensor([*inner["key"].tolist(), inner["pos"]])
    states["python"] = torch.tensor(random.getstate()[1])
    return states
