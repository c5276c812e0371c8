"""Numbers as people write them: ``8/255``, ``0.1``, ``0:500``."""

from __future__ import annotations

import math
from fractions import Fraction

from robeval.core.errors import UsageError


def number(text: str, *, name: str = "number", code: str = "A02") -> float:
    """Read ``8/255``, ``0.031`` or ``1e-3``.

    Raises:
        UsageError: not a finite number, or a division by zero.
    """
    try:
        top, _, bottom = text.strip().partition("/")
        value = float(Fraction(top.strip()) / Fraction(bottom.strip())) if bottom else float(top)
    except ZeroDivisionError:
        raise UsageError(f"{name} divides by zero: {text}", code=code, do="write it like 8/255 or 0.031") from None
    except (ValueError, OverflowError):
        raise UsageError(
            f"{name} must be a number, got {text!r}", code=code, do="write it like 8/255 or 0.031"
        ) from None
    if not math.isfinite(value):
        raise UsageError(f"{name} must be a finite number, got {text}", code=code)
    return value


def radius(text: str, norm: str) -> float:
    """Read one eps in pixel units and refuse values that mean something else than the user thinks.

    Raises:
        UsageError: negative, not a number, or above 1 for linf (8 instead of 8/255).
    """
    value = number(text, name="eps")
    if value < 0:
        raise UsageError(f"eps must be a number >= 0, got {text}", code="A02")
    if norm == "linf" and value > 1:
        raise UsageError(
            f"eps {text} covers every image; did you mean {text}/255?",
            code="A03",
            why="pixels live in [0, 1] and eps is in the same units",
        )
    return value


def radii(text: str, norm: str) -> list[float]:
    """Read a comma-separated list of eps; sorted, without repeats."""
    return sorted({radius(part, norm) for part in text.split(",") if part.strip()})


def pretty(value: float) -> str:
    """An eps as people write it: ``8/255`` when it is a small multiple of 1/255, otherwise short decimals."""
    if not math.isfinite(value):
        return "inf"
    for bottom in (255, 16):
        top = value * bottom
        if value and abs(top - round(top)) < 1e-6 * bottom / 255 and 0 < round(top) < bottom:
            return f"{round(top)}/{bottom}"
    return f"{value:.6g}"
