"""The engine: full batches of open rows from many cohorts, and a judge over every point.

An attack proposes, the engine disposes. Images that are decided are never evaluated again; the places that they leave
are filled with rows of other cohorts. What an image experiences depends on its own stream and its own answers alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.goal import Goal
from robeval.core.images import Images
from robeval.core.questions import Answer, Attack, Gradient, Logits, Question
from robeval.core.streams import Streams
from robeval.engine.backend import Backend
from robeval.engine.cohort import Cohort, waves
from robeval.engine.judge import Judge, Outcome

#: Most entries (rows times pixels) of one cohort, so that its tensors stay small beside the model's.
COHORT_ENTRIES = 1 << 24


@dataclass(frozen=True)
class Plan:
    """An attack with its settings, ready to run.

    Args:
        name: Name of the method; part of the key of the random streams.
        start: ``(x0, goal, ball, rng) -> generator``.
        attempts: Restarts or targets per image.
        black_box: The attack may only ask for logits.
    """

    name: str
    start: Callable[[Tensor, Goal, Ball, Streams], Attack]
    attempts: int = 1
    black_box: bool = False


OnBatch = Callable[[int, int, str], None]


def run(
    plan: Plan,
    images: Images,
    goal: Goal,
    ball: Ball,
    backend: Backend,
    *,
    seed: int = 0,
    clean: Tensor | None = None,
    on_batch: OnBatch | None = None,
) -> Iterator[Outcome]:
    """Attack every image; yield each outcome as soon as it is decided.

    Args:
        plan: The attack.
        images: (N, C, H, W) in [0, 1]; all of them are attacked, so leave out those already misclassified.
        goal: One goal per image.
        ball: Threat model; ``eps = inf`` searches the nearest adversarial image.
        backend: Evaluates and counts.
        seed: Seed of the run.
        clean: (N, K), logits of the images where they are known, so that no attack pays for them again.
        on_batch: Told (decided, total, text) after every batch.

    Raises:
        MachineError: out of memory even with one image.
        ContractBroken: the model fails or gives no gradient.
    """
    if (
        math.isinf(ball.eps) and backend.precision != "float32"
    ):  # what lies on the boundary is no matter for coarse arithmetic
        backend = replace(backend, precision="float32")
    engine = _Engine(plan, images, goal, ball, backend, seed, clean)
    while engine.busy:
        yield from engine.step()
        if on_batch:
            text = f"{plan.name}  {backend.counts.forwards + backend.counts.backwards:,} passes"
            on_batch(int(engine.judge.closed.sum()), len(images), text)


class _Engine:
    def __init__(
        self, plan: Plan, images: Images, goal: Goal, ball: Ball, backend: Backend, seed: int, clean: Tensor | None
    ):
        self.plan, self.images, self.goal, self.ball = plan, images, goal, ball
        self.backend, self.seed, self.clean = backend, seed, clean
        self.judge = Judge(images, goal, ball, backend)
        self.waves = waves(plan.attempts, at_once=self.judge.minimal)
        self.queue: dict[int, list[int]] = defaultdict(list)
        self.queue[0] = list(range(len(images)))
        self.live: list[Cohort] = []
        self.templates: dict[object, Answer] = {}

    @property
    def busy(self) -> bool:
        return bool(self.live or any(self.queue.values()))

    def step(self) -> Iterator[Outcome]:
        """Admit cohorts, fill one batch, and let the cohorts whose answers are complete go on."""
        capacity = max(1, self.backend.capacity)
        while sum(c.open_waiting for c in self.live) < capacity and any(self.queue.values()):
            yield from self._settle(self._admit(capacity))
        if not self.live:
            return
        lanes: dict[object, list[Cohort]] = defaultdict(list)
        for cohort in self.live:
            lanes[cohort.lane].append(cohort)
        lane = max(lanes.values(), key=lambda cohorts: sum(c.open_waiting for c in cohorts))
        self._evaluate(lane, capacity)
        for cohort in lane:
            if not cohort.open_waiting:
                yield from self._settle(cohort)

    def _admit(self, capacity: int) -> Cohort:
        """A cohort of the wave with most images in the queue, later waves first among equals."""
        wave = max(self.queue, key=lambda w: (len(self.queue[w]), w))
        attempts = self.waves[wave]
        entries = self.images.x[0].numel() * len(attempts)
        seats = max(1, min(max(capacity, 16) // len(attempts), COHORT_ENTRIES // entries))
        chosen, self.queue[wave] = self.queue[wave][:seats], self.queue[wave][seats:]
        rows = torch.tensor([i for i in sorted(chosen) for _ in attempts], device=self.images.x.device)
        tries = [a for _ in chosen for a in attempts]
        ids = self.images.ids[rows].tolist()
        x0 = self.images.x[rows]
        rng = Streams(self.seed, ids, self.plan.name, tries, dtype=x0.dtype, device=x0.device)
        attack = self.plan.start(x0, self.goal[rows], Ball(self.ball.norm, self.ball.eps), rng)
        clean = None if self.clean is None else self.clean[rows]
        cohort = Cohort(rows, rng.attempt, wave, attack, x0, self.plan.black_box, clean)
        cohort.resume(~self.judge.closed[rows])
        self.live.append(cohort)
        return cohort

    def _evaluate(self, lane: list[Cohort], capacity: int) -> None:
        """One batch from the waiting points of a lane."""
        taken, room = [], capacity
        for cohort in lane:
            chosen = cohort.take(room)
            if len(chosen):
                taken.append((cohort, chosen))
                room -= len(chosen)
            if not room:
                break
        points = torch.cat([c.points[chosen] for c, chosen in taken if c.points is not None])
        positions = torch.cat([c.rows[c.owner[chosen]] for c, chosen in taken if c.owner is not None])
        packed: Question = Logits(points)
        asked = [(c.question, chosen) for c, chosen in taken if isinstance(c.question, Gradient)]
        if asked:
            args = zip(*([a[chosen] for a in q.args] for q, chosen in asked), strict=True)
            packed = Gradient(points, asked[0][0].loss, args=tuple(torch.cat(a) for a in args))
        said = self.backend.evaluate(packed, self.goal[positions])
        losses = 0 if isinstance(packed, Logits) else (1 if said.loss.dim() == 1 else said.loss.shape[1])
        self.judge.charge(positions, losses)
        self.templates[taken[0][0].lane] = said
        start = 0
        for cohort, chosen in taken:
            part = slice(start, start + len(chosen))
            cohort.store(chosen, said[part])
            start += len(chosen)

    def _settle(self, cohort: Cohort) -> Iterator[Outcome]:
        """Judge a complete question and go on, until the cohort waits for answers again or has ended."""
        while cohort.question is not None and not cohort.open_waiting:
            if cohort.reply is None:  # nobody asked
                cohort.store(torch.empty(0, dtype=torch.int64, device=cohort.rows.device), self._template(cohort))
            assert cohort.reply is not None and cohort.owner is not None and cohort.points is not None
            logits = cohort.reply.logits
            counts = cohort.complete(self.goal[cohort.rows])
            if len(counts):
                owner = cohort.owner[counts]
                yield from self.judge.look(
                    cohort.rows[owner], cohort.attempts[owner], cohort.points[counts], logits[counts]
                )
            cohort.resume(~self.judge.closed[cohort.rows])
        if cohort.question is None:
            self.live.remove(cohort)
            yield from self._next_wave(cohort)

    def _template(self, cohort: Cohort) -> Answer:
        """Shapes of an answer for a question that no open row asks."""
        if cohort.lane not in self.templates:
            question = cohort.question
            one: Question = Logits(cohort.x0[:1])
            if isinstance(question, Gradient):
                one = Gradient(cohort.x0[:1], question.loss, args=tuple(a[:1] for a in question.args))
            self.templates[cohort.lane] = self.backend.evaluate(one, self.goal[cohort.rows[:1]])
        return self.templates[cohort.lane][:0]

    def _next_wave(self, cohort: Cohort) -> Iterator[Outcome]:
        left = cohort.rows[~self.judge.closed[cohort.rows]].unique()
        if cohort.wave + 1 < len(self.waves):
            self.queue[cohort.wave + 1] += left.tolist()
        else:
            yield from self.judge.finish(left)
