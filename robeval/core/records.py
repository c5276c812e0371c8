"""What a run writes down: one row per image and attack, or per image and bound. No torch here.

Every field carries its sentence and unit; the Parquet schema and the documentation are made from this file.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

SCHEMA = 1
CLEAN = "clean"
CERTIFIED = "certified"
#: Label of images that a diagnostic broke, before the test's id.
COUNTEREXAMPLES = "diagnostic:"
#: The five words that a diagnostic can say of what it looked for; there is no word for a good model.
CLEAR, WARNING, FAILED, NOT_RUN, DOES_NOT_APPLY = "clear", "warning", "FAILED", "not run", "does not apply"


def col(doc: str, unit: str = "", default: Any = MISSING) -> Any:
    """A record's column: what it says and in which unit."""
    return field(default=default, metadata={"doc": doc, "unit": unit})


@dataclass(frozen=True)
class AttackRecord:
    """One attack on one image.

    The row ``attack == "clean"`` holds the clean pass of every image; a row ``attack == "certified"`` says that a proof
    covers the image at this eps, so that no attack was run.
    """

    index: int = col("id of the image in its split")
    label: int = col("true class")
    clean_prediction: int = col("class predicted for the clean image")
    clean_correct: bool = col("the clean image is classified correctly")
    attack: str = col("attack with its settings, or clean, or certified")
    norm: str = col("norm of the threat model")
    eps: float = col(
        "radius of the threat model; inf for a search of the nearest adversarial image", "pixels in [0, 1]"
    )
    success: bool = col("a verified adversarial image was found (for clean: the image is misclassified)")
    prediction: int = col("class predicted for the stored image, or the clean prediction")
    distance_linf: float = col("largest pixel change; inf when nothing was found", "pixels in [0, 1]")
    distance_l2: float = col("Euclidean distance", "pixels in [0, 1]")
    distance_l1: float = col("sum of absolute changes", "pixels in [0, 1]")
    distance_l0: float = col("number of changed entries", "entries")
    margin: float = col("true logit minus best other logit at the stored image, else the smallest seen", "logits")
    attempt: int = col("restart or target that succeeded, -1 if none")
    iterations: int = col(
        "questions asked until the decision, of the earliest of attempts side by side; for a random search the queries "
        "that count, without those that looking ahead discards",
        "questions",
    )
    forwards: int = col("images of this row passed forward, the verdict's included", "passes")
    backwards: int = col("gradients taken for this row", "passes")
    first_success_forward: int = col("forward pass at which the first adversarial image appeared, -1 if none", "passes")
    survives_8bit: bool = col("still adversarial after rounding to 8 bits inside the ball")
    seed: int = col("seed of the run")
    attack_config_hash: str = col("hash of the attack's name and all its settings")
    error: str = col("why the image could not be evaluated, else empty", default="")
    example: int = col("row of the stored image in the examples file of this part, -1 if none", default=-1)
    relative_l2: float = col(
        "distance_l2 over the Euclidean norm of the clean image, in the mean DeepFool's rho_adv; inf when nothing was "
        "found, NaN in runs from before the column",
        default=math.nan,
    )


@dataclass(frozen=True)
class Certificate:
    """One bound on one image."""

    index: int = col("id of the image in its split")
    label: int = col("true class")
    prediction: int = col("class predicted for the clean image")
    clean_correct: bool = col("the clean image is classified correctly")
    bound: str = col("bound with its settings")
    kind: str = col("estimate, proof or probabilistic")
    norm: str = col("norm of the radius")
    eps: float = col("radius that was asked for; nan when a radius was sought", "pixels in [0, 1]")
    status: str = col("estimate, verified, unknown, falsified, abstain or clean_error")
    radius: float = col("largest radius that the bound gives", "pixels in [0, 1]")
    margin_lower: float = col("lower bound of the margin at eps; nan where there is none")
    loss: str = col("loss whose change is bounded")
    loss_value: float = col("value of that loss at the image; negative = correct")
    gradient_norm: float = col("dual norm of the loss gradient at the image")
    curvature: float = col("largest eigenvalue of the loss Hessian at the image; nan where not computed")
    constant: float = col("constant L or C that the bound used")
    domain: str = col("where the constant was taken: test set, ball, box, whole space, point or smoothed classifier")
    arithmetic: str = col("floating-point format, and whether rounding is enclosed")
    residual: float = col("error bound of the eigenvalue: an eigenvalue lies this close; nan where not computed")
    confidence: float = col("probability that the statement holds; nan for estimates, 1 for proofs")
    samples: int = col("random samples used")
    forwards: int = col("images passed forward", "passes")
    backwards: int = col("gradients or Hessian-vector products taken", "passes")
    seed: int = col("seed of the run")
    bound_config_hash: str = col("hash of the bound's name and all its settings")
    rival: int = col("class whose margin decides the radius, -1 where the loss is over all rivals", default=-1)
    curvature_least: float = col("smallest eigenvalue of the loss Hessian; nan where not computed", default=math.nan)
    reach: float = col(
        "radius within which points were drawn; nan where none were", "pixels in [0, 1]", default=math.nan
    )
    blocks: int = col("blocks of ``samples`` points whose largest values were fitted", default=0)
    plain: float = col(
        "radius that the largest value seen gives, without the fit; nan without one",
        "pixels in [0, 1]",
        default=math.nan,
    )
    p_value: float = col("Kolmogorov-Smirnov test of the fit; nan where nothing was fitted", default=math.nan)
    p_lower: float = col(
        "lower confidence limit of the probability of the predicted class under noise; nan where there is none",
        default=math.nan,
    )


@dataclass(frozen=True)
class Diagnosis:
    """One test of the evaluation: what was looked for, what was seen, and what to do."""

    id: str = col("id of the test, such as D1")
    test: str = col("name of the test")
    question: str = col("what it asks, in one sentence")
    result: str = col("clear, warning, FAILED, not run, or does not apply")
    measured: str = col("what was found")
    limit: str = col("what it is held against")
    n_images: int = col("images that were looked at", "images")
    n_flagged: int = col("images that show the sign", "images")
    interval95_low: float = col("lower end of the 95 % interval of what was measured; nan where it has none")
    interval95_high: float = col("upper end of that interval; nan where it has none")
    image_ids_file: str = col("file in the run folder with the ids of the images that show the sign, empty if none")
    attack: str = col("attacks that the test ran, with loss and steps; empty if none")
    norm: str = col("norm of the threat model")
    eps: float = col("radius of the threat model", "pixels in [0, 1]")
    seed: int = col("seed of the run")
    counterexamples: int = col("images that this test was the first to break; they count in the headline", "images")
    forwards: int = col("images passed forward", "passes")
    backwards: int = col("gradients taken", "passes")
    seconds: float = col("time that the test took", "seconds")
    why: str = col("reason of a result that is not clear")
    what_to_do: str = col("what mends it; for a warning the usual innocent causes too")
    reference: str = col("source of the test")
    group: int = col("group of the test: 1 contract, 2 gradients, 3 each attack, 4 attack against attack, 5 unit test")
    tool_version: str = col("version of robeval")


def describe(record: type) -> list[tuple[str, str, str, str]]:
    """(column, type, unit, sentence) of each field, for the documentation."""
    return [(f.name, str(f.type), f.metadata["unit"], f.metadata["doc"]) for f in fields(record)]
