"""CONTRIBUTING.md names files and make targets that exist; the hosted workflows run what it says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from tiny_models import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_named_files_exist() -> None:
    names = [name for name in re.findall(r"`([\w./-]+)`", TEXT) if "/" in name or name.endswith((".md", ".toml"))]
    assert len(names) > 30
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("BITS", "skv_export/spec/recipe.py"),
        ("GRANULARITIES", "skv_export/spec/recipe.py"),
        ("PLANES", "skv_export/spec/layout.py"),
        ("LAYOUT_VERSION", "skv_export/spec/layout.py"),
        ("MIDRISE_STEP", "skv_export/spec/quantizer.py"),
        ("ROWS", "skv_export/checkpoints/attention_weights.py"),
        ("parameter_bytes", "skv_export/native/kv_layout.h"),
    ],
)
def test_named_constants_are_where_it_says(name: str, path: str) -> None:
    assert f"`{name}`" in TEXT
    assert re.search(rf"\b{name}\b.* ?[=(]", (ROOT / path).read_text(encoding="utf-8"))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^    make (\w+)", TEXT, flags=re.MULTILINE)
    assert {"setup", "test", "docs"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_well_formed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] and all(("uses" in step) != ("run" in step) for step in job["steps"])


def test_hosted_ci_runs_ours() -> None:
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_wheels_are_built_for_every_platform() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]["wheels"]
    assert {row["architecture"] for row in job["strategy"]["matrix"]["include"]} == {
        "x86_64", "aarch64", "arm64", "AMD64",
    }  # fmt: skip
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert options["config-settings"] == {"cmake.define.SKV_CUDA": "off"}
