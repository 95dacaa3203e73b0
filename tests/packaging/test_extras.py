"""What the base package does without the extra ``export``, and what it says of the rest."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny_models import ROOT, make_tiny, write_tokenizer

from skv_export.errors import EXTRAS
from skv_export.export.pipeline import export_model

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {name for name, extra in EXTRAS.items() if extra == "export"}
# A path finder that stands before the others: the packages of the extra are not there.
WITHOUT = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MODULES}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def run(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run("from skv_export.cli.main import main; main()", *arguments)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_tiny(tmp_path_factory.mktemp("extras") / "checkpoint", "llama")
    write_tokenizer(made, 320)
    return made


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    return export_model(source, out=source.parent / "folder")


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~;\[ ]", line)[0].replace("-", "_") for line in requirements}


def test_the_modules_that_messages_name_are_the_extra() -> None:
    assert names(PROJECT["optional-dependencies"]["export"]) == MODULES
    assert not names(PROJECT["dependencies"]) & MODULES


def test_the_runtime_imports_no_package_that_it_does_not_require() -> None:
    code = (
        "import sys, skv_export.runtime.session, skv_export.runtime.text, onnxruntime, tokenizers\n"
        "files = {name: str(getattr(module, '__file__', '')) for name, module in sys.modules.items()}\n"
        "print(*{name.partition('.')[0] for name, file in files.items() if 'site-packages' in file})"
    )
    loaded = {name for name in run(code).stdout.split() if not name.startswith(("_", "skv_export"))}
    required = names(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["cpu"])
    assert {"onnxruntime", "numpy", "tokenizers", "ml_dtypes"} <= loaded <= required, loaded - required


def test_a_folder_runs_without_the_extra(folder: Path, tmp_path: Path) -> None:
    for arguments in (["doctor", folder], ["recipes"], ["generate", folder, "--prompt", "ab", "--max-new-tokens", "3"]):
        result = cli(*arguments)
        assert result.returncode == 0, (arguments, result.stderr)
    code = "from skv_export import Session; s = Session(sys.argv[1]); print(s.generate([[1, 2]], max_new_tokens=3))"
    result = run(code, folder)
    assert result.returncode == 0 and "[" in result.stdout, result.stderr


def test_commands_that_need_the_extra_name_it(folder: Path, source: Path, tmp_path: Path) -> None:
    for arguments in (
        ["model", source, "--out", tmp_path / "out"],
        ["analyze", source],
        ["quality", source],
        ["verify", folder],
        ["bench", "attention"],
    ):
        result = cli(*arguments)
        assert result.returncode == 1, (arguments, result.stdout)
        assert "pip install '.[export]'" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()
    result = run("from skv_export import SkvForCausalLM")
    assert "No module named 'torch'" in result.stderr or "pip install '.[export]'" in result.stderr
