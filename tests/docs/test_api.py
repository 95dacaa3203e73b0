"""docs/api.md lists the public API, its program runs, and the site builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from tiny_models import ROOT

import skv_export

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^::: (\S+)$", PAGE, flags=re.MULTILINE)


def test_public_names_are_documented() -> None:
    objects = []
    for path in DOCUMENTED:
        module, _, name = path.rpartition(".")
        objects.append(getattr(import_module(module), name))
    for name in set(skv_export.__all__) - {"__version__"}:
        assert getattr(skv_export, name) in objects, name
        assert re.search(rf"^\| \[{name}\]", PAGE, flags=re.MULTILINE), name


@pytest.mark.slow
def test_the_program_runs_as_it_stands(demo_export: Path, tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "demo-model").symlink_to(demo_export)
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    for module in ("mkdocs", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason=f"{module.split('.')[0]} is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for path in DOCUMENTED:
        assert f'id="{path}"' in page, path
