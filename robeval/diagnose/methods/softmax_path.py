"""P8, the probabilities along the direction of an attack, as a picture."""

from __future__ import annotations

import torch

from robeval.core.ball import Ball
from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, Finding
from robeval.diagnose.path import path
from robeval.diagnose.subject import Subject


@diagnostic(
    id="P8",
    group=6,
    level="full",
    images=4,
    question="how do the probabilities change along the direction of an attack?",
    limit="no verdict",
    source="Roth, Lucchi, Nowozin, Hofmann 2018, Adversarially Robust Training through Structured Gradient"
    " Regularization, arXiv:1805.08736, figure 6",
)
def softmax_path(subject: Subject, *, images: int = 4, span: float = 5.0, points: int = 101) -> Finding:
    """Softmax outputs on the line through an image and the end of a PGD run, on both sides and far beyond.

    Args:
        images: Images, the first that are classified correctly.
        span: Ends of the line, in lengths of the perturbation.
        points: Points of the line.

    Cost:
        ``points`` forward passes per image, and 10 steps of PGD.
    Source:
        SGR paper, figure 6: the line x + t delta with t from -5 to 5 and delta from PGD of 10 steps of eps / 5.
    Departs:
        Points that leave the box are cut off at it, since models are promised pixels in [0, 1].
    """
    chosen = subject.correct(len(subject.images))
    chosen = chosen[torch.arange(min(images, len(chosen)), device=chosen.x.device)]
    change = path(subject, "pgd:steps=10,relative_step=0.2", chosen).last - chosen.x
    times = torch.linspace(-span, span, points)
    drawn = []
    for k in range(len(chosen)):
        line = torch.stack([(chosen.x[k] + t * change[k]).clamp(0, 1) for t in times.tolist()])
        p = subject.logits(line).softmax(1)
        leading = p.amax(0).topk(min(4, p.shape[1])).indices.tolist()
        label = int(chosen.y[k])
        classes = list(dict.fromkeys([label, *leading]))
        curves = {str(c): p[:, c].tolist() for c in classes}
        drawn.append({"index": int(chosen.ids[k]), "label": label, "probabilities": curves})
    size = float(Ball(subject.norm, subject.eps).norm_of(change).mean())
    data = {"t": times.tolist(), "size": size, "images": drawn}
    return Finding(CLEAR, f"{len(drawn)} images", "no verdict", len(drawn), why="a picture", data=data)
