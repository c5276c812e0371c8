"""Randomized adversarial training via Taylor expansion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from robeval.core.catalogue import trainer
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.losses import kl, per_sample_loss
from robeval.core.streams import Streams
from robeval.train.memory import Memory
from robeval.train.modes import fp32_exact, normalises_over_the_batch
from robeval.train.noise import Noise, Shifted, fixed_statistics, gaussian, most_divergent, without_dropout
from robeval.train.step import Loss, Objective, accuracy

#: The paper's eta for each order.
ETA = {0: 0.0, 1: 0.3, 2: 0.2}


def derivatives(model: nn.Module, s: Tensor, z: Tensor, u: Noise, impl: str) -> tuple[Tensor, Tensor]:
    """J u and u^T (Hessian) u of each logit in weight space; both can be differentiated in the weights.

    Args:
        model: The network.
        s: (n, C, H, W).
        z: (n, K), its logits at ``s``.
        u: Direction in weight space.
        impl: ``antithetic``, from the logits at w + u and w - u, wrong by terms of order u^3 and u^4; or ``exact``.

    Shapes:
        Returns (n, K) and (n, K).
    """
    if impl == "exact":
        w = {name: p for name, p in model.named_parameters() if name in u}

        def first(at: Noise) -> Tensor:
            ju: Tensor = jvp(lambda v: functional_call(model, v, (s,)), (at,), (u,))[1]
            return ju

        return cast(tuple[Tensor, Tensor], jvp(first, (w,), (u,)))
    ahead, behind = Shifted(model, u)(s), Shifted(model, u, -1.0)(s)
    return (ahead - behind) / 2, ahead + behind - 2 * z


@trainer(
    source="Jin, Yi, Wu, Mu, Huang 2023, Randomized Adversarial Training via Taylor Expansion, arXiv:2303.10653,"
    " equation 8 and algorithm 1",
    norms=("linf", "l2"),
    robust=True,
)
def rat(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rng: Streams,
    memory: Memory,
    *,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    beta: float = 6.0,
    order: int = 2,
    eta: float | None = None,
    sigma: float = 0.01,
    samples: int = 1,
    impl: Literal["antithetic", "exact"] = "antithetic",
    objective: Literal["paper", "direct"] = "paper",
) -> Iterator[Objective]:
    """TRADES that also keeps the weight derivatives of the logits alike on the image and its neighbourhood.

    With Gaussian noise u on all weights, the loss at w + u is expanded in u: the first and second derivatives of the
    logits along u are compared between x and x' as the logits themselves are. The attack sees the network at w + u.

    Args:
        norm: Norm of the threat model.
        eps: Radius of the threat model in pixel units.
        steps: Gradient steps of the attack.
        step_size: Length of a step in pixel units; none means 2/255 at eps 8/255 and 10 steps, and 15/255 at eps
            128/255 in l2, in proportion to eps and steps.
        beta: Weight of the divergence of the logits, 1 / lambda in the paper.
        order: Highest derivative that is compared; 0 is TRADES, without any noise.
        eta: Weight of the first derivative's divergence, and half of it that of the second's; none means 0.3 with
            order 1 and 0.2 with order 2.
        sigma: Standard deviation of the noise on every weight.
        samples: Draws of u averaged in the loss; the attack uses the first.
        impl: Derivatives from the logits at w + u and w - u, or by exact forward differentiation.
        objective: The expansion, or its origin: the mean divergence of the noisy networks themselves, without order
            and eta.

    Shapes:
        x (n, C, H, W) in [0, 1], y (n,).
    Cost:
        ``steps`` + 7 forward and ``steps`` + 1 backward passes per step, 4 more forward for each further sample; 2 in
        place of 4 with impl=exact, whose passes cost several, and with objective=direct, which saves one besides.
    Source:
        Jin et al. 2023, arXiv:2303.10653, equations 5 and 8, algorithm 1.
    Departs:
        The paper calls sigma = 0.01 a variance; here it is the standard deviation. Its divergence of derivatives is
        taken of the softmax of the logits' derivatives, since derivatives of probabilities are no distributions.
        Dropout is off while derivatives are taken. What the authors' code computes is another method: rat-released.
    Raises:
        ContractBroken: impl=exact and a network with BatchNorm (L02): PyTorch's nested forward differentiation is
            wrong there.
        UsageError: an order other than 0, 1 and 2, fewer than one sample, or a negative sigma.
    """
    if order not in ETA:
        raise UsageError(f"order of rat must be 0, 1 or 2, got {order}", code="A04")
    if samples < 1:
        raise UsageError(f"samples of rat must be at least 1, got {samples}", code="A04")
    if not sigma >= 0:
        raise UsageError(f"sigma of rat must be a number >= 0, got {sigma}", code="A04")
    direct = objective == "direct"
    weight = ETA[order] if eta is None else eta
    expands = not direct and order > 0 and weight != 0
    if expands and impl == "exact" and model.training and normalises_over_the_batch(model):
        raise ContractBroken(
            "rat with impl=exact needs a network without BatchNorm",
            code="L02",
            why="PyTorch takes BatchNorm's batch statistics for constants when it differentiates forward twice",
            do="--set impl=antithetic",
        )
    generator = memory.generator(x.device)
    draws = [gaussian(model, sigma, generator) for _ in range(samples)]
    step_size = step_size or (2.5 if norm == "linf" else 10 * 15 / 128) * eps / steps
    attacked = model if order == 0 and not direct else Shifted(model, draws[0])
    x_adv = most_divergent(attacked, x, y, rng, norm=norm, eps=eps, steps=steps, step_size=step_size)

    def expansion() -> Loss:
        z, z_adv = model(x), model(x_adv)
        zeroth = kl(z, z_adv).mean()
        penalty = beta * zeroth
        logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(z_adv, y)}
        if expands:
            first = torch.zeros_like(zeroth)
            for u in draws:
                with fixed_statistics(model):
                    d1, d2 = derivatives(model, x, z, u, impl)
                    d1_adv, d2_adv = derivatives(model, x_adv, z_adv, u, impl)
                first = first + kl(d1, d1_adv).mean() / samples
                if order == 2:
                    penalty = penalty + weight / 2 * kl(d2, d2_adv).mean() / samples
            penalty = penalty + weight * first
            logs["first_over_zeroth"] = (first / zeroth.clamp_min(1e-12)).detach()
        return Loss(per_sample_loss(z, y, "ce").mean() + penalty, logs | {"penalty": penalty.detach()})

    def mean_of_noisy_networks() -> Loss:
        z = model(x)
        with fixed_statistics(model):
            pairs = [(Shifted(model, u)(x), Shifted(model, u)(x_adv)) for u in draws]
        penalty = beta * torch.stack([kl(z_u, z_adv).mean() for z_u, z_adv in pairs]).mean()
        logs: dict[str, Tensor | float] = {"train_accuracy": accuracy(pairs[0][1], y), "penalty": penalty.detach()}
        return Loss(per_sample_loss(z, y, "ce").mean() + penalty, logs)

    def descended() -> Loss:
        with fp32_exact(), without_dropout(model) if expands else nullcontext():
            return mean_of_noisy_networks() if direct else expansion()

    yield descended
