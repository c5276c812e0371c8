"""What reduced precision, channels-last layout and torch.compile bring on this machine, before anybody recommends them.

    python -m benchmarks.options --arch resnet10_nobn --size 32 --channels 3
    python -m benchmarks.options --arch sgr_cnn

Prints images per second forward, and forward with the gradient, of random weights, for each option.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.counting import line, machine
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.questions import Gradient, Logits, Question
from robeval.engine.backend import Backend
from robeval.models.accelerate import accelerate
from robeval.models.build import build

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels-last": {"channels_last": True},
    "compile": {"compiled": True},
    "bfloat16": {"precision": "bfloat16"},
}


def rate(backend: Backend, question: Question, goal: Untargeted, repeat: int) -> float:
    """Images per second, the best of several batches after one that warms up."""
    seconds = []
    for _ in range(repeat + 1):
        before = time.perf_counter()
        backend.evaluate(question, goal)
        if question.points.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return len(question.points) / min(seconds[1:])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--arch", default="resnet10_nobn")
    arguments.add_argument("--size", type=int, default=28)
    arguments.add_argument("--channels", type=int, default=1)
    arguments.add_argument("--batch-size", type=int, default=64)
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    line(options.out, case="options", arch=options.arch, machine=machine(), device=options.device)
    torch.manual_seed(0)
    net = build(options.arch, **({"in_channels": 3} if options.channels == 3 else {})).eval().to(options.device)
    x = torch.rand(options.batch_size, options.channels, options.size, options.size, device=options.device)
    goal = Untargeted(torch.zeros(len(x), dtype=torch.int64, device=options.device))
    for name, how in OPTIONS.items():
        how = dict(how)
        precision = how.pop("precision", "float32")
        classifier = Classifier(copy.deepcopy(net), 10)
        accelerate(classifier, **how)
        backend = Backend(classifier, options.batch_size, precision=precision)
        forward = rate(backend, Logits(x), goal, options.repeat)
        gradient = rate(backend, Gradient(x, "ce"), goal, options.repeat)
        line(
            options.out, case="options", arch=options.arch, option=name, batch=len(x),
            forward_per_s=round(forward, 1), gradient_per_s=round(gradient, 1),
        )  # fmt: skip


if __name__ == "__main__":
    main()
