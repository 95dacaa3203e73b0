"""docs/deploy.md and the Docker image's recipe: programs run as they stand, and what they name is there."""

from __future__ import annotations

import re
import subprocess
import sys
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


def test_the_image_installs_the_extras_of_a_server() -> None:
    assert '"$(echo /wheels/*.whl)[gpu,serve]"' in DOCKERFILE


def test_the_image_is_pinned_small_and_not_roots() -> None:
    tools = re.findall(r'"([\w-]+)>=[\d.]+(,<\d+)?"', DOCKERFILE)
    assert len(tools) == 3 and all(upper for _, upper in tools)
    # nvcc works with headers and libraries of its own version; each package has releases of its own beside them.
    assert set(re.findall(r'"nvidia-[\w-]+(.*?)"', DOCKERFILE)) == {"==13.0.*"}
    images = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", image) for image in images)
    served = DOCKERFILE.rpartition("\nFROM")[2]
    assert re.search(r"^USER skv$", served, re.MULTILINE) and served.index("USER") < served.index("ENTRYPOINT")
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and all((ROOT / name).exists() for name in kept)
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "recipes", "skv_export", "packaging"} <= kept
