"""What a method keeps between mini-batches, and where in the training it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robeval.core.images import Images
from robeval.core.streams import Streams


@dataclass
class Memory:
    """The fifth argument of a trainer that asks for one by naming it ``memory``.

    Args:
        tensors: Whatever the method wants back at the next mini-batch, by name; saved with the state of the training,
            so that a resumed run goes on with the same numbers. Empty at the first mini-batch.
        ids: (n,) int64, positions of the mini-batch's images in the training split.
        epoch: Running epoch, counted from 0.
        step: Mini-batches before this one, over all epochs.
        batches: Mini-batches of an epoch.
        epochs: Epochs of the training.
        seed: Seed of the training.
        train: All training images, for what is computed from them once; None outside the training loop.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    epoch: int = 0
    step: int = 0
    batches: int = 1
    epochs: int = 1
    seed: int = 0
    train: Images | None = None

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Draws that belong to the mini-batch as a whole, such as noise on the weights; the same at every call."""
        bits = Streams(self.seed, [self.step], "mini-batch").bits(2)[0].tolist()
        return torch.Generator(device).manual_seed(bits[0] << 31 | bits[1] >> 1)
