"""From a data set and names to a finished model file: what ``robeval train`` and ``robeval demo`` both do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from robeval.core.catalogue import Spec
from robeval.core.errors import ContractBroken, UsageError
from robeval.core.images import Images
from robeval.data.subset import holdout
from robeval.models.build import build, is_factory
from robeval.models.build import fit as fitted_arguments
from robeval.models.checkpoint import save
from robeval.models.load import load
from robeval.train.devices import together
from robeval.train.epoch import OnNotice, OnProgress
from robeval.train.fit import FitResult, fit
from robeval.train.initial import data_normalisation, seeded
from robeval.train.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """One training from beginning to end.

    Args:
        method: A trainer with its settings.
        recipe: Settings of the loop.
        out: The model file; the training folder is beside it.
        model: Architecture, factory ``file.py:callable``, or empty for the default of the image size.
        model_arguments: Its arguments.
        normalise: ``data`` (mean and standard deviation of the training images), ``none``, ``per-image``, or the two.
        weights: Starting weights, ``he`` or ``torch``.
        init_from: A model file whose weights, architecture and normalisation are taken; empty for none.
        surrogate: A model file for the test of transferred images after each epoch; empty for ``init_from``.
        held_out: Training images held out for log and selection; None for a tenth, at most 1,000; 0 for none.
        fresh: Throw an unfinished or finished training of this file away.
        device: Where to train: cpu, cuda or cuda:N.
        devices: Processes that train it together, one device each; more than one are started by torchrun.
        note: Plain values for the recipe in the model file, such as the name of the data.
    """

    method: Spec
    recipe: Recipe
    out: Path
    model: str = ""
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    normalise: Any = "data"
    weights: str = "he"
    init_from: str = ""
    surrogate: str = ""
    held_out: int | None = None
    fresh: bool = False
    device: str = "cpu"
    devices: int = 1
    note: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where log and state are: ``model.pt.train`` beside ``model.pt``."""
        return self.out.with_name(self.out.name + ".train")


def default_model(shape: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """The architecture for images of a shape (C, H, W), with its arguments."""
    if shape[-1] >= 16:
        return "sgr_cnn", {"width": "cifar" if shape[0] == 3 else "mnist"}
    return "digits_cnn", {}


def judged(metrics: Mapping[str, Any]) -> tuple[float, float]:
    """Clean and PGD-20 accuracy of the weights in the model file: of the averaged ones where there are any."""
    prefix = "averaged_" if "averaged_pgd20_accuracy" in metrics else ""
    return metrics[f"{prefix}clean_accuracy"], metrics[f"{prefix}pgd20_accuracy"]


def run_job(
    job: Job,
    images: Images,
    test: Images | None = None,
    *,
    on_progress: OnProgress | None = None,
    on_notice: OnNotice | None = None,
) -> FitResult:
    """Train and write the model file; resumes, or finds everything done.

    Args:
        job: What to train.
        images: The training split.
        test: The test split, for a recipe with ``select_from=test``.
        on_progress: See :func:`robeval.train.fit.fit`.
        on_notice: See :func:`robeval.train.fit.fit`.

    Raises:
        UsageError: names or values that do not fit; a training folder of another training.
        FileRefused: ``init_from`` cannot be read.
        ContractBroken: the network does not fit the method or the data, or training diverged.
        MachineError: the disk is full or not writable.
    """
    if job.out.suffix not in (".pt", ".safetensors"):
        raise UsageError(f"--out {job.out} must end in .pt or .safetensors", code="A04")
    shape = tuple(images.x.shape[1:])
    if job.init_from:
        name, arguments, normalise, module = _trained(job, shape, len(images.classes))
    else:
        name, given = (job.model, {}) if job.model else default_model(shape)
        arguments = fitted_arguments(name, shape, len(images.classes), {**given, **job.model_arguments})
        normalise = job.normalise
        if normalise == "data":
            normalise = data_normalisation(images.x)
        module = seeded(lambda: build(name, normalise=normalise, **arguments), job.recipe.seed, job.weights)
    count = min(1000, len(images) // 10) if job.held_out is None else job.held_out
    if job.recipe.select_from == "test":
        if test is None:
            raise UsageError("select_from=test needs the test images", code="A04")
        count, train, seen = 0, images, "test-selected (optimistic)"
        validation: Images | None = test
    else:
        seen = "held-out training images" if count else "first training batch"
        train, validation = holdout(images, count) if count else (images, None)
    devices, device = together(job.devices, job.device)
    if job.fresh and devices.first and job.folder.is_dir():
        shutil.rmtree(job.folder)
    devices.wait()
    surrogate: Any = load(job.surrogate).module if job.surrogate else None
    result = fit(
        module,
        train,
        method=job.method,
        folder=job.folder,
        recipe=job.recipe,
        validation=validation,
        device=device,
        devices=devices,
        pretrained=bool(job.init_from),
        surrogate=surrogate,
        on_progress=on_progress,
        on_notice=on_notice,
    )
    if devices.first and (result.resumed != "finished" or not job.out.is_file()):
        recipe = {"method": job.method.method.name, "settings": job.method.settings, **asdict(job.recipe), **job.note}
        recipe |= {
            "init_from": job.init_from,
            "held_out": count,
            "metrics_on": seen,
            "metrics_images": min(job.recipe.batch_size, len(train)) if validation is None else len(validation),
            "weights": "" if job.init_from else job.weights,
            "stopped": result.stopped,
        }
        recipe |= {"warnings": [n.code for n in result.notices], "chosen_epoch": result.epoch}
        save(
            job.out,
            module,
            architecture=name,
            arguments=arguments,
            normalise=normalise,
            input_shape=shape,
            classes=images.classes,
            recipe=recipe,
            metrics={k: v for k, v in result.metrics.items() if k not in ("seconds", "warnings")},
        )
    return result


def _trained(job: Job, shape: tuple[int, ...], classes: int) -> tuple[str, dict[str, Any], Any, Any]:
    """The network of an earlier training, ready to train on.

    Raises:
        UsageError: another architecture was asked for as well.
        ContractBroken: it was made for other images or classes.
    """
    given = job.model if is_factory(job.model) else None
    classifier = load(job.init_from, arch=given)
    info = classifier.info
    if (job.model and job.model != info["architecture"]) or any(
        str(info["arguments"].get(k)) != str(v) for k, v in job.model_arguments.items()
    ):
        raise UsageError(
            f"{job.init_from} is {info['architecture']} {info['arguments']}; --model and --model-arg disagree",
            code="A04",
            do="leave them out, or leave --init-from out",
        )
    if list(info["input_shape"] or shape) != list(shape) or classifier.classes != classes:
        raise ContractBroken(
            f"{job.init_from} takes images {tuple(info['input_shape'])} of {classifier.classes} classes,"
            f" the data have {shape} and {classes}",
            code="C02",
        )
    module: Any = classifier.module
    for p in module.parameters():
        p.requires_grad_(True)
    return info["architecture"], info["arguments"], info["normalise"], module
