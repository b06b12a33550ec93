import tomllib
from pathlib import Path
from typing import Any

import pytest

from support.layers import ROOMS, source_files

ROOT = Path(__file__).parents[1]
MAX_LINES = 400


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_packages_are_the_folders_that_hold_source(pyproject: dict[str, Any]) -> None:
    folders = {file.parent.relative_to(ROOT) for file in source_files(ROOT)}
    packages = {f"headlong.{'.'.join(folder.parts)}": str(folder) for folder in folders}
    settings = pyproject["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(packages)
    assert settings["package-dir"] == packages


def test_type_checkers_look_at_every_room(pyproject: dict[str, Any]) -> None:
    assert sorted(pyproject["tool"]["pyright"]["include"]) == sorted(ROOMS)
    assert sorted(pyproject["tool"]["mypy"]["packages"]) == sorted(f"headlong.{r}" for r in ROOMS)


def test_no_folder_is_a_regular_package() -> None:
    assert [file for file in source_files(ROOT) if file.name == "__init__.py"] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_room_says_that_it_is_typed(pyproject: dict[str, Any]) -> None:
    assert [room for room in ROOMS if not (ROOT / room / "py.typed").is_file()] == []
    assert "py.typed" in pyproject["tool"]["setuptools"]["package-data"]["*"]


def test_type_checkers_find_the_package_through_the_link() -> None:
    link = ROOT / ".typing" / "headlong"
    assert link.is_symlink()
    assert link.readlink() == Path("..")


def test_no_file_is_too_long() -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in source_files(ROOT)
    }
    assert {file: lines for file, lines in lengths.items() if lines > MAX_LINES} == {}


def test_constraints_pin_the_pytorch_that_make_installs_first() -> None:
    (line,) = [
        line
        for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
        if line.startswith("TORCH := ")
    ]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert line.removeprefix("TORCH := ") in pins
