"""What a training step costs, method by method, and what it costs in the plain published form.

    python -m benchmarks.trainers                                      # every method, relative to standard training
    python -m benchmarks.trainers --method trades --method sgr:source=pgd --method awp-adv
    python -m benchmarks.trainers --model sgr_cnn --data fashion-mnist
    python -m benchmarks.trainers against                              # ours against benchmarks.published_trainers

One JSON line per method. A step is a whole mini-batch: crafting, loss, gradient, update of the weights; Free-m takes m
updates in it. Two tools at a time run in alternating turns (A B, B A, ...) on one thread; seconds are CPU seconds, a
ratio is the median over the turns, and ``noisy`` says that the turns spread by more than a quarter. Passes are images
through the network divided by the mini-batch, as :mod:`robeval.train.passes` counts them; for the nested jvp, whose one
call does the work of several, they say little. Memory is the highest sum of all tensors that the first two steps
allocate, from the allocator's own events (torch.profiler), so it is exact and repeats; the gradients of the weights,
momentum and what a method keeps between steps are in it, the network, the images and scratch space inside oneDNN and
FFT calls are not.

``against`` first runs two float64 steps of both on the network with smooth activations, and compares losses and last
parameter gradient. Where ours is a finite difference, that comparison takes a small step. Exit code 7 when they are
further apart than the tolerance. Its ratios are the plain form's over ours.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import published_trainers
from benchmarks.counting import line, machine
from benchmarks.race import NOISY, quiet_machine
from robeval.core import catalogue
from robeval.core.images import Images
from robeval.core.streams import Streams
from robeval.data.load import load
from robeval.models.build import build
from robeval.train.awp import perturbed_weights
from robeval.train.memory import Memory
from robeval.train.passes import counting
from robeval.train.step import fill_gradients, objectives

#: Settings beside each method's own that are measured too; ``awp-`` in front stands for weight perturbation.
VARIANTS = (
    "awp-adv",
    "awp-trades",
    "soar:init=zero",
    "foar:init=zero",
    "fd-grad:order=2",
    "sgr:source=sign",
    "sgr:source=fgsm",
    "sgr:source=pgd",
)
#: Radius of the weight perturbation, by the method that it is put around.
AWP = {"adv": 0.01, "trades": 0.005}


@dataclass
class Training:
    """A trainer on its own copy of the network, from the same weights and over the same mini-batches as all others.

    Args:
        trainer: The method.
        settings: Its settings.
        start: The network, which stays as it is.
        images: Training images.
        size: Images of a mini-batch.
        awp: Radius of adversarial weight perturbation; 0 for none.
    """

    trainer: Callable[..., Any]
    settings: dict[str, Any]
    start: nn.Module
    images: Images
    size: int
    awp: float = 0.0
    updates: int = field(default=0, init=False)
    losses: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.network = copy.deepcopy(self.start).train()
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.01, momentum=0.9)
        self.kept: dict[str, Tensor] = {}
        self.done = 0

    def again(self, start: nn.Module | None = None, images: Images | None = None) -> Training:
        """The same from its beginning, or on another network and images."""
        return Training(
            self.trainer, self.settings, start or self.start, images or self.images, self.size, awp=self.awp
        )

    def steps(self, count: int) -> None:
        """Train on the next mini-batches."""
        for _ in range(count):
            rows = torch.arange(self.done * self.size, (self.done + 1) * self.size) % len(self.images)
            x, y, ids = self.images.x[rows], self.images.y[rows], self.images.ids[rows].tolist()
            rng = Streams(0, ids, "benchmark", [self.done] * len(ids), dtype=x.dtype)
            memory = Memory(self.kept, rows, step=self.done, seed=0, train=self.images)
            for objective in objectives(self.trainer, self.network, x, y, rng, self.settings, memory):
                around = perturbed_weights(self.network, objective, self.awp) if self.awp else nullcontext(objective)
                with around as descended:
                    self.losses.append(fill_gradients(self.parameters, descended)["loss"])
                    self.optimizer.step()
                self.updates += 1
            self.done += 1


def method(spec: str, start: nn.Module, images: Images, size: int) -> Training:
    """One of our methods by name and settings, ``awp-`` in front for weight perturbation."""
    awp, text = spec.startswith("awp-"), spec.removeprefix("awp-")
    found = catalogue.parse("trainers", text)
    radius = AWP.get(found.method.name, 0.005) if awp else 0.0
    return Training(found.method.load(), found.settings, start, images, size, awp=radius)


def peak_mib(training: Training, count: int = 2) -> float:
    """Most memory that the tensors of the first steps hold at one time, in MiB."""
    fresh = training.again()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        fresh.steps(count)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return float(held.max()) / 2**20


def cost(training: Training) -> dict[str, Any]:
    """Exact costs of a step: passes forward and backward, updates of the weights, and memory."""
    memory = peak_mib(training)  # first: tables that are made once are counted
    fresh = training.again()
    with counting(fresh.network) as passes:
        fresh.steps(1)
    size = fresh.size
    return {
        "forward": round(passes.forward / size, 2),
        "backward": round(passes.backward / size, 2),
        "updates": fresh.updates,
        "peak_mib": round(memory, 2),
    }


def duel(turns: int, count: int, **tools: Training) -> dict[str, Any]:
    """CPU milliseconds of a step of two tools, and how many times the second's the first takes."""
    (one, first), (two, second) = ((name, training.again()) for name, training in tools.items())
    seconds: dict[str, list[float]] = {one: [], two: []}
    for training in (first, second):
        training.steps(1)
    for turn in range(turns):
        for name, training in ((one, first), (two, second))[:: 1 if turn % 2 == 0 else -1]:
            before = time.process_time()
            training.steps(count)
            seconds[name].append((time.process_time() - before) / count)
    ratios = [a / b for a, b in zip(seconds[one], seconds[two], strict=True)]
    return {
        "cpu_ms": {name: round(1000 * statistics.median(s), 2) for name, s in seconds.items()},
        "times_seconds": round(statistics.median(ratios), 2),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "noisy": max(ratios) > (1 + NOISY) * min(ratios),
        "load": round(os.getloadavg()[0], 2),
    }


