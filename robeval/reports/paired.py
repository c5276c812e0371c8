"""Statistics of paired yes-or-no outcomes: the same images under two or more runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, chi2

from robeval.reports.stats import wilson


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: how surprising is this split of the images that differ, were it a coin's?"""
    n = only_a + only_b
    return float(binomtest(min(only_a, only_b), n, 0.5).pvalue) if n else 1.0


def newcombe(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """95 % interval for the difference of two paired proportions (Newcombe 1998, Statistics in Medicine 17, method 10).

    The Wilson intervals of both proportions, combined with their correlation phi (corrected for continuity).

    Args:
        both: Images that count for A and for B.
        only_a: For A alone.
        only_b: For B alone.
        neither: For neither.

    Returns:
        Ends of the interval of p_A - p_B, where p_A = (both + only_a) / n.
    """
    n = both + only_a + only_b + neither
    if n == 0:
        return -1.0, 1.0
    k_a, k_b = both + only_a, both + only_b
    p_a, p_b = k_a / n, k_b / n
    (low_a, high_a), (low_b, high_b) = wilson(k_a, n), wilson(k_b, n)
    spread = k_a * (n - k_a) * k_b * (n - k_b)
    cross = both * neither - only_a * only_b
    phi = (max(cross - n / 2, 0) if cross > 0 else cross) / math.sqrt(spread) if spread else 0.0

    def combined(u: float, v: float) -> float:
        return math.sqrt(max(u * u - 2 * phi * u * v + v * v, 0.0))

    difference = p_a - p_b
    return difference - combined(p_a - low_a, high_b - p_b), difference + combined(high_a - p_a, p_b - low_b)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down (1979), in the order given."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, k in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[k]))
        adjusted[k] = largest
    return adjusted


def cochran(stands: NDArray[np.bool_]) -> tuple[float, float]:
    """Cochran's Q: do k treatments of the same subjects succeed equally often?

    Args:
        stands: (n, k), success of each subject under each treatment.

    Returns:
        Q and its p from the chi-squared distribution with k - 1 degrees of freedom; Q = 0 and p = 1 where no subject
        tells the treatments apart.

    Source:
        Cochran 1950, The Comparison of Percentages in Matched Samples, Biometrika 37.
    """
    k = stands.shape[1]
    columns, rows, total = stands.sum(0), stands.sum(1), int(stands.sum())
    spread = k * total - int((rows**2).sum())
    if spread == 0:
        return 0.0, 1.0
    q = (k - 1) * (k * int((columns**2).sum()) - total**2) / spread
    return float(q), float(chi2.sf(q, k - 1))
