"""P10, the spectrum of the loss's input Hessian, as a picture."""

from __future__ import annotations

import torch

from robeval.bounds.expansion import expand, in_double
from robeval.bounds.spectral_density import spectral_density
from robeval.core.catalogue import diagnostic
from robeval.diagnose.counted import Counted
from robeval.diagnose.finding import CLEAR, Finding
from robeval.diagnose.subject import Subject


@diagnostic(
    id="P10",
    group=6,
    level="full",
    images=16,
    question="how is the curvature of the loss spread over directions?",
    limit="no verdict",
    source="Ghorbani, Krishnan, Xiao 2019, An Investigation into Neural Net Optimization via Hessian Eigenvalue"
    " Density, arXiv:1901.10159, on the Hessian with respect to the pixels",
)
def curvature_density(subject: Subject, *, images: int = 16, starts: int = 4, steps: int = 40) -> Finding:
    """The density of the eigenvalues of the cross-entropy's Hessian in the pixels, mean over images.

    Few large eigenvalues in front of a bulk at zero are usual; a spectrum wholly at zero means a loss that is flat or
    linear where it is looked at, which second-order bounds and attacks then see as well.

    Args:
        images: Images, the first of those chosen, the misclassified left out.
        starts: Random starts per image.
        steps: Hessian-vector products per start.

    Shapes:
        Uses all its images in one batch, (n, C, H, W) in [0, 1].
    Cost:
        1 forward and ``starts`` times ``steps`` backward passes per image.
    Source:
        arXiv:1901.10159, section 2, stochastic Lanczos quadrature.
    Departs:
        The Hessian of the input, not of the weights. ReLU kinks have no curvature that a derivative sees: what remains
        is that of the cross-entropy over the logits. In float64, since 1 - p is small where the network is sure.
    """
    chosen = subject.correct(images)
    size = chosen.x[0].numel()
    double = Counted.of(in_double(subject.classifier), subject.passes)
    around = expand(double, chosen.x.double(), chosen.y, "ce", 1.0, second=True)

    def draw(rows: torch.Tensor, number: int) -> torch.Tensor:
        return subject.rng("curvature-density", chosen.ids[rows], number).normal(size).double()

    # The quadrature asks for all rows at once, so a product is one backward pass through one graph.
    found = spectral_density(lambda rows: around.product, draw, len(chosen), size, starts=starts, steps=steps)
    grid, density = found.curve()
    trace = size * found.moment(1)
    largest, least = found.nodes.amax((1, 2)), found.nodes.amin((1, 2))
    ends = f"eigenvalues {float(least.min()):.3g} to {float(largest.max()):.3g}"
    data = {
        "eigenvalue": grid.tolist(), "density": density.mean(0).tolist(), "ids": chosen.ids.tolist(),
        "largest": largest.tolist(), "least": least.tolist(), "trace": trace.tolist(),
    }  # fmt: skip
    return Finding(CLEAR, ends, "no verdict", len(chosen), why="a picture", data=data)
