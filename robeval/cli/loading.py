"""From the command line's words to a classifier and images, for all commands that need both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from robeval.cli.common import note

if TYPE_CHECKING:
    from robeval.core.classifier import Classifier
    from robeval.core.images import Images

MODEL = "Model"
DATA = "Data"

ModelFile = Annotated[str, typer.Argument(help="A .pt or .safetensors file.", metavar="MODEL", show_default=False)]
Data = Annotated[
    str, typer.Option("--data", help="digits, fashion-mnist, idx:DIR, folder:DIR, npz:FILE.", rich_help_panel=DATA)
]
Split = Annotated[str, typer.Option("--split", help="Split of the data set.", rich_help_panel=DATA)]
Subset = Annotated[
    str | None,
    typer.Option(
        "--images",
        help="500 (class-balanced), 0:500, first:500, 3,17,90 or @ids.txt. All by default.",
        rich_help_panel=DATA,
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch", help="Architecture of a bare state_dict: a name or file.py:function.", rich_help_panel=MODEL
    ),
]
ArchArg = Annotated[
    list[str] | None, typer.Option("--arch-arg", help="key=value for --arch, repeatable.", rich_help_panel=MODEL)
]
Normalise = Annotated[
    str,
    typer.Option(
        "--normalise", help="Inside a bare state_dict's model: none, per-image, or MEANS/STDS.", rich_help_panel=MODEL
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every image's own random stream.", rich_help_panel="Run")]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", min=1, help="Most images in one model call; changes no result.", rich_help_panel="Run"
    ),
]
Runs = Annotated[str, typer.Option("--out", help="Folder of runs.", rich_help_panel="Output")]


def pairs(texts: list[str] | None) -> dict[str, str]:
    """``["key=value", ...]`` as a dictionary.

    Raises:
        UsageError: a text without ``=``.
    """
    from robeval.core.errors import UsageError

    found = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f'expected key=value, got "{text}"', code="A04")
        found[key.strip().replace("-", "_")] = value.strip()
    return found


def normalisation(text: str) -> Any:
    """``none``, ``per-image`` or ``0.5,0.5,0.5/0.2,0.2,0.2`` as the model builder wants it."""
    from robeval.core.numbers import number

    if "/" not in text:
        return text
    mean, std = text.split("/", 1)
    read = lambda part: [number(v, name="normalise", code="A04") for v in part.split(",")]
    return {"mean": read(mean), "std": read(std)}


def load_both(
    model: str,
    data: str,
    split: str,
    subset: str | None,
    *,
    arch: str | None = None,
    arch_arg: list[str] | None = None,
    normalise: str = "none",
    device: str = "cpu",
    randomised: bool = False,
    form_only: bool = False,
) -> tuple[Classifier, Images]:
    """The classifier on its device and the chosen images, after the contract check, or that of the form alone.

    Raises:
        FileRefused, ContractBroken, UsageError, MachineError: see the documentation of exit codes.
    """
    from torch import nn

    from robeval.cli.common import device_named
    from robeval.data.load import load as load_images
    from robeval.data.repeats import repeated
    from robeval.data.subset import subset as choose
    from robeval.models.contract import check
    from robeval.models.load import load as load_model

    where = device_named(device)
    images = choose(load_images(data, split), subset)
    classifier = load_model(
        model,
        arch=arch,
        arch_args=pairs(arch_arg) or None,
        normalise=normalisation(normalise),
        classes=images.classes if arch else None,  # a robeval checkpoint knows its own
        input_shape=tuple(images.x.shape[1:]) if arch else None,
    )
    if isinstance(classifier.module, nn.Module):
        classifier.module.to(where)
    images = images.to(where)
    classifier.info["source"] = {  # enough to load both again
        "model": model,
        "data": data,
        "split": split,
        "subset": subset,
        "arch": arch,
        "arch_arg": arch_arg,
        "normalise": normalise,
        "randomised": randomised,
    }
    for remark in [
        *classifier.info.get("notes", ()),
        *repeated(images),
        *check(classifier, images, randomised=randomised, form_only=form_only),
    ]:
        note(remark)
    return classifier, images
