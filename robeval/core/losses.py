"""Per-sample losses by name, shared by trainers and bounds. All are functions of logits and true labels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from robeval.core.errors import unknown
from robeval.core.goal import column, without


def ce(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Cross-entropy: logsumexp(z) - z_y."""
    return z.logsumexp(1) - column(z, y)


def cw(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Best other logit minus z_y; positive exactly where the image is misclassified."""
    return without(z, y).amax(1) - column(z, y)


def cw_prob(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Best other probability minus p_y, in [-1, 1]; the same sign as ``cw``."""
    p = z.softmax(1)
    return without(p, y).amax(1) - column(p, y)


def softcw_prob(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """``cw_prob`` with the maximum replaced by a softmax-weighted mean over p with p_y set to 0.

    The zeroed entry stays in the softmax, so the value lies below the hard maximum and its sign is not exactly the
    test of misclassification; kept for reproduction of Finlay and Oberman 2019.
    """
    p = z.softmax(1)
    q = p.scatter(1, y[:, None], 0.0)
    return ((temperature * q).softmax(1) * q).sum(1) - column(p, y)


def softcw_lse(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """``cw_prob`` with the maximum replaced by logsumexp(T p) / T over the other classes; never below ``cw_prob``."""
    p = z.softmax(1)
    return (temperature * without(p, y)).logsumexp(1) / temperature - column(p, y)


def slm(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Soft logit margin: logsumexp of the other logits minus z_y (Ding et al. 2020)."""
    return without(z, y).logsumexp(1) - column(z, y)


def cw_k50(z: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Carlini-Wagner attack loss with confidence 50: -max(z_y - best other + 50, 0); attackers ascend it."""
    return -(50 - cw(z, y, temperature)).clamp_min(0)


def kl(z: Tensor, z_other: Tensor) -> Tensor:
    """Divergence KL(p || q) of the probabilities of two sets of logits. (n, K), (n, K) -> (n,)."""
    log_p = z.log_softmax(1)
    return (log_p.exp() * (log_p - z_other.log_softmax(1))).sum(1)


KINDS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "ce": ce,
    "cw": cw,
    "cw_prob": cw_prob,
    "softcw_prob": softcw_prob,
    "softcw_lse": softcw_lse,
    "slm": slm,
    "cw_k50": cw_k50,
}


def per_sample_loss(z: Tensor, y: Tensor, kind: str, temperature: float = 10.0) -> Tensor:
    """The named loss of every row.

    Args:
        z: Logits, (n, K).
        y: True labels, (n,) int64.
        kind: A name of :data:`KINDS`.
        temperature: Sharpness T of the two soft variants; the others ignore it.

    Shapes:
        (n, K), (n,) -> (n,).
    Raises:
        UsageError: unknown kind.
    """
    if kind not in KINDS:
        raise unknown("loss", kind, KINDS)
    return KINDS[kind](z, y, temperature)
