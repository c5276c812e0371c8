"""What a diagnostic is given: a model whose passes are counted, images, the threat model, and attacks to run on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import Spec
from robeval.core.choosing import choose, for_classes
from robeval.core.classifier import FLOOR, Classifier
from robeval.core.goal import Loss, Untargeted, ranked_rivals, towards
from robeval.core.images import Images
from robeval.core.questions import Gradient
from robeval.core.records import CLEAN
from robeval.core.streams import Streams
from robeval.diagnose.counted import Counted, Passes
from robeval.diagnose.outcomes import Counterexample, Outcome, carried, gathered, judged, reach
from robeval.engine.backend import Backend
from robeval.engine.drive import answer
from robeval.engine.judge import Outcome as Decided
from robeval.engine.run import run
from robeval.evaluate.settings import plan, searches_nearest
from robeval.store.runstore import RunStore


@dataclass(eq=False)
class Subject:
    """A model under diagnosis.

    Args:
        model: The model; diagnostics ask :attr:`classifier`, which counts.
        images: All chosen images.
        norm: Norm of the threat model.
        eps: Radius of the threat model, in pixel units.
        seed: Seed of every random stream.
        level: ``quick``, ``standard`` or ``full``.
        stores: Attack runs on the same model, images and norm; may be empty.
        surrogates: Models to craft transferred images on; may be empty.
        randomised: The model answers at random, and the user says so.
        batch_size: Most images in one model call.
        certificates: Runs of bounds on the same model and images; may be empty.
    """

    model: Classifier
    images: Images
    norm: str
    eps: float
    seed: int = 0
    level: str = "quick"
    stores: Sequence[RunStore] = ()
    surrogates: Sequence[Classifier] = ()
    randomised: bool = False
    batch_size: int = 256
    certificates: Sequence[RunStore] = ()
    #: Every counterexample so far, and the attacks that the present test asked for.
    found: list[Counterexample] = field(default_factory=list)
    ran: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.passes = Passes()
        self.classifier = Counted.of(self.model, self.passes)
        self.sources = [Counted.of(s, self.passes) for s in self.surrogates]
        self.images = self.images.to(self.classifier.device)
        self.place = {index: k for k, index in enumerate(self.images.ids.tolist())}
        self._known: dict[tuple[str, float, str, str], dict[int, Decided]] = {}
        self._clean: Tensor | None = None

    @cached_property
    def broken(self) -> set[int]:
        """Ids of images that the stored attacks broke within eps, and that diagnostics broke since."""
        ids: set[int] = set()
        for store in self.stores:
            frame = store.frame()
            hit = frame["success"] & (frame["attack"] != CLEAN) & (frame[f"distance_{self.norm}"] <= reach(self.eps))
            ids |= set(frame.loc[hit, "index"].tolist())
        return ids

    def some(self, n: int) -> Images:
        """The first n chosen images."""
        return self.images if n >= len(self.images) else self.images[torch.arange(n, device=self.images.x.device)]

    def correct(self, n: int) -> Images:
        """Those of the first n chosen images that are classified correctly.

        Raises:
            ContractBroken: there is none (D13), so that the test does not apply.
        """
        some = self.some(n)
        z = self.clean_logits()[: len(some)]
        return some[(z.isfinite().all(1) & (z.argmax(1) == some.y)).nonzero().squeeze(1)]

    def clean_logits(self) -> Tensor:
        """Logits of all chosen images, computed once. -> (N, K)."""
        if self._clean is None:
            self._clean = self.logits(self.images.x)
        return self._clean

    def logits(self, x: Tensor) -> Tensor:
        """Logits without gradients, in batches. (n, C, H, W) -> (n, K)."""
        with torch.no_grad():
            return torch.cat([self.classifier.logits(part) for part in x.split(self.batch_size)])

    def backend(self) -> Backend:
        """For the engine; batches of one image are not padded."""
        return Backend(self.classifier, self.batch_size, floor=min(FLOOR, self.batch_size))

    def rng(self, name: str, ids: Tensor, number: int = 0) -> Streams:
        """One random stream per image that belongs to a diagnostic.

        Args:
            name: Name of the diagnostic.
            ids: (n,) ids of the images.
            number: Number of the draw, so that a test may have many.
        """
        tries = [number] * len(ids)
        return Streams(self.seed, ids.tolist(), name, tries, dtype=self.images.x.dtype, device=self.images.x.device)

    def gradient(self, loss: str | Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Value and input gradient of a loss, which attacks ascend, in batches.

        Args:
            loss: ``ce``, ``cw`` (or ``margin``), ``dlr``, ``cw-targeted`` (towards the second most probable rival), or
                a function of goal and logits.
            x: (n, C, H, W).
            y: (n,) true classes.

        Returns:
            (n,) and (n, C, H, W).
        """
        names: dict[str | Loss, str | Loss] = {"margin": "cw", "cw-targeted": _second_rival}
        named = names.get(loss, loss)
        values, grads = [], []
        for a, b in zip(x.split(self.batch_size), y.split(self.batch_size), strict=True):
            open_ = torch.ones(len(a), dtype=torch.bool, device=a.device)
            said = answer(Gradient(a, named), self.classifier.logits, Untargeted(b), open_)
            values.append(said.loss)
            grads.append(said.grad)
        return torch.cat(values), torch.cat(grads)

    def attack(
        self,
        text: str,
        images: Images,
        *,
        eps: float | None = None,
        norm: str | None = None,
        on: Classifier | None = None,
    ) -> Outcome:
        """Run an attack of the house on some images; what is known from an earlier call is not run again.

        An image that it breaks inside the subject's own ball is a counterexample and counts in the headline.

        Args:
            text: Such as ``pgd:steps=40,loss=cw`` or ``square:queries=1000``.
            images: Some of the chosen images, all classified correctly.
            eps: Another radius than the subject's.
            norm: Another norm.
            on: Craft on this model instead, at full length, and judge here.

        Raises:
            UsageError: no such attack in this norm, or one that cannot be carried over.
            ContractBroken: the model gives no gradient.
        """
        norm, eps = norm or self.norm, self.eps if eps is None else eps
        spec = for_classes(choose("attacks", [text], norm)[0], self.classifier.classes)
        ball = Ball(norm, math.inf if searches_nearest(spec) else eps)
        label = spec.label if on is None else f"transfer:{on.name}/{spec.label}"
        self.ran[label] = None
        known = self._known.setdefault((label, ball.eps, norm, on.fingerprint if on else ""), {})
        ids = images.ids.tolist()
        rows = [k for k, index in enumerate(ids) if index not in known]
        if rows:
            new = images[torch.tensor(rows, device=images.x.device)]
            for row, one in zip(rows, self._attacked(spec, new, ball, on), strict=True):
                known[ids[row]] = one
                if norm == self.norm:
                    self._keep(ids[row], one, label)
        return gathered(images, [known[index] for index in ids], norm, eps)

    def counterexample(self, ids: Sequence[int] | Tensor, x_adv: Tensor, how: str) -> Tensor:
        """Hand in candidates; each is judged in float32 in a batch of its own, and kept when it stands.

        Args:
            ids: (n,) ids of chosen images that are classified correctly.
            x_adv: (n, C, H, W), a candidate for each.
            how: How they were found, in a few words.

        Returns:
            (n,) bool, the candidates that are adversarial images within eps.
        """
        at = torch.tensor([self.place[int(index)] for index in ids], dtype=torch.int64, device=self.images.x.device)
        if not len(at):
            return at.bool()
        clean = self.images[at]
        decided = judged(self.backend(), clean, x_adv[:, None], Ball(self.norm, self.eps))
        for index, one in zip(clean.ids.tolist(), decided, strict=True):
            self._keep(index, one, how)
        return torch.tensor([one.success for one in decided], device=clean.x.device)

    def _attacked(self, spec: Spec, images: Images, ball: Ball, on: Classifier | None) -> list[Decided]:
        backend = self.backend()
        if on is not None:
            return carried(spec, images, ball, backend, on, self.seed)
        clean = self.clean_logits()[[self.place[index] for index in images.ids.tolist()]]
        outcomes = run(plan(spec), images, Untargeted(images.y), ball, backend, seed=self.seed, clean=clean)
        return sorted(outcomes, key=lambda one: one.position)

    def _keep(self, index: int, one: Decided, how: str) -> None:
        if one.success and one.distances[self.norm] <= reach(self.eps) and index not in self.broken:
            self.broken.add(index)
            self.found.append(Counterexample(self.place[index], how, one))


def _second_rival(goal: Untargeted, z: Tensor) -> Tensor:
    """Lead of the second most probable rival class over the true one. (n, K) -> (n,)."""
    rank = torch.full_like(goal.y, min(1, z.shape[1] - 2))
    return towards(goal, z, ranked_rivals(goal, z.detach(), rank))
