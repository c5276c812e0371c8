"""Proofs, estimates and attacks side by side: mean l2 radii on smooth networks of the digits.

One command trains two networks with smooth activations, seeks each image's largest proven radius by every proof, and
compares with the estimates and with the nearest adversarial image that three attacks find. A proof above an attack is
wrong: exit code 7. An estimate above one is only counted.

    python -m benchmarks.proofs --images 12

Prints one JSON line per network and method, then the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from functools import partial

import torch
from torch import Tensor

from benchmarks.lanczos import smooth_network
from robeval.bounds.graph import graph_of
from robeval.certification.proving import Prover
from robeval.certification.settings import Settings
from robeval.core import catalogue
from robeval.core.ball import Ball
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.streams import Streams
from robeval.data.load import load
from robeval.data.subset import subset
from robeval.engine.backend import Backend
from robeval.engine.run import Plan, run

PROOFS = (
    "alpha-crown",
    "crown",
    "crown-ibp",
    "curvature",
    "curvature-ibp",
    "jacobian",
    "jacobian-ibp",
    "ibp",
    "lipschitz",
)
ESTIMATES = ("l-bound", "c-bound", "clever")
ATTACKS = ("deepfool", "ddn", "fmn")


def proven(name: str, model: Classifier, images: Images, norm: str) -> Tensor:
    """Largest proven radius of each image. -> (N,)."""
    spec = catalogue.parse("bounds", name)
    settings = Settings([spec], norm)
    graph = graph_of(model.module, tuple(images.x.shape[1:]))
    prover = Prover(spec, graph, model, images, settings)
    return torch.tensor([r.radius for r in prover.decide(list(range(len(images))))], dtype=torch.float64)


def estimated(name: str, model: Classifier, images: Images, norm: str) -> Tensor:
    """Radius that an estimate claims for each image. -> (N,)."""

    def rng(ids: list[int], number: int) -> Streams:
        return Streams(0, ids, name, [number] * len(ids))

    spec = catalogue.parse("bounds", name)
    readings = spec.method.load()(model, images, norm, rng, **spec.settings)
    return torch.tensor([r.radius for r in readings], dtype=torch.float64)


def attacked(name: str, model: Classifier, images: Images, norm: str) -> Tensor:
    """Verified distance of the nearest adversarial image found. -> (N,)."""
    method = catalogue.find("attacks", name)
    plan = Plan(method.name, partial(method.load(), **method.bind({})))
    outcomes = run(plan, images, Untargeted(images.y), Ball(norm, math.inf), Backend(model, 256))
    return torch.tensor([o.distances[norm] for o in sorted(outcomes, key=lambda o: o.position)], dtype=torch.float64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--norm", choices=("l2", "linf", "l1"), default="l2")
    parser.add_argument("--networks", nargs="+", default=["mlp", "digits_cnn"])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--bounds", nargs="+", default=[*PROOFS, *ESTIMATES], help="proofs and estimates to compare")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table, wrong = [], 0
    for network in given.networks:
        model = smooth_network(network, given.epochs)
        images = subset(load("digits", "test"), f"{given.images}")
        with torch.no_grad():
            images = images[model.logits(images.x).argmax(1) == images.y]
        attacks = [attacked(name, model, images, given.norm) for name in ATTACKS]
        nearest = torch.stack(attacks).amin(0)
        table.append((network, "attacks", "attack", float(nearest.mean()), math.nan, 0, math.nan))
        for kind, names, radii in (("proof", PROOFS, proven), ("estimate", ESTIMATES, estimated)):
            for name in names:
                if name not in given.bounds:
                    continue
                started = time.process_time()
                radius = radii(name, model, images, given.norm)
                seconds = time.process_time() - started
                above = int((radius > nearest).sum())
                wrong += above if kind == "proof" else 0
                share = float((radius / nearest).mean())
                table.append((network, name, kind, float(radius.mean()), share, above, seconds))
                keys = ("network", "bound", "kind", "mean_radius", "mean_share_of_attack", "above_attack", "seconds")
                print(json.dumps(dict(zip(keys, table[-1], strict=True)) | {"images": len(images)}), flush=True)
    print(
        f"\n{'network':<12}{'method':<16}{'kind':<10}{'mean radius':>12}{'of attack':>11}{'above it':>10}{'CPU s':>9}"
    )
    for network, name, kind, mean, share, above, seconds in table:
        print(f"{network:<12}{name:<16}{kind:<10}{mean:>12.4f}{share:>11.3f}{above:>10}{seconds:>9.2f}")
    print(f"proofs above an attack: {wrong}")
    return 7 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
