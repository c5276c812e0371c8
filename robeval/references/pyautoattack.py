"""AutoAttack by its authors, as packaged in pyautoattack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import reference
from robeval.core.errors import UsageError

NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
#: Fewest classes that the logits' ratio of an attack needs; the package fails below them.
CLASSES = {"apgd-dlr": 3, "apgd-t": 4}


@reference(
    source="Croce and Hein 2020, Reliable evaluation of adversarial robustness with an ensemble of diverse"
    " parameter-free attacks, arXiv:2003.01690, with the authors' code",
    norms=("linf", "l2", "l1"),
    needs="pyautoattack",
    word="version",
)
def pyautoattack(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    ball: Ball,
    seed: int,
    *,
    version: Literal[
        "standard", "plus", "rand", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"
    ] = "standard",
    steps: int | None = None,
    restarts: int | None = None,
    queries: int | None = None,
) -> Tensor:
    """AutoAttack as its authors wrote it: a version of the ensemble, or one of its attacks alone.

    The package runs its attacks one after the other over the images still standing in a batch. To cross-check ours.

    Args:
        version: standard, plus or rand; or apgd-ce, apgd-dlr, apgd-t, fab, fab-t or square alone.
        steps: Steps of APGD and FAB; none means the package's (100).
        restarts: Starts of APGD, FAB and Square; none means the package's, which for APGD-CE, APGD-DLR and FAB alone
            is 5.
        queries: Proposals of Square; none means the package's (5000).

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,); returns candidates of the shape of x, the image itself where none was found.
    Cost:
        standard, ten classes: 1910 backward and about 7900 forward passes per image that stands to the end, with the
        package's 8 forward passes per batch for its checks.
    Source:
        Croce and Hein 2020, arXiv:2003.01690; the package pyautoattack.
    Departs:
        Targeted attacks visit min(9, K - 1) classes instead of failing with fewer than 10. The result of an image
        depends on its batch, because the package draws for a batch at once.
    """
    from pyautoattack import AutoAttack

    ensemble = version in ("standard", "plus", "rand")
    names = {"version": version} if ensemble else {"version": "custom", "attacks": [version]}
    made = AutoAttack(model, norm=NORM[ball.norm], eps=ball.eps, seed=seed, device=x.device, **names)
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    _insist_on_classes(version, made.attacks_to_run, classes)
    for part in (made.apgd_targeted, made.fab):
        part.n_target_classes = min(part.n_target_classes, classes - 1)
    _shorten(made, steps, restarts, queries)
    found: Tensor = made.run_standard_evaluation(x, y, batch_size=len(x))[0]
    return found


def _insist_on_classes(version: str, attacks: list[str], classes: int) -> None:
    short = [name for name in attacks if classes < CLASSES.get(name, 2)]
    if short:
        raise UsageError(
            f"pyautoattack:{version} runs {short[0]}, which needs {CLASSES[short[0]]} classes; the model has {classes}",
            code="A06",
            do="pyautoattack:apgd-ce, pyautoattack:fab or pyautoattack:square",
        )


def _shorten(made: Any, steps: int | None, restarts: int | None, queries: int | None) -> None:
    """Put the user's budget in the place of the package's."""
    for part in (made.apgd, made.apgd_targeted, made.fab):
        part.n_iter = steps or part.n_iter
        if hasattr(part, "n_iter_orig"):
            part.n_iter_orig = part.n_iter
    for part in (made.apgd, made.apgd_targeted, made.fab, made.square):
        part.n_restarts = restarts or part.n_restarts
    made.square.n_queries = queries or made.square.n_queries
