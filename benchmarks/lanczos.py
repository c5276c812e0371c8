"""Batched Lanczos against scipy's eigsh image by image: largest curvature of the loss at 64 digits.

Both work on the same smooth network, loss and float32 Hessian-vector products from a kept graph, to a relative
tolerance of 1e-3, on one thread, in alternating repetitions. Ours runs two random starts per image, eigsh one. Errors
are against dense float64 eigenvalues. Prints one JSON line per repetition and a summary; exit code 7 below 20 times.

    python -m benchmarks.lanczos
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

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


def smooth_network(epochs: int = 20) -> Classifier:
    """A ``digits_cnn`` with smooth activations, trained for some seconds."""
    torch.manual_seed(0)
    train = load("digits", "train")
    net = build("digits_cnn", act="smooth")
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(train.x[rows]), train.y[rows]).backward()
            optimiser.step()
    return Classifier(net, 10)


def batched(model: Classifier, images: Images) -> tuple[np.ndarray, int]:
    """Largest eigenvalue of every image at once, and the number of products per image."""

    def products(rows: Tensor) -> Callable[[Tensor], Tensor]:
        return expand(model, images.x[rows], images.y[rows], LOSS, T, second=True).product

    def draw(rows: Tensor, number: int) -> Tensor:
        ids = images.ids[rows].tolist()
        return Streams(0, ids, "benchmark", [number] * len(ids)).normal(images.x[0].numel())

    found = lanczos(products, draw, len(images), images.x[0].numel(), tolerance=TOLERANCE)
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
            direction = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32)).view_as(x)
            (hv,) = torch.autograd.grad(gradient, x, direction, retain_graph=True)
            return hv.flatten().numpy()

        operator = LinearOperator((d, d), matvec=product, dtype=np.float32)
        start = np.random.default_rng(i).standard_normal(d).astype(np.float32)
        values.append(eigsh(operator, k=1, which="LA", tol=TOLERANCE, v0=start, return_eigenvectors=False)[0])
    return np.array(values), products // len(images)


def dense(model: Classifier, images: Images) -> np.ndarray:
    """Largest eigenvalue of every image from its whole float64 Hessian."""
    model = in_double(model)
    at = expand(model, images.x.double(), images.y, LOSS, T, second=True)
    d = images.x[0].numel()
    columns = [at.product(torch.eye(d, dtype=torch.float64)[k].expand(len(images), d)) for k in range(d)]
    return torch.linalg.eigvalsh(torch.stack(columns, 2))[:, -1].numpy()


def main(repetitions: int = 5, epochs: int = 20) -> int:
    torch.set_num_threads(1)
    model = smooth_network(epochs)
    images = subset(load("digits", "test"), "64")
    truth = dense(model, images)
    seconds: dict[str, list[float]] = {"batched": [], "eigsh": []}
    worst: dict[str, float] = {}
    products: dict[str, int] = {}
    for repetition in range(repetitions):
        for name, method in (("batched", batched), ("eigsh", one_by_one)):
            before = time.process_time()
            values, products[name] = method(model, images)
            seconds[name].append(time.process_time() - before)
            worst[name] = float(np.max(np.abs(values - truth) / np.abs(truth)))
            print(json.dumps({"repetition": repetition, "method": name, "cpu_seconds": round(seconds[name][-1], 4)}))
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    ratio = middle["eigsh"] / middle["batched"]
    summary = {
        "images": len(images),
        "threads": torch.get_num_threads(),
        "cpu_seconds": {k: round(v, 4) for k, v in middle.items()},
        "ratio": round(ratio, 1),
        "products_per_image": products,
        "max_relative_error": worst,
    }
    print(json.dumps({"summary": summary}))
    return 0 if ratio >= GATE and worst["batched"] <= TOLERANCE else 7


if __name__ == "__main__":
    sys.exit(main())
