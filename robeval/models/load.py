"""A model file as a `Classifier`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robeval.core.classifier import Classifier
from robeval.core.errors import ContractBroken, FileRefused, RobevalError, UsageError
from robeval.models.build import build, is_factory, resolve
from robeval.models.checkpoint import Checkpoint, read

PREFIXES = ("module.", "model.", "network.", "_orig_mod.")


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    normalise: Any = "none",
    classes: Sequence[str] | None = None,
    input_shape: Sequence[int] | None = None,
    name: str | None = None,
    sha256: str = "",
) -> Classifier:
    """Read weights safely, build the network, and fit them together strictly.

    Args:
        path: A robeval checkpoint, which describes itself, or a foreign state_dict, which needs ``arch``. Known
            prefixes (``module.``, ``model.``) and wrappers (``{"state_dict": ...}``) come off by themselves.
        arch: Architecture, or a factory ``path/to/file.py:callable``, WHOSE FILE IS EXECUTED. A checkpoint that was
            made with a factory must be given its factory here: no file is executed because another file names it.
        arch_args: Arguments of the architecture.
        normalise: For foreign files: ``none``, ``per-image`` or ``{"mean": ..., "std": ...}``.
        classes: Class names; those of the checkpoint otherwise.
        input_shape: (C, H, W) that the model takes; the checkpoint's otherwise.
        name: How tables call the model; the file's name otherwise.
        sha256: The hash that the file must have; empty for any.

    Returns:
        A Classifier in eval mode; ``info`` holds architecture, arguments, normalise, input_shape, classes, file,
        file_sha256, recipe, metrics, parameters, notes.
    Raises:
        FileRefused: the file is missing, damaged or would run code (exit 3).
        ContractBroken: weights do not fit the architecture (M10, M11) or hold NaN or Inf (M12) (exit 4).
        UsageError: unknown architecture or arguments, or a foreign file without ``arch`` (exit 2).
    """
    checkpoint = read(path, sha256=sha256)
    spec = _description(checkpoint, arch, arch_args, normalise, input_shape)
    state, notes = _floats(checkpoint)
    module = _fitted(spec, state, checkpoint.path)
    names = list(classes) if classes is not None else list(spec.get("classes", []))
    names = names or [str(i) for i in range(_outputs(spec, state))]
    info = {k: spec[k] for k in ("architecture", "arguments", "normalise", "input_shape", "recipe", "metrics")}
    info |= {"classes": names, "file": str(checkpoint.path), "file_sha256": checkpoint.sha256, "notes": notes}
    info["parameters"] = sum(p.numel() for p in module.parameters())
    return Classifier(module, len(names), name or checkpoint.path.stem, info=info)


def _description(
    checkpoint: Checkpoint, arch: str | None, arch_args: Mapping[str, Any] | None, normalise: Any, shape: Any
) -> dict[str, Any]:
    """The checkpoint's own description, or one put together from the options."""
    own = checkpoint.spec
    if own is None and arch is None:
        raise UsageError(
            f"{checkpoint.path} holds weights but does not say which network they belong to",
            code="A04",
            do="name it: --arch NAME, or --arch path/to/file.py:callable",
        )
    if own is not None and arch is None and is_factory(own["architecture"]):
        raise FileRefused(
            f"{checkpoint.path} needs {own['architecture']}, which is code and is not run on a file's word",
            code="S02",
            do=f"if you trust that file, name it yourself: --arch {own['architecture']}",
        )
    if own is None:
        own = {"architecture": arch, "arguments": {}, "normalise": normalise, "input_shape": None, "classes": []}
        own |= {"recipe": {}, "metrics": {}}
    elif arch is not None and arch != own["architecture"] and not is_factory(own["architecture"]):
        own = {**own, "architecture": arch, "arguments": {}}
    given = dict(own["arguments"]) | dict(arch_args or {})
    architecture = arch or own["architecture"]
    shape = list(shape) if shape is not None else own["input_shape"]
    return {**own, "architecture": architecture, "arguments": resolve(architecture, given), "input_shape": shape}


def _floats(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """All floating weights in float32, with a note when they were not; refused when not finite."""
    kinds = sorted({str(v.dtype).removeprefix("torch.") for v in checkpoint.state.values() if v.is_floating_point()})
    other = [k for k in kinds if k != "float32"]
    notes = [f"note[M13] weights are {', '.join(other)}; computed in float32"] if other else []
    state = {k: v.float() if v.is_floating_point() else v for k, v in checkpoint.state.items()}
    bad = {k: int((~torch.isfinite(v)).sum()) for k, v in state.items() if v.is_floating_point()}
    bad = {k: n for k, n in bad.items() if n}
    if bad:
        raise ContractBroken(
            f"{sum(bad.values())} weights hold NaN or Inf, first: {next(iter(bad))}",
            code="M12",
            where=str(checkpoint.path),
        )
    return state, notes


def _fitted(spec: Mapping[str, Any], state: dict[str, Tensor], path: Path) -> nn.Module:
    """The network with these weights in it; the random state of torch is left as it was."""
    make = {"normalise": spec["normalise"], **spec["arguments"]}
    if not is_factory(spec["architecture"]):
        with torch.device("meta"):  # shapes first: a false description must not cost memory
            skeleton = _built(spec["architecture"], make, path)
        _strict(skeleton.get_submodule("network").state_dict(), state, path, spec["architecture"])
    with torch.random.fork_rng(devices=[]):
        module = _built(spec["architecture"], make, path)
    body = module.get_submodule("network")
    body.load_state_dict(_strict(body.state_dict(), state, path, spec["architecture"]), strict=True)
    return module


def _built(architecture: str, make: dict[str, Any], path: Path) -> nn.Module:
    try:
        return build(architecture, **make)
    except RobevalError:
        raise
    except Exception as error:
        raise ContractBroken(
            f"{architecture} cannot be built with these arguments: {error}", code="M10", where=str(path)
        ) from None


def _strict(wanted: Mapping[str, Tensor], state: dict[str, Tensor], path: Path, architecture: str) -> dict[str, Tensor]:
    """The weights under the architecture's names, prefixes taken off where that helps."""
    best = state
    while set(state) != set(wanted):
        prefix = next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k.removeprefix(prefix): v for k, v in state.items()}
        if len(set(state) & set(wanted)) > len(set(best) & set(wanted)):
            best = state
    state = state if set(state) == set(wanted) else best
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or unexpected:
        raise ContractBroken(
            f"{len(missing)} weights missing, {len(unexpected)} unexpected for {architecture}",
            code="M10",
            where=str(path),
            why="; ".join(f"{t}: {_some(n)}" for t, n in (("missing", missing), ("unexpected", unexpected)) if n),
            do="check --arch and its arguments",
        )
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            has, wants = ("x".join(map(str, t.shape)) or "a single number" for t in (state[key], value))
            raise ContractBroken(
                f"{key} is {has}, the architecture expects {wants}",
                code="M11",
                where=str(path),
                do="check --arch and its arguments (classes, in_channels, size, width)",
            )
    return state


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _outputs(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> int:
    """Number of classes: the argument if there is one, else the rows of the last weight."""
    given = spec["arguments"].get("classes")
    return int(given) if isinstance(given, int) else int(list(state.values())[-1].shape[0])
