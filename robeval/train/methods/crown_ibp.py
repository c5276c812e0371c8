"""Training on linear bounds whose activations are bounded by intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn

from robeval.bounds.crown_intervals import relaxed
from robeval.bounds.graph import Graph
from robeval.bounds.linear import backward
from robeval.bounds.proof import margins_of
from robeval.bounds.region import Region
from robeval.core.catalogue import trainer
from robeval.core.streams import Streams
from robeval.train.bounding import mixed, ramped
from robeval.train.memory import Memory
from robeval.train.step import Loss, Objective


@trainer(
    source="Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning, Hsieh 2020, Towards Stable and Efficient Training of"
    " Verifiably Robust Neural Networks, arXiv:1906.06316, equation 12",
    norms=("linf",),
    robust=True,
    loop={"select": "last", "weights": "ibp", "epochs": 90},
)
def crown_ibp(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    norm: Literal["linf"] = "linf",
    eps: float = 8 / 255,
    kappa: float = 0.5,
    beta: float = 0.0,
    warmup: float = 0.05,
    ramp: float = 0.5,
) -> Iterator[Objective]:
    """As ibp, with tighter bounds while the radius grows: linear ones, which hand over to the intervals.

    The bounds of the margins are beta times those of CROWN, carried back through all layers with intervals before each
    activation, plus 1 - beta times those of the intervals alone. Tight bounds help early, the intervals are easier to
    train at a large radius, so that beta falls from 1 during the ramp.

    Args:
        norm: Norm of the threat model; the bounds are made for linf.
        eps: Radius at the end of the ramp, in pixel units; a little above the one that will be certified often helps.
        kappa: Weight of the clean loss at the end of the ramp, from 1.
        beta: Share of the linear bounds at the end of the ramp, from 1.
        warmup: Share of the training before the ramp, on the clean loss alone.
        ramp: Share of the training that the ramp takes.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        3 + K forward and 1 backward passes per step with K classes, 3 and 1 once beta is 0.
    Source:
        Zhang et al. 2020, arXiv:1906.06316, section 3 and equation 12.
    Departs:
        Warm-up and ramp are shares of the training instead of numbers of epochs. The bounds are cut to the pixel box.
        BatchNorm treats them with the statistics of the clean batch; dropout is left out of them.
    Raises:
        ContractBroken: an operator that bounds do not know (B03).
        UsageError: warmup and ramp that do not fit into one training, or a kappa or beta outside [0, 1].
    """
    at = ramped(memory, warmup, ramp, kappa=kappa, beta=beta)
    share = 1 - at * (1 - beta)

    def lower(graph: Graph, region: Region, y: Tensor) -> tuple[Tensor, int]:
        rows, last = margins_of(y, graph.classes, x.dtype), len(graph.nodes) - 1
        found, lines = relaxed(graph, region, tight=False)
        by_intervals = backward(graph, region, last, rows, found, {})
        if share == 0:
            return by_intervals, 2
        by_lines = backward(graph, region, last, rows, found, lines)
        return share * by_lines + (1 - share) * by_intervals, 2 + graph.classes

    def objective() -> Loss:
        return mixed(model, x, y, at * eps, 1 - at * (1 - kappa), lower)

    yield objective
