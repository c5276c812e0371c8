"""Structured gradient regularization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from robeval.core.catalogue import trainer
from robeval.core.errors import UsageError
from robeval.core.losses import per_sample_loss
from robeval.core.streams import Streams
from robeval.train.covariance import MOMENTS, Matrix, covariance_of, data_moment, form, running_mean, synthetic
from robeval.train.covariance_function import Stationary
from robeval.train.gradients import inner
from robeval.train.memory import Memory
from robeval.train.modes import bn_mode, normalises_over_the_batch
from robeval.train.perturbations import perturbation
from robeval.train.step import Loss, Objective, accuracy


@trainer(
    source="Roth, Lucchi, Nowozin, Hofmann 2018, Adversarially Robust Training through Structured Gradient"
    " Regularization, arXiv:1805.08736, algorithm 1",
    norms=(),
    robust=True,
    warns={"psd=none": "without psd the covariance may be indefinite and the penalty negative"},
    presets={
        "sgr-mnist-grad": {"source": "grad", "weight": 0.1},
        "sgr-mnist-sign": {"source": "sign", "weight": 1.0},
        "sgr-mnist-fgsm": {"source": "fgsm", "weight": 0.5, "eps": 32 / 255},
        "sgr-mnist-pgd": {"source": "pgd", "weight": 1.0, "eps": 32 / 255},
        "sgr-cifar-grad": {"source": "grad", "weight": 0.1},
        "sgr-cifar-sign": {"source": "sign", "weight": 0.5},
        "sgr-cifar-fgsm": {"source": "fgsm", "weight": 0.5, "eps": 8 / 255},
        "sgr-cifar-pgd": {"source": "pgd", "weight": 0.5, "eps": 8 / 255},
        "sgr-transfer-grad": {"source": "grad", "weight": 0.03},
        "sgr-transfer-sign": {"source": "sign", "weight": 0.2},
        "sgr-transfer-fgsm": {"source": "fgsm", "weight": 0.25, "eps": 8 / 255},
        "sgr-transfer-pgd": {"source": "pgd", "weight": 0.35, "eps": 8 / 255},
        "sgr-lrc": {"source": "lrc", "weight": 5.0},
    },
)
def sgr(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    source: Literal["grad", "sign", "fgsm", "pgd", "deepfool", "data", "lrc", "identity"] = "grad",
    weight: float = 0.1,
    representation: Literal["covfun", "full"] = "covfun",
    psd: Literal["auto", "interp", "spectral", "none"] = "auto",
    beta: float = 0.1,
    scale: float | None = None,
    update_every: int = 1,
    mean: bool = False,
    eps: float = 8 / 255,
    steps: int = 10,
    zeta: float = 8.0,
    inter: float = 0.5,
    batchnorm: Literal["frozen", "train"] = "frozen",
) -> Iterator[Objective]:
    """The loss plus a quadratic form of its input gradient in the covariance of perturbations.

    The covariance of what an attack does to images is learnt over the training, scaled to the variance of the data, and
    gradients are made small along the perturbations that it makes likely. A fixed covariance gives the special cases.

    Args:
        source: Perturbations: the gradient, its sign, what fgsm, pgd or deepfool do to the images (away from the
            network's own prediction), the training images, long-range-correlated noise, or independent pixels.
        weight: Strength lambda of the penalty.
        representation: covfun keeps the covariance as a function of channels and distance, full as a (d, d) matrix.
        psd: What is done about negative eigenvalues of a covariance function: interp interpolates between whole
            distances, spectral sets them to zero, none nothing; auto means interp for lrc and identity, otherwise
            spectral.
        beta: Weight of the newest mini-batch in the running covariance.
        scale: Mean variance c that the covariance is scaled to, in squared pixel units; none means that of the training
            images, 0.061 on CIFAR-10 (of the first mini-batch where there is no training set).
        update_every: Mini-batches from one update of the covariance to the next.
        mean: Also add the slope along the mean perturbation.
        eps: Radius in linf of fgsm and pgd, in pixel units; up to clipping the scaling cancels it.
        steps: Steps of pgd, of length eps / 5.
        zeta: Decay length of the correlation of lrc, in pixels.
        inter: Correlation of two channels of lrc at the same pixel.
        batchnorm: With BatchNorm: take the gradient with its running statistics (one more forward pass), or the
            batch's.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        1 forward and 2 backward passes per step; one more of each with fgsm, ``steps`` more with pgd; with
        deepfool as many as its slowest image needs.
    Source:
        Roth et al. 2018, arXiv:1805.08736, algorithm 1 and equation 16.
    Departs:
        Avg is the mean of the diagonal, as the text says; algorithm 1 prints it over all entries, where it is almost
        zero. The running covariance is corrected for its start from zero, which the scaling cancels. Covariance
        functions with rounded distances are indefinite and are mended, see psd. The paper names neither the c of its
        tables nor the eps of the attacks.
    Raises:
        UsageError: beta outside (0, 1], a scale that is not positive, or update_every below 1.
    """
    if not 0 < beta <= 1 or update_every < 1 or not (scale is None or scale > 0):
        raise UsageError("sgr needs 0 < beta <= 1, scale > 0 and update_every >= 1", code="A04")
    if psd == "auto":
        psd = "interp" if source in ("lrc", "identity") else "spectral"
    kept, images = memory.tensors, x if memory.train is None else memory.train.x
    if "scale" not in kept:
        kept["scale"] = images.var(0, correction=0).mean().to(x) if scale is None else x.new_tensor(scale)
    if "moment" not in kept and source == "data":
        kept["moment"] = data_moment(images, representation)
    elif "moment" not in kept and source == "lrc":
        kept["moment"] = synthetic(x, representation, zeta=zeta, inter=inter)
    elif "moment" not in kept and source == "identity":
        kept["moment"] = synthetic(x, representation, zeta=None)
    due = source not in ("data", "lrc", "identity") and (memory.step % update_every == 0 or "moment" not in kept)
    xi = perturbation(source, model, x, rng, eps=eps, steps=steps) if due and source not in ("grad", "sign") else None
    built: list[Matrix | Stationary] = []
    apart = batchnorm == "frozen" and normalises_over_the_batch(model)

    def covariance(g: Tensor) -> Matrix | Stationary:
        """Learnt from the gradient of the first evaluation where that is the source, and a constant from then on."""
        if not built:
            if due:
                news = xi if xi is not None else g.sign() if source == "sign" else g
                running_mean(kept, {"moment": MOMENTS[representation](news), "mean": news.mean(0)}, beta)
            built.append(covariance_of(kept["moment"], x.shape[1:], psd))
        return built[0]

    def objective() -> Loss:
        with torch.enable_grad(), bn_mode(model, "eval") if apart else nullcontext():
            points = x.detach().requires_grad_()
            z = model(points)
            loss = per_sample_loss(z, y, "ce")
            (g,) = torch.autograd.grad(loss.sum(), points, create_graph=True)
        structure = covariance(g.detach())
        sigma = torch.where(structure.variance > 0, kept["scale"] / structure.variance, 0)  # none without perturbations
        omega = sigma * form(structure, g).mean() / 2
        penalty = weight * omega
        if mean and "mean" in kept:
            penalty = penalty + weight * sigma.sqrt() * inner(g, kept["mean"]).mean()
        if apart:
            z = model(x)
            loss = per_sample_loss(z, y, "ce")
        logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(z, y), "penalty": penalty.detach()}
        logs["indefinite"] = float(omega < 0)
        if isinstance(structure, Stationary):
            logs["lowest_eigenvalue"] = sigma * structure.lowest
        return Loss(loss.mean() + penalty, logs)

    yield objective
