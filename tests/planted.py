"""Honest models and planted faults on the embedded digits: what the diagnostics must leave alone, and must catch.

All share four small networks that train once, in seconds; a fault is a wrapper around one of them. The list is that of
the pilot in which the diagnostics were chosen, with a purifier, a randomised defence and a model with batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robeval.core.ball import Ball
from robeval.core.classifier import Classifier
from robeval.core.goal import Untargeted
from robeval.core.images import Images
from robeval.core.streams import Streams
from robeval.data.load import load
from robeval.data.subset import subset
from robeval.engine.drive import drive

NORM, EPS = "linf", 0.15
HONEST = ("honest-standard", "honest-adv", "honest-fgsm")


def plain_net(norm: bool = False) -> nn.Sequential:
    """Two convolutions and two dense layers, 20,000 parameters."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1)]
    between: list[nn.Module] = [nn.BatchNorm2d(32), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(*layers, *between, nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10))


Craft = Callable[[nn.Module, Tensor, Tensor, list[int]], Tensor]


def clean(net: nn.Module, x: Tensor, y: Tensor, ids: list[int]) -> Tensor:
    return x


def noisy(net: nn.Module, x: Tensor, y: Tensor, ids: list[int]) -> Tensor:
    return x + 0.25 * torch.randn_like(x)


def by_attack(name: str, **settings: object) -> Craft:
    """Training images from one of our own attacks; FGSM starts at random, so that it does not overfit to one step."""

    def craft(net: nn.Module, x: Tensor, y: Tensor, ids: list[int]) -> Tensor:
        from robeval.attacks.pgd import pgd

        rng = Streams(int(torch.randint(1 << 30, ())), ids, name)
        return drive(pgd(x, Untargeted(y), Ball(NORM, EPS), rng, **settings), net, Untargeted(y)).detach()

    return craft


def fitted(craft: Craft = clean, *, epochs: int = 8, seed: int = 0, norm: bool = False) -> nn.Sequential:
    """A network trained on the images that ``craft`` makes, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, train = plain_net(norm), load("digits", "train")
        steps = epochs * -(-len(train) // 64)
        optimiser = torch.optim.Adam(net.parameters(), 4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 8e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(train)).split(64):
                x = craft(net, train.x[rows], train.y[rows], rows.tolist())
                optimiser.zero_grad()
                F.cross_entropy(net(x), train.y[rows]).backward()
                optimiser.step()
                schedule.step()
    return net.eval()


@cache
def standard() -> nn.Sequential:
    return fitted()


@cache
def adversarial() -> nn.Sequential:
    return fitted(by_attack("pgd", steps=5), epochs=16)


@cache
def one_step() -> nn.Sequential:
    return fitted(by_attack("pgd", steps=1, relative_step=1.0), epochs=16)


@cache
def with_noise() -> nn.Sequential:
    return fitted(noisy, epochs=8)


@cache
def with_batchnorm() -> nn.Sequential:
    return fitted(norm=True)


class Around(nn.Module):
    """A network with something before its input and something after its logits."""

    def __init__(self, net: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def same(t: Tensor) -> Tensor:
    return t


def quantised(x: Tensor) -> Tensor:
    return (4 * x).round() / 4


def shattered(x: Tensor) -> Tensor:
    return x + 0.03 * (1000 * x).sin()


def one_hot(z: Tensor) -> Tensor:
    return F.one_hot(z.argmax(1), z.shape[1]) + 0 * z


def constant(z: Tensor) -> Tensor:
    return F.one_hot(z.argmax(1) * 0 + 1, z.shape[1]) * 5.0 + 0 * z


class Purifier(nn.Module):
    """Descends the entropy of its own answer before it classifies, and hides that from the gradient."""

    def __init__(self, net: nn.Module, steps: int = 3, length: float = 0.03):
        super().__init__()
        self.net, self.steps, self.length = net, steps, length

    def forward(self, x: Tensor) -> Tensor:
        moved = x.detach()
        with torch.enable_grad():
            for _ in range(self.steps):
                moved = moved.detach().requires_grad_()
                z = self.net(moved)
                entropy = -(z.softmax(1) * z.log_softmax(1)).sum()
                moved = moved - self.length * torch.autograd.grad(entropy, moved)[0].sign()
        return self.net(x + (moved.detach() - x.detach()))


class BatchStatistics(nn.Module):
    """Subtracts what the images of a batch have in common."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - 0.5 * (x.mean(0, keepdim=True) - 0.3))


class Training(nn.Module):
    """A network that its author forgot to put in eval mode, or took out of it again."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def train(self, mode: bool = True) -> Training:
        super().train(True)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def _copy(net: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(net)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "honest-standard": standard,
    "honest-adv": adversarial,
    "honest-fgsm": one_step,
    "logits-x1000": lambda: Around(standard(), same, lambda z: 1000 * z),
    "logits-x40": lambda: Around(standard(), same, lambda z: 40 * z),
    "quantised": lambda: Around(standard(), quantised, same),
    "detached": lambda: Around(standard(), Tensor.detach, same),
    "noise": lambda: Around(with_noise(), lambda x: x + 0.25 * torch.randn_like(x), same),
    "shattered": lambda: Around(standard(), shattered, same),
    "softmax": lambda: Around(standard(), same, lambda z: z.softmax(1)),
    "softmax-x1000": lambda: Around(standard(), same, lambda z: (1000 * z).softmax(1)),
    "one-hot": lambda: Around(standard(), same, one_hot),
    "constant": lambda: Around(standard(), same, constant),
    "batchnorm-train": lambda: Training(_copy(with_batchnorm())),
    "purifier": lambda: Purifier(standard()),
    "randomised": lambda: Around(adversarial(), lambda x: x + 0.05 * torch.randn_like(x), same),
    "batch-statistics": lambda: BatchStatistics(standard()),
}


def model(name: str) -> Classifier:
    """A model of the suite by name."""
    return Classifier(MODELS[name](), 10, name)


@cache
def source() -> Classifier:
    """An undefended network of the same architecture with other weights, to craft transfer images on."""
    return Classifier(fitted(seed=1), 10, "plain-source")


def chosen(n: int) -> Images:
    return subset(load("digits", "test"), str(n))
