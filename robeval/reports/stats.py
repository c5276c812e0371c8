"""Counts with their uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from scipy.stats import norm

CONFIDENCE = 0.95


def wilson(k: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); (0, 1) when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    z = float(norm.ppf(0.5 + confidence / 2))
    p, z2 = k / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    return (0.0 if k == 0 else max(0.0, middle - half)), (1.0 if k == n else min(1.0, middle + half))


@dataclass(frozen=True)
class Rate:
    """``k`` of ``n`` images, with the 95 % Wilson interval."""

    k: int
    n: int

    @property
    def value(self) -> float:
        """The proportion; nan when nothing was counted."""
        return self.k / self.n if self.n else float("nan")

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        return wilson(self.k, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]" if self.n else "no image"
