"""The README's programs, run as they stand on the exported demo model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from skv_export.export.architectures import TESTED

README = Path(__file__).parents[2] / "README.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_run_as_they_stand(program: str, demo_export: Path, tmp_path: Path) -> None:
    (tmp_path / "demo-model").symlink_to(demo_export)
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def test_deployment_needs_no_torch() -> None:
    (program,) = (p for p in PROGRAMS if "register_custom_ops_library" in p)
    imported = re.findall(r"^(?:import|from) (\w+)", program, flags=re.MULTILINE)
    assert set(imported) == {"json", "numpy", "onnxruntime", "tokenizers"}


def test_models_are_those_that_are_tested() -> None:
    """The README's list is the package's, in its order."""
    page = README.read_text(encoding="utf-8")
    (named,) = re.findall(r"^\*\*Models\.\*\* Tested against PyTorch: (.*?)\.\s+Any", page, re.MULTILINE | re.DOTALL)
    assert re.findall(r"[a-z]\w+", re.sub(r"\(.*?\)|\band\b", "", named, flags=re.DOTALL)) == list(TESTED)


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
