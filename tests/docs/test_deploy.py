"""docs/deploy.md and the Docker image's recipe: programs run as they stand, and what they name is there."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_models import ROOT

PAGE = ROOT / "docs" / "deploy.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
DOCKERFILE = (ROOT / "examples" / "docker" / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_run_as_they_stand(program: str, demo_export: Path, tmp_path: Path) -> None:
    if "onnxruntime_genai" in program:
        pytest.importorskip(
            "onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install onnxruntime-genai"
        )
    (tmp_path / "demo-model").symlink_to(demo_export)
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def test_a_server_needs_what_the_page_says() -> None:
    """The runtime imports no package beyond those that the page and the Docker image install."""
    code = (
        "import sys, skv_export.runtime.session, onnxruntime, tokenizers\n"
        "files = {name: str(getattr(module, '__file__', '')) for name, module in sys.modules.items()}\n"
        "print(*{name.partition('.')[0] for name, file in files.items() if 'site-packages' in file})"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    needed = {name for name in output.split() if not name.startswith(("_", "skv_export"))}
    (line,) = (line for line in PAGE.read_text().splitlines() if "pip install onnxruntime numpy" in line)
    assert {"onnxruntime", "numpy", "tokenizers", "ml_dtypes"} <= needed <= set(line.split()), needed
    assert set(line.split("#")[0].split()[3:]) <= set(re.split(r"\s+", DOCKERFILE))


def test_the_image_has_the_libraries_of_the_gpu_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in extras["gpu"]:
        assert re.split("[<>=]", requirement)[0] in DOCKERFILE, requirement
