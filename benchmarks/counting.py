"""A wrapper that counts what any tool asks of a model: rows and calls, forward and backward."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Counting(nn.Module):
    """Counts rows and calls; a backward pass is counted when a gradient reaches the wrapper's output."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.reset()

    def reset(self) -> None:
        """Start a new count."""
        self.forwards = self.backwards = self.calls = 0
        self.seconds = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.forwards += len(x)
        before = time.perf_counter()
        z: Tensor = self.inner(x)
        self.seconds += time.perf_counter() - before
        if z.requires_grad:
            z.register_hook(self._backward)
        return z

    def _backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)

    def counts(self) -> dict[str, Any]:
        """Rows forward and backward, calls, and seconds spent in forward passes, since the last reset."""
        return {
            "forwards": self.forwards,
            "backwards": self.backwards,
            "calls": self.calls,
            "seconds_forward": round(self.seconds, 3),
        }


class Timed:
    """CPU and wall seconds of a block."""

    def __enter__(self) -> Timed:
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu = round(time.process_time() - self._cpu, 3)
        self.wall = round(time.perf_counter() - self._wall, 3)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def line(out: Path | None, **facts: Any) -> None:
    """One JSON line on stdout, and in a file if one is given."""
    text = json.dumps(facts)
    print(text, flush=True)
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
