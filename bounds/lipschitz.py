"""A global Lipschitz constant."""

from __future__ import annotations

from torch import Tensor

from robeval.bounds.constants import less, margins_at, pair_constants, reach
from robeval.bounds.graph import Graph
from robeval.bounds.proof import Proof, against
from robeval.bounds.region import Region
from robeval.core.catalogue import bound


@bound(
    source="Szegedy et al. 2014, Intriguing properties of neural networks, arXiv:1312.6199, section 4.3;"
    " Delattre, Barthelemy, Araujo, Allauzen 2023, Efficient Bound of Lipschitz Constant for Convolutional Layers by"
    " Gram Iteration, arXiv:2305.16173",
    norms=("l2", "linf", "l1"),
    kind="proof",
    domain="whole space",
    order=1,
    smooth=False,
)
def lipschitz(graph: Graph, region: Region, y: Tensor) -> Proof:
    """Margin less L_j times the distance, L_j a Lipschitz constant of the margin against rival j everywhere.

    L_j is a product of norms of the layers, each an upper bound: Gram iteration, for convolutions on a torus that is
    large enough, and never power iteration, which converges from below. Networks must be trained for small norms.

    Shapes:
        region of n images, y (n,); lower bounds (n, K).
    Cost:
        Norms of all layers once for a network; then one forward pass for a radius.
    Source:
        Szegedy et al. 2014, section 4.3; Delattre et al. 2023, theorem 1; Tsuzuku, Sato, Sugiyama 2018,
        arXiv:1802.04034, for the norms of pairs in the last layer.
    Departs:
        Affine layers that follow each other count as one. The constants are of l2; linf and l1 go through |v|_2 <=
        sqrt(d) |v|_inf for d pixels and |v|_2 <= |v|_1, and the diagonal of the smallest box around the region.
    Raises:
        ContractBroken: B03, an operator that proofs do not know.
    """
    pairs = graph.once("lipschitz", pair_constants)
    constants = pairs[y]
    fall = constants * reach(region)[:, None]
    lower = against(less(margins_at(graph, region.x, y), fall), y)
    return Proof(lower, constants.gather(1, lower.argmin(1, keepdim=True))[:, 0])
