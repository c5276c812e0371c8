"""Random numbers that belong to an image, not to a batch.

Each row has its own counter-based stream (Philox4x32-10, Salmon et al. 2011), keyed by seed, image id, method and
attempt. What an image draws does not depend on its neighbours, on the batch size, on shards or on a resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Ten rounds of Philox4x32. All tensors int64 holding 32-bit words, broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two 32-bit words wraps in int64, yet its 64 bits are right; the mask undoes the sign.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


class Streams:
    """One stream per row; every method returns one draw of the given shape for each row.

    Args:
        seed: Seed of the run.
        ids: Image ids, one per row.
        method: Name of the attack or bound.
        attempts: Attempt (restart or target) of each row.
        dtype: Floating type of the draws.
        device: Where the draws live.
    """

    def __init__(
        self,
        seed: int,
        ids: Sequence[int],
        method: str,
        attempts: Sequence[int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        attempts = [0] * len(ids) if attempts is None else attempts
        words = []
        for index, attempt in zip(ids, attempts, strict=True):
            digest = hashlib.blake2b(f"{seed}/{index}/{method}/{attempt}".encode(), digest_size=8).digest()
            words.append([int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")])
        key = torch.tensor(words, dtype=torch.int64, device=device).reshape(-1, 2)
        self.key = (key[:, :1], key[:, 1:])
        self.ids = torch.tensor(list(ids), dtype=torch.int64, device=device)
        self.attempt = torch.tensor(list(attempts), dtype=torch.int64, device=device)
        self.dtype, self.device = dtype, torch.device(device)
        self.draws = 0

    def bits(self, *shape: int) -> Tensor:
        """Uniform 32-bit words as int64. -> (n, *shape)."""
        size = math.prod(shape)
        block = torch.arange((size + 3) // 4, device=self.device)[None]
        zero = torch.zeros_like(block)
        words = philox((block, zero + self.draws, zero, zero), self.key)
        self.draws += 1
        return torch.stack(words, 2).flatten(1)[:, :size].reshape(-1, *shape)

    def numbered(self, rows: Tensor, numbers: Tensor, words: int) -> Tensor:
        """Uniform 32-bit words as int64 that belong to a number, such as a proposal's, in whatever order one asks.

        Args:
            rows: (m,) int64.
            numbers: (m, L) int64 below 2**32.
            words: How many words each number has.

        Returns:
            (m, L, words) int64.
        """
        block = torch.arange((words + 3) // 4, device=self.device)
        zero = torch.zeros_like(block)
        key = [k[rows][:, None] for k in self.key]
        drawn = philox((block, zero + numbers[..., None], zero + 1, zero), key)  # the 1 keeps clear of all other draws
        return torch.stack(drawn, 3).flatten(2)[..., :words]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in (0, 1). -> (n, *shape)."""
        return ((self.bits(*shape).double() + 0.5) * 2.0**-32).to(self.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, by Box and Muller. -> (n, *shape)."""
        size = math.prod(shape)
        u = (self.bits(2, (size + 1) // 2).double() + 0.5) * 2.0**-32
        radius, angle = (-2 * u[:, 0].log()).sqrt(), 2 * math.pi * u[:, 1]
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return both[:, :size].reshape(-1, *shape).to(self.dtype)

    def sign(self, *shape: int) -> Tensor:
        """-1 or +1 with equal chance. -> (n, *shape)."""
        return ((self.bits(*shape) >> 31) * 2 - 1).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high). -> (n, *shape) int64."""
        return (self.bits(*shape) * high) >> 32

    def permutation(self, size: int) -> Tensor:
        """A random order of ``size`` things. -> (n, size) int64."""
        return self.bits(size).argsort(dim=1, stable=True)
