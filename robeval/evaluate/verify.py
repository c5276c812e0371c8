"""Check every stored adversarial image again, outside the engine and with none of its code paths.

Plain batches in reverse order and of an odd size, norms in float64 by numpy: nothing is shared with the search that
found the images but the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from robeval.core.ball import ABS, REL
from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken
from robeval.core.images import Images
from robeval.core.records import CLEAN
from robeval.store.runstore import RunStore

BATCH = 61


@dataclass
class Verification:
    """What the second look found.

    Args:
        checked: Number of stored adversarial images.
        confirmed: How many hold in every respect.
        failures: One sentence per image that does not.
        forwards: Passes that the check cost.
        fickle: Images on which a model that answers at random gave another answer this time; not a failure.
    """

    checked: int = 0
    confirmed: int = 0
    failures: list[str] = field(default_factory=list)
    forwards: int = 0
    fickle: int = 0

    def __str__(self) -> str:
        text = f"stored adversarial images re-verified {self.confirmed}/{self.checked}"
        return text + (f", on {self.fickle} a random model answered otherwise this time" if self.fickle else "")

    def insist(self) -> None:
        """Raise where a stored image does not hold.

        Raises:
            ContractBroken: with the first failures.
        """
        if self.failures:
            raise ContractBroken(
                f"{len(self.failures)} of {self.checked} stored adversarial images do not hold",
                code="V01",
                where="; ".join(self.failures[:3]),
                why="the records claim successes that a second look does not confirm",
            )


def verify(
    store: RunStore,
    classifier: Classifier,
    images: Images,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Verification:
    """Evaluate all stored adversarial images of a run once more, in float32.

    Args:
        store: The run.
        classifier: The model; its fingerprint must be the manifest's.
        images: The full image set of the run, found by id.

    Raises:
        ContractBroken: another model or other images than the run's.
    """
    manifest = store.manifest()
    for what, had, has in (
        ("this model is", manifest["model"]["fingerprint"], classifier.fingerprint),
        ("these images are", manifest["data"]["fingerprint"], images.fingerprint),
    ):
        if had != has:
            raise ContractBroken(
                f"{what} not the run's",
                code="M06",
                where=f"sha256 {has[:12]}, the run has {had[:12]}",
            )
    frame = store.frame()
    rows = frame[frame["success"] & (frame["attack"] != CLEAN)].iloc[::-1]
    result = Verification(checked=len(rows))
    place = {int(index): k for k, index in enumerate(images.ids.tolist())}
    for start in range(0, len(rows), BATCH):
        part = rows.iloc[start : start + BATCH]
        adversarial = store.examples(part)
        clean = images.x[torch.tensor([place[int(i)] for i in part["index"]])].cpu().numpy()
        with torch.no_grad(), torch.autocast(classifier.device.type, enabled=False):
            x = torch.from_numpy(adversarial).to(classifier.device, images.x.dtype)
            predicted = classifier.logits(x).cpu()
        result.forwards += len(part)
        change = adversarial.astype(np.float64) - clean.astype(np.float64)
        flat = np.abs(change).reshape(len(part), -1)
        norms = {"linf": flat.max(1), "l2": np.sqrt((flat**2).sum(1)), "l1": flat.sum(1)}
        size = np.sqrt((clean.astype(np.float64) ** 2).reshape(len(part), -1).sum(1))
        for k, row in enumerate(part.itertuples(index=False)):
            problems, fickle = [], False
            if not torch.isfinite(predicted[k]).all():
                problems.append("logits are not finite")
            elif manifest["settings"].get("randomised"):
                fickle = int(predicted[k].argmax()) == row.label
            elif int(predicted[k].argmax()) == row.label:
                problems.append("it is classified correctly")
            elif int(predicted[k].argmax()) != row.prediction:
                problems.append(f"predicted {int(predicted[k].argmax())}, recorded {row.prediction}")
            if adversarial[k].min() < 0 or adversarial[k].max() > 1 or not np.isfinite(adversarial[k]).all():
                problems.append("pixels leave [0, 1]")
            if not norms[row.norm][k] <= row.eps * (1 + REL) + ABS:
                problems.append(f"{row.norm} distance {norms[row.norm][k]:.6g} exceeds eps {row.eps:.6g}")
            if abs(norms[row.norm][k] - getattr(row, f"distance_{row.norm}")) > 1e-6:
                problems.append("the recorded distance is another one")
            if abs(row.relative_l2 * size[k] - norms["l2"][k]) > 1e-6:  # never for NaN, of runs before the column
                problems.append("the recorded relative distance is another one")
            if problems:
                index = part["index"].iloc[k]
                result.failures.append(f"image {index} by {row.attack}: {', '.join(problems)}")
            elif fickle:
                result.fickle += 1
            else:
                result.confirmed += 1
        if on_progress:
            on_progress(min(start + BATCH, len(rows)), len(rows), "verified")
    return result
