"""U1, the binarization test: does the attack find an adversarial image that exists by construction?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from robeval.core.ball import Ball
from robeval.core.catalogue import Spec, diagnostic
from robeval.core.choosing import choose, for_classes
from robeval.core.images import Images
from robeval.diagnose.binary import Features, Heads, Trial, features_of
from robeval.diagnose.finding import CLEAR, DOES_NOT_APPLY, FAILED, WARNING, Finding, not_run, share_failed
from robeval.diagnose.subject import Subject
from robeval.evaluate.settings import searches_nearest

SCALES = ("width", "adaptive")
#: Entries of the features of all points of one part, so that memory stays small beside the model's.
PART = 1 << 25


@diagnostic(
    id="U1",
    group=5,
    level="full",
    images=512,
    question="does the attack find an adversarial image that exists by construction?",
    limit=">= 95 %",
    source="Zimmermann, Brendel, Tramer, Carlini 2022, Increasing Confidence in Adversarial Robustness Evaluations,"
    " arXiv:2206.13991",
)
def binarization(
    subject: Subject,
    *,
    images: int = 512,
    inner: int = 999,
    boundary: int = 1,
    gap: float = 0.05,
    closeness: float = 0.5,
    attack: str = "pgd:steps=40",
) -> Finding:
    """Put a two-class head with a known adversarial point in the place of the last layer, and attack that.

    For each image a separator without a penalty tells points inside the ball from a point at its edge. That point is an
    adversarial image, so an attack that works must find one. Run with two scales of the new logits: spread 1, and the
    spread of the model's own logits, which keeps a saturated loss saturated.

    Args:
        images: Images, the first of those chosen.
        inner: Points within (1 - gap) eps of each image; more make the test harder.
        boundary: Points at distance eps of each image.
        gap: Relative width of the shell between the two.
        closeness: Where between the two kinds of points the decision lies; 0.999 is hard against the boundary points.
        attack: What is tested when no attack run is at hand; otherwise that run's gradient attacks.

    Cost:
        ``inner`` + ``boundary`` forward passes per image, then twice the attack and as many random points.
    Source:
        Zimmermann et al. 2022, arXiv:2206.13991, section 4 and algorithm 1.
    Departs:
        All heads are attacked at once, each with the point of its own image. The separator is the direction of the
        largest gap, which unpenalised logistic regression tends to. An image counts as found when any of the attacks
        finds a point.
    """
    chosen = subject.some(images)
    found = features_of(subject.classifier, chosen.x[:2])
    if isinstance(found, str):
        return not_run(found, DOES_NOT_APPLY)
    specs = under_test(subject, attack)
    if not specs:
        return not_run("the attack runs hold no gradient attack")
    hits = {scale: torch.zeros(len(chosen), dtype=torch.bool) for scale in SCALES}
    easy = {scale: torch.zeros(len(chosen), dtype=torch.bool) for scale in SCALES}
    fitted = torch.zeros(len(chosen), dtype=torch.bool)
    ball = Ball(subject.norm, subject.eps)
    with torch.no_grad():
        width = found(chosen.x[:2])[0].shape[1]
    for rows in torch.arange(len(chosen)).split(max(1, PART // (width * (inner + boundary)))):
        part = chosen[rows.to(chosen.x.device)]
        points = sampled(subject, found, part, inner, boundary, gap)
        heads = Heads.fit(*points, closeness)
        fitted[rows] = heads.fitted.cpu()
        for scale in SCALES:
            trial = Trial(found, heads.scaled(scale), part, ball, subject.passes, subject.batch_size)
            control = replace(trial)
            for spec in specs:
                trial.attack(spec, subject.seed)
            control.search(trial.queries, subject.seed, f"binarization/{scale}")
            hits[scale][rows], easy[scale][rows] = trial.found.cpu(), control.found.cpu()
    return judged(chosen, fitted, hits, easy, ", ".join(s.label for s in specs))


def under_test(subject: Subject, fallback: str) -> list[Spec]:
    """The gradient attacks of the attack runs, as they run on two classes; the fallback where there is no run."""
    labels = [m["label"] for s in subject.stores for m in s.manifest()["methods"] if m.get("name") is not None]
    known = [m for m in dict.fromkeys(labels) if not m.startswith(("torchattacks", "pyautoattack"))]
    specs = choose("attacks", known if subject.stores else [fallback], subject.norm)
    specs = [for_classes(s, 2) for s in specs if s.method.facts.get("access") != "black-box"]
    return sorted(specs, key=searches_nearest)


def sampled(
    subject: Subject, features: Features, images: Images, inner: int, boundary: int, gap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of inner points (n, inner, F) and of boundary points (n, boundary, F), and the logits at all of them."""
    rng = subject.rng("binarization", images.ids)
    inside, edge = Ball(subject.norm, (1 - gap) * subject.eps), Ball(subject.norm, subject.eps)
    said = []
    with torch.no_grad():
        for k in range(inner + boundary):
            x = inside.sample(images.x, rng) if k < inner else edge.surface(images.x, rng)
            parts = [features(p) for p in x.split(subject.batch_size)]
            said.append([torch.cat(both) for both in zip(*parts, strict=True)])
    points, logits = (torch.stack(list(each), 1) for each in zip(*said, strict=True))
    return points[:, :inner], points[:, inner:], logits


def judged(images: Images, fitted: Tensor, hits: dict[str, Tensor], easy: dict[str, Tensor], attacks: str) -> Finding:
    """The scale with fewer successes decides; images whose separator failed are left out and counted."""
    n = int(fitted.sum())
    if 2 * n < len(fitted):
        why = f"the separator failed on {len(fitted) - n} of {len(fitted)} images: too many points for the features"
        return not_run(why)
    won = {scale: int((hit & fitted).sum()) for scale, hit in hits.items()}
    chance = {scale: int((hit & fitted).sum()) for scale, hit in easy.items()}
    worst = min(SCALES, key=lambda scale: won[scale])
    k = won[worst]
    result = CLEAR if k >= 0.95 * n else FAILED if share_failed(n - k, n, 0.05) else WARNING
    told = [f"{100 * won[s] / n:.1f} % at scale {s} (random search {100 * chance[s] / n:.1f} %)" for s in SCALES]
    why = f"{attacks}: {'; '.join(told)}; {len(fitted) - n} of {len(fitted)} separators failed"
    todo = ""
    if result != CLEAR:
        todo = "use more steps, a margin loss or another attack until this test is met, then attack again"
    elif chance[worst] > n / 2:
        result, todo = WARNING, "random points find the planted images too: raise inner, or closeness"
    return Finding(
        result,
        f"{100 * k / n:.1f} %",
        ">= 95 %",
        n,
        flagged=images.ids[(fitted & ~hits[worst]).nonzero().squeeze(1).to(images.ids.device)].tolist(),
        interval=wilson(k, n),
        what_to_do=todo,
        why=why,
        data={"fitted": n, "images": len(fitted), "found": won, "random": chance, "attacks": attacks},
    )


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    from scipy.stats import binomtest

    interval = binomtest(k, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
