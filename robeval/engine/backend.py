"""One padded batch: logits, losses, gradients, with every pass counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robeval.core.classifier import ELSEWHERE, FLOOR, Classifier
from robeval.core.errors import ContractBroken, MachineError, RobevalError
from robeval.core.goal import Goal
from robeval.core.questions import Answer, Gradient, Logits, Question
from robeval.engine.drive import answer


@dataclass
class Counts:
    """What the model was asked, all in rows (images) except ``calls``."""

    forwards: int = 0
    backwards: int = 0
    calls: int = 0
    slots: int = 0

    @property
    def fill(self) -> float:
        """Share of the batch places that held a row somebody had asked about."""
        return self.forwards / self.slots if self.slots else 1.0


@dataclass
class Backend:
    """Evaluates packed rows on a classifier, in batches whose shapes come from a short list.

    Args:
        classifier: The model; its parameters need no gradient.
        capacity: Most rows in one batch. Halved when memory runs out, which never changes an answer.
        floor: Batches are padded to multiples of it.
        precision: float32, or the type that autocast lets a search compute in: bfloat16 or float16.
    """

    classifier: Classifier
    capacity: int = 256
    counts: Counts = field(default_factory=Counts)
    floor: int = FLOOR
    precision: str = "float32"

    def shape(self, rows: int) -> int:
        """Width of the padded batch for so many rows.

        Where kernels are tuned or compiled for a shape it is one of sixteen; a CPU takes any multiple of four, with the
        same bits, and pays for every row.
        """
        if self.classifier.device.type == "cpu" and not self.classifier.info.get("compiled"):
            return -(-rows // self.floor) * self.floor
        floor = ELSEWHERE if self.floor == FLOOR else self.floor
        step = max(floor, self.capacity // 16)
        return max(rows, min(max(floor, self.capacity), -(-rows // step) * step))

    def evaluate(self, question: Question, goal: Goal) -> Answer:
        """Answer a question about any number of packed rows.

        Raises:
            MachineError: out of memory at the smallest batch.
            ContractBroken: the model gives no gradient, or fails on these images.
        """
        n = len(question.points)
        parts = []
        start = 0
        while start < n:
            rows = torch.arange(start, min(start + max(1, self.capacity), n), device=question.points.device)
            try:
                parts.append(self._batch(question, goal, rows))
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise _told(error) from error
                if self.capacity == 1 and self.floor == 1:
                    raise MachineError(
                        "out of memory with one image in a batch",
                        code="E01",
                        do="use a machine with more memory, or another --device",
                    ) from None
                self.capacity = max(1, self.capacity // 2)
                self.floor = min(self.floor, self.capacity)  # memory goes before the last bits of the logits
                continue
            start += len(rows)
        return parts[0] if len(parts) == 1 else _join(parts)

    def logits(self, x: Tensor, goal: Goal) -> Tensor:
        """(n, C, H, W) -> (n, K)."""
        return self.evaluate(Logits(x), goal).logits

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Full precision inside, whatever the search may use."""
        before, self.precision = self.precision, "float32"
        try:
            yield
        finally:
            self.precision = before

    def _logits(self, x: Tensor) -> Tensor:
        if self.precision == "float32":
            return self.classifier.logits(x)
        with torch.autocast(x.device.type, dtype=getattr(torch, self.precision)):
            return self.classifier.logits(x).to(x.dtype)

    def _batch(self, question: Question, goal: Goal, rows: Tensor) -> Answer:
        n = len(rows)
        width = self.shape(n)
        padded = torch.cat([rows, rows[:1].expand(width - n)])
        points, open_ = question.points[padded], torch.ones(width, dtype=torch.bool, device=rows.device)
        asked: Question = Logits(points)
        if isinstance(question, Gradient):
            asked = Gradient(points, question.loss, args=tuple(a[padded] for a in question.args))
        said = answer(asked, self._logits, goal[padded], open_)
        self.counts.calls += 1
        self.counts.slots += width
        self.counts.forwards += n
        if isinstance(question, Gradient):
            self.counts.backwards += n * (1 if said.loss.dim() == 1 else said.loss.shape[1])
        return said[:n]


def _join(parts: list[Answer]) -> Answer:
    return Answer(*(torch.cat([getattr(p, name) for p in parts]) for name in ("logits", "open", "loss", "grad")))


def out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "out of memory" in text or "can't allocate memory" in text
    )


def _told(error: BaseException) -> BaseException:
    """The model's own failure, in the user's terms."""
    if isinstance(error, RobevalError):
        return error
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "does not require grad" in text or "not have been used in the graph" in text:
        return ContractBroken(
            "the model gives no gradient with respect to its input",
            code="C19",
            why="a detach, a no_grad or a rounding inside the model cuts the graph; gradient attacks would be blind",
            do="mend the model, or use attacks that need no gradient: square, simba, noise",
        )
    return ContractBroken(f"the model failed: {text}", code="C17", do="check the model on one batch of these images")
