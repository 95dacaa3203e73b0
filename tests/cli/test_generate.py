"""The command `generate`: what it prints where, how it ends, and what it passes on."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from stalling import stalling
from tiny_graph import CONTEXT, Tiny

from skv_export.cli.main import main
from skv_export.runtime.text import generate_text

pytestmark = pytest.mark.usefixtures("library")
TEMPLATE = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}{{ mood }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Tiny().write_all(tmp_path_factory.mktemp("tiny"), eos_token_id=[])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "recipe.toml").write_text("k_bits = 4\nv_bits = 2\n")
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


def test_text_goes_to_standard_output_and_figures_to_standard_error(folder: Path) -> None:
    result = run(folder, "--prompt", "Anne", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    assert result.stdout == generate_text(folder, "Anne", max_new_tokens=8).text
    assert "4 prompt tokens" in result.stderr and "stopped by the limit of new tokens" in result.stderr


def test_beyond_the_context_the_reason_is_named(folder: Path) -> None:
    result = run(folder, "--prompt", "a" * (CONTEXT - 3), "--max-new-tokens", 100)
    assert result.exit_code == 0 and "stopped by the model's context, which is full" in result.stderr


def test_json_says_what_was_generated_and_by_what(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "--prompt", "Anne", "--max-new-tokens", 8, "--json", "-")
    figures = json.loads(result.stdout)
    expected = generate_text(folder, "Anne", max_new_tokens=8)
    assert (figures["prompt"], figures["text"], figures["tokens"]) == ("Anne", expected.text, expected.tokens)
    assert figures["stop_reason"] == "max_new_tokens" and figures["tokens_per_second"] > 0
    assert figures["model"]["bits"] == "K4V2" and figures["model"]["recipe"]["v_bits"] == 2
    assert figures["model"]["folder"] == str(folder) and "skv-export" in figures["versions"]
    assert expected.text in result.stderr
    run(folder, "--prompt", "Anne", "--max-new-tokens", 8, "--json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] == expected.tokens


def test_every_knob_reaches_the_sampler(folder: Path) -> None:
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "seed": 4}
    given = [x for name, value in options.items() for x in ("--" + name.replace("_", "-"), value)]
    result = run(folder, "--prompt", "Anne", "--max-new-tokens", 30, *given)
    assert result.stdout == generate_text(folder, "Anne", max_new_tokens=30, **options).text
    for name, other in {"top_k": 2, "min_p": 0.9, "repetition_penalty": 5.0, "seed": 5, "temperature": 0.0}.items():
        assert generate_text(folder, "Anne", max_new_tokens=30, **(options | {name: other})).text not in result.stdout


def test_stop_strings_system_prompts_and_template_options(folder: Path) -> None:
    whole = run(folder, "--prompt", "Anne", "--max-new-tokens", 20).stdout
    assert run(folder, "--prompt", "Anne", "--stop", "\0", "--stop", whole[5:7]).stdout == whole[:5]
    result = run(folder, "--chat", "--prompt", "Hi", "--system", "Be brief.", "--template-option", "mood=[1, 2]",
                 "--max-new-tokens", 1)  # fmt: skip
    count = len("[system: Be brief.][user: Hi][1, 2]")
    assert f"{count} prompt tokens" in result.stderr
    for wrong in ("mood", "=x", "a b=c"):
        assert "no option such as" in run(folder, "--chat", "--prompt", "x", "--template-option", wrong).stderr


def test_ctrl_c_prints_the_figures_so_far_and_exits_with_130(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-c",
        stalling(4, "ready"),
        "generate",
        str(folder),
        "--prompt",
        "Anne",
        "--json",
        str(report),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and "ready" in process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err
    assert "4 prompt tokens" in err and "3 new" in err and "stopped by an interrupt" in err
    figures = json.loads(report.read_text())
    assert figures["stop_reason"] == "interrupted" and len(figures["tokens"]) == 3


def test_verbose_logs_through_the_package_s_logger(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="skv_export"):
        run(folder, "--prompt", "Anne", "--max-new-tokens", 2)
    assert {record.name.partition(".")[0] for record in caplog.records} == {"skv_export"}
    said = [record.getMessage() for record in caplog.records]
    assert any("layers of K4V2, loaded on cpu" in line for line in said)
    assert any("prompt of 4 tokens: 0 are in the cache" in line for line in said)
    quiet, loud, louder = (
        run(folder, "--prompt", "Anne", "--max-new-tokens", 2, *flags).stderr for flags in ([], ["-v"], ["-vv"])
    )
    assert "loaded on cpu" not in quiet and "skv_export.runtime.graph: " in loud and "loaded on cpu" in loud
    assert "cache of 1 sequences" not in loud and "cache of 1 sequences" in louder
    assert not logging.getLogger("skv_export").handlers
