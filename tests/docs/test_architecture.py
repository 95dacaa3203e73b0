"""docs/architecture.md: its table is the import contract of pyproject.toml, and the files that it names exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FOLDERS = ("", "skv_export", "skv_export/export", "skv_export/export/passes")


def test_table_is_the_contract() -> None:
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]
    first_cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", TEXT, flags=re.MULTILINE)
    assert [set(re.findall(r"\w+", cell)) for cell in first_cells] == layers


def test_every_package_has_a_row() -> None:
    packages = {path.parent.name for path in (ROOT / "skv_export").glob("*/__init__.py")}
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    modules = {"arguments", "errors", "paths", "progress", "provenance"}
    assert packages | modules == set(re.findall(r"\w+", " ".join(contract["layers"])))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:\w+/)+[\w*]+(?:\.\w+|\.\*)?)`", TEXT))))
def test_named_files_exist(name: str) -> None:
    pattern = name if "." in name else f"{name}*"
    assert any(list((ROOT / folder).glob(pattern)) for folder in FOLDERS), name
