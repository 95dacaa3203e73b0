"""The README's programs, run as they stand on the exported demo model; the commands and files it names exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from skv_export.export.architectures import HYBRID, TESTED

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
(SERVER,) = (program for program in PROGRAMS if "register_custom_ops_library" in program)
RAN_WITHOUT_TORCH = "\nimport sys\nassert not {'torch', 'transformers', 'onnx'} & set(sys.modules)\n"


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_run_as_they_stand(program: str, demo_export: Path, tmp_path: Path) -> None:
    (tmp_path / "demo-model").symlink_to(demo_export)
    code = program + RAN_WITHOUT_TORCH if program is SERVER else program
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout


def test_deployment_needs_no_torch() -> None:
    imported = re.findall(r"^(?:import|from) (\w+)", SERVER, flags=re.MULTILINE)
    assert set(imported) == {"json", "numpy", "onnxruntime", "tokenizers", "skv_export"}


def test_deployment_loads_the_installed_library() -> None:
    """Native code in a folder from elsewhere may be anybody's."""
    (registered,) = re.findall(r"register_custom_ops_library\((.*)\)$", SERVER, flags=re.MULTILINE)
    assert registered == "str(library_path())"


def test_commands_exist() -> None:
    from skv_export.cli.main import main

    commands = set(re.findall(r"^    skv-export (\w+)", TEXT, flags=re.MULTILINE))
    assert {"model", "generate", "verify", "analyze", "quality"} <= commands
    listed = set(main.list_commands(None))  # type: ignore[arg-type]
    assert commands <= listed


def test_models_are_those_that_are_tested() -> None:
    """The README's list is the package's, in its order."""
    (named,) = re.findall(r"^\*\*Models\.\*\* Tested against PyTorch: (.*?)\.\s+Any", TEXT, re.MULTILINE | re.DOTALL)
    assert re.findall(r"[a-z]\w+", re.sub(r"\(.*?\)|\band\b", "", named, flags=re.DOTALL)) == list(TESTED)
    (named,) = re.findall(r"^\*\*Hybrid models\.\*\* Tested in the same way: (.*?)\.\s", TEXT, re.MULTILINE | re.DOTALL)
    assert re.findall(r"[a-z]\w+", re.sub(r"\(.*?\)|\band\b", "", named, flags=re.DOTALL)) == list(HYBRID)


SHOWN = re.findall(r"^    \$ skv-export (.*)\n((?:    (?!\$).+\n)+)", TEXT, flags=re.MULTILINE)
"""Commands, and what the README says that they print."""


@pytest.mark.slow
@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_commands_print_what_the_readme_shows(
    command: str, output: str, demo_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line; ``...`` stands for anything. The export itself is the fixture's: here it only plans."""
    from skv_export.cli.main import main

    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)
    if arguments[0] == "model":
        arguments += ["--dry-run"]
    else:
        (tmp_path / "demo-model").symlink_to(demo_export)
    lines = [line.strip() for line in output.splitlines()]
    typed = "".join(f"{line[2:]}\n" for line in lines if line.startswith("> "))
    done = CliRunner().invoke(main, arguments, input=typed)
    assert done.exit_code == 0, done.output
    for line in (line for line in lines if not line.startswith("> ")):
        assert re.search(re.escape(line).replace(re.escape("..."), ".*"), done.output), (line, done.output)


def test_the_readme_shows_four_commands() -> None:
    assert [command.split()[0] for command, _ in SHOWN] == ["model", "verify", "generate", "chat"]
