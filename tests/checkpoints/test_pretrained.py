"""The loader of models for PyTorch: whole or refused, from the files that were checked, running none of their code."""

from __future__ import annotations

import ast
import builtins
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny_models import ROOT, write_tokenizer
from transformers import AutoModelForCausalLM, modeling_utils

from skv_export.checkpoints import pretrained, tensor_files
from skv_export.checkpoints.checkpoint import Source, resolve
from skv_export.checkpoints.model_config import load_config
from skv_export.checkpoints.pretrained import Placement, load_model, load_tokenizer, replace_attention
from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import ATTENTION_NAME, Simulation, simulated_logits
from skv_export.spec.recipe import Recipe

NAME = "model.layers.1.mlp.up_proj.weight"
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of its own, with a tokenizer."""
    folder = shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "checkpoint")
    write_tokenizer(folder, 320)
    return folder


def _measure(command: str, folder: Path, *options: str) -> Result:
    """Runs a command that loads the whole model."""
    text = folder.parent / "text"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 40)
    arguments = [command, str(folder), "--text", str(text), "--windows", "1", "--window", "160", *options]
    given = {
        "quality": ["--configs", "K4V4"],
        "analyze": ["--measure", "--choices", "4", "--recent-tokens", "16", "--budget", "9"],
    }
    return CliRunner().invoke(main, [*arguments, *given[command]])


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(pretrained.input_device(model))).logits.float().cpu()


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Whole, and from the files that were checked.


@pytest.mark.parametrize("command", ["quality", "analyze"])
@pytest.mark.parametrize("rows", [None, 95])
def test_a_tensor_that_is_missing_or_does_not_fit_is_named(command: str, rows: int | None, checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    kept = stored.pop(NAME)
    assert _measure(command, checkpoint).exit_code == 0
    if rows is not None:
        stored[NAME] = kept[:rows].clone()
    save_file(stored, checkpoint / "model.safetensors", {"format": "pt"})
    done = _measure(command, checkpoint)
    assert done.exit_code != 0 and "missing or have another shape" in done.output + str(done.exception)
    assert NAME in done.output + str(done.exception)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_is_cut_while_it_is_loaded_is_an_error(
    dtype: torch.dtype, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped, the process would be killed (SIGBUS)."""
    file = checkpoint / "model.safetensors"
    stored = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(stored, file, {"format": "pt"})
    model = load_model(resolve(checkpoint))
    for name, parameter in model.state_dict().items():
        if name in stored:
            assert torch.equal(parameter, stored[name].float()), name
    take, taken = pretrained._StoredTensor.__getitem__, []

    def cut(self: Any, index: Any) -> torch.Tensor:
        taken.append(index)
        if len(taken) == 4:
            with file.open("r+b") as opened:
                opened.truncate(4096)
        return take(self, index)

    monkeypatch.setattr(pretrained._StoredTensor, "__getitem__", cut)
    monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", 1024)  # else a block holds all of a small file
    with pytest.raises(SkvError, match=r"model\.safetensors: the file was changed while it was read"):
        load_model(resolve(checkpoint))
    assert len(taken) >= 4


