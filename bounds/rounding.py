"""How far float64 arithmetic may be from the truth. Machinery of the proofs, no bound itself.

A sum of m products, in whatever order it is taken, differs from the exact one by at most gamma(m) times the sum of
their sizes (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1). That holds for dot products, and
so for dense layers and convolutions as they are computed on a CPU in float64; not for transforms such as Winograd's.
"""

from __future__ import annotations

UNIT = 2.0**-53
#: Added where products may have underflowed.
TINY = 1e-290
#: An elementary function of the library (exp, log1p, erf) is right to this many units in the last place.
ULPS = 16


def gamma(terms: int) -> float:
    """Relative error of a sum of so many products: m u / (1 - m u), with a few operations to spare."""
    m = (terms + 8) * UNIT
    return m / (1 - m)
