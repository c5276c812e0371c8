"""The attack classes of torchattacks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robeval.core.ball import Ball
from robeval.core.catalogue import reference
from robeval.core.errors import unknown

NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
#: What the run decides, and what would only print.
OURS = {"eps", "max_epsilon", "norm", "seed", "verbose"}
#: Stands for an infinite radius where a class computes with it.
HUGE = 1e10


@reference(
    source="Kim 2020, Torchattacks: a PyTorch repository for adversarial attacks, arXiv:2010.01950",
    norms=("linf", "l2", "l1"),
    needs="torchattacks",
    word="attack",
    by_word={
        "BIM DIFGSM EOTPGD FFGSM FGSM Jitter MIFGSM NIFGSM PGD PGDRS PIFGSM PIFGSMPP RFGSM SINIFGSM SPSA TIFGSM TPGD"
        " UPGD VMIFGSM VNIFGSM": {"norms": ("linf",)},
        "PGDL2 PGDRSL2": {"norms": ("l2",)},
        "APGD APGDT AutoAttack Square": {"norms": ("linf", "l2")},
        "FAB": {"norms": ("linf", "l2"), "search": "minimal"},
        "CW DeepFool": {"norms": ("l2",), "search": "minimal"},
        "EADL1": {"norms": ("l1",), "search": "minimal"},
        "EADEN": {"norms": ("l2", "l1"), "search": "minimal"},
        "GN JSMA OnePixel Pixle SparseFool VANILA": {"search": "minimal"},
    },
)
def torchattacks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    seed: int,
    *,
    attack: str = "PGD",
    **settings: Any,
) -> Tensor:
    """Any attack class of torchattacks by its name, such as torchattacks:PGD,steps=20.

    To cross-check ours. Settings go to the constructor of the class; a class without a radius counts as a search of the
    nearest adversarial image.

    Args:
        attack: Name of the class. Its other settings are those of its constructor; radius, norm and seed are the run's.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,); returns candidates of the same shape.
    Cost:
        As the class does; passes are counted.
    Source:
        Kim 2020, arXiv:2010.01950; the package torchattacks.
    Departs:
        A step size that is not given keeps the proportion to eps that the class's defaults have (eps / 4 for PGD), the
        number of classes is the model's, and FAB searches without a radius. NaN candidates, such as CW's where a pixel
        is exactly 0 or 1, count as not found. Results depend on the batch wherever the class draws or stops for one.
    """
    made = check(attack, **settings)
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    found: Tensor = made(model, **_filled(made, ball, seed, classes, settings))(x, y)
    return found


def check(attack: str = "PGD", **settings: Any) -> Any:
    """The class of that name.

    Raises:
        UsageError: no such class, or a setting that its constructor does not have.
    """
    import torchattacks as package
    from torchattacks.attack import Attack

    found = {n: c for n, c in vars(package).items() if inspect.isclass(c) and issubclass(c, Attack)}
    usable = {n: c for n, c in found.items() if _needs_a_model_only(c)}
    if attack not in usable:
        raise unknown("attack of torchattacks", attack, usable)
    known = set(_parameters(usable[attack])) - OURS
    for name in settings:
        if name not in known:
            raise unknown(f"setting of torchattacks:{attack}", name, known)
    return usable[attack]


def _parameters(made: Any) -> Mapping[str, inspect.Parameter]:
    """What the constructor takes after the model."""
    return dict(list(inspect.signature(made.__init__).parameters.items())[2:])


def _needs_a_model_only(made: Any) -> bool:
    first = list(inspect.signature(made.__init__).parameters)[1:2]
    return first == ["model"] and all(p.default is not p.empty for p in _parameters(made).values())


def _filled(made: Any, ball: Ball, seed: int, classes: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings, and what the run knows better than the class's defaults."""
    takes = _parameters(made)
    eps = ball.eps if math.isfinite(ball.eps) else HUGE
    run = {"eps": eps, "max_epsilon": eps, "norm": NORM[ball.norm], "seed": seed, "n_classes": classes}
    if {"alpha", "eps"} <= set(takes):
        run["alpha"] = takes["alpha"].default / takes["eps"].default * eps
    return {name: value for name, value in run.items() if name in takes} | dict(given)
