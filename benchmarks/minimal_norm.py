"""Our minimal-norm attacks against the same attacks of foolbox, adv-lib and torchattacks: distances and cost.

    python benchmarks/minimal_norm.py model.pt --data digits --norm l2 --images 200

Runs ours and every peer that can be imported block by block in turn, on one thread. Prints one JSON line per attack and
tool, then on how many images ours is no worse than 1.02 times the peer's distance.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.counting import Counting, Timed, line, machine
from robeval.core import catalogue
from robeval.core.ball import Ball, vector_norm
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.data.load import load as load_images
from robeval.data.subset import subset
from robeval.engine.backend import Backend
from robeval.engine.run import Plan, run
from robeval.models.load import load as load_model

#: Norms in which a peer has the attack too.
NORMS = {"deepfool": ("l2", "linf"), "ddn": ("l2",), "fmn": ("linf", "l2", "l1"), "cw-l2": ("l2",)}
Tool = Callable[[Counting, Images], Tensor]


def ours(name: str, norm: str, settings: dict[str, Any], model: Counting, images: Images) -> Tensor:
    """Verified distance of each image. -> (N,)."""
    method = catalogue.find("attacks", name)
    plan = Plan(method.name, partial(method.load(), **method.bind(settings)))
    backend = Backend(Classifier(model, len(images.classes)), 256)
    outcomes = list(run(plan, images, Untargeted(images.y), Ball(norm, math.inf), backend))
    outcomes = sorted(outcomes, key=lambda o: o.position)
    return torch.tensor([o.distances[norm] for o in outcomes], dtype=torch.float64)


def theirs(attack: Callable[[Counting, Tensor, Tensor], Tensor], norm: str, model: Counting, images: Images) -> Tensor:
    """Distance of each returned image that is in the box and misclassified. -> (N,)."""
    points = attack(model, images.x, images.y).detach()
    with torch.no_grad():
        wrong = model.inner(points).argmax(1) != images.y
    inside = ((points >= 0) & (points <= 1)).flatten(1).all(1)
    distance = vector_norm(points.double() - images.x.double(), norm)
    return torch.where(wrong & inside, distance, torch.inf)


def peers(name: str, norm: str, steps: int, searches: int) -> Iterator[tuple[str, Tool]]:
    """The same attack, with the same budget, in every package that has it and can be imported."""
    try:
        import foolbox

        made = {
            ("deepfool", "l2"): lambda: foolbox.attacks.L2DeepFoolAttack(steps=steps),
            ("deepfool", "linf"): lambda: foolbox.attacks.LinfDeepFoolAttack(steps=steps),
            ("ddn", "l2"): lambda: foolbox.attacks.DDNAttack(steps=steps),
            ("fmn", "linf"): lambda: foolbox.attacks.LInfFMNAttack(steps=steps),
            ("fmn", "l2"): lambda: foolbox.attacks.L2FMNAttack(steps=steps),
            ("fmn", "l1"): lambda: foolbox.attacks.L1FMNAttack(steps=steps),
            ("cw-l2", "l2"): lambda: foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=searches, steps=steps),
        }[name, norm]()

        def by_foolbox(model: Counting, x: Tensor, y: Tensor) -> Tensor:
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
            points: Tensor = made(wrapped, x, y, epsilons=None)[1]
            return points

        yield "foolbox", partial(theirs, by_foolbox, norm)
    except ImportError:
        pass
    try:
        from adv_lib import attacks as adv

        p = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
        functions: dict[str, Callable[[Counting, Tensor, Tensor], Tensor]] = {
            "deepfool": lambda model, x, y: adv.df(model, x, y, steps=steps, norm=p),
            "ddn": lambda model, x, y: adv.ddn(model, x, y, steps=steps, levels=None),
            "fmn": lambda model, x, y: adv.fmn(model, x, y, norm=p, steps=steps),
            "cw-l2": lambda model, x, y: adv.carlini_wagner_l2(
                model, x, y, binary_search_steps=searches, max_iterations=steps
            ),
        }
        yield "adv-lib", partial(theirs, functions[name], norm)
    except ImportError:
        pass
    try:
        import torchattacks

        if (name, norm) == ("deepfool", "l2"):
            yield "torchattacks", partial(theirs, lambda m, x, y: torchattacks.DeepFool(m, steps)(x, y), norm)
        elif name == "cw-l2":  # one value of c; the whole budget in one search
            by_one_c = partial(theirs, lambda m, x, y: torchattacks.CW(m, c=1, steps=steps * searches)(x, y), norm)
            yield "torchattacks", by_one_c
    except ImportError:
        pass


def summary(distances: Tensor) -> dict[str, Any]:
    """How many, and how far."""
    found = distances[distances.isfinite()]
    return {
        "found": len(found),
        "mean": round(float(found.mean()), 6) if len(found) else None,
        "median": round(float(distances.median()), 6),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("--data", default="digits")
    arguments.add_argument("--norm", choices=("linf", "l2", "l1"), help="one of the three; all by default")
    arguments.add_argument("--images", default="200")
    arguments.add_argument("--block", type=int, default=100, help="images per turn of a tool")
    arguments.add_argument("--attack", choices=list(NORMS), help="one of these; all by default")
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--iterations", type=int, default=1000, help="Adam steps per search of cw-l2")
    arguments.add_argument("--searches", type=int, default=9)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    classifier = load_model(options.model)
    images = subset(load_images(options.data, "test"), options.images)
    with torch.no_grad():
        images = images[classifier.logits(images.x).argmax(1) == images.y]
    assert isinstance(classifier.module, torch.nn.Module)
    model = Counting(classifier.module)
    case: dict[str, Any] = {"case": "minimal_norm", "model": Path(options.model).name, "data": images.name}
    line(options.out, **case, correct=len(images), block=options.block, machine=machine())
    for name, norms in NORMS.items():
        for norm in norms:
            if options.attack not in (None, name) or options.norm not in (None, norm):
                continue
            # The same schedule for all, an equal number of gradients; with ddn and fmn ours judges one point more.
            budget: dict[str, Any] = {"steps": options.steps}
            if name == "cw-l2":
                budget = {"iterations": options.iterations, "searches": options.searches}
            steps = options.iterations if name == "cw-l2" else options.steps
            tools: dict[str, Tool] = {"robeval": partial(ours, name, norm, budget)}
            tools |= dict(peers(name, norm, steps, options.searches))
            compare(tools, model, images, options.block, options.out, {**case, "attack": name, "norm": norm, **budget})


def compare(
    tools: dict[str, Tool], model: Counting, images: Images, block: int, out: Path | None, case: dict[str, Any]
) -> None:
    """Run the tools in turn, block by block, and print what each found and spent."""
    distances: dict[str, list[Tensor]] = defaultdict(list)
    spent: dict[str, dict[str, float]] = {tool: defaultdict(float) for tool in tools}
    for rows in torch.arange(len(images)).split(block):
        for tool, function in tools.items():
            model.reset()
            torch.manual_seed(0)
            with Timed() as time:
                distances[tool].append(function(model, images[rows]))
            for key, value in {**model.counts(), "cpu_s": time.cpu, "wall_s": time.wall}.items():
                spent[tool][key] += value
    found = {tool: torch.cat(parts) for tool, parts in distances.items()}
    for tool, values in found.items():
        per_image = {f"{key}_per_image": round(spent[tool][key] / len(images), 1) for key in ("forwards", "backwards")}
        rest = {key: round(spent[tool][key], 2) for key in ("calls", "cpu_s", "wall_s")}
        line(out, **case, tool=tool, **summary(values), **per_image, **rest)
    mine = found["robeval"]
    for tool, values in found.items():
        if tool != "robeval":
            both = mine.isfinite() & values.isfinite()
            line(
                out, **case, peer=tool, images=len(mine), no_worse=int((mine <= 1.02 * values).sum()),
                closer=int((mine < values).sum()), farther=int((mine > 1.02 * values).sum()),
                median_ratio=round(float((mine / values)[both].median()), 5) if both.any() else None,
            )  # fmt: skip


if __name__ == "__main__":
    main()
