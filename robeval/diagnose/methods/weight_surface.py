"""P7, the loss around the weights, as a picture."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from robeval.core.catalogue import diagnostic
from robeval.core.goal import Untargeted
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, Finding, not_run
from robeval.diagnose.subject import Subject


@diagnostic(
    id="P7",
    group=6,
    level="full",
    images=64,
    question="what does the loss look like around the weights?",
    limit="no verdict",
    source="Li, Xu, Taylor, Studer, Goldstein 2018, Visualizing the Loss Landscape of Neural Nets, arXiv:1712.09913",
)
def weight_surface(subject: Subject, *, images: int = 64, points: int = 21, reach: float = 1.0) -> Finding:
    """The mean cross-entropy of clean images on a plane through the weights, along two filter-normalised directions.

    Args:
        images: Images, the first of those chosen.
        points: Points along each axis.
        reach: Half-width of the plane; 1 moves each filter by its own norm.

    Cost:
        ``points`` squared forward passes per image.
    Source:
        Li et al. 2018, arXiv:1712.09913, section 4: each filter of a random direction gets the norm of its filter;
        biases and normalisation stay.
    Departs:
        None.
    """
    classifier = subject.classifier
    if not isinstance(classifier.module, nn.Module):
        return not_run("the model is a function, its weights are out of sight", DOES_NOT_APPLY)
    chosen = subject.some(images)
    model, moved = classifier.module, copy.deepcopy(classifier.module)
    weights = [(w, v) for w, v in zip(model.parameters(), moved.parameters(), strict=True) if w.dim() > 1]
    directions = [
        [filter_normalised(w, subject.seed, 2 * k + axis) for k, (w, _) in enumerate(weights)] for axis in (0, 1)
    ]
    grid = torch.linspace(-reach, reach, points).tolist()
    classifier.module = moved
    try:
        rows = []
        for b in grid:
            row = []
            for a in grid:
                with torch.no_grad():
                    for (w, v), d, e in zip(weights, *directions, strict=True):
                        v.copy_(w + a * d + b * e)
                row.append(float(Untargeted(chosen.y).cross_entropy(subject.logits(chosen.x)).mean()))
            rows.append(row)
    finally:
        classifier.module = model
    data = {"axis": grid, "ce": rows, "images": len(chosen)}
    return Finding(CLEAR, f"{len(chosen)} images", "no verdict", len(chosen), why="a picture", data=data)


def filter_normalised(weight: Tensor, seed: int, number: int) -> Tensor:
    """A Gaussian direction, each filter (row of the weight) with the norm of that filter."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    d = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device).flatten(1)
    lengths = torch.linalg.vector_norm(weight.flatten(1), dim=1, keepdim=True)
    d *= lengths / torch.linalg.vector_norm(d, dim=1, keepdim=True).clamp_min(1e-30)
    return d.view_as(weight)
