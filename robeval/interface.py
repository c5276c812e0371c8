"""robeval from Python: the engine, the records and the tables of the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from robeval.certification import settings as certifying
from robeval.certification.run import certify as certify_run
from robeval.core.choosing import choose
from robeval.core.classifier import Classifier
from robeval.core.images import Images
from robeval.data.load import load as load_images
from robeval.data.subset import subset
from robeval.evaluate.attacking import attack_run
from robeval.evaluate.settings import Settings
from robeval.evaluate.suites import suite as read_suite
from robeval.evaluate.verify import Verification, verify
from robeval.models.contract import check
from robeval.models.load import load as load_model
from robeval.models.normalise import normaliser
from robeval.reports.bounds import bounds_table
from robeval.reports.certificates import CertificateFacts
from robeval.reports.frames import AttackFacts
from robeval.reports.stats import Rate
from robeval.reports.tables import Table, attacks_table
from robeval.store.runstore import RunStore

if TYPE_CHECKING:
    import pandas as pd


def wrap(
    module: Callable[[Tensor], Tensor],
    *,
    classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str = "model",
) -> Classifier:
    """Any callable from images to logits as a classifier of pixels in [0, 1].

    Args:
        module: (n, C, H, W) -> (n, K). A torch module is put in eval mode and its parameters are frozen.
        classes: K.
        mean: Channel means that the module wants subtracted; together with ``std``.
        std: Channel standard deviations.
        name: How tables call it.

    Raises:
        UsageError: only one of mean and std.
    """
    if isinstance(module, nn.Module) and (mean is not None or std is not None):
        module = nn.Sequential(normaliser({"mean": list(mean or ()), "std": list(std or ())}), module)
    return Classifier(module, classes, name, info={"notes": []})


@dataclass(frozen=True)
class AttackRun:
    """A finished attack run.

    Args:
        store: Its folder on disk.
        verification: The second look at its adversarial images.
    """

    store: RunStore
    verification: Verification

    def to_frame(self) -> pd.DataFrame:
        """One row per image and attack; the columns of :class:`robeval.core.records.AttackRecord`."""
        return self.store.frame()

    def clean_accuracy(self) -> Rate:
        """Correctly classified images, k of n, with the 95 % Wilson interval."""
        return AttackFacts(self.store).clean_accuracy

    def worst_case(self, eps: float) -> Rate:
        """Images that no attack broke at this radius: an upper bound on robust accuracy."""
        return AttackFacts(self.store).worst_case(eps)

    def distances(self) -> pd.Series:
        """Smallest verified adversarial distance per image id; 0 where misclassified, inf where none was found."""
        return AttackFacts(self.store).distances()

    def table(self) -> Table:
        """Attacks against radii, with passes."""
        return attacks_table(self.store)


def attack(
    model: Classifier | str | Path,
    data: Images | str,
    *,
    suite: str = "quick",
    attacks: Sequence[str] = (),
    norm: str = "linf",
    eps: float | Sequence[float] = (),
    images: str | None = None,
    each: bool = False,
    seed: int = 0,
    batch_size: int = 256,
    out: str | Path = "runs",
) -> AttackRun:
    """Attack a classifier image by image, as ``robeval attack`` does; the same call resumes.

    Args:
        model: A model file, or a classifier made by :func:`wrap`.
        data: A data set as on the command line (its test split), or images in [0, 1].
        suite: Used when ``attacks`` is empty.
        attacks: Attacks such as ``"pgd:steps=50,restarts=10"``.
        norm: linf, l2 or l1.
        eps: One radius or several, in pixel units.
        images: Subset, such as ``"500"``.
        each: Attack every correctly classified image with every attack.
        seed: Seed of every image's random stream.
        batch_size: Most images in one model call; changes no result.
        out: Folder of runs.

    Raises:
        RobevalError: unusable model, data or settings; see the documentation of exit codes.
    """
    classifier = model if isinstance(model, Classifier) else load_model(model)
    chosen = subset(load_images(data) if isinstance(data, str) else data, images).to(classifier.device)
    check(classifier, chosen)
    radii = sorted({float(e) for e in ([eps] if isinstance(eps, (int, float)) else eps)})
    if attacks:
        specs = choose("attacks", list(attacks), norm)
    else:
        specs, _, every = read_suite(suite, norm)
        each = each or every
    settings = Settings(specs, norm, radii, seed=seed, each=each, batch_size=batch_size)
    store = attack_run(classifier, chosen, settings, root=str(out))
    result = verify(store, classifier, chosen)
    result.insist()
    return AttackRun(store, result)


@dataclass(frozen=True)
class CertifyRun:
    """A finished run of bounds.

    Args:
        store: Its folder on disk.
    """

    store: RunStore

    def to_frame(self) -> pd.DataFrame:
        """One row per image, bound and radius; the columns of :class:`robeval.core.records.Certificate`."""
        return self.store.frame()

    def certified(self, bound: str, eps: float) -> Rate:
        """Images that this proof or probabilistic bound certifies at eps: for a proof a lower bound on robust accuracy.

        Raises:
            ValueError: the bound is an estimate.
        """
        return CertificateFacts(self.store).certified(bound, eps)

    def radii(self, bound: str) -> pd.Series:
        """Radius per image id; 0 where misclassified or nothing is certified."""
        return CertificateFacts(self.store).reach(bound)

    def table(self) -> Table:
        """Every bound with its kind."""
        return bounds_table([self.store])


def certify(
    model: Classifier | str | Path,
    data: Images | str,
    *,
    bounds: Sequence[str] = ("crown",),
    norm: str = "linf",
    eps: float | Sequence[float] = (),
    top_k: int = 1,
    images: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    out: str | Path = "runs",
) -> CertifyRun:
    """Bound a classifier image by image, as ``robeval certify`` does; the same call resumes.

    Args:
        model: A model file, or a classifier made by :func:`wrap`.
        data: A data set as on the command line (its test split), or images in [0, 1].
        bounds: Bounds such as ``"crown"`` or ``"smoothing:sigma=0.5"``.
        norm: linf, l2 or l1.
        eps: Radii that proofs try, in pixel units; none seeks the largest radius of every image.
        top_k: The class is to stay among so many best ones.
        images: Subset, such as ``"500"``.
        seed: Seed of every image's random stream.
        batch_size: Most images in one model call; changes no result.
        out: Folder of runs.

    Raises:
        RobevalError: unusable model, data or settings; see the documentation of exit codes.
    """
    classifier = model if isinstance(model, Classifier) else load_model(model)
    chosen = subset(load_images(data) if isinstance(data, str) else data, images).to(classifier.device)
    check(classifier, chosen)
    radii = sorted({float(e) for e in ([eps] if isinstance(eps, (int, float)) else eps)})
    settings = certifying.Settings(choose("bounds", list(bounds), norm), norm, seed, batch_size, radii, top_k)
    return CertifyRun(certify_run(classifier, chosen, settings, root=str(out)))
