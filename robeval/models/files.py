"""Reading model files without running anything in them: every check comes before the bytes reach torch.

Formats are told apart by content, never by the ending. `torch.load` is called with ``weights_only=True`` only, there is
no second attempt, and torch's own error text (which proposes the unsafe way) is never shown.
"""

from __future__ import annotations

import hashlib
import pickletools
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from robeval.core.errors import FileRefused
from robeval.models.safetensors_header import read_safetensors

MAX_ENTRIES = 100_000
MAX_RATIO = 200
MAX_BYTES = 16 * 2**30
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before version 1.6
SAVE_WEIGHTS = "where you trust the file, save its weights alone: torch.save(model.state_dict(), PATH)"

# Modules and builtins that act on the machine when a pickle names them.
_MODULES = (
    "posix nt os subprocess sys shutil socket pty runpy importlib ctypes webbrowser pickle _pickle marshal code codeop "
    "commands multiprocessing threading signal tempfile pathlib._local io _io operator functools types inspect timeit "
    "cProfile profile pdb bdb asyncio urllib http requests torch.hub torch.jit torch.utils.cpp_extension"
)
_BUILTINS = "eval exec compile getattr setattr delattr __import__ open input breakpoint map"
ACTING, ACTING_BUILTINS = frozenset(_MODULES.split()), frozenset(_BUILTINS.split())


def sha256_of(path: Path) -> str:
    """Hash of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def amount(count: float) -> str:
    """Bytes as people write them: ``1.6 KB``."""
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} {units[0]}" if units[0] == "bytes" or count >= 100 else f"{count:.1f} {units[0]}"


def present(path: Path) -> bytes:
    """The first bytes of a model file that exists, is a file, and holds something.

    Raises:
        FileRefused: missing (M01), a folder (M02), empty (M03), a web page (M07), or a Git-LFS pointer (M08).
    """
    if path.is_dir():
        raise FileRefused(f"{path} is a folder, expected .safetensors or .pt", code="M02")
    if not path.is_file():
        raise FileRefused(f"no model file at {path}", code="M01")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise FileRefused(f"{path} cannot be read: {error.strerror}", code="M01") from None
    if not head:
        raise FileRefused(f"{path} is empty (0 bytes)", code="M03")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<!--")):
        start = text.split(b">")[0].split()[0].decode("ascii", "replace")
        raise FileRefused(
            f"{path} is a web page, not a model (starts with {start})", code="M07", do="download the file itself"
        )
    if text.startswith(b"version https://git-lfs"):
        raise FileRefused(f"{path} is a Git-LFS pointer; run git lfs pull", code="M08")
    return head


def read_weights(path: Path) -> tuple[Any, dict[str, str]]:
    """What a model file holds, and its text metadata (safetensors only).

    Returns:
        The saved object (plain types and tensors on the CPU), and the metadata.
    Raises:
        FileRefused: codes M01 to M05, M07 to M09, S01 to S07 of the documentation of bad inputs.
    """
    head = present(path)
    if head.startswith(b"PK"):
        check_torch_zip(path)
        held = _load(path)
    elif head.startswith(LEGACY_MAGIC) or head[:1] == b"\x80":
        refuse_globals(path, sorted(set(pickle_globals(path))), legacy=True)
        held = _load(path)
    elif head[8:9] == b"{" or path.suffix == ".safetensors":
        return read_safetensors(path)
    else:
        raise FileRefused(f"{path} is neither a .safetensors nor a .pt file", code="M09")
    refuse_false_claims(path, held)
    return held, {}


def _load(path: Path) -> Any:
    """torch.load in the restricted mode, its error text replaced."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, MemoryError) as error:
        raise FileRefused(
            f"{path} is cut short or claims more than it holds", code="M04", why=type(error).__name__
        ) from None
    except Exception as error:
        raise FileRefused(
            f"{path} is damaged or holds more than weights; refused", code="M05", why=type(error).__name__,
            do=SAVE_WEIGHTS,
        ) from None  # fmt: skip


