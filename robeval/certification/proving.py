"""Proofs image by image: at given radii, or the largest radius of each image by bisection in a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from robeval.bounds.graph import Graph
from robeval.bounds.proof import Proof
from robeval.bounds.region import Region
from robeval.certification.chunks import OnProgress, in_chunks
from robeval.certification.settings import Settings
from robeval.core.ball import Ball, vector_norm
from robeval.core.catalogue import Spec
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken
from robeval.core.images import Images
from robeval.core.records import Certificate

#: Images in the first chunk of a proof; the next ones grow while a chunk is quick.
FIRST = 16
#: A sought radius lies this close below the largest one that the method can prove.
TOLERANCE = 1e-3
#: The search starts at the distance to the farthest corner of the box over START, and gives up below that over DEEP.
START, DEEP = 2.0**10, 2.0**12

Method = Callable[[Graph, Region, Tensor], Proof]


@dataclass
class Findings:
    """What a proof says of some images at some radii.

    Args:
        radius: (n,) proven radius, 0 where nothing is proven.
        margin: (n,) lower bound of the margin there; nan where no radius was proven and none was given.
        constant: (n,) constant that the bound used, nan where there is none.
        falsified: (n,) bool, a point of the region has a wrong class.
        evaluations: (n,) int64, how often the bound was computed.
    """

    radius: Tensor
    margin: Tensor
    constant: Tensor
    falsified: Tensor
    evaluations: Tensor


class Prover:
    """One proof method on one network.

    Args:
        spec: The method with its settings.
        graph: The network as operators, float64.
        classifier: The same network as it runs; it alone says what is misclassified.
        images: All images of the run.
        settings: Norm, radii and what counts as correct.
    """

    def __init__(self, spec: Spec, graph: Graph, classifier: Classifier, images: Images, settings: Settings):
        self.spec, self.graph, self.classifier = spec, graph, classifier
        self.images, self.settings = images, settings
        self.method: Method = partial(spec.method.load(), **spec.settings)

    def records(self, rows: list[int], on_progress: OnProgress | None) -> Iterator[list[Certificate]]:
        """Chunk by chunk, the certificates of some images of the run."""
        return in_chunks(
            rows, FIRST, self.settings.batch_size, self.decide, label=self.spec.label, on_progress=on_progress
        )

    def decide(self, rows: list[int]) -> list[Certificate]:
        """The certificates of some images: one for each radius asked for, or one with the largest radius found.

        A misclassified image costs nothing and gets radius 0.
        """
        images = self.images[torch.tensor(rows, device=self.images.x.device)]
        with torch.no_grad():
            z = self.classifier.logits(images.x)
        if not z.isfinite().all():
            raise ContractBroken("NaN or Inf logits on clean images", code="C07")
        loss = overtaking(z.double(), images.y, self.settings.top_k)
        correct = (z.argmax(1) == images.y) if self.settings.top_k == 1 else loss < 0
        radii = self.settings.eps or [math.nan]
        if correct.any():
            found = self._at_radii(images[correct]) if self.settings.eps else [self._largest(images[correct])]
        else:
            found = [_nothing(images)] * len(radii)
        records = []
        for eps, findings in zip(radii, found, strict=True):
            place = (correct.cumsum(0) - 1).tolist()
            for i in range(len(rows)):
                own = place[i] if bool(correct[i]) else None
                records.append(self._certificate(images, i, eps, int(z[i].argmax()), float(loss[i]), findings, own))
        return records

    def _at_radii(self, images: Images) -> list[Findings]:
        """Every radius on its own; what is proven of a ball is proven of every smaller one."""
        found = [self._prove(images, images.x.new_full((len(images),), eps).double()) for eps in self.settings.eps]
        for larger, smaller in pairwise(reversed(found)):
            better = larger.margin > smaller.margin
            smaller.margin = torch.where(better, larger.margin, smaller.margin)
            smaller.constant = torch.where(better, larger.constant, smaller.constant)
        for eps, findings in zip(self.settings.eps, found, strict=True):
            findings.radius = torch.full_like(findings.margin, eps).masked_fill(~(findings.margin > 0), 0)
        for smaller, larger in pairwise(found):
            larger.falsified = larger.falsified | smaller.falsified
        return found

    def _prove(self, images: Images, eps: Tensor) -> Findings:
        """One evaluation of the bound at a radius per image."""
        with torch.no_grad():
            proof = self.method(self.graph, Region(images.x.double(), self.settings.norm, eps), images.y)
        margin = proof.margin(self.settings.top_k)
        margin = margin.masked_fill(proof.lower.isnan().any(1), -math.inf)  # an overflow proves nothing
        constant = torch.full_like(margin, math.nan) if proof.constant is None else proof.constant
        falsified = torch.zeros_like(margin, dtype=torch.bool)
        if proof.witness is not None:
            falsified = self._misclassified(images, eps, proof.witness)
        once = torch.ones_like(margin, dtype=torch.int64)
        return Findings(eps.masked_fill(~(margin > 0), 0), margin, constant, falsified, once)

    def _largest(self, images: Images) -> Findings:
        """Bisection, every image at its own radius: grow or shrink by steps until it is bracketed, then halve.

        Images that are done leave the batch. The largest radius that was proven is kept, with its margin.
        """
        x = images.x.double()
        farthest = vector_norm(torch.maximum(x, 1 - x), self.settings.norm)  # a ball of that radius holds the box
        low, high = torch.zeros_like(farthest), torch.full_like(farthest, math.inf)
        best = _nothing(images)
        open_ = torch.arange(len(images), device=x.device)
        while len(open_):
            lo, hi, cap = low[open_], high[open_], farthest[open_]
            eps = torch.where(lo == 0, hi / 8, (lo + hi) / 2)
            eps = torch.where(hi.isinf(), torch.maximum(2 * lo, cap / START).minimum(cap), eps)
            now = self._prove(images[open_], eps)
            proven = now.margin > 0
            low[open_] = torch.where(proven, eps, lo)
            high[open_] = torch.where(proven, hi, eps)
            best.margin[open_] = torch.where(proven, now.margin, best.margin[open_])
            best.constant[open_] = torch.where(proven, now.constant, best.constant[open_])
            best.evaluations[open_] += 1
            lo, hi = low[open_], high[open_]
            done = (lo >= cap) | (hi <= lo * (1 + TOLERANCE)) | (hi <= cap / (START * DEEP))
            open_ = open_[~done]
        best.radius = low
        return best

    def _misclassified(self, images: Images, eps: Tensor, witness: Tensor) -> Tensor:
        """Which witnesses the network itself, as it runs, misclassifies inside the ball and the box. -> (n,) bool."""
        found = torch.zeros(len(images), dtype=torch.bool, device=images.x.device)
        for i in witness.isfinite().flatten(1).all(1).nonzero()[:, 0].tolist():
            ball, x0 = Ball(self.settings.norm, float(eps[i])), images.x[i : i + 1]
            point = ball.project(x0, witness[i : i + 1].to(x0.dtype))
            with torch.no_grad():
                z = self.classifier.logits(point)
            wrong = bool(overtaking(z.double(), images.y[i : i + 1], self.settings.top_k) >= 0)
            if self.settings.top_k == 1:
                wrong = bool(z.argmax(1) != images.y[i])
            found[i] = wrong and bool(ball.contains(x0, point))
        return found

    def _certificate(
        self, images: Images, i: int, eps: float, prediction: int, loss: float, found: Findings, own: int | None
    ) -> Certificate:
        """The row of image ``i``; ``own`` is its place among the correct ones, None where it is misclassified."""
        top = f"-top{self.settings.top_k}" if self.settings.top_k > 1 else ""
        radius = 0.0 if own is None else float(found.radius[own])
        status = "clean_error" if own is None else "verified" if radius > 0 else "unknown"
        if own is not None and bool(found.falsified[own]):
            if radius > 0:
                raise ContractBroken(
                    f"{self.spec.label} proves image {int(images.ids[i])} at {radius:g} and shows a point of that ball "
                    "that is misclassified",
                    code="P02",
                    why="one of the two is wrong; no certificate of this image is written",
                    do="please report it",
                )
            status = "falsified"
        return Certificate(
            index=int(images.ids[i]),
            label=int(images.y[i]),
            prediction=prediction,
            clean_correct=own is not None,
            bound=self.spec.label,
            kind="proof",
            norm=self.settings.norm,
            eps=eps,
            status=status,
            radius=radius,
            margin_lower=math.nan if own is None else float(found.margin[own]),
            loss=f"cw{top}",
            loss_value=loss,
            gradient_norm=math.nan,
            curvature=math.nan,
            constant=math.nan if own is None else float(found.constant[own]),
            domain=str(self.spec.method.facts.get("domain", "ball")),
            arithmetic="float64, rounding enclosed",
            residual=math.nan,
            confidence=1.0,
            samples=0,
            forwards=1 + (0 if own is None else int(found.evaluations[own])),
            backwards=0,
            seed=self.settings.seed,
            bound_config_hash=self.spec.config_hash,
        )


def _nothing(images: Images) -> Findings:
    """Nothing proven, nothing computed."""
    zero = torch.zeros(len(images), dtype=torch.float64, device=images.x.device)
    return Findings(zero, zero + math.nan, zero + math.nan, zero.bool(), zero.long())


def overtaking(z: Tensor, y: Tensor, top: int = 1) -> Tensor:
    """How far the ``top``-th best rival is ahead of the true class; negative = correct. (n, K), (n,) -> (n,)."""
    own = z.gather(1, y[:, None])
    rivals = z.scatter(1, y[:, None], -math.inf)
    return rivals.topk(top, dim=1).values[:, -1] - own[:, 0]
