"""What a proof costs and how tight it is: ibp, crown-ibp, crown and alpha-crown on the same images.

    python -m benchmarks.certificates --images 20 --cifar cifar10:/path/to/folder --out certificates.jsonl

A small strided convolutional network and an mlp with ReLU on digits, Fashion-MNIST and, where it is given, CIFAR-10,
each trained for a few epochs. Per method: images a CPU second, mean lower bound of the smallest margin, share of images
proven at the radius, share that a PGD attack leaves. A bound above an attacked margin is wrong: exit code 7.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from robeval.bounds.graph import Graph, graph_of
from robeval.bounds.region import Region
from robeval.core import catalogue
from robeval.core.ball import Ball
from robeval.core.images import Images
from robeval.core.streams import Streams
from robeval.data.load import load
from robeval.data.subset import subset
from robeval.train.craft import crafted

METHODS = ("ibp", "crown-ibp", "crown", "alpha-crown")


def strided(channels: int, side: int) -> nn.Sequential:
    """Two strided convolutions and two dense layers, as small certified networks commonly have."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * (side // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def dense(channels: int, side: int) -> nn.Sequential:
    """Two hidden layers of 64."""
    width = channels * side * side
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def trained(net: nn.Module, train: Images, epochs: int, eps: float) -> nn.Module:
    """A few epochs of Adam on images with uniform noise of the radius."""
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(64):
            x = train.x[rows]
            optimiser.zero_grad()
            noisy = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
            nn.functional.cross_entropy(net(noisy), train.y[rows]).backward()
            optimiser.step()
    return net.eval()


def left_by_pgd(graph: Graph, net: nn.Module, these: Images, eps: float) -> Tensor:
    """Smallest margin after PGD on cross-entropy, in float64. -> (n,)."""
    rng = Streams(0, these.ids.tolist(), "benchmark", [0] * len(these))
    x = crafted(net, these.x, these.y, rng, Ball("linf", eps), steps=20)
    z = graph.logits(x.double())
    own = z.gather(1, these.y[:, None])
    return (own - z.scatter(1, these.y[:, None], -torch.inf)).amin(1)


def lines(name: str, net: nn.Module, these: Images, eps: float) -> Iterable[dict[str, object]]:
    """One line per method."""
    graph = graph_of(net, tuple(these.x.shape[1:]))
    these = these[graph.logits(these.x.double()).argmax(1) == these.y]
    region = Region(these.x.double(), "linf", torch.full((len(these),), eps, dtype=torch.float64))
    margin = left_by_pgd(graph, net, these, eps)
    for method in METHODS:
        spec = catalogue.parse("bounds", method)
        started = time.process_time()
        with torch.no_grad():
            lower = spec.method.load()(graph, region, these.y, **spec.settings).margin()
        seconds = time.process_time() - started
        yield {
            "network": name,
            "bound": method,
            "eps": eps,
            "images": len(these),
            "images_per_cpu_second": round(len(these) / seconds, 2),
            "mean_lower_margin": round(float(lower.mean()), 4),
            "proven": int((lower > 0).sum()),
            "left_by_pgd": int((margin > 0).sum()),
            "mean_attacked_margin": round(float(margin.mean()), 4),
            "above_attack": int((lower > margin).sum()),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--data", nargs="+", default=["digits", "fashion-mnist"])
    parser.add_argument("--cifar", default="", help="CIFAR-10 as robeval's --data names it")
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for data in [*given.data, *([given.cifar] if given.cifar else [])]:
        eps = 1 / 255 if data == given.cifar else 0.01
        train, test = (load(data, split) for split in ("train", "test"))
        train = subset(train, str(min(len(train), 6000)))
        for build in (strided, dense):
            torch.manual_seed(0)
            net = trained(build(train.x.shape[1], train.x.shape[-1]), train, given.epochs, eps)
            short = "cifar10" if data == given.cifar else data
            for line in lines(f"{short} {build.__name__}", net, subset(test, str(given.images)), eps):
                print(json.dumps(line), flush=True)
                wrong += int(str(line["above_attack"]))
                if given.out:
                    with open(given.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
    return 7 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
