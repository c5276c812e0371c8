"""Contexts that change how a network or the arithmetic behaves, and put everything back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

BnMode = Literal["train", "train_noupdate", "eval"]


def normalises_over_the_batch(module: nn.Module) -> bool:
    """Does a layer make one image's logits depend on the other images while it trains?"""
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def differs_in_training(module: nn.Module) -> bool:
    """Does the network compute something else in train mode than in eval mode (BatchNorm or dropout)?"""
    return any(isinstance(m, _BatchNorm) or (isinstance(m, _DropoutNd) and m.p > 0) for m in module.modules())


@contextmanager
def bn_mode(module: nn.Module, mode: BnMode) -> Iterator[None]:
    """The whole network in a mode; every layer's own mode is put back at the end.

    Args:
        module: The network.
        mode: ``train`` uses and updates the batch's statistics, ``train_noupdate`` uses them and leaves the buffers
            as they are bit by bit, ``eval`` uses the running statistics.
    """
    training = [(m, m.training) for m in module.modules()]
    tracking = [(m, m.track_running_stats) for m in module.modules() if isinstance(m, _BatchNorm)]
    module.train(mode != "eval")
    if mode == "train_noupdate":
        for m, _ in tracking:
            m.track_running_stats = False
    try:
        yield
    finally:
        for layer, was in training:
            layer.training = was
        for m, tracked in tracking:
            m.track_running_stats = tracked


@contextmanager
def fp32_exact() -> Iterator[None]:
    """Full float32 inside: no autocast, no TF32. Finite differences vanish in less."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    was = matmul.allow_tf32, cudnn.allow_tf32
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        matmul.allow_tf32, cudnn.allow_tf32 = False, False
        try:
            yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = was
