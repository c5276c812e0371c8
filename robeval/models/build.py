"""Networks by name: an optional normalisation, then an architecture from the folder or from the user's own file."""

from __future__ import annotations

import importlib.util
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from robeval.core import catalogue
from robeval.core.errors import FileRefused, RobevalError, UsageError, unknown
from robeval.models.normalise import normaliser


def is_factory(name: str) -> bool:
    """Whether the name means a callable in a file, ``path/to/file.py:callable``."""
    return re.fullmatch(r".+\.py:\w+", name) is not None


def resolve(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of an architecture, defaults included; those of a factory are returned as they are.

    Raises:
        UsageError: unknown architecture or argument.
    """
    return dict(arguments) if is_factory(name) else catalogue.find("models", name).bind(arguments)


def fit(name: str, shape: Sequence[int], classes: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments completed by what the data say: ``in_channels``, ``height``, ``size``, ``classes``.

    Args:
        shape: (C, H, W) of one image.
        classes: Number of classes.
        arguments: What the user gave; it wins.
    """
    if is_factory(name):
        return dict(arguments)
    known = {s.name: s for s in catalogue.find("models", name).settings}
    data: dict[str, Any] = {"in_channels": shape[0], "size": shape[-1], "height": shape[-2], "classes": classes}
    return resolve(name, {k: v for k, v in data.items() if k in known} | dict(arguments))


def build(name: str, *, normalise: Any = "none", **arguments: Any) -> nn.Module:
    """A freshly initialised network of two parts, ``normalise`` and ``network``: pixels in [0, 1] to logits.

    Args:
        name: An architecture of the catalogue, or a factory ``path/to/file.py:callable``. THE FILE OF A FACTORY IS
            EXECUTED, with all your rights: name only files that you trust.
        normalise: ``none``, ``per-image`` or ``{"mean": [...], "std": [...]}``.
        arguments: Arguments of the architecture or of the callable.

    Shapes:
        The network maps (n, C, H, W) to (n, K).
    Raises:
        UsageError: unknown name, argument or normalisation, or a factory that does not return a module.
        FileRefused: the factory's file is missing or fails.
    """
    first = normaliser(normalise)
    if is_factory(name):
        body = _from_file(name, arguments)
    else:
        method = catalogue.find("models", name)
        body = method.load()(**method.bind(arguments))
    return nn.Sequential(OrderedDict(normalise=first, network=body))


def _from_file(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Run the user's file and call the callable."""
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise FileRefused(f"no file at {path}", code="F02", do="the form is path/to/file.py:callable")
    try:
        spec = importlib.util.spec_from_file_location(f"robeval_factory_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except Exception as error:
        raise FileRefused(f"{path} failed when run: {type(error).__name__}: {error}", code="F02") from error
    make: Callable[..., Any] | None = getattr(loaded, function, None)
    if not callable(make):
        raise unknown(f"callable in {path}", function, [n for n, v in vars(loaded).items() if callable(v)])
    try:
        body = make(**arguments)
    except RobevalError:
        raise
    except Exception as error:
        raise UsageError(f"{name} failed: {type(error).__name__}: {error}", code="A04") from error
    if not isinstance(body, nn.Module):
        raise UsageError(f"{name} returned {type(body).__name__}, expected a torch.nn.Module", code="A04")
    return body