def relative_to_standard(specs: list[str], options: argparse.Namespace, start: nn.Module, images: Images) -> int:
    """A line per method."""
    standard = method("standard", start, images, options.batch_size)
    base = cost(standard)
    for spec in specs:
        training = method(spec, start, images, options.batch_size)
        facts = cost(training)
        line(
            options.out, method=spec, model=options.model, data=options.data, batch=options.batch_size, **facts,
            times_memory=round(facts["peak_mib"] / base["peak_mib"], 2),
            **duel(options.turns, options.steps, method=training, standard=standard),
        )  # fmt: skip
    return 0


@dataclass(frozen=True)
class Pair:
    """Ours beside the plain form.

    Args:
        ours: Method and settings that are timed.
        plain: The plain form, with the same settings.
        tolerance: Largest relative difference of the losses and of the gradient, in float64.
        both: Settings of both for that comparison, with a penalty that weighs enough to be seen.
        step: Further settings of ours for it, where ours is a finite difference.
    """

    ours: str
    plain: Callable[..., Any]
    tolerance: float
    both: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)


PAIRS = {
    "fd-grad": Pair("fd-grad", published_trainers.fd_grad, 1e-4, {"weight": 10.0}, {"h": 1e-6}),
    "trades": Pair("trades", published_trainers.trades, 1e-9),
    "sgr": Pair("sgr:source=grad,psd=none", published_trainers.sgr, 1e-9, {"weight": 10.0}),
    "rat": Pair("rat", published_trainers.rat, 1e-5, {"eta": 10.0, "sigma": 1e-3}),
    "soar": Pair("soar", published_trainers.soar, 1e-4, {}, {"h": 1e-6}),
}