def test_the_untouched_model_outlives_its_file(checkpoint: Path) -> None:
    """In a process of its own: a mapped file that becomes shorter would kill the one that uses it."""
    program = f"""
import torch
from pathlib import Path
from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.pretrained import load_untouched
model = load_untouched(resolve({str(checkpoint)!r}))
(Path({str(checkpoint)!r}) / "model.safetensors").open("r+b").truncate(64)
print(model(torch.arange(3, 40)[None]).logits.isfinite().all().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]


class _Bomb:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("command", ["quality", "analyze"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_pickle_is_never_read(command: str, beside: bool, checkpoint: Path, tmp_path: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    marker = tmp_path / "marker"
    torch.save({**stored, "bomb": _Bomb(marker)}, checkpoint / "pytorch_model.bin")
    if beside:
        save_file({"unrelated": torch.zeros(2)}, checkpoint / "other.safetensors")
    done = _measure(command, checkpoint)
    said = str(done.exception) + done.output
    assert done.exit_code != 0 and not marker.exists()
    expected = (
        {"quality": "as the tensors in its files have it", "analyze": "got unrelated"}[command]
        if beside
        else "a pickle"
    )
    assert expected in said


def test_shards_are_those_of_the_index_though_a_single_file_stands_beside_them(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    expected = _logits(load_model(resolve(checkpoint)))
    names = sorted(stored)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: stored[name] for name in part}, checkpoint / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({name: tensor * 0 for name, tensor in stored.items()}, checkpoint / "model.safetensors")
    assert torch.equal(_logits(load_model(resolve(checkpoint))), expected)


def test_a_file_of_another_name_is_loaded_as_it_is_exported(checkpoint: Path) -> None:
    expected = _logits(load_model(resolve(checkpoint)))
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
    assert torch.equal(_logits(load_model(resolve(checkpoint))), expected)


def test_what_is_loaded_is_what_transformers_loads(
    checkpoint: Path, tiny_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    for folder in (checkpoint, tiny_checkpoint("gemma2"), tiny_checkpoint("gpt_oss")):
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        capfd.readouterr()
        model = load_model(resolve(folder))
        assert type(model) is type(plain) and not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(_logits(model), _logits(plain))
        assert capfd.readouterr() == ("", ""), "transformers draws a bar beside ours"


# Code of a checkpoint's.


def _plant(folder: Path, marker: Path) -> None:
    """Code that would make a file if it ran, named by config.json and by the tokenizer's."""
    (folder / "planted.py").write_text(f"open({str(marker)!r}, 'w')\nclass Planted: pass\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    _edit(folder / "config.json", auto_map=dict.fromkeys(classes, "planted.Planted"))
    _edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.Planted", "planted.Planted"]})
    (folder / "custom_generate").mkdir()
    shutil.copyfile(folder / "planted.py", folder / "custom_generate" / "generate.py")


@pytest.fixture
def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(question: object = "") -> str:
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.mark.parametrize("command", ["quality", "analyze"])
@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_checkpoint_is_never_run_nor_asked_about(
    command: str, known: bool, checkpoint: Path, tmp_path: Path, never_asked: None
) -> None:
    _plant(checkpoint, tmp_path / "marker")
    if not known:
        _edit(checkpoint / "config.json", model_type="planted")
    done = _measure(command, checkpoint)
    assert not (tmp_path / "marker").exists()
    if known:
        assert done.exit_code == 0, done.output
    else:
        assert isinstance(done.exception, SkvError | SystemExit) and done.exit_code != 0
    if not known:
        for load in (load_config, load_model):
            with pytest.raises(SkvError, match="can't read its configuration"):
                load(resolve(checkpoint))


def test_a_tokenizer_that_needs_code_is_refused(checkpoint: Path, tmp_path: Path, never_asked: None) -> None:
    _plant(checkpoint, tmp_path / "marker")
    (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.json")
    _edit(checkpoint / "tokenizer_config.json", tokenizer_class="Planted")
    with pytest.raises(SkvError, match="can't load its tokenizer"):
        load_tokenizer(Source("safetensors", checkpoint))
    assert not (tmp_path / "marker").exists()


def test_a_folder_that_was_exported_runs_no_code_either(
    checkpoint: Path, tmp_path: Path, library: Path, never_asked: None
) -> None:
    from skv_export.export.pipeline import export_model
    from skv_export.integrations.transformers_model import SkvForCausalLM

    folder = export_model(checkpoint, out=tmp_path / "folder", progress=lambda *_: None)
    _plant(folder, tmp_path / "marker")
    SkvForCausalLM.from_pretrained(folder)
    load_tokenizer(Source("safetensors", folder))
    _edit(folder / "config.json", model_type="planted")
    with pytest.raises(SkvError, match="can't read its configuration"):
        SkvForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "marker").exists()


def test_there_is_one_loader() -> None:
    """No other module calls from_pretrained on transformers' Auto classes."""
    calls = set()
    for path in [*(ROOT / "skv_export").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained" and isinstance(node.value, ast.Name):
                calls.add((path.name, node.value.id))
    auto = {(file, name) for file, name in calls if name.startswith("Auto")}
    by_design = {("tested.py", "AutoModelForCausalLM")}  # makes its checkpoints itself; transformers is its yardstick
    assert auto - by_design == {("pretrained.py", "AutoModelForCausalLM"), ("tokenizer.py", "AutoTokenizer")}
    files_only = {"GenerationConfig", "PreTrainedTokenizerFast"}  # these hold no code, and no weights
    assert {(f, n) for f, n in calls - auto if n not in files_only} == {
        ("pretrained.py", "model_class"),
        ("pretrained.py", "PeftModel"),  # an adapter's safetensors onto the model that was loaded
        ("auto_model.py", "SkvForCausalLM"),  # an exported folder
        ("auto_model.py", "auto"),  # transformers' own, which is wrapped
    }


# Placement.


@pytest.mark.parametrize("placement", [Placement(device_map="auto"), Placement(dtype="bf16"), Placement(dtype="fp16")])
def test_placement(placement: Placement, checkpoint: Path) -> None:
    expected = _logits(load_model(resolve(checkpoint)))
    model = load_model(resolve(checkpoint), placement=placement)
    assert model.dtype == placement.torch_dtype
    worst = (_logits(model) - expected).abs().max().item()
    assert worst == 0 if placement.dtype == "fp32" else 0 < worst < 0.5


def test_layers_on_the_disk_compute_the_same_and_leave_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As device_map="auto" spreads a model that is larger than the memory."""
    whole = load_model(resolve(checkpoint))
    expected = _logits(whole)
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    parts |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    monkeypatch.setattr(modeling_utils, "_get_device_map", lambda *_: dict(parts))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = load_model(resolve(checkpoint), placement=Placement(device_map="auto"))
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(_logits(model), expected)
    simulation = Simulation.of_recipe(Recipe().with_options(recent_tokens=0, num_sink_tokens=0, tile_tokens=32))
    for loaded in (whole, model):
        replace_attention(loaded, ATTENTION_NAME)
    simulated = [simulated_logits(loaded, IDS[0].repeat(3), simulation) for loaded in (whole, model)]
    assert torch.equal(*simulated) and (simulated[0][: IDS.shape[1]] - expected[0]).abs().max() > 1e-3
    (offloaded,) = (tmp_path / "temporary").iterdir()
    assert any(offloaded.iterdir())
    del model, loaded
    gc.collect()
    assert not offloaded.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda:99"}, "device cuda:99: not available"),
        ({"device": "abacus"}, "device abacus: not available"),
        ({"device": "meta"}, "device meta: it holds no numbers"),
        ({"device_map": "somehow"}, "device_map; got somehow; expected auto"),
        ({"device_map": "auto", "device": "cpu:0"}, "device and device_map"),
        ({"dtype": "int8"}, "dtype; got int8; expected fp32, fp16, bf16"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(SkvError, match=said):
        Placement(**options)


@pytest.mark.parametrize("command", ["quality", "analyze"])
def test_a_device_that_is_not_there_is_refused_before_any_work(
    command: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skv_export.checkpoints.checkpoint.Checkpoint.entries", property(lambda _: 1 / 0))
    done = _measure(command, checkpoint, "--device", "cuda:99")
    assert "device cuda:99: not available" in done.output + str(done.exception)


@pytest.mark.parametrize("command", ["quality", "analyze"])
def test_commands_run_in_half_precision_and_spread_out(command: str, checkpoint: Path, tmp_path: Path) -> None:
    figures = []
    for options in ([], ["--device-map", "auto"], ["--dtype", "bf16"]):
        done = _measure(command, checkpoint, "--json", str(tmp_path / "figures.json"), *options)
        assert done.exit_code == 0, done.output
        found = json.loads((tmp_path / "figures.json").read_text())
        figures.append(found["rows"][0]["kld_mean"] if command == "quality" else found["recommendation"]["loss"])
    assert figures[1] == figures[0] != figures[2] == pytest.approx(figures[0], rel=0.3)
