"""An attack is a generator: it asks, you answer. Here the answers come from one network on one batch, without engine.

    python examples/attack_by_hand.py

A linear classifier of 8x8 digits is trained in a second, then PGD moves every test image by at most eps per pixel.
Nothing here judges, counts or records; that is what ``robeval attack`` does.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from robeval.attacks.pgd import pgd
from robeval.core.ball import Ball
from robeval.core.goal import Untargeted
from robeval.core.streams import Streams
from robeval.engine.drive import drive

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
y = torch.tensor(digits.target)
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(300):
    optimiser.zero_grad()
    nn.functional.cross_entropy(network(x[:1400]), y[:1400]).backward()
    optimiser.step()

x, y = x[1400:], y[1400:]
ids = list(range(1400, 1400 + len(x)))
print(f"clean accuracy {(network(x).argmax(1) == y).float().mean():.1%}")
for eps in (0.5 / 16, 1 / 16, 2 / 16):
    goal, ball = Untargeted(y), Ball("linf", eps)
    x_adv = drive(pgd(x, goal, ball, Streams(0, ids, "pgd"), steps=20), network, goal)
    still = (network(x_adv).argmax(1) == y).float().mean()
    print(f"eps {eps:.4f}  accuracy after PGD {still:.1%}  largest change {(x_adv - x).abs().max():.4f}")
