"""A classifier that counts its passes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from robeval.core.classifier import Classifier


@dataclass
class Passes:
    """Rows that went forward through models, and gradients that came back."""

    forwards: int = 0
    backwards: int = 0


@dataclass
class Counted(Classifier):
    """A classifier that counts every pass, whoever asks for it."""

    passes: Passes = field(default_factory=Passes)

    @classmethod
    def of(cls, classifier: Classifier, passes: Passes) -> Counted:
        """The same model under the same fingerprint, counting into ``passes``."""
        c = classifier
        return cls(c.module, c.classes, c.name, c.fingerprint, c.info, passes)

    def logits(self, x: Tensor) -> Tensor:
        z = self.module(x)
        self.passes.forwards += len(x)
        if isinstance(z, Tensor) and z.requires_grad:
            z.register_hook(lambda grad: self._back(len(grad)))
        return z

    def _back(self, rows: int) -> None:
        self.passes.backwards += rows
