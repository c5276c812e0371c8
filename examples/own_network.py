"""A network of your own, for weights that were trained elsewhere.

Save the weights with ``torch.save(network.state_dict(), "weights.pt")`` and name the function that builds the network:

    robeval attack weights.pt --arch examples/own_network.py:two_layers --arch-arg width=64 --eps 1/16

The function is your code and is run as it stands. It takes pixels in [0, 1]: if the network was trained on normalised
images, say so with ``--normalise``.
"""

from __future__ import annotations

from torch import nn


def two_layers(width: int | str = 32, classes: int = 10) -> nn.Module:
    """(n, 1, 8, 8) -> (n, classes). Arguments of the command line arrive as text."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, int(width)), nn.ReLU(), nn.Linear(int(width), classes))
