"""Training on interval bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from robeval.bounds.graph import Graph
from robeval.bounds.intervals import intervals
from robeval.bounds.linear import backward
from robeval.bounds.proof import margins_of
from robeval.bounds.region import Region
from robeval.core.catalogue import trainer
from robeval.core.streams import Streams
from robeval.train.bounding import mixed, ramped
from robeval.train.memory import Memory
from robeval.train.step import Loss, Objective


@trainer(
    source="Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli 2018, On the Effectiveness of"
    " Interval Bound Propagation for Training Verifiably Robust Models, arXiv:1810.12715, equations 6 and 12",
    norms=("linf",),
    robust=True,
    loop={"select": "last", "weights": "ibp", "epochs": 90},
)
def ibp(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    norm: Literal["linf"] = "linf",
    eps: float = 8 / 255,
    kappa: float = 0.5,
    warmup: float = 0.05,
    ramp: float = 0.5,
) -> Iterator[Objective]:
    """Cross-entropy on the image, mixed with that of the worst logits which intervals around it leave open.

    Intervals of every neuron over the whole ball are computed beside the clean pass and differentiated in the weights;
    a network trained like this is proven right by the bound ``ibp`` for about as many images as PGD leaves right. The
    radius grows from 0 to eps during the ramp, and the weight of the clean loss falls from 1 to kappa.

    Args:
        norm: Norm of the threat model; intervals are made for linf.
        eps: Radius at the end of the ramp, in pixel units; a little above the one that will be certified often helps.
        kappa: Weight of the clean loss at the end of the ramp.
        warmup: Share of the training before the ramp, on the clean loss alone.
        ramp: Share of the training that the ramp takes.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        3 forward and 1 backward passes per step, two of the former for the centres and radii of the intervals.
    Source:
        Gowal et al. 2018, arXiv:1810.12715, section 3; the last layer is merged with the margins as in equation 6.
    Departs:
        Warm-up and ramp are shares of the training instead of numbers of steps. Intervals are cut to the pixel box.
        Layers behind the last activation are all merged with the margins, not one only. BatchNorm, which the paper does
        not use, treats the intervals with the statistics of the clean batch; dropout is left out of them.
    Raises:
        ContractBroken: an operator that bounds do not know (B03).
        UsageError: warmup and ramp that do not fit into one training, or a kappa outside [0, 1].
    """
    at = ramped(memory, warmup, ramp, kappa=kappa)

    def lower(graph: Graph, region: Region, y: Tensor) -> tuple[Tensor, int]:
        rows = margins_of(y, graph.classes, x.dtype)
        return backward(graph, region, len(graph.nodes) - 1, rows, intervals(graph, region), {}), 2

    def objective() -> Loss:
        return mixed(model, x, y, at * eps, 1 - at * (1 - kappa), lower)

    yield objective
