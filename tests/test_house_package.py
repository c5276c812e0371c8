"""What is built and installed: the package list, the wheel, the source archive, and a clean environment outside."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import robeval

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINKS = {"attacks": "robeval.attacks", "bounds": "robeval.bounds"}


def folders_with_code() -> dict[str, Path]:
    """Package name -> folder, as the tree has them."""
    found = {name: ROOT / folder for folder, name in LINKS.items()}
    for marker in (ROOT / "robeval").rglob("__init__.py"):
        parts = marker.parent.relative_to(ROOT).parts
        if parts[1:2] not in [(folder,) for folder in LINKS]:
            found[".".join(parts)] = marker.parent
    return found


def wheel_files() -> set[str]:
    """Every file of the house that belongs into the wheel, by its path in there."""
    files = set()
    for top in ("robeval", *LINKS):
        for path in (ROOT / top).rglob("*"):
            linked = top == "robeval" and path.relative_to(ROOT).parts[1] in LINKS
            if path.is_file() and "__pycache__" not in path.parts and not linked:
                inside = path.relative_to(ROOT).as_posix()
                files.add(inside if top == "robeval" else f"robeval/{inside}")
    return files


def test_the_package_list_equals_the_tree() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders_with_code())


def test_every_folder_with_code_is_a_package() -> None:
    bare = {p.parent for p in (ROOT / "robeval").rglob("*.py") if not (p.parent / "__init__.py").exists()}
    assert bare == set()


def test_versions_agree() -> None:
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == robeval.__version__  # type: ignore[index]
    assert f"## {robeval.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned_within_its_range() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["reference"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.lower()]), text
    assert not [line for line in lines if "+" in line.split("#")[0] or "/" in line or "@" in line], "only plain pins"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel made from it, built from a copy of the tree."""
    top = tmp_path_factory.mktemp("built")
    copy = top / "checkout"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs", ".*_cache", ".hypothesis", "*.pt"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(top / "dist")],
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return top / "dist"


def test_the_wheel_holds_every_file_once_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(wheel_files())


def test_the_source_archive_does_not_follow_the_links(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = ["/".join(name.split("/")[1:]) for name in archive.getnames()]
    assert "attacks/pgd.py" in names
    assert [name for name in names if name.startswith(("robeval/attacks/", "robeval/bounds/"))] == []
    assert len(names) == len(set(names))
    assert {"constraints.txt", "LICENSE", "README.md", "pyproject.toml"} <= set(names)


@pytest.fixture(scope="module")
def outside(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs folder of a clean environment with the wheel; other packages are borrowed."""
    home = tmp_path_factory.mktemp("outside")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "env")], check=True)
    python = home / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(next(built.glob("*.whl")))], check=True, capture_output=True)
    site = next((home / "env" / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run_outside(program: Path, *arguments: str) -> str:
    """stdout of a program that is started far from the checkout, without its paths."""
    done = subprocess.run(
        [str(program), *arguments],
        cwd=program.parent.parent,
        env={"PATH": "/usr/bin:/bin", "HOME": str(program.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_installed_command_tells_its_version(outside: Path) -> None:
    assert run_outside(outside / "robeval", "--version") == f"robeval {robeval.__version__}"
    assert run_outside(outside / "python", "-m", "robeval", "--version") == f"robeval {robeval.__version__}"


def test_the_installed_package_finds_and_loads_its_methods(outside: Path) -> None:
    code = (
        "import robeval.attacks.pgd as file; from robeval.core import catalogue as c; "
        "assert c.find('attacks', 'pgd').load() is file.pgd; print(file.__file__); print(*c.methods('attacks'))"
    )
    where, names = run_outside(outside / "python", "-c", code).splitlines()
    assert where.startswith(str(outside.parent))
    # A file with a decorator is a method; the others are machinery beside them.
    files = [path for path in (ROOT / "attacks").glob("*.py") if "\n@attack(" in path.read_text(encoding="utf-8")]
    assert len(files) > 15
    assert set(names.split()) == {path.stem.replace("_", "-") for path in files}
