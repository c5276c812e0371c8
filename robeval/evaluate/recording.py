"""From outcomes to records, and from records to parts on disk every few seconds."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robeval.core.catalogue import Spec
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.records import CERTIFIED, CLEAN, AttackRecord
from robeval.engine.judge import Outcome
from robeval.store.runstore import RunStore

FLUSH_SECONDS = 5.0


@dataclass
class Recorder:
    """Writes the records of one shard.

    Args:
        store: The run.
        images: The images of the shard; positions count in them.
        norm: Norm of the threat model.
        seed: Seed of the run.
        logits: (N, K), the clean pass.
    """

    store: RunStore
    images: Images
    norm: str
    seed: int
    logits: Tensor
    records: list[AttackRecord] = field(default_factory=list)
    examples: list[NDArray[np.float32]] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.prediction = self.logits.argmax(1)
        self.margin = Untargeted(self.images.y).margin(self.logits)
        self.correct = self.prediction == self.images.y

    def clean(self, position: int) -> None:
        """Record the clean pass of one image; a misclassified one is decided by it."""
        correct = bool(self.correct[position])
        self._unattacked(position, CLEAN, 0.0, found=not correct, forwards=1)

    def certified(self, position: int, eps: float) -> None:
        """Record that a proof covers one image, so that it is not attacked at this radius."""
        self._unattacked(position, CERTIFIED, eps, found=False, forwards=0)

    def _unattacked(self, position: int, why: str, eps: float, *, found: bool, forwards: int) -> None:
        distance = 0.0 if found else math.inf
        self._add(
            AttackRecord(
                index=int(self.images.ids[position]),
                label=int(self.images.y[position]),
                clean_prediction=int(self.prediction[position]),
                clean_correct=bool(self.correct[position]),
                attack=why,
                norm=self.norm,
                eps=eps,
                success=found,
                prediction=int(self.prediction[position]),
                distance_linf=distance,
                distance_l2=distance,
                distance_l1=distance,
                distance_l0=distance,
                margin=float(self.margin[position]),
                attempt=-1,
                iterations=0,
                forwards=forwards,
                backwards=0,
                first_success_forward=1 if found else -1,
                survives_8bit=False,
                seed=self.seed,
                attack_config_hash="",
                relative_l2=distance,
            )
        )

    def attacked(self, spec: Spec, radius: float, position: int, outcome: Outcome) -> None:
        """Record what an attack did to one image, and keep the image that it found."""
        example = -1
        if outcome.example is not None:
            example = len(self.examples)
            self.examples.append(outcome.example.detach().cpu().float().numpy())
        length = float(self.images.x[position].double().norm())
        self._add(
            AttackRecord(
                index=int(self.images.ids[position]),
                label=int(self.images.y[position]),
                clean_prediction=int(self.prediction[position]),
                clean_correct=True,
                attack=spec.label,
                norm=self.norm,
                eps=radius,
                success=outcome.success,
                prediction=outcome.prediction,
                **{f"distance_{norm}": distance for norm, distance in outcome.distances.items()},
                margin=outcome.margin,
                attempt=outcome.attempt,
                iterations=outcome.iterations,
                forwards=outcome.forwards,
                backwards=outcome.backwards,
                first_success_forward=outcome.first_success_forward,
                survives_8bit=outcome.survives_8bit,
                seed=self.seed,
                attack_config_hash=spec.config_hash,
                error=outcome.error,
                example=example,
                relative_l2=outcome.distances["l2"] / length if length else math.inf,
            )
        )

    def flush(self) -> None:
        """Put everything recorded so far on disk."""
        if self.records:
            self.store.append(self.records, np.stack(self.examples) if self.examples else None)
        self.records, self.examples, self.since = [], [], time.monotonic()

    def _add(self, record: AttackRecord) -> None:
        self.records.append(record)
        if time.monotonic() - self.since > FLUSH_SECONDS:
            self.flush()
