"""What a diagnostic says, and the rule that turns a count of images into a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import beta, binomtest

from robeval.core.records import CLEAR, DOES_NOT_APPLY, FAILED, NOT_RUN, WARNING

__all__ = [
    "CLEAR",
    "DOES_NOT_APPLY",
    "FAILED",
    "NOT_RUN",
    "WARNING",
    "Finding",
    "not_run",
    "share_failed",
    "surely",
    "wilson",
]


@dataclass(frozen=True)
class Finding:
    """The outcome of one diagnostic on one model.

    Args:
        result: ``clear``, ``warning``, ``FAILED``, ``not run`` or ``does not apply``; there is no other word.
        measured: What was found, short: ``2 of 256``, ``0.01 median``.
        limit: What it is held against, in the same unit.
        n_images: Images that were looked at.
        flagged: Ids of the images that show the sign.
        interval: 95 % interval of the measured share or number, where it has one.
        what_to_do: What mends it; for a warning the usual innocent causes too.
        why: For ``not run`` and ``does not apply`` the reason; else what was seen, in one sentence.
        data: Plain numbers for pictures, stored as JSON beside the rows.
    """

    result: str
    measured: str
    limit: str
    n_images: int
    flagged: Sequence[int] = ()
    interval: tuple[float, float] | None = None
    what_to_do: str = ""
    why: str = ""
    data: Any = None


def not_run(why: str, result: str = NOT_RUN) -> Finding:
    """A test that measured nothing, with the reason.

    Args:
        why: The reason, in a few words.
        result: ``not run`` or ``does not apply``.
    """
    return Finding(result, "-", "-", 0, why=why)


def wilson(k: int, n: int) -> tuple[float, float] | None:
    """95 % Wilson interval of a share; none when nothing was counted."""
    if not n:
        return None
    interval = binomtest(k, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def surely(k: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson lower bound of a share: with this confidence the true share is larger."""
    return float(beta.ppf(1 - confidence, k, n - k + 1)) if k else 0.0


def share_failed(k: int, n: int, limit: float) -> bool:
    """The share k of n is larger than the limit beyond the chance of this sample (one-sided 95 %)."""
    return n > 0 and surely(k, n) > limit
