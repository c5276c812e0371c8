"""How much answers change, and how much they may by rounding alone."""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest change of an image's logits, relative to its largest one, that rounding explains. Single precision leaves
#: 1e-7 on a CPU; half precision and TF32 leave much more.
SINGLE, HALF = 1e-3, 2e-2


def relative_change(z: Tensor, other: Tensor) -> Tensor:
    """Largest change of each row relative to its largest logit; 0 where both are not finite. (n, K), (n, K) -> (n,)."""
    gap = (other.double() - z.double()).abs().amax(1)
    size = z.double().abs().amax(1).clamp_min(1e-12)
    return torch.nan_to_num(gap / size, nan=0.0, posinf=float("inf"))


def rounding(z: Tensor) -> float:
    """The change that rounding explains for logits of this type on this device."""
    coarse = z.dtype in (torch.float16, torch.bfloat16)
    tf32 = z.device.type == "cuda" and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    return HALF if coarse or tf32 else SINGLE
