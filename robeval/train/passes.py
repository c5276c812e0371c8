"""Count the images that pass through a network, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Passes:
    """Images passed so far.

    Args:
        forward: Images passed forward.
        backward: Images whose graph was differentiated. One call of autograd counts once, however many forward graphs
            it runs through: a loss over two forward passes costs one backward pass, as the papers count.
    """

    forward: int = 0
    backward: int = 0
    _last_call: int = field(default=-1, repr=False)


#: The counts that are going on.
_OPEN: list[Passes] = []


def also_passed(images: int) -> None:
    """Count images that a method passes forward beside the network's own forward, as intervals or coefficients."""
    for passes in _OPEN:
        passes.forward += images


@contextmanager
def counting(module: nn.Module) -> Iterator[Passes]:
    """Count the passes through ``module`` while the context is open."""
    passes = Passes()

    def on_forward(_: nn.Module, __: Any, z: Tensor) -> None:
        images = len(z)
        passes.forward += images

        def on_backward(grad: Tensor) -> None:
            # The private number of the running autograd call is the only way to tell two graphs of one call apart
            # from two calls.
            call = torch._C._current_graph_task_id()
            if call != passes._last_call:
                passes._last_call = call
                passes.backward += images

        if z.requires_grad:
            z.register_hook(on_backward)

    handle = module.register_forward_hook(on_forward)
    _OPEN.append(passes)
    try:
        yield passes
    finally:
        _OPEN[:] = [other for other in _OPEN if other is not passes]
        handle.remove()
