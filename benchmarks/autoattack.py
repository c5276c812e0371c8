"""AutoAttack against pyautoattack on a model of your own: who is broken, and what it costs.

    python -m benchmarks.autoattack model.pt --data digits --norm linf --eps 2/16 --images 300
    python -m benchmarks.autoattack model.pt --attack apgd-ce --seeds 6

Prints one JSON line per tool and run, then a comparison. Needs the extra ``reference``.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from benchmarks import contenders
from benchmarks.counting import Counting, line
from benchmarks.race import quiet_machine, race
from robeval.core.numbers import radius
from robeval.data.load import load as load_images
from robeval.data.subset import subset
from robeval.models.load import load as load_model

VERSIONS = {"standard": "autoattack", "plus": "autoattack-plus", "rand": "autoattack-rand"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("--data", default="digits")
    arguments.add_argument("--norm", choices=list(contenders.NORM), default="linf")
    arguments.add_argument("--eps", default="2/16")
    arguments.add_argument("--images", default="300")
    arguments.add_argument("--attack", choices=(*VERSIONS, *contenders.PARTS), default="standard")
    arguments.add_argument("--batch-size", type=int, default=256)
    arguments.add_argument("--repeat", type=int, default=1)
    arguments.add_argument("--seed", type=int, default=0, help="the first seed")
    arguments.add_argument("--seeds", type=int, default=1, help="repeat with this many seeds")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    quiet_machine()
    eps = radius(options.eps, options.norm)
    images = subset(load_images(options.data, "test"), options.images)
    classifier = load_model(options.model)
    assert isinstance(classifier.module, torch.nn.Module)
    model = Counting(classifier.module)
    specs = contenders.attacks(VERSIONS.get(options.attack, options.attack), options.norm, classifier.classes)
    differences = []
    for seed in range(options.seed, options.seed + options.seeds):
        how = {"norm": options.norm, "eps": eps, "seed": seed, "images": images}
        told = race(
            model,
            {
                "robeval": partial(contenders.robeval, specs=specs, capacity=options.batch_size, **how),
                "pyautoattack": partial(
                    contenders.pyautoattack, version=options.attack, batch=options.batch_size, **how
                ),
            },
            repeat=options.repeat,
            out=options.out,
            case="autoattack",
            model=Path(options.model).name,
            data=images.name,
            images=len(images),
            norm=options.norm,
            eps=options.eps,
            attack=options.attack,
            seed=seed,
        )
        mine, theirs = (set(told[tool]["broken"]) for tool in ("robeval", "pyautoattack"))
        differences.append(len(mine) - len(theirs))
    if options.seeds > 1:
        mean = sum(differences) / len(differences)
        line(options.out, case="autoattack", attack=options.attack, seeds=options.seeds, mean_difference=mean)


if __name__ == "__main__":
    main()
