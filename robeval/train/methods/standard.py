"""Plain training on clean images."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from robeval.core.catalogue import trainer
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Goodfellow, Bengio, Courville 2016, Deep Learning, MIT Press, section 8.1",
    norms=(),
    robust=False,
    aliases=("clean", "natural", "undefended"),
    passes={"forward": 1, "backward": 1},
)
def standard(model: nn.Module, x: Tensor, y: Tensor, rng: Streams) -> Iterator[Objective]:
    """Cross-entropy on the clean images.

    The mean cross-entropy of the mini-batch is descended, nothing else. It is the start that SOAR needs and the
    baseline of every table.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        One forward and one backward pass per step.
    Source:
        Goodfellow, Bengio, Courville 2016, section 8.1.
    Departs:
        Nothing.
    """

    def objective() -> Loss:
        z = model(x)
        return Loss(per_sample_loss(z, y, "ce").mean(), {"train_accuracy": accuracy(z, y)})

    yield objective
