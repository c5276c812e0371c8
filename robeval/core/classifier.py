"""A model as the rest of the house sees it: pixels in [0, 1] in, logits out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: Batches that reach a model are padded to multiples of 4: at these widths (measured, CPU, float32 and float64) an
#: image's logits, gradient and Hessian product are the same bits whatever its place and company; at others they are
#: not. Nobody has measured it elsewhere, so other devices keep a margin.
FLOOR, ELSEWHERE = 4, 16


def weights_fingerprint(state: Mapping[str, Tensor], description: str = "") -> str:
    """sha256 over the names, shapes, types and bytes of all weights and a description of the architecture."""
    digest = hashlib.sha256(description.encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def fixed_parameters(module: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients inside, so that attacks store less."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; every flag is put back as it was, module by module."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with fixed_parameters(module):
            yield
    finally:
        for m, mode in modes:
            m.training = mode


@dataclass
class Classifier:
    """A network that maps (n, C, H, W) pixels in [0, 1] to (n, K) logits; normalisation lives inside.

    Args:
        module: A torch module, or any callable from pixels to logits.
        classes: Number of classes K.
        name: How tables call the model.
        fingerprint: sha256 of weights and architecture; empty for a plain callable.
        info: Plain facts for the manifest (architecture, arguments, parameters, file, training recipe).
    """

    module: Callable[[Tensor], Tensor]
    classes: int
    name: str = "model"
    fingerprint: str = ""
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.module, nn.Module):
            self.module.eval()
            for p in self.module.parameters():
                p.requires_grad_(False)
            self.fingerprint = self.fingerprint or weights_fingerprint(self.module.state_dict(), repr(self.module))

    def logits(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, K), differentiable in x."""
        return self.module(x)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        if isinstance(self.module, nn.Module):
            for p in self.module.parameters():
                return p.device
        return torch.device("cpu")

    @property
    def parameters(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for p in self.module.parameters()) if isinstance(self.module, nn.Module) else 0

    def facts(self) -> dict[str, Any]:
        """Plain facts for the manifest of a run."""
        about = {"name": self.name, "fingerprint": self.fingerprint, "classes": self.classes}
        return about | self.info | {"parameters": self.parameters}
