"""The tools that the comparisons run: ours through the engine, others as their users call them."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
from torch import Tensor

from benchmarks.counting import Counting
from robeval.core.ball import Ball
from robeval.core.catalogue import Spec, parse
from robeval.core.choosing import for_classes
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.engine.backend import Backend
from robeval.engine.run import run
from robeval.evaluate.settings import plan, searches_nearest
from robeval.evaluate.suites import suite

NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


def attacks(name: str, norm: str, classes: int) -> list[Spec]:
    """The attacks of a suite, or one attack."""
    specs = suite(name, norm)[0] if name.startswith("autoattack") else [parse("attacks", name)]
    return [for_classes(s, classes) for s in specs]


def robeval(
    model: Counting, *, specs: list[Spec], norm: str, eps: float, seed: int, capacity: int, images: Images
) -> set[int]:
    """Ids that the attacks break, one attack after the other over the survivors; the clean pass included."""
    backend = Backend(Classifier(model, len(images.classes)), capacity)
    clean = backend.logits(images.x, Untargeted(images.y))
    standing = clean.argmax(1) == images.y
    broken: set[int] = set(images.ids[~standing].tolist())
    for spec in specs:
        left = standing.nonzero().squeeze(1)
        if not len(left):
            break
        these = images[left]
        ball = Ball(norm, float("inf") if searches_nearest(spec) else eps)
        for o in run(plan(spec), these, Untargeted(these.y), ball, backend, seed=seed, clean=clean[left]):
            if o.success and o.distances[norm] <= eps * (1 + 1e-6) + 1e-9:
                standing[left[o.position]] = False
                broken.add(int(these.ids[o.position]))
    return broken


def pyautoattack(
    model: Counting, *, version: str, norm: str, eps: float, seed: int, batch: int, images: Images
) -> set[int]:
    """Ids that the reference's AutoAttack, or one part of it with the standard version's settings, breaks."""
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").disabled = True
    made = AutoAttack(model, norm=NORM[norm], eps=eps, seed=seed, device="cpu", version="standard")
    if version in PARTS:
        made.attacks_to_run = [version]
    elif version != "standard":
        made = AutoAttack(model, norm=NORM[norm], eps=eps, seed=seed, device="cpu", version=version)
    with contextlib.redirect_stdout(io.StringIO()):
        points, _ = made.run_standard_evaluation(images.x, images.y, batch_size=batch)
    return wrong(model, points, images)


def wrong(model: Counting, points: Tensor, images: Images) -> set[int]:
    """Ids of the images that the points fool, looked at outside the count."""
    with torch.no_grad():
        return set(images.ids[model.inner(points).argmax(1) != images.y].tolist())


def plain_pgd(
    model: Counting, *, eps: float, steps: int, restarts: int, seed: int, batch: int, images: Images
) -> set[int]:
    """PGD as most papers' code writes it: every restart of every image to its end, in fixed batches."""
    generator = torch.Generator().manual_seed(seed)
    broken: set[int] = set()
    for rows in torch.arange(len(images)).split(batch):
        x0, y = images.x[rows], images.y[rows]
        for _ in range(restarts):
            x = (x0 + eps * (2 * torch.rand(x0.shape, generator=generator) - 1)).clamp(0, 1)
            for _ in range(steps):
                x.requires_grad_()
                loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
                grad = torch.autograd.grad(loss, x)[0]
                x = (x0 + (x.detach() + eps / 4 * grad.sign() - x0).clamp(-eps, eps)).clamp(0, 1)
            with torch.no_grad():
                broken |= set(images.ids[rows[model(x).argmax(1) != y]].tolist())
    return broken


def torchattacks_multi(
    model: Counting, *, eps: float, steps: int, restarts: int, batch: int, images: Images
) -> set[int]:
    """torchattacks' way of restarts: MultiAttack of so many PGD, each over the images still standing."""
    import torchattacks

    made: Any = torchattacks.MultiAttack([torchattacks.PGD(model, eps, eps / 4, steps) for _ in range(restarts)])
    points = torch.cat([made(images.x[rows], images.y[rows]) for rows in torch.arange(len(images)).split(batch)])
    return wrong(model, points, images)


def plain_simba(model: Counting, *, eps: float, seed: int, images: Images) -> set[int]:
    """SimBA as its paper's algorithm reads: image by image, plus before minus, on the probability of the true class."""
    generator = torch.Generator().manual_seed(seed)
    broken: set[int] = set()
    with torch.no_grad():
        for x0, y, index in zip(images.x, images.y.tolist(), images.ids.tolist(), strict=True):
            x, z = x0[None].clone(), model(x0[None])
            best = z.softmax(1)[0, y]
            for pixel in torch.randperm(x0.numel(), generator=generator).tolist():
                if int(z.argmax()) != y:
                    break
                for step in (eps, -eps):
                    proposal = x.clone()
                    proposal.view(-1)[pixel] = (proposal.view(-1)[pixel] + step).clamp(0, 1)
                    z_new = model(proposal)
                    if z_new.softmax(1)[0, y] < best:
                        x, z, best = proposal, z_new, z_new.softmax(1)[0, y]
                        break
            if int(z.argmax()) != y:
                broken.add(index)
    return broken
