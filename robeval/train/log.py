"""The per-epoch log as a table on disk."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robeval.train.resume import write_atomic

#: Column -> sentence. Methods may add columns of their own, which follow these.
COLUMNS = {
    "epoch": "epoch, counted from 1",
    "seconds": "wall time of the epoch with its measurements",
    "lr": "learning rate at the last step",
    "loss": "mean of what was descended",
    "train_accuracy": "accuracy on the images that the loss was taken at",
    "clean_train_accuracy": "accuracy on the clean training images, where the method sees both",
    "bounded_accuracy": "share of the training images whose bounds leave the label alone, in float32: no certificate",
    "bound_radius": "mean radius of the bounds that are trained on, in pixel units",
    "penalty": "mean of the regularizer with its weight",
    "indefinite": "share of mini-batches whose covariance made the penalty negative (sgr)",
    "lowest_eigenvalue": "lowest eigenvalue of the covariance on the torus, before negative ones are mended (sgr)",
    "first_over_zeroth": "divergence of the logits' first weight derivatives over that of the logits (rat)",
    "clipped": "share of images whose regularizer is clipped and so has no gradient",
    "gradient_clipped": "share of steps where the regularizer's parameter gradient was clipped",
    "clean_accuracy": "accuracy on the held-out images",
    "pgd20_accuracy": "accuracy on the held-out images after PGD with 20 steps, an upper bound of robust accuracy",
    "transfer_accuracy": "the same on PGD images that were made on the surrogate",
    "averaged_clean_accuracy": "accuracy of the averaged weights on the held-out images",
    "averaged_pgd20_accuracy": "the same after PGD with 20 steps on them",
    "first_batch_accuracy": "accuracy on the fixed first training batch after PGD with 5 steps",
    "confidence_clean": "mean largest softmax output, clean",
    "confidence_random": "the same at random points of the ball",
    "confidence_pgd1": "the same after one PGD step",
    "grad_nonzero": "mean number of non-zero entries of the input gradient",
    "grad_l1": "mean l1 norm of the input gradient",
    "grad_l2": "mean l2 norm of the input gradient",
    "forward_per_step": "forward passes of the batch per step",
    "backward_per_step": "backward passes of the batch per step",
    "warnings": "codes of warnings after this epoch",
}


def write_log(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows at once, through a temporary file; floats with all their digits."""
    extra = sorted({name for row in rows for name in row} - set(COLUMNS))
    text = io.StringIO()
    table = csv.DictWriter(text, [*COLUMNS, *extra], restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))
