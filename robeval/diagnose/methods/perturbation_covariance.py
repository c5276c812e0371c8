"""P9, the covariance of adversarial perturbations as a function of distance, as a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from robeval.core.catalogue import diagnostic
from robeval.diagnose.finding import CLEAR, Finding
from robeval.diagnose.path import path
from robeval.diagnose.subject import Subject


@diagnostic(
    id="P9",
    group=6,
    level="full",
    images=256,
    question="over which distance are adversarial perturbations correlated?",
    limit="no verdict",
    source="Roth, Lucchi, Nowozin, Hofmann 2018, Adversarially Robust Training through Structured Gradient"
    " Regularization, arXiv:1805.08736, figure 2",
)
def perturbation_covariance(subject: Subject, *, images: int = 256) -> Finding:
    """Mean product of two entries of a PGD perturbation against the distance of their pixels.

    Within a channel and between channels. The decay length is the first distance at which the first falls to 1/e of its
    value at 0.

    Args:
        images: Images, the first of those chosen, the misclassified left out.

    Cost:
        10 forward and backward passes per image.
    Source:
        SGR paper, figure 2; PGD of 10 steps of eps / 5.
    Departs:
        Distances are Euclidean and rounded to whole pixels; the second moment is shown, and its ratio to the moment of
        the mean perturbation, which is what a centred covariance would take away.
    """
    chosen = subject.correct(images)
    change = path(subject, "pgd:steps=10,relative_step=0.2", chosen).last - chosen.x
    within, between = by_distance(change.double())
    small = [r for r, value in enumerate(within) if value <= within[0] / torch.e]
    mean = change.double().mean(0)
    ratio = float((change.double() ** 2).mean() / (mean**2).mean().clamp_min(1e-30))
    decay = small[0] if small else None
    data = {"within": within, "between": between, "decay": decay, "moment_over_mean": ratio, "images": len(chosen)}
    measured = f"decay length {'beyond the image' if decay is None else f'{decay} pixels'}"
    return Finding(CLEAR, measured, "no verdict", len(chosen), why="a picture", data=data)


def by_distance(d: Tensor) -> tuple[list[float], list[float]]:
    """Mean product of entries at each rounded distance, within a channel and between two; (n, C, H, W) -> two lists.

    The second list is empty for grey images. Distances end at half of the shorter side.
    """
    channels, height, width = d.shape[1:]
    size = (2 * height, 2 * width)
    f = torch.fft.rfft2(d, s=size)
    ones = torch.fft.rfft2(torch.ones(height, width, dtype=d.dtype, device=d.device), s=size)
    pairs = torch.fft.irfft2(ones * ones.conj(), s=size).round()
    total = torch.fft.irfft2((f[:, :, None] * f[:, None].conj()).mean(0), s=size)
    mean = total / pairs.clamp_min(1)
    rows, columns = (torch.fft.fftfreq(s, 1 / s, device=d.device) for s in size)
    distance = (rows[:, None] ** 2 + columns**2).sqrt().round().long()
    same = torch.eye(channels, dtype=torch.bool, device=d.device)
    reach = min(height, width) // 2

    def ring(pick: Tensor) -> list[float]:
        these = mean[pick].mean(0)
        at = [(distance == r) & (pairs > 0) for r in range(reach + 1)]
        return [float((these * pairs)[a].sum() / pairs[a].sum()) for a in at]

    return ring(same), ring(~same) if channels > 1 else []
