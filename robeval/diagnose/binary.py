"""Machinery of the binarization test: features, one separator per image, and attacks on all these heads at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robeval.core.ball import Ball
from robeval.core.catalogue import Spec
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.questions import Answer, Gradient, Proposals, Question
from robeval.core.streams import Streams
from robeval.diagnose.counted import Passes
from robeval.engine.drive import answer
from robeval.evaluate.settings import plan, searches_nearest


@contextmanager
def _watched(layers: list[nn.Linear]) -> Iterator[list[tuple[nn.Linear, Tensor]]]:
    """The inputs of dense layers, in the order in which a forward pass reaches them."""
    seen: list[tuple[nn.Linear, Tensor]] = []
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append((m, args[0]))) for m in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Features:
    """What the last dense layer of a network is given, differentiable in the pixels.

    Args:
        classifier: The network; every pass is counted there.
        layer: Its last dense layer.
    """

    classifier: Classifier
    layer: nn.Linear

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C, H, W) -> features (n, F), and the logits of the whole network, (n, K)."""
        with _watched([self.layer]) as seen:
            z = self.classifier.logits(x)
        return seen[-1][1], z


def features_of(classifier: Classifier, x: Tensor) -> Features | str:
    """The features of a network, or the reason why it has none that this test can use.

    Args:
        classifier: The network.
        x: A few images, (n, C, H, W) with n > 1.
    """
    if not isinstance(classifier.module, nn.Module):
        return "the model is a function, its layers are out of sight"
    with torch.no_grad(), _watched([m for m in classifier.module.modules() if isinstance(m, nn.Linear)]) as seen:
        classifier.logits(x)
    if not seen:
        return "no feature layer: the model has no dense layer"
    layer, said = seen[-1]
    if layer.out_features != classifier.classes:
        return f"no feature layer: the last dense layer gives {layer.out_features} numbers, not one per class"
    if said.dim() != 2 or len(said) != len(x):
        return f"no feature layer: the last dense layer is given {tuple(said.shape)} for {len(x)} images"
    return Features(classifier, layer)


def separators(inner: Tensor, boundary: Tensor, *, steps: int = 2000, near: float = 0.05) -> tuple[Tensor, Tensor]:
    """Per image the direction of the largest gap between two sets of points, all images in one batch.

    The nearest points of the two convex hulls, by Frank and Wolfe's steps (Gilbert 1966); what logistic regression
    without a penalty tends to. Features are scaled to unit spread first.

    Args:
        inner: (n, P, F).
        boundary: (n, Q, F).
        steps: Most steps.
        near: Relative distance to the largest gap at which the search ends.

    Returns:
        Directions (n, F), and whether they separate the sets, (n,) bool.
    """
    spread = torch.cat([inner, boundary], 1).std(1, keepdim=True).clamp_min(1e-9)
    a, b = inner / spread, boundary / spread
    w = b.mean(1) - a.mean(1)
    each = torch.arange(len(w), device=w.device)
    gap = torch.zeros_like(w[:, 0])
    for _ in range(steps):
        high = torch.bmm(a, w[:, :, None]).squeeze(2).argmax(1)
        low = torch.bmm(b, w[:, :, None]).squeeze(2).argmin(1)
        towards = b[each, low] - a[each, high]
        gap, square = (w * towards).sum(1), (w * w).sum(1)
        if bool((gap >= (1 - near) * square).all()):
            break
        change = towards - w
        step = (-(w * change).sum(1) / (change * change).sum(1).clamp_min(1e-30)).clamp(0, 1)
        w = w + step[:, None] * change
    w = w / spread.squeeze(1)
    return w, _lowest(boundary, w) > _highest(inner, w)


