"""Small problems with known answers, for laws and oracles."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robeval.core import catalogue
from robeval.core.ball import DUAL, Ball, vector_norm
from robeval.core.choosing import for_classes
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.engine.backend import Backend
from robeval.engine.judge import Outcome
from robeval.engine.run import Plan, run
from robeval.evaluate.settings import attempts_of

#: Settings that keep slow attacks quick in the laws.
QUICK = {"steps": 30, "queries": 100}
#: More of it for single attacks.
SHORT: dict[str, dict[str, Any]] = {
    "cw-l2": {"iterations": 20, "searches": 3},
    "logbarrier": {"outer": 4, "inner": 20},
}
#: Presets that take another path through their method's code.
VARIANTS = ("apgd-t", "fab-t", "simba-dct")
PIXELS = (1, 4, 4)


def images(x: Tensor, y: Tensor, classes: int) -> Images:
    return Images(x, y, torch.arange(100, 100 + len(x)), "problem", [str(k) for k in range(classes)])


def linear(classes: int, *, rows: int = 24, seed: int = 0) -> tuple[Classifier, Images]:
    """A float64 linear model and images that it classifies correctly, far from the box."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(16, classes).double()
    layer.weight.data = torch.randn(classes, 16, generator=generator, dtype=torch.float64)
    layer.bias.data = -layer.weight.data.sum(1) / 2  # balanced at the grey image
    model = Classifier(nn.Sequential(nn.Flatten(), layer), classes)
    x = 0.5 + 0.3 * (torch.rand(rows, *PIXELS, generator=generator, dtype=torch.float64) - 0.5)
    return model, images(x, model.logits(x).argmax(1), classes)


def exact_distance(model: Classifier, these: Images, norm: str) -> Tensor:
    """Distance of each image to the nearest boundary of a linear model, the box left aside. -> (N,)."""
    assert isinstance(model.module, nn.Sequential)
    layer = model.module[1]
    assert isinstance(layer, nn.Linear)
    w = layer.weight.detach()
    goal = Untargeted(these.y)
    gaps = -goal.gaps(model.logits(these.x))
    slopes = w[goal.rivals(model.classes)] - w[these.y][:, None]
    return (gaps / vector_norm(slopes.flatten(0, 1), DUAL[norm]).view_as(gaps)).amin(1)


def network(
    *, rows: int = 24, seed: int = 0, classes: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Classifier, Images]:
    """A small ReLU network with a convolution and images of its own classes."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes)
    ).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=dtype) / max(1, p[0].numel()) ** 0.5
    x = torch.rand(rows, *PIXELS, generator=generator, dtype=dtype)
    with torch.no_grad():
        last = net[-1]
        assert isinstance(last, nn.Linear)
        last.bias -= net(x).mean(0)  # all classes occur
        last.weight *= 30  # confident, as trained networks are
        last.bias *= 30
    model = Classifier(net, classes)
    return model, images(x, model.logits(x).argmax(1), classes)


def quick(name: str, classes: int = 10, **more: Any) -> dict[str, Any]:
    """All settings of an attack or preset, the slow ones shortened, with as many targets as there are rivals."""
    spec = for_classes(catalogue.parse("attacks", name), classes)
    short = {k: v for k, v in {**QUICK, **SHORT.get(name, {}), **more}.items() if k in spec.settings}
    bound = spec.method.bind(short)
    return spec.settings | {k: bound[k] for k in short}


def attack(
    name: str,
    model: Classifier,
    these: Images,
    norm: str,
    eps: float,
    *,
    capacity: int = 256,
    seed: int = 0,
    **settings: Any,
) -> list[Outcome]:
    """Run one attack through the engine, the outcomes in the order of the images."""
    method = catalogue.find("attacks", name)
    radius = float("inf") if method.facts.get("search") == "minimal" else eps
    bound = quick(name, model.classes, **settings)
    plan = Plan(
        method.name,
        partial(method.load(), **bound),
        attempts_of(method, bound),
        method.facts.get("access") == "black-box",
    )
    with torch.no_grad():
        clean = model.logits(these.x)
    goal, backend = Untargeted(these.y), Backend(model, capacity)
    outcomes = run(plan, these, goal, Ball(norm, radius), backend, seed=seed, clean=clean)
    return sorted(outcomes, key=lambda o: o.position)


def attack_cases() -> list[tuple[str, str]]:
    """Every attack in the folder, and the presets that take another path, with every norm that it declares."""
    names = [*catalogue.methods("attacks"), *VARIANTS]
    return [(name, norm) for name in names for norm in catalogue.find("attacks", name).facts["norms"]]


def trained(path: Path, architecture: str, **arguments: Any) -> Path:
    """A model file trained on digits for a second or two."""
    from robeval.data.load import load
    from robeval.models.build import build
    from robeval.models.checkpoint import save

    torch.manual_seed(0)
    net, train = build(architecture, **arguments), load("digits", "train")
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(8):
        for rows in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(train.x[rows]), train.y[rows]).backward()
            optimizer.step()
    return save(
        path, net, architecture=architecture, arguments=arguments, normalise="none", input_shape=(1, 8, 8),
        classes=list(train.classes), recipe={}, metrics={},
    )  # fmt: skip
