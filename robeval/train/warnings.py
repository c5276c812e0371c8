"""Signs that a training does not give what it promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from robeval.core.catalogue import Spec
from robeval.core.errors import ContractBroken
from robeval.train.modes import normalises_over_the_batch

#: White-box PGD may leave at most so much more accuracy than images made on another network.
TRANSFER_GAP = 0.05


@dataclass(frozen=True)
class Notice:
    """One warning.

    Args:
        code: Short stable name.
        epoch: Epoch after which it was seen, counted from 1; 0 before training.
        text: One sentence.
    """

    code: str
    epoch: int
    text: str

    def __str__(self) -> str:
        return f"warning[{self.code}] {self.text}"


def before_training(method: Spec, module: nn.Module, pretrained: bool) -> list[Notice]:
    """What is known before the first step.

    Args:
        method: The trainer with its settings.
        module: The network.
        pretrained: Training starts from trained weights.

    Raises:
        ContractBroken: the method does not work with BatchNorm and the network has it.
    """
    name, facts, notices = method.method.name, method.method.facts, []
    choice = method.settings.get("batchnorm")
    if normalises_over_the_batch(module) and choice == "refuse":
        raise ContractBroken(
            f"BN_INCOMPATIBLE: {name} needs the gradient of each image alone, BatchNorm mixes those of a batch",
            code="L02",
            do="a network without BatchNorm such as resnet10_nobn, or --set batchnorm=frozen",
        )
    if normalises_over_the_batch(module) and choice:
        text = (
            f"{name} with BatchNorm in mode {choice}: the penalty may not help"
            if facts.get("batchnorm")
            else (f"{name} takes its penalty with BatchNorm in mode {choice}")
        )
        notices.append(Notice("BN_INCOMPATIBLE", 0, text))
    if facts.get("start") == "standard" and not pretrained:
        notices.append(
            Notice(
                "FROM_SCRATCH", 0, f"{name} is hard to train from scratch; start it with --init-from a standard model"
            )
        )
    for setting, text in facts.get("warns", {}).items():
        key, _, value = setting.partition("=")
        if str(method.settings.get(key)) == value:
            notices.append(Notice("RISKY_SETTING", 0, f"{name}: {text}"))
    return notices


def after_epoch(rows: Sequence[Mapping[str, float]], *, robust: bool, size: int, classes: int) -> list[Notice]:
    """What the log shows after its last row.

    Args:
        rows: The log so far, one row per epoch.
        robust: The method claims robustness.
        size: Number d of entries of an image.
        classes: Number of classes.
    """
    row, epoch, notices = rows[-1], len(rows), []
    seen, fooled = "", False
    if "transfer_accuracy" in row:
        own, transfer = row["pgd20_accuracy"], row["transfer_accuracy"]
        fooled = own - transfer > TRANSFER_GAP
        seen = f", PGD leaves {own:.1%} right and the surrogate's PGD images {transfer:.1%}"
    if robust and (row["confidence_clean"] > 0.999 or row["grad_nonzero"] < 0.5 * size or fooled):
        notices.append(
            Notice(
                "GRADIENT_MASKING",
                epoch,
                f"mean confidence {row['confidence_clean']:.4f}, {row['grad_nonzero']:.0f} of {size} gradient entries"
                f" are not zero{seen}: gradient attacks may fail without robustness; judge with square or a transfer"
                " attack",
            )
        )
    if len(rows) >= 3 and all(r.get("clipped", 0.0) > 0.95 for r in rows[-3:]):
        notices.append(
            Notice("SOAR_INERT", epoch, "over 95 % of the images are clipped, where the penalty has no gradient")
        )
    if row.get("indefinite", 0.0) > 0:
        notices.append(
            Notice(
                "SGR_INDEFINITE",
                epoch,
                f"the covariance made the penalty negative in {row['indefinite']:.0%} of the mini-batches:"
                " psd=spectral or psd=interp",
            )
        )
    if row.get("first_over_zeroth", 1.0) < 1e-3:
        notices.append(
            Notice(
                "RAT_NEGLIGIBLE",
                epoch,
                f"the first-order term is {row['first_over_zeroth']:.1e} of the zeroth: a larger sigma is needed",
            )
        )
    if row.get("clean_train_accuracy", 1.0) < row["train_accuracy"]:
        notices.append(
            Notice(
                "LABEL_LEAKING",
                epoch,
                f"adversarial training images are recognised better ({row['train_accuracy']:.1%}) than clean ones"
                f" ({row['clean_train_accuracy']:.1%}): the perturbation may carry the label",
            )
        )
    if robust and epoch >= 5 and row["confidence_clean"] < 1 / classes + 0.05:
        notices.append(
            Notice(
                "UNIFORM",
                epoch,
                f"mean confidence is {row['confidence_clean']:.3f}: the network has learnt to say nothing; a smaller"
                " weight of the penalty, or clean labels",
            )
        )
    if robust and epoch == 5 and row["train_accuracy"] <= 1 / classes + 0.02:
        notices.append(
            Notice(
                "NOT_LEARNING",
                epoch,
                f"accuracy on the images trained on is {row['train_accuracy']:.1%} after 5 epochs:"
                " raise eps slowly, try a smaller learning rate, or a larger network",
            )
        )
    return notices


@dataclass
class Guard:
    """Watches robust accuracy on the fixed first training batch for catastrophic overfitting (Wong et al. 2020).

    Args:
        drop: A fall by more than this from one epoch to the next stops the training.
        last: Accuracy after the epoch before.
    """

    drop: float = 0.2
    last: float | None = None

    def fell(self, accuracy: float) -> bool:
        """Did it fall too far? Remembers the value."""
        fell = self.last is not None and self.last - accuracy > self.drop
        self.last = accuracy
        return fell
