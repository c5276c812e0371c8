"""Structured gradient regularization: the product with a covariance function by FFT against the (d, d) matrix.

A batch of 128 random images in float32, on one thread. ``estimate`` takes the covariance of the batch, ``build`` makes
what the product needs of it (with the spectral clamp), ``penalty`` is g^T Sigma g with its gradient. The two tools run
in alternating repetitions. Memory is the growth of the largest resident size over one call of all three, each tool in a
process of its own (Linux). The largest relative difference of the products is measured with one stationary covariance.
One JSON line per image size.

    python -m benchmarks.trainers_sgr
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.counting import line, machine
from robeval.core.correlated import second_moment
from robeval.train.covariance import Matrix, covariance_of, form, synthetic
from robeval.train.covariance_function import Stationary, covariance_function, stationary

SHAPES = ((3, 32, 32), (1, 28, 28))
MOMENTS: dict[str, Callable[[Tensor], Tensor]] = {"fft": covariance_function, "matrix": second_moment}


def images(shape: tuple[int, ...], batch: int = 128) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


def penalty(covariance: Matrix | Stationary, g: Tensor) -> Tensor:
    """The penalty's gradient."""
    leaf = g.detach().requires_grad_()
    return torch.autograd.grad(form(covariance, leaf).mean(), leaf)[0]


def difference(shape: tuple[int, ...]) -> float:
    """Largest relative difference of the products in float32 with one covariance that both can hold exactly."""
    g = images(shape)
    moment = synthetic(g, "covfun", zeta=8.0, inter=0.5)
    fft = stationary(moment, (shape[1], shape[2]), "interp")
    unit = torch.eye(g[0].numel()).view(-1, *shape)
    matrix = Matrix(torch.cat([stationary(moment.double(), (shape[1], shape[2]), "interp").product(part.double())
                               for part in unit.split(128)]).flatten(1).float())  # fmt: skip
    apart = (fft.product(g) - matrix.product(g)).flatten(1).norm(dim=1)
    return float((apart / matrix.product(g).flatten(1).norm(dim=1)).max())


def megabytes(tool: str, shape: tuple[int, ...]) -> float:
    """Growth of the largest resident size over one estimate, build and penalty."""
    torch.set_num_threads(1)
    small = (shape[0], 2, 2)  # loads what the libraries load at the first call
    penalty(covariance_of(MOMENTS[tool](images(small)), small, "spectral"), images(small))
    g = images(shape)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = peak_kilobytes()
    penalty(covariance_of(MOMENTS[tool](g), shape, "spectral"), g)
    return round((peak_kilobytes() - before) / 1024, 1)


def peak_kilobytes() -> int:
    """Largest resident size of this process, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) for text in lines if text.startswith("VmHWM"))


def seconds(function: Callable[[], object]) -> float:
    before = time.process_time()
    function()
    return time.process_time() - before


def main(repetitions: int = 15) -> None:
    torch.set_num_threads(1)
    line(None, benchmark="trainers_sgr", machine=machine())
    for shape in SHAPES:
        g = images(shape)
        taken: dict[str, dict[str, list[float]]] = {}
        moments = {tool: moment(g) for tool, moment in MOMENTS.items()}
        built = {tool: covariance_of(moments[tool], shape, "spectral") for tool in MOMENTS}
        for _ in range(repetitions):
            for tool, moment in MOMENTS.items():
                jobs: dict[str, Callable[[], object]] = {
                    "estimate": partial(moment, g),
                    "build": partial(covariance_of, moments[tool], shape, "spectral"),
                    "penalty": partial(penalty, built[tool], g),
                }
                for job, function in jobs.items():
                    taken.setdefault(job, {}).setdefault(tool, []).append(seconds(function))
        whole = [
            [sum(taken[job][tool][k] for job in taken) for tool in ("fft", "matrix")] for k in range(repetitions)
        ]  # fmt: skip
        ratios = [matrix / fft for fft, matrix in whole]
        line(
            None,
            image=list(shape),
            batch=len(g),
            largest_relative_difference=difference(shape),
            milliseconds={
                job: {tool: round(1e3 * statistics.median(s), 2) for tool, s in of.items()} for job, of in taken.items()
            },
            megabytes={tool: own_process(tool, shape) for tool in MOMENTS},
            times_quicker=round(statistics.median(ratios), 2),
            spread=[round(min(ratios), 2), round(max(ratios), 2)],
        )


def own_process(tool: str, shape: tuple[int, ...]) -> float:
    """:func:`megabytes`, in a process that has done nothing else."""
    command = f"from benchmarks.trainers_sgr import megabytes; print(megabytes({tool!r}, {shape!r}))"
    return float(subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