def _highest(points: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(points, w[:, :, None]).squeeze(2).amax(1)


def _lowest(points: Tensor, w: Tensor) -> Tensor:
    return -_highest(points, -w)


@dataclass
class Heads:
    """One two-class head per image, in the place of the last layer.

    Args:
        weight: (n, F), each head's difference of logits is weight . features - offset.
        offset: (n,).
        fitted: (n,) bool, the head tells all inner points (class 0) from all boundary points (class 1).
        range: (n,) spread of the network's own logits over the same points.
    """

    weight: Tensor
    offset: Tensor
    fitted: Tensor
    range: Tensor

    @classmethod
    def fit(cls, inner: Tensor, boundary: Tensor, logits: Tensor, closeness: float) -> Heads:
        """Heads with logits of spread 1, and their boundary at ``closeness`` of the way to the boundary points.

        Args:
            inner: (n, P, F).
            boundary: (n, Q, F).
            logits: (n, P + Q, K), of the network at all points.
            closeness: 0.5 is half way, 0.999 close to the boundary points.
        """
        w, fitted = separators(inner, boundary)
        everything = torch.cat([inner, boundary], 1)
        w = w / (_highest(everything, w) - _lowest(everything, w)).clamp_min(1e-30)[:, None]
        top, bottom = _lowest(boundary, w), _highest(inner, w)
        flat = logits.flatten(1)
        return cls(w, bottom + closeness * (top - bottom), fitted, flat.amax(1) - flat.amin(1))

    def scaled(self, scale: str) -> Heads:
        """Heads whose logits have spread 1 (``width``), or that of the network's own logits (``adaptive``)."""
        factor = self.range if scale == "adaptive" else torch.ones_like(self.range)
        return Heads(factor[:, None] * self.weight, factor * self.offset, self.fitted, self.range)

    def logits(self, features: Tensor, rows: Tensor) -> Tensor:
        """One point for each of some heads, as one batched product. (m, F), (m,) -> (m, 2)."""
        half = (torch.bmm(self.weight[rows][:, None], features[:, :, None]).flatten() - self.offset[rows]) / 2
        return torch.stack([-half, half], 1)


@dataclass
class Trial:
    """All heads under one attack: what was found, and how many questions it took.

    Args:
        features: Of the network.
        heads: One per image.
        images: The images that the heads belong to.
        ball: Where adversarial points count.
        passes: Where gradients are counted; passes forward count themselves.
        batch_size: Most images in one model call.
    """

    features: Features
    heads: Heads
    images: Images
    ball: Ball
    passes: Passes
    batch_size: int

    def __post_init__(self) -> None:
        self.found = torch.zeros(len(self.images), dtype=torch.bool, device=self.images.x.device)
        self.queries = 0

    def ask(self, x: Tensor, rows: Tensor) -> Tensor:
        """Logits of the heads of some rows, one point each; every point counts. (m, C, H, W) -> (m, 2)."""
        parts = zip(x.split(self.batch_size), rows.split(self.batch_size), strict=True)
        z = torch.cat([self.heads.logits(self.features(part)[0], r) for part, r in parts])
        z = z + 0 * x.flatten(1).sum(1, keepdim=True)  # a cut graph means a gradient of zero, not an error
        x = x.detach()
        hit = rows[(z[:, 1] > z[:, 0]) & self.ball.contains(self.images.x[rows], x)]
        self.found[hit] = True
        return z

    def attack(self, spec: Spec, seed: int) -> None:
        """Run a catalogued attack from beginning to end on every head, all of its attempts."""
        method, n, device = plan(spec), len(self.images), self.images.x.device
        goal = Untargeted(torch.zeros(n, dtype=torch.int64, device=device))
        ball = Ball(self.ball.norm, float("inf")) if searches_nearest(spec) else self.ball
        rows = torch.arange(n, device=device)
        for attempt in range(method.attempts):
            tries = [attempt] * n
            rng = Streams(seed, self.images.ids.tolist(), method.name, tries, dtype=self.images.x.dtype, device=device)
            generator = method.start(self.images.x, goal, ball, rng)
            try:
                question = next(generator)
                while True:
                    question = generator.send(self._answer(question, goal, rows))
            except StopIteration as end:
                if end.value is not None:
                    with torch.no_grad():
                        self.ask(end.value, rows)

    def _answer(self, question: Question, goal: Untargeted, rows: Tensor) -> Answer:
        open_ = torch.ones_like(rows, dtype=torch.bool)
        mine = rows
        if isinstance(question, Proposals):
            mine = question.rows.repeat_interleave(question.only.shape[1])
        self.queries += len(mine) // len(rows)
        said = answer(question, lambda x: self.ask(x, mine), goal, open_)
        if isinstance(question, Gradient):
            self.passes.backwards += len(rows) * (1 if said.loss.dim() == 1 else said.loss.shape[1])
        return said

    def search(self, queries: int, seed: int, name: str) -> None:
        """The control: as many random points of the ball's surface, for every head that has not fallen to one."""
        for number in range(queries):
            rows = (~self.found).nonzero().squeeze(1)
            if not len(rows):
                return
            ids = self.images.ids[rows].tolist()
            rng = Streams(seed, ids, name, [number] * len(ids), dtype=self.images.x.dtype, device=self.images.x.device)
            with torch.no_grad():
                self.ask(self.ball.surface(self.images.x[rows], rng), rows)
