"""The comparisons of the engine with other tools, one command each.

    python -m benchmarks.cases A     # AutoAttack, a broken ResNet
    python -m benchmarks.cases B     # AutoAttack, a weak small network, 200 images
    python -m benchmarks.cases C     # AutoAttack, a robust small network, 48 images
    python -m benchmarks.cases D     # PGD with 20 steps and 50 restarts, the weak network
    python -m benchmarks.cases E     # the same, the robust network
    python -m benchmarks.cases S     # SimBA in the pixel basis, against the paper's loop
    python -m benchmarks.lanczos     # F: curvature of 64 images against scipy

The small networks are those that ``robeval demo`` trains (digits_cnn, smooth); --models names their folder. Tools run
in alternating order on one thread; every run prints a JSON line, and the last line compares. Needs the extra
``reference``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders
from benchmarks.counting import Counting, line
from benchmarks.race import Tool, quiet_machine, race
from robeval.core.images import Images
from robeval.data.load import load as load_images
from robeval.data.subset import subset
from robeval.models.build import build
from robeval.models.load import load as load_model

#: Rows that any run of AutoAttack's standard version must spend on an image of ten classes that stands to the end: the
#: clean pass, 101 points of APGD-CE, nine times 101 of APGD-T, nine times 200 of FAB-T, 5,001 of Square; the last point
#: of an APGD run needs no gradient.
LIMIT = {"forwards": 1 + 101 + 9 * 101 + 9 * 200 + 5001, "backwards": 100 + 9 * 100 + 9 * 100}
WEAK, ROBUST = 2.8 / 16, 1.5 / 16


def resnet(folder: Path) -> tuple[Counting, Images]:
    """A ResNet-10 that was never taught to resist, on 16 digits blown up to 3 x 16 x 16; trained once, in a minute."""
    train, test = load_images("digits", "train"), load_images("digits", "test")
    grown = [torch.nn.functional.interpolate(s.x, size=16).expand(-1, 3, -1, -1).contiguous() for s in (train, test)]
    file = folder / "resnet10_digits16.pt"
    torch.manual_seed(0)
    net = build("resnet10")
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
    else:
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for rows in [r for _ in range(2) for r in torch.randperm(len(train)).split(64)]:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(grown[0][rows]), train.y[rows]).backward()
            optimizer.step()
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), file)
    net.eval()
    with torch.no_grad():
        correct = (net(grown[1][:40]).argmax(1) == test.y[:40]).nonzero().squeeze(1)[:16]
    images = Images(grown[1][correct], test.y[correct], test.ids[correct], "digits 16x16", list(test.classes))
    return Counting(net), images


def small(name: str, folder: Path, images: int) -> tuple[Counting, Images]:
    """A small network on digits, and a class-balanced part of the test images."""
    file = folder / f"{name}.pt"
    if not file.exists():
        raise SystemExit(f"{file} is not there: run `robeval demo`, which trains it, or give --models")
    classifier = load_model(str(file))
    assert isinstance(classifier.module, torch.nn.Module)
    return Counting(classifier.module), subset(load_images("digits", "test"), str(images))


def autoattack(images: Images, eps: float, capacity: int) -> dict[str, Tool]:
    """Ours and the reference's, standard version, linf."""
    how: dict[str, Any] = {"norm": "linf", "eps": eps, "seed": 0, "images": images}
    specs = contenders.attacks("autoattack", "linf", len(images.classes))
    return {
        "robeval": partial(contenders.robeval, specs=specs, capacity=capacity, **how),
        "pyautoattack": partial(contenders.pyautoattack, version="standard", batch=capacity, **how),
    }


def restarts(images: Images, eps: float, capacity: int) -> dict[str, Tool]:
    """PGD 20 x 50: ours, the plain loop and torchattacks' MultiAttack."""
    how: dict[str, Any] = {"eps": eps, "images": images}
    plain: dict[str, Any] = {"steps": 20, "restarts": 50, "batch": capacity, **how}
    specs = contenders.attacks("pgd20x50", "linf", len(images.classes))
    return {
        "robeval": partial(contenders.robeval, specs=specs, norm="linf", seed=0, capacity=capacity, **how),
        "plain loop": partial(contenders.plain_pgd, seed=0, **plain),
        "torchattacks": partial(contenders.torchattacks_multi, **plain),
    }


def simba(images: Images, eps: float, capacity: int) -> dict[str, Tool]:
    """SimBA in the pixel basis with a step of eps: ours and the paper's loop."""
    specs = contenders.attacks("simba", "linf", len(images.classes))
    how: dict[str, Any] = {"eps": eps, "seed": 0, "images": images}
    return {
        "robeval": partial(contenders.robeval, specs=specs, norm="linf", capacity=capacity, **how),
        "plain loop": partial(contenders.plain_simba, **how),
    }


def over_the_limit(told: dict[str, Any], images: int, out: Path | None) -> None:
    """How many more rows each tool passed than the robust images alone need."""
    for tool, facts in told.items():
        robust = images - len(facts["broken"])
        if robust:
            ratios = {key: round(facts[key] / (robust * LIMIT[key]), 3) for key in LIMIT}
            line(out, tool=tool, robust=robust, rows_over_limit=ratios)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("case", choices=("A", "B", "C", "D", "E", "S"))
    arguments.add_argument("--models", type=Path, default=Path("demo"), help="folder with standard.pt and adv.pt")
    arguments.add_argument("--images", type=int, help="how many; the case's own number by default")
    arguments.add_argument("--eps", type=float, help="radius; the case's own by default")
    arguments.add_argument("--repeat", type=int, default=2)
    arguments.add_argument("--batch-size", type=int, default=256)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    quiet_machine()
    own = {
        "A": (16, 3.2 / 16),
        "B": (200, WEAK),
        "C": (48, ROBUST),
        "D": (200, WEAK),
        "E": (100, ROBUST),
        "S": (100, WEAK),
    }
    count, eps = options.images or own[options.case][0], options.eps or own[options.case][1]
    making: dict[str, Callable[[Images, float, int], dict[str, Tool]]] = {"D": restarts, "E": restarts, "S": simba}
    if options.case == "A":
        model, images = resnet(options.models)
    else:
        model, images = small("standard" if options.case in "BDS" else "adv", options.models, count)
    tools = making.get(options.case, autoattack)(images, eps, options.batch_size)
    told = race(
        model, tools, repeat=options.repeat, out=options.out, case=options.case, images=len(images), eps=eps,
        parameters=sum(math.prod(p.shape) for p in model.inner.parameters()),
    )  # fmt: skip
    if options.case in "BC":
        over_the_limit(told, len(images), options.out)


if __name__ == "__main__":
    main()