def check_zip(path: Path, *, damaged: str = "M05") -> zipfile.ZipFile:
    """Open a zip whose directory is there, whose sizes are sane and whose checksums hold.

    Args:
        damaged: Code for a checksum that fails.

    Raises:
        FileRefused: cut short (M04), damaged, or a bomb (S07).
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise FileRefused(f"{path} is cut short: the zip directory is missing", code="M04") from None
    entries = archive.infolist()
    total, size = sum(e.file_size for e in entries), max(path.stat().st_size, 1)
    if total > MAX_RATIO * size:
        raise FileRefused(
            f"{path} would expand {total / size:.0f} times to {amount(total)} (cap {MAX_RATIO} times)", code="S07"
        )
    if total > MAX_BYTES or len(entries) > MAX_ENTRIES:
        raise FileRefused(
            f"{path} would expand to {amount(total)} in {len(entries)} entries"
            f" (caps {amount(MAX_BYTES)}, {MAX_ENTRIES})",
            code="S07",
        )
    for entry in entries:
        try:
            with archive.open(entry) as member:
                while member.read(2**20):
                    pass
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError):
            name = entry.filename.partition("/")[2] or entry.filename
            raise FileRefused(f"{path} is damaged: entry {name} fails its checksum", code=damaged) from None
    return archive


def check_torch_zip(path: Path) -> None:
    """Let only a zip of plain weights pass.

    Raises:
        FileRefused: a program (S04, S05), code in the pickle (S01 to S03), damage (M04, M05), a bomb (S07).
    """
    with check_zip(path) as archive:
        names = {n.partition("/")[2] or n for n in archive.namelist()}
    if ".data/extern_modules" in names or "models/model.json" in names or "serialized_exported_program.json" in names:
        raise FileRefused(f"{path} is an exported program and can run code on loading", code="S05", do=SAVE_WEIGHTS)
    if "constants.pkl" in names or any(n.startswith("code/") for n in names):
        raise FileRefused(f"{path} is TorchScript, which is a program; refused", code="S04", do=SAVE_WEIGHTS)
    if "data.pkl" not in names:
        raise FileRefused(f"{path} is a zip archive but not a model file", code="M09")
    try:
        found = get_unsafe_globals_in_checkpoint(str(path))
    except Exception:
        raise FileRefused(f"{path} is damaged: entry data.pkl cannot be read", code="M05") from None
    refuse_globals(path, found)


def refuse_globals(path: Path, found: list[str], *, legacy: bool = False) -> None:
    """Refuse a pickle that names functions or classes beyond weights.

    Args:
        found: Dotted names that the pickle asks for.
        legacy: The list holds the harmless names too; they are left out here.

    Raises:
        FileRefused: S01 for names that act on the machine, S02 for a whole module, S03 for other classes.
    """
    if legacy:
        harmless = ("torch._utils._rebuild_", "torch.Size", "torch.storage.", "torch.nn.parameter.Parameter")
        found = [n for n in found if not n.startswith(harmless) and n not in ("collections.OrderedDict",)]
        found = [n for n in found if not (n.startswith("torch.") and n.endswith("Storage")) and n.count(".")]
    acting = [n for n in found if _acts(n)]
    if acting:
        raise FileRefused(f"{path} wants to run {acting[0]} when loaded; refused", code="S01")
    if any(n.startswith("torch.nn.") for n in found):
        raise FileRefused(
            f"{path} holds a whole program, not weights; save its state_dict", code="S02", do=SAVE_WEIGHTS
        )
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise FileRefused(f"{path} also holds {sorted(found)[0]}{more}; refused", code="S03", do=SAVE_WEIGHTS)


def _acts(name: str) -> bool:
    module, _, last = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        return last in ACTING_BUILTINS
    return module in ACTING or module.partition(".")[0] in ACTING


def pickle_globals(path: Path) -> Iterator[str]:
    """Dotted names that the pickles at the start of a file ask for, read without running them."""
    with open(path, "rb") as file:
        for _ in range(5):  # torch's old layout: magic, protocol, system, object, keys
            strings: list[str] = []
            try:
                for code, argument, _ in pickletools.genops(file):
                    if code.name in ("GLOBAL", "INST"):
                        yield str(argument).replace(" ", ".")
                    elif code.name == "STACK_GLOBAL":
                        yield ".".join(strings[-2:])
                    elif isinstance(argument, str):
                        strings.append(argument)
            except Exception:  # the tensors' bytes follow; what cannot be parsed cannot be unpickled either
                return


def refuse_false_claims(path: Path, held: Any, name: str = "") -> None:
    """Refuse tensors that are larger than the bytes behind them.

    Raises:
        FileRefused: S06.
    """
    if isinstance(held, Mapping):
        for key, value in held.items():
            refuse_false_claims(path, value, str(key))
    elif isinstance(held, Tensor):
        size = path.stat().st_size
        claim = held.numel() * held.element_size()
        if held.layout != torch.strided or claim > max(size, held.untyped_storage().nbytes()):
            raise FileRefused(
                f"tensor {name} claims {amount(claim)} from a {amount(size)} file", code="S06", where=str(path)
            )
