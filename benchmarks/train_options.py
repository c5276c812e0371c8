"""What channels-last layout and torch.compile bring to a training step on this machine, before anybody recommends them.

    python -m benchmarks.train_options                              # sgr_cnn on 28x28, digits_cnn on 8x8; minutes
    python -m benchmarks.train_options --case sgr_cnn:relu:28 --method adv --method trades

One JSON line per network, method and option: CPU seconds of a step on one thread, the median over turns in which the
options take turns (A B C, C B A, ...), and ``gain``, how many times faster than plain, the median of the turns' ratios;
``noisy`` says that these spread by more than a quarter. Compiling happens before the clock starts, ``compile_seconds``
says how long. Images are random: a step's time does not depend on them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.counting import line, machine
from benchmarks.race import NOISY, quiet_machine
from benchmarks.trainers import Training, method
from robeval.core.errors import RobevalError
from robeval.core.images import Images
from robeval.models.build import build
from robeval.train.faster import Forward, compiled, computing_with, in_layout

#: Option -> (channels last, compiled).
OPTIONS = {"plain": (False, False), "channels-last": (True, False), "compile": (False, True), "both": (True, True)}
CASES = ("sgr_cnn:relu:28", "sgr_cnn:smooth:28", "digits_cnn:relu:8")
METHODS = ("standard", "adv:steps=3", "gn")


@dataclass
class Way:
    """A training with one of the options.

    Args:
        spec: The method.
        training: Its steps, on its own network.
        forward: The compiled network, or None.
    """

    spec: str
    training: Training
    forward: Forward | None

    def seconds(self, steps: int) -> float:
        """CPU seconds of a step."""
        before = time.process_time()
        with computing_with(self.training.network, self.forward, self.spec):
            self.training.steps(steps)
        return (time.process_time() - before) / steps


def ways(spec: str, start: torch.nn.Module, images: Images, size: int) -> dict[str, Way]:
    """The options, each on its own copy of the network."""
    found = {}
    for option, (channels_last, quick) in OPTIONS.items():
        training = method(spec, start, images, size)
        in_layout(training.network, channels_last)
        found[option] = Way(spec, training, compiled(training.network) if quick else None)
    return found


def compare(case: str, spec: str, options: argparse.Namespace) -> None:
    """A line per option."""
    name, act, side = case.split(":")
    torch.manual_seed(0)
    start = build(name, in_channels=1, classes=10, size=int(side), act=act)
    x = torch.rand(options.batch_size, 1, int(side), int(side))
    images = Images(x, torch.arange(len(x)) % 10, torch.arange(len(x)), "random", list("0123456789"))
    going, began = ways(spec, start, images, options.batch_size), {}
    facts = {"case": case, "method": spec, "batch": options.batch_size}
    for option, way in list(going.items()):
        before = time.perf_counter()
        try:
            way.seconds(2)
        except RobevalError as error:
            del going[option]
            line(options.out, **facts, option=option, refused=error.what)
        began[option] = round(time.perf_counter() - before, 1)
    seconds: dict[str, list[float]] = {option: [] for option in going}
    for turn in range(options.turns):
        for option in list(going)[:: 1 if turn % 2 == 0 else -1]:
            seconds[option].append(going[option].seconds(options.steps))
    for option, taken in seconds.items():
        gains = [plain / own for plain, own in zip(seconds["plain"], taken, strict=True)]
        more = {"compile_seconds": began[option]} if OPTIONS[option][1] else {}
        line(
            options.out, **facts, option=option, seconds=round(statistics.median(taken), 5),
            gain=round(statistics.median(gains), 2), noisy=max(gains) > (1 + NOISY) * min(gains), **more,
            load=round(os.getloadavg()[0], 1),
        )  # fmt: skip


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--case", action="append", help="architecture:activation:side, one or several")
    arguments.add_argument("--method", action="append", help="one or several")
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--turns", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=2, help="in a turn")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    quiet_machine()
    line(options.out, benchmark="train_options", machine=machine(), turns=options.turns, steps=options.steps)
    for case in options.case or CASES:
        for spec in options.method or METHODS:
            compare(case, spec, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
