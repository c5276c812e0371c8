"""Batched Lanczos against scipy's eigsh image by image: largest curvature of the loss at 64 digits.

Both work on the same smooth network, loss and Hessian-vector products from a kept graph, to a relative tolerance of
1e-3, on one thread, in alternating repetitions. eigsh has one random start per image; ours is timed with one start, the
like-for-like comparison, and with the two starts that robeval uses by default. Errors are against dense float64
eigenvalues. In float32 the curvature at very confident images drowns in rounding, for both methods, so errors relative
to the largest curvature of all images, the constant of the C-bound, are printed too. The gate is on ``mlp`` in float64:
20 times faster, and errors of at most 1e-3; in ``digits_cnn`` the arithmetic of the products themselves leaves less to
gain. Exit code 7 when missed.

    python -m benchmarks.lanczos
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from robeval.bounds.expansion import expand, in_double
from robeval.bounds.lanczos import lanczos
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.data.load import load
from robeval.data.subset import subset
from robeval.models.build import build

LOSS, T, TOLERANCE, GATE = "softcw_lse", 10.0, 1e-3, 20.0


def smooth_network(name: str, epochs: int = 20) -> Classifier:
    """A network with smooth activations, trained for some seconds."""
    torch.manual_seed(0)
    train = load("digits", "train")
    net = build(name, act="smooth")
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(train.x[rows]), train.y[rows]).backward()
            optimiser.step()
    return Classifier(net, 10)


def batched(model: Classifier, images: Images, starts: int) -> tuple[np.ndarray, int]:
    """Largest eigenvalue of every image at once, and the number of products per image."""

    whole = expand(model, images.x, images.y, LOSS, T, second=True)

    def products(rows: Tensor) -> Callable[[Tensor], Tensor]:
        if len(rows) == len(images):
            return whole.product
        return expand(model, images.x[rows], images.y[rows], LOSS, T, second=True).product

    def draw(rows: Tensor, number: int) -> Tensor:
        ids = images.ids[rows].tolist()
        return Streams(0, ids, "benchmark", [number] * len(ids)).normal(images.x[0].numel()).to(images.x.dtype)

    found = lanczos(products, draw, len(images), images.x[0].numel(), starts=starts, tolerance=TOLERANCE)
    return found.largest.numpy(), int(found.products.sum()) // len(images)


def one_by_one(model: Classifier, images: Images) -> tuple[np.ndarray, int]:
    """The same by eigsh on one LinearOperator per image, its graph kept too and nothing padded."""
    values, products, d = [], 0, images.x[0].numel()
    for i in range(len(images)):
        x = images.x[i : i + 1].clone().requires_grad_()
        value = per_sample_loss(model.logits(x), images.y[i : i + 1], LOSS, T).sum()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)

        def product(v: np.ndarray, x: Tensor = x, gradient: Tensor = gradient) -> np.ndarray:
            nonlocal products
            products += 1
            direction = torch.from_numpy(np.ascontiguousarray(v)).view_as(x)
            (hv,) = torch.autograd.grad(gradient, x, direction, retain_graph=True)
            return hv.flatten().numpy()

        operator = LinearOperator((d, d), matvec=product, dtype=x.detach().numpy().dtype)
        start = np.random.default_rng(i).standard_normal(d).astype(operator.dtype)
        values.append(eigsh(operator, k=1, which="LA", tol=TOLERANCE, v0=start, return_eigenvectors=False)[0])
    return np.array(values), products // len(images)


def dense(model: Classifier, images: Images) -> np.ndarray:
    """All eigenvalues of every image's float64 Hessian, ascending. -> (n, d)."""
    at = expand(in_double(model), images.x.double(), images.y, LOSS, T, second=True)
    d = images.x[0].numel()
    columns = [at.product(torch.eye(d, dtype=torch.float64)[k].expand(len(images), d)) for k in range(d)]
    return torch.linalg.eigvalsh(torch.stack(columns, 2)).numpy()


METHODS: dict[str, Callable[[Classifier, Images], tuple[np.ndarray, int]]] = {
    "batched": partial(batched, starts=1),
    "batched_two_starts": partial(batched, starts=2),
    "eigsh": one_by_one,
}


def compare(network: str, model: Classifier, images: Images, truth: np.ndarray, repetitions: int) -> bool:
    """Print the comparison on one network in one arithmetic; whether it is fast and exact enough."""
    kind = str(images.x.dtype).removeprefix("torch.")
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    found: dict[str, tuple[np.ndarray, int]] = {}
    for repetition in range(repetitions):
        for name, method in METHODS.items():
            before = time.process_time()
            found[name] = method(model, images)
            seconds[name].append(time.process_time() - before)
            line = {"network": network, "arithmetic": kind, "repetition": repetition, "method": name}
            print(json.dumps(line | {"cpu_seconds": round(seconds[name][-1], 4)}), flush=True)
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    error = {name: np.abs(values - truth[:, -1]) for name, (values, _) in found.items()}
    relative = {name: float((e / np.abs(truth[:, -1])).max()) for name, e in error.items()}
    summary = {
        "network": network,
        "arithmetic": kind,
        "images": len(images),
        "threads": torch.get_num_threads(),
        "cpu_seconds": {name: round(s, 4) for name, s in middle.items()},
        "times_faster_than_eigsh": {n: round(middle["eigsh"] / middle[n], 1) for n in METHODS if n != "eigsh"},
        "products_per_image": {name: count for name, (_, count) in found.items()},
        "max_relative_error": relative,
        "max_error_over_constant": {n: float(e.max() / truth[:, -1].max()) for n, e in error.items()},
    }
    print(json.dumps({"summary": summary}), flush=True)
    return middle["eigsh"] >= GATE * middle["batched"] and relative["batched"] <= TOLERANCE


def main(repetitions: int = 3, epochs: int = 20) -> int:
    torch.set_num_threads(1)
    images = subset(load("digits", "test"), "64")
    in64 = Images(images.x.double(), images.y, images.ids, images.name, images.classes)
    met = {}
    for network in ("mlp", "digits_cnn"):
        model = smooth_network(network, epochs)
        truth = dense(model, images)
        met[network, 64] = compare(network, in_double(model), in64, truth, repetitions)
        compare(network, model, images, truth, repetitions)
    return 0 if met["mlp", 64] else 7


if __name__ == "__main__":
    sys.exit(main())
