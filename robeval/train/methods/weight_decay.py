"""Plain training with a penalty on the weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from robeval.core.catalogue import trainer
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Roth, Lucchi, Nowozin, Hofmann 2018, Adversarially Robust Training through Structured Gradient"
    " Regularization, arXiv:1805.08736, section 4",
    norms=(),
    robust=False,
    aliases=("wdecay",),
    passes={"forward": 1, "backward": 1},
)
def weight_decay(model: nn.Module, x: Tensor, y: Tensor, rng: Streams, *, weight: float = 5e-4) -> Iterator[Objective]:
    """Cross-entropy on the clean images plus half the squared length of all weights.

    The penalty is a term of the loss, so an optimiser that scales gradients, such as Adam, scales it too. It is the
    baseline "clean + L2" that input-gradient penalties are compared with.

    Args:
        weight: Strength lambda of lambda / 2 times the sum of squared weights; the paper has 5e-4 on CIFAR and 2e-4 on
            MNIST.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        One forward and one backward pass per step.
    Source:
        Roth et al. 2018, arXiv:1805.08736, section 4.
    Departs:
        The paper does not say whether its L2 is a term of the loss or of the optimiser's step. Here it is a term of the
        loss and spares biases and BatchNorm (parameters of one dimension); the loop's own --weight-decay, which works
        with every method, adds it in the optimiser, to all parameters. With plain SGD the two are the same.
    """

    def objective() -> Loss:
        z = model(x)
        squares = [p.square().sum() for p in model.parameters() if p.dim() >= 2]
        penalty = weight / 2 * (torch.stack(squares).sum() if squares else z.new_zeros(()))
        total = per_sample_loss(z, y, "ce").mean() + penalty
        return Loss(total, {"train_accuracy": accuracy(z, y), "penalty": penalty.detach()})

    yield objective
