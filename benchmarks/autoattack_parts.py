"""APGD-CE and Square against the same attacks of pyautoattack: who is broken, and what it costs.

    python benchmarks/autoattack_parts.py model.pt --data digits --eps 2/16 --images 300

Prints one JSON line per attack and tool, then a comparison. Needs the extra ``reference``.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.counting import Counting, Timed, line, machine
from robeval.core import catalogue
from robeval.core.ball import Ball
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.numbers import radius
from robeval.data.load import load as load_images
from robeval.data.subset import subset
from robeval.engine.backend import Backend
from robeval.engine.run import Plan, run
from robeval.models.load import load as load_model


def ours(name: str, model: Counting, images: Images, eps: float, settings: dict[str, Any], seed: int) -> set[int]:
    """Ids that our attack breaks."""
    method = catalogue.find("attacks", name)
    plan = Plan(
        method.name,
        partial(method.load(), **method.bind(settings)),
        black_box=method.facts.get("access") == "black-box",
    )
    backend = Backend(Classifier(model, len(images.classes)), 256)
    outcomes = run(plan, images, Untargeted(images.y), Ball("linf", eps), backend, seed=seed)
    return {int(images.ids[o.position]) for o in outcomes if o.success}


def theirs(name: str, model: Counting, images: Images, eps: float, settings: dict[str, Any], seed: int) -> set[int]:
    """Ids that the reference's attack breaks, by its own last look at the images that it returns."""
    from pyautoattack.autopgd_base import APGDAttack
    from pyautoattack.square import SquareAttack

    if name == "apgd-ce":
        attack = APGDAttack(
            model, n_restarts=1, n_iter=settings["steps"], verbose=False, eps=eps, norm="Linf", eot_iter=1,
            rho=0.75, seed=seed, device="cpu", logger=logging.getLogger("reference"),
        )  # fmt: skip
        attack.loss = "ce"
        adversarial = attack.perturb(images.x, images.y)
    else:
        square = SquareAttack(
            model, p_init=0.8, n_queries=settings["queries"], eps=eps, norm="Linf", n_restarts=1, seed=seed,
            verbose=False, device="cpu", resc_schedule=False,
        )  # fmt: skip
        adversarial = square.perturb(images.x, images.y)
    with torch.no_grad():
        wrong = model(adversarial).argmax(1) != images.y
    return set(images.ids[wrong].tolist())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("--data", default="digits")
    arguments.add_argument("--eps", default="2/16")
    arguments.add_argument("--images", default="300")
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--queries", type=int, default=5000)
    arguments.add_argument("--attack", choices=("apgd-ce", "square"), help="one of the two; both by default")
    arguments.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    eps = radius(options.eps, "linf")
    classifier = load_model(options.model)
    images = subset(load_images(options.data, "test"), options.images)
    with torch.no_grad():
        images = images[classifier.logits(images.x).argmax(1) == images.y]
    assert isinstance(classifier.module, torch.nn.Module)
    model = Counting(classifier.module)
    case: dict[str, Any] = {
        "case": "autoattack_parts",
        "model": Path(options.model).name,
        "data": images.name,
        "eps": options.eps,
    }
    line(options.out, **case, correct=len(images), machine=machine())
    budgets = {"apgd-ce": {"steps": options.steps}, "square": {"queries": options.queries}}
    for name in [options.attack] if options.attack else budgets:
        differences = []
        for seed in range(options.seeds):
            case |= {"attack": name, "seed": seed}
            broken = {}
            for tool, function in (("robeval", ours), ("pyautoattack", theirs)):
                model.reset()
                with Timed() as time:
                    broken[tool] = function(name, model, images, eps, budgets[name], seed)
                line(
                    options.out, **case, tool=tool, **budgets[name], broken=len(broken[tool]), **model.counts(),
                    cpu_s=time.cpu, wall_s=time.wall,
                )  # fmt: skip
            mine, reference = broken["robeval"], broken["pyautoattack"]
            differences.append(len(mine) - len(reference))
            line(
                options.out, **case, difference=differences[-1], only_robeval=sorted(mine - reference),
                only_pyautoattack=sorted(reference - mine),
            )  # fmt: skip
        case.pop("seed")
        line(options.out, **case, seeds=options.seeds, mean_difference=sum(differences) / len(differences))


if __name__ == "__main__":
    main()
