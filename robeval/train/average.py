"""Averages of the weights along the training: SWA and EMA."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robeval.core.images import Images
from robeval.core.streams import Streams


@dataclass
class Average:
    """A running average of a network's weights; buffers are those of the last update.

    With ``decay`` None it is the mean of all weights it was given (stochastic weight averaging, once per epoch:
    Izmailov et al. 2018, arXiv:1803.05407, algorithm 1). With a decay rho it is w' <- rho w' + (1 - rho) w (exponential
    moving average, once per step), which begins at the first weights it was given: those before the first step.

    Args:
        decay: Weight rho of the past, or None for the plain mean.
        tensors: The averaged parameters and the copied buffers, by their name in the ``state_dict``.
        count: Weights averaged so far. ``tensors`` and ``count`` are the whole state.
    """

    decay: float | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the present weights into the average."""
        averaged = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        share = 1 / (self.count + 1) if self.decay is None or self.count == 0 else 1 - self.decay
        for name, now in module.state_dict().items():
            if self.count and name in averaged:
                self.tensors[name].lerp_(now, share)
            else:
                self.tensors[name] = now.clone()
        self.count += 1

    def network(self, module: nn.Module, images: Images | None = None, batch_size: int = 256) -> nn.Module:
        """A copy of the network with the averaged weights.

        Args:
            module: The network that the average was taken of; it is left as it is.
            images: Clean training images from which BatchNorm's statistics are computed anew. Without them the copied
                ones stay, which fit an average over few steps (EMA) but not one over epochs (SWA).
            batch_size: Images per pass.
        """
        network = copy.deepcopy(module)
        for p in network.parameters():
            p.grad = None
        network.load_state_dict(self.tensors)
        if images is not None:
            recompute_statistics(network, images, batch_size)
        return network


@torch.no_grad()
def recompute_statistics(module: nn.Module, images: Images, batch_size: int = 256) -> None:
    """Set BatchNorm's running statistics to the mean of the batches' in one pass over the images.

    All other layers are in eval mode, so that dropout is off as in the evaluation that follows. The order is random, so
    that batches look alike when images lie sorted by class; an incomplete last batch is left out.

    Args:
        module: The network; its layers' modes are put back.
        images: Clean training images.
        batch_size: Images per pass.
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    modes = [(m, m.training) for m in module.modules()]
    momenta = [m.momentum for m in layers]
    module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # every batch counts the same
        layer.train()
    order = Streams(0, [0], "statistics", device=images.x.device).permutation(len(images))[0]
    try:
        for rows in order[: max(len(order) // batch_size, 1) * batch_size].split(batch_size):
            module(images.x[rows])
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for m, mode in modes:
            m.training = mode
