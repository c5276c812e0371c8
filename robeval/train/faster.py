"""Ways to compute the same network faster while it trains. Measure before using them: benchmarks/train_options.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robeval.core.errors import MachineError, UsageError

Forward = Callable[[Tensor], Tensor]


def in_layout(module: nn.Module, channels_last: bool) -> None:
    """Keep the weights of convolutions in channels-last layout, or in the usual one. Changes no value."""
    module.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)  # type: ignore[call-overload]


def compiled(module: nn.Module) -> Forward:
    """The compiled forward pass of a network, for :func:`computing_with`. Nothing is compiled before its first call.

    A pass that somebody listens to, by hooks inside the network, is computed as ever: compiled code has no layers.
    """
    # One graph for each width, mode and set of gradients; without a common one for all widths, whose bits would depend
    # on which width came first, a resumed training computes the same.
    torch._dynamo.reset()  # past the limit nothing is compiled, and trainings before this one in the process count too
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    torch._functorch.config.donated_buffer = False  # a graph may be differentiated by parts, as for a clipped penalty
    plain: Forward = module.forward
    quick, hooks = torch.compile(plain, dynamic=False), _hooks(module)

    def forward(x: Tensor) -> Tensor:
        z: Tensor = (quick if _hooks(module) == hooks else plain)(x)
        return z

    return forward


def _hooks(module: nn.Module) -> int:
    """Number of hooks on the layers of a network."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules() if m is not module)


@contextmanager
def computing_with(module: nn.Module, forward: Forward | None, method: str) -> Iterator[None]:
    """The network with another forward pass inside; hooks, names of weights and its class stay as they are.

    Args:
        module: The network.
        forward: From :func:`compiled`, or None for its own.
        method: The trainer that runs inside, for messages.

    Raises:
        UsageError: the method differentiates twice, which compiled networks cannot.
        MachineError: the network cannot be compiled here.
    """
    if forward is None:
        yield
        return
    module.forward = forward
    try:
        yield
    except RuntimeError as error:
        if "double backward" in str(error):
            raise UsageError(
                f"{method} differentiates the network twice, which torch.compile does not support",
                code="A04",
                do="leave compile out; channels-last goes with every method",
            ) from None
        if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        raise MachineError(
            f"torch.compile failed: {' '.join(str(error).split()[:30])}",
            code="E05",
            why="it needs a C++ compiler, triton on a GPU, and a network that it can trace",
            do="leave compile out",
        ) from error
    finally:
        del module.forward