def apart(pair: Pair, start: nn.Module, images: Images, size: int) -> tuple[float, float]:
    """Relative difference of the losses of two float64 steps, and of the last one's parameter gradient.

    Between x and x + h v a kink, or one of the many ties of max pooling on a flat background, may lie however small h
    is; hence ``start`` should be smooth.
    """
    double = copy.deepcopy(start).double()
    images = Images(images.x.double(), images.y, images.ids, images.name, images.classes)
    ours = method(pair.ours, double, images, size)
    ours.settings = {**ours.settings, **pair.both, **pair.step}
    theirs = Training(pair.plain, pair.both, double, images, size)
    for training in (ours, theirs):
        training.steps(2)
    losses = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    mine, other = (torch.cat([p.grad.flatten() for p in t.parameters if p.grad is not None]) for t in (ours, theirs))
    return losses, float((mine - other).norm() / other.norm())


def against(names: list[str], options: argparse.Namespace, start: nn.Module, images: Images) -> int:
    """A line per pair; 7 when one of them does not agree."""
    wrong, smooth = 0, trained(options.model, images, options.epochs, "smooth")
    for name in names:
        pair = PAIRS[name]
        loss, gradient = apart(pair, smooth, images, options.batch_size)
        agrees = max(loss, gradient) <= pair.tolerance
        wrong += not agrees
        ours = method(pair.ours, start, images, options.batch_size)
        plain = Training(pair.plain, {}, start, images, options.batch_size)
        mine, theirs = cost(ours), cost(plain)
        line(
            options.out, against=pair.ours, model=options.model, data=options.data, batch=options.batch_size,
            ours=mine, plain=theirs, times_memory=round(theirs["peak_mib"] / mine["peak_mib"], 2),
            **duel(options.turns, options.steps, plain=plain, ours=ours),
            loss_apart=float(f"{loss:.1e}"), gradient_apart=float(f"{gradient:.1e}"),
            tolerance=pair.tolerance, agrees=agrees,
        )  # fmt: skip
    return 7 if wrong else 0


def trained(model: str, images: Images, epochs: int, act: str = "relu") -> nn.Module:
    """A network after some epochs of ordinary training, so that its gradients are those of a training."""
    torch.manual_seed(0)
    _, channels, size, _ = images.x.shape
    network = build(model, in_channels=channels, classes=len(images.classes), size=size, act=act)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images.x[rows]), images.y[rows]).backward()
            optimizer.step()
    return network


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("case", nargs="?", choices=("methods", "against"), default="methods")
    arguments.add_argument("--method", action="append", help="one or several; all by default")
    arguments.add_argument("--model", default="digits_cnn", help="an architecture without BatchNorm")
    arguments.add_argument("--data", default="digits")
    arguments.add_argument("--images", type=int, default=1280, help="training images")
    arguments.add_argument("--batch-size", type=int, default=128)
    arguments.add_argument("--epochs", type=int, default=5, help="of standard training beforehand")
    arguments.add_argument("--turns", type=int, default=5)
    arguments.add_argument("--steps", type=int, default=3, help="in a turn")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    quiet_machine()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own starts and stops otherwise
    images = load(options.data, "train")
    images = images[torch.arange(min(options.images, len(images)))]
    start = trained(options.model, images, options.epochs)
    line(options.out, benchmark=f"trainers {options.case}", machine=machine(), turns=options.turns, steps=options.steps)
    if options.case == "against":
        return against(options.method or list(PAIRS), options, start, images)
    return relative_to_standard(options.method or [*_names(), *VARIANTS], options, start, images)


def _names() -> list[str]:
    return [name for name in catalogue.methods("trainers") if name != "standard"]


if __name__ == "__main__":
    sys.exit(main())
