"""Model files: what is read, and what is refused with which words."""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robeval.core.errors import MachineError, RobevalError
from robeval.models.build import build
from robeval.models.checkpoint import read, save
from robeval.models.load import load

Write = Callable[[Path], None]
ARGUMENTS = {"height": 4, "size": 4, "classes": 3, "hidden": 6, "depth": 1}


def net() -> nn.Module:
    torch.manual_seed(0)
    return build("mlp", normalise={"mean": [0.5], "std": [0.25]}, **ARGUMENTS)


def write_checkpoint(path: Path, module: nn.Module | None = None, **changed: Any) -> None:
    facts: dict[str, Any] = {
        "architecture": "mlp", "arguments": ARGUMENTS, "normalise": {"mean": [0.5], "std": [0.25]},
        "input_shape": (1, 4, 4), "classes": ["a", "b", "c"], "recipe": {"trainer": "adv", "eps": 0.1},
        "metrics": {"clean": 0.97},
    }  # fmt: skip
    save(path, module or net(), **(facts | changed))


class Runs:
    """Calls a function when unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def cut(write: Write, count: int) -> Write:
    def do(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:-count])

    return do


def flipped(path: Path) -> None:
    write_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("data/0"))
    data = bytearray(path.read_bytes())
    at = data.index(torch.load(path, weights_only=True)["state_dict"]["network.1.weight"].numpy().tobytes())
    assert entry.header_offset < at
    data[at] ^= 1
    path.write_bytes(bytes(data))


def scripted(path: Path) -> None:
    torch.jit.save(torch.jit.trace(plain_net(), torch.rand(1, 1, 4, 4)), str(path))


def members(*names: str, data: bytes = b"x") -> Write:
    def do(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(f"model/{name}", data)

    return do


def safetensors(header: Any, payload: bytes = b"") -> Write:
    def do(path: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + payload)

    return do


def torch_save(held: Callable[[], Any], **options: Any) -> Write:
    return lambda path: torch.save(held(), path, **options)


def text(content: bytes) -> Write:
    def do(path: Path) -> None:
        path.write_bytes(content)

    return do


W4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
OLD = {"_use_new_zipfile_serialization": False}
EXTRA = {"weights": torch.zeros(2), "args": argparse.Namespace(lr=0.1)}
BAD: list[tuple[str, str, Write, int, str, str]] = [
    ("missing", "m.pt", lambda path: None, 3, "M01", r"no model file at .*m\.pt$"),
    ("folder", "m.pt", lambda path: path.mkdir(), 3, "M02", r"is a folder, expected .safetensors or .pt$"),
    ("empty", "m.pt", text(b""), 3, "M03", r"is empty \(0 bytes\)$"),
    ("cut zip", "m.pt", cut(write_checkpoint, 300), 3, "M04", "is cut short: the zip directory is missing$"),
    ("cut safetensors", "m.safetensors", cut(write_checkpoint, 4), 3, "M04", "is cut short by 4 bytes$"),
    ("cut safetensors header", "m.safetensors", text(b"\x10\x00\x00\x00\x00\x00\x00\x00{}"), 3, "M04", "by 14 bytes$"),
    ("six bytes", "m.safetensors", text(b"abcdef"), 3, "M04", "is cut short by 2 bytes$"),
    ("cut legacy", "m.pt", cut(torch_save(lambda: plain_net().state_dict(), **OLD), 40), 3, "M0", "damaged|cut short"),
    ("flipped byte", "m.pt", flipped, 3, "M05", r"is damaged: entry data/\d+ fails its checksum$"),
    ("page", "m.pt", text(b"\n<!DOCTYPE html><p>no"), 3, "M07", r"is a web page, .* \(starts with <!doctype\)$"),
    ("page 2", "m.safetensors", text(b"<html><body>"), 3, "M07", r"is a web page, not a model \(starts with <html\)$"),
    ("lfs", "m.pt", text(b"version https://git-lfs.github.com/spec/v1\noid"), 3, "M08", "pointer; run git lfs pull$"),
    ("long header", "m.safetensors", text(struct.pack("<Q", 2**62) + b"{}"), 3, "M09", "has an impossible header$"),
    ("no json", "m.safetensors", safetensors(b"{nonsense"), 3, "M09", "has an impossible header$"),
    ("shape lies", "m.safetensors", safetensors({"w": {**W4, "shape": [10**9]}}, b"1234"), 3, "M09", "impossible"),
    ("unknown type", "m.safetensors", safetensors({"w": {**W4, "dtype": "X"}}, b"1234"), 3, "M09", "impossible"),
    ("extra bytes", "m.safetensors", safetensors({"w": W4}, b"123456"), 3, "M09", "has an impossible header$"),
    ("words", "m.pt", text(b"hello, this is no model at all"), 3, "M09", "is neither a .safetensors nor a .pt file$"),
    ("other zip", "m.pt", members("readme.txt"), 3, "M09", "is a zip archive but not a model file$"),
    ("list", "m.pt", torch_save(lambda: [1, 2]), 3, "M09", "holds a list, not a state_dict$"),
    ("os.system", "m.pt", torch_save(lambda: {"w": Runs(os.system, "true")}), 3, "S01", r"wants to run posix\.system"),
    ("eval", "m.pt", torch_save(lambda: {"w": Runs(eval, "1")}), 3, "S01", r"wants to run (__)?builtin(s|__)\.eval"),
    ("legacy os.system", "m.pt", torch_save(lambda: {"w": Runs(os.system, "true")}, **OLD), 3, "S01", "posix.system"),
    ("module", "m.pt", torch_save(plain_net), 3, "S02", "holds a whole program, not weights; save its state_dict$"),
    ("legacy module", "m.pt", torch_save(plain_net, **OLD), 3, "S02", "holds a whole program, not weights"),
    ("namespace", "m.pt", torch_save(lambda: EXTRA), 3, "S03", r"also holds argparse\.Namespace; refused$"),
    ("numpy number", "m.pt", torch_save(lambda: {"best": np.float64(0.5)}), 3, "S03", "also holds numpy"),
    ("torchscript", "m.pt", scripted, 3, "S04", "is TorchScript, which is a program; refused$"),
    ("pt2", "m.pt", members("models/model.json"), 3, "S05", "is an exported program and can run code on loading$"),
    ("package", "m.pt", members(".data/extern_modules"), 3, "S05", "is an exported program"),
    ("expanded", "m.pt", torch_save(lambda: {"w": torch.zeros(1).expand(10**9)}), 3, "S06",
     r"tensor w claims 4\.0 GB from a 1\.\d KB file$"),
    ("bomb", "m.pt", members("data.pkl", data=bytes(10**7)), 3, "S07", r"would expand \d+ times to 10\.0 MB \(cap 200"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name, write, exit_code, code, words", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_model_files(tmp_path: Path, name: str, write: Write, exit_code: int, code: str, words: str) -> None:
    path = tmp_path / name
    write(path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RobevalError) as caught:
        load(path, arch="mlp", arch_args=ARGUMENTS)
    assert re.search(words, caught.value.lines()[0])
    assert caught.value.exit_code == exit_code
    assert caught.value.code.startswith(code)
    lines = caught.value.lines()
    assert lines[0].startswith(f"robeval: error[{caught.value.code}] ")
    assert len(lines) <= 4
    assert not any("weights_only" in line or "Traceback" in line for line in lines)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_in_a_hostile_file_runs(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    for i, options in enumerate([{}, OLD]):
        torch.save({"w": Runs(os.mkdir, str(witness))}, tmp_path / f"{i}.pt", **options)
        with pytest.raises(RobevalError, match=r"wants to run (posix|nt)\.mkdir"):
            load(tmp_path / f"{i}.pt", arch="linear")
    assert not witness.exists()


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_round_trip_is_bit_equal_and_self_describing(tmp_path: Path, name: str) -> None:
    module = net().eval()
    write_checkpoint(tmp_path / name, module)
    model = load(tmp_path / name)
    x = torch.rand(5, 1, 4, 4)
    assert torch.equal(model.logits(x), module(x))
    assert (model.classes, model.name, model.parameters) == (3, "m", 16 * 6 + 6 + 6 * 3 + 3)
    assert model.info["classes"] == ["a", "b", "c"]
    assert model.info["input_shape"] == [1, 4, 4]
    assert model.info["arguments"] == {**ARGUMENTS, "in_channels": 1, "act": "relu"}
    assert model.info["normalise"] == {"mean": [0.5], "std": [0.25]}
    assert model.info["recipe"] == {"trainer": "adv", "eps": 0.1}
    assert model.info["metrics"] == {"clean": 0.97}
    assert model.info["notes"] == []
    assert os.listdir(tmp_path) == [name]


def test_both_formats_are_the_same_model_and_endings_do_not_matter(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pt")
    write_checkpoint(tmp_path / "b.safetensors")
    (tmp_path / "a.pt").rename(tmp_path / "a.bin")
    (tmp_path / "b.safetensors").rename(tmp_path / "b.pt")
    assert load(tmp_path / "a.bin").fingerprint == load(tmp_path / "b.pt").fingerprint


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m.pt")
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    load(tmp_path / "m.pt")
    assert torch.equal(torch.rand(1), wanted)


def test_recorded_hash_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_checkpoint(path)
    recorded = load(path).info["file_sha256"]
    assert load(path, sha256=recorded).classes == 3
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RobevalError, match=r"is not the file recorded for this run \(sha256 differs\)") as caught:
        load(path, sha256=recorded)
    assert caught.value.code == "M06"


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: OrderedDict(("module." + k, v) for k, v in s.items()),
    lambda s: {"model": {"module.model." + k: v for k, v in s.items()}},
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, OLD])
def test_foreign_weights_with_prefixes_and_wrappers(tmp_path: Path, wrap: Any, options: dict[str, Any]) -> None:
    body = net().get_submodule("network")
    torch.save(wrap(body.state_dict()), tmp_path / "m.pt", **options)
    given = {k: str(v) for k, v in ARGUMENTS.items()}  # as the command line gives them
    model = load(tmp_path / "m.pt", arch="mlp", arch_args=given, normalise="per-image")
    x = torch.rand(2, 1, 4, 4)
    assert model.logits(x).shape == (2, 3)
    assert isinstance(model.module, nn.Module)
    assert torch.equal(model.module.get_submodule("network")(x), body(x))


def test_foreign_weights_need_an_architecture(tmp_path: Path) -> None:
    torch.save(plain_net().state_dict(), tmp_path / "m.pt")
    with pytest.raises(RobevalError, match="does not say which network") as caught:
        load(tmp_path / "m.pt")
    assert caught.value.exit_code == 2


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    state = net().get_submodule("network").state_dict()
    torch.save({k.replace("1.", "first."): v for k, v in state.items()}, path)
    with pytest.raises(RobevalError, match="2 weights missing, 2 unexpected for mlp") as caught:
        load(path, arch="mlp", arch_args=ARGUMENTS)
    assert (caught.value.code, caught.value.exit_code) == ("M10", 4)
    assert caught.value.why == "missing: 1.bias, 1.weight; unexpected: first.bias, first.weight"
    torch.save(state, path)
    with pytest.raises(
        RobevalError, match=r"is 3x6, the architecture expects 100x6|is 3, the arch.* expects 100"
    ) as caught:
        load(path, arch="mlp", arch_args=ARGUMENTS | {"classes": 100})
    assert (caught.value.code, caught.value.exit_code) == ("M11", 4)
    state["1.weight"][0, :3] = torch.nan
    torch.save(state, path)
    with pytest.raises(RobevalError, match=r"3 weights hold NaN or Inf, first: 1\.weight") as caught:
        load(path, arch="mlp", arch_args=ARGUMENTS)
    assert (caught.value.code, caught.value.exit_code) == ("M12", 4)


def test_half_precision_weights_are_noted_and_computed_in_float32(tmp_path: Path) -> None:
    state = {k: v.bfloat16() for k, v in net().get_submodule("network").state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    model = load(tmp_path / "m.safetensors", arch="mlp", arch_args=ARGUMENTS)
    assert model.info["notes"] == ["note[M13] weights are bfloat16; computed in float32"]
    assert model.logits(torch.rand(1, 1, 4, 4)).dtype == torch.float32


def test_a_file_cannot_have_code_run_by_naming_a_factory(tmp_path: Path) -> None:
    factory = tmp_path / "mine.py"
    factory.write_text(
        "import torch\ndef make(k=3):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, k))\n"
    )
    name = f"{factory}:make"
    module = build(name, k=3)
    write_checkpoint(tmp_path / "m.pt", module, architecture=name, arguments={"k": 3}, normalise="none")
    with pytest.raises(RobevalError, match="is not run on a file's word") as caught:
        load(tmp_path / "m.pt")
    assert caught.value.code == "S02"
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(load(tmp_path / "m.pt", arch=name).logits(x), module(x))


@pytest.mark.parametrize("changed, words", [
    ({"input_shape": (1, 4)}, "input_shape must be three sizes"),
    ({"architecture": 5}, "architecture is missing or of the wrong type"),
])  # fmt: skip
def test_damaged_descriptions(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    write_checkpoint(tmp_path / "m.pt", **changed)
    with pytest.raises(RobevalError, match=words) as caught:
        load(tmp_path / "m.pt")
    assert caught.value.code == "M09"


def test_newer_formats_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m.pt")
    held = torch.load(tmp_path / "m.pt", weights_only=True)
    torch.save(held | {"format_version": 9}, tmp_path / "m.pt")
    with pytest.raises(RobevalError, match="written by a newer robeval"):
        load(tmp_path / "m.pt")


def test_a_lying_description_costs_no_memory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m.pt", arguments=ARGUMENTS | {"hidden": 10**9})
    with pytest.raises(RobevalError, match="the architecture expects 1000000000"):
        load(tmp_path / "m.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    write_checkpoint(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left on device"):
        write_checkpoint(path, recipe={"other": 1})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.pt"]


def test_only_plain_values_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path / "m.pt", recipe={"x": object()})
    assert not list(tmp_path.iterdir())


def test_read_returns_state_spec_and_hash(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m.pt")
    held = read(tmp_path / "m.pt")
    assert held.spec is not None
    assert held.spec["classes"] == ["a", "b", "c"]
    assert set(held.state) == {f"network.{i}.{w}" for i in (1, 3) for w in ("weight", "bias")}
    assert len(held.sha256) == 64
