"""P4, the loss around some images, as a picture."""

from __future__ import annotations

import torch

from robeval.core.ball import per_row, vector_norm
from robeval.core.catalogue import diagnostic
from robeval.core.goal import LOSSES, Untargeted
from robeval.diagnose.finding import CLEAR, Finding
from robeval.diagnose.slopes import slope
from robeval.diagnose.subject import Subject


@diagnostic(
    id="P4",
    group=6,
    level="full",
    images=4,
    question="what does the loss look like around an image?",
    limit="no verdict",
    source="Jin, Yi, Wu, Mu, Huang 2023, Randomized Adversarial Training via Taylor Expansion, arXiv:2303.10653,"
    " figure 2",
)
def loss_surface(subject: Subject, *, images: int = 4, points: int = 41, reach: float = 1.0) -> Finding:
    """The margin and the cross-entropy on a square around each image: one axis the gradient's sign, one random signs.

    A surface that is flat on a plateau, or jagged at the scale of the ball, misleads attacks that follow gradients.
    Both axes have the length eps in the norm of the threat model; what leaves the box is cut off.

    Args:
        images: Images, the first that are classified correctly.
        points: Points along each axis.
        reach: Half-width of the square, in eps.

    Cost:
        ``points`` squared forward passes and one backward pass per image.
    Source:
        The axes are those of RAT's figure 2; the sign of the gradient is that of the cross-entropy at the image.
    Departs:
        Cross-entropy and margin instead of cross-entropy alone; a zero gradient leaves its axis flat.
    """
    chosen = subject.correct(len(subject.images))
    chosen = chosen[torch.arange(min(images, len(chosen)), device=chosen.x.device)]
    steep = slope(subject, "ce", chosen.x, chosen.y)[1].sign()
    rough = subject.rng("loss-surface", chosen.ids).sign(*chosen.x.shape[1:])
    axes = [d * (subject.eps / per_row(vector_norm(d, subject.norm).clamp_min(1e-30), d)) for d in (steep, rough)]
    grid = torch.linspace(-reach, reach, points).tolist()
    drawn = []
    for k in range(len(chosen)):
        square = torch.stack([(chosen.x[k] + a * axes[0][k] + b * axes[1][k]).clamp(0, 1) for b in grid for a in grid])
        z = subject.logits(square)
        goal = Untargeted(chosen.y[k].expand(len(z)))
        surface = {loss: LOSSES[loss](goal, z).view(points, points).tolist() for loss in ("ce", "cw")}
        drawn.append({"index": int(chosen.ids[k]), "label": int(chosen.y[k]), **surface})
    data = {"axis": grid, "images": drawn}
    return Finding(CLEAR, f"{len(drawn)} images", "no verdict", len(drawn), why="a picture", data=data)
