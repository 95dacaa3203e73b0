"""`skv-export quantize` on tiny models: what the layers read, what is written, and who else reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from log_probabilities import divergence, logits
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from skv_export.checkpoints.checkpoint import Checkpoint, resolve
from skv_export.checkpoints.pretrained import load_model, load_tokenizer
from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import Simulation
from skv_export.evaluation.text import CALIBRATION_TEXT, cut_windows, read_text
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.quantization.pipeline import Options, quantize
from skv_export.quantization.solver import Form, fit_grid
from skv_export.runtime.session import Session
from skv_export.spec.recipe import Recipe

TEXT = read_text(None, CALIBRATION_TEXT)[2000:6000]
SMALL = Options(form=Form(4, 16), windows=3, window=128)
Make = Callable[..., Path]


# Layer by layer.


@pytest.mark.parametrize(
    "arch",
    ["llama", "gemma2", "gemma3_text", "phi3", "qwen3", "gpt2", "gpt_neox", "gpt_oss", "falcon", "gptj", "smollm3"],
)
def test_layers_one_by_one_compute_what_the_whole_model_computes(arch: str, tiny_checkpoint: Make) -> None:
    folder = tiny_checkpoint(arch)
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 320, (2, 40)))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True).hidden_states
    model = LayerByLayer(resolve(folder))
    states = model.embed(ids)
    for index in model.layers:
        for row, hidden in enumerate(states):
            # The last of transformers' own are behind the final norm.
            torch.testing.assert_close(hidden[0], expected[index][row], rtol=1e-4, atol=1e-4)
        with model.loaded(index):
            states = [model.run(index, hidden, Simulation.full_precision()) for hidden in states]
    assert all(isinstance(parameter.data, FakeTensor) for parameter in model.model.parameters())


# The checkpoint.


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_neox"])  # norms of three kinds: w, 1 + w, with a bias
def test_awq_scales_the_norms_and_keeps_what_a_layer_computes(
    arch: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Inputs of very different sizes: with 8 bits nothing is lost, with 4 less than without scales."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(arch), folder)
    tensors = load_file(folder / "model.safetensors")
    spread = torch.linspace(-3, 3, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))].exp()
    norms = [name for name in tensors if ".0.input_layernorm.weight" in name]
    for name in norms:
        tensors[name] = (spread - 1 if arch == "gemma2" else spread).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = torch.from_numpy(cut_windows(load_tokenizer(resolve(folder)), read_text(None)[:9000], 2, 128))
    reference, losses = logits(folder, ids), {}
    for method, bits in (("rtn", 4), ("awq", 4), ("awq", 8)):
        out = tmp_path / f"{method}{bits}"
        quantize(resolve(folder), TEXT, out, Options(method, Form(bits, 16), windows=2, window=128))
        losses[method, bits] = divergence(reference, logits(out, ids))
    after = load_file(tmp_path / "awq4" / "model-00001.safetensors")
    assert norms and all(not torch.equal(tensors[name], after[name]) for name in norms)
    assert losses["awq", 4] < 0.9 * losses["rtn", 4] and losses["awq", 8] < 0.05 * losses["rtn", 4], losses


@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi3", "gpt_oss"])
def test_gptq_loses_less_than_rounding(arch: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint(arch)
    ids = torch.from_numpy(cut_windows(load_tokenizer(resolve(folder)), read_text(None)[:9000], 4, 128))
    reference = logits(folder, ids)
    losses = {}
    for method in ("rtn", "gptq", "rsq", "qep"):
        options = Options(method=method, form=SMALL.form, windows=SMALL.windows, window=SMALL.window)
        quantize(resolve(folder), TEXT, tmp_path / method, options)
        losses[method] = divergence(reference, logits(tmp_path / method, ids))
    assert all(losses[method] < losses["rtn"] for method in ("gptq", "rsq", "qep")), losses


def test_others_read_what_is_written(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers, with the library compressed-tensors, has the same weights as our own loader."""
    pytest.importorskip("compressed_tensors")
    made = quantize(resolve(checkpoint("llama")), TEXT, tmp_path / "out", SMALL)
    assert (made.matrices, made.plain) == (14, {})
    ids = torch.arange(3, 67)[None]
    unpacked = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=unpacked)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits.log_softmax(-1), logits(tmp_path / "out", ids), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_an_export_of_it_keeps_the_codes(arch: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from skv_export.export.pipeline import export_model

    quantize(resolve(checkpoint(arch)), TEXT, tmp_path / "int4", SMALL)
    export_model(tmp_path / "int4", out=tmp_path / "out", recipe=Recipe().with_options(k_bits=16, v_bits=16))
    ids = list(range(3, 43))
    session = Session(tmp_path / "out")
    got = torch.from_numpy(session.append([ids], session.cache(max_length=64)))[0].log_softmax(-1)
    torch.testing.assert_close(
        got.flatten(), logits(tmp_path / "int4", torch.tensor([ids]))[0, -1], rtol=1e-3, atol=1e-3
    )
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 7 * len(session.config.layers)


@pytest.mark.parametrize("arch", ["mistral", "gemma2"])  # two matrices; one that is tied
def test_embeddings_in_8_bits_lose_next_to_nothing(
    arch: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    for bits in (16, 8):
        quantize(resolve(checkpoint(arch)), TEXT, tmp_path / str(bits), Options("rtn", SMALL.form, head_bits=bits))
    ids = torch.arange(3, 67)[None]
    exact, rounded = logits(tmp_path / "16", ids), logits(tmp_path / "8", ids)
    assert 0 < divergence(exact, rounded) < 5e-3  # 4 bits in the layers: 0.36
    names = Checkpoint.open(tmp_path / "8").entries
    embeddings = [name for name in names if "embed_tokens" in name or name.startswith("lm_head")]
    assert len(embeddings) == (1 if arch == "gemma2" else 2)
    assert all(names[name].blocks().format.bits == 8 for name in embeddings)  # type: ignore[union-attr]


def test_tensors_that_are_not_quantized_stay_as_they_are(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("llama")
    quantize(resolve(folder), TEXT, tmp_path / "out", SMALL)
    before = load_file(folder / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        after |= load_file(file)
    kept = {name for name in before if "norm" in name or "embed" in name}
    assert kept and all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in kept
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)


def test_runs_are_alike(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(resolve(checkpoint("qwen3")), TEXT, tmp_path / name, SMALL)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_layers_can_read_through_the_cache_that_will_be_used(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    cache = Recipe().with_options(k_bits=2, v_bits=2, recent_tokens=16, tile_tokens=32)
    options = Options(form=SMALL.form, windows=3, window=128, cache=cache)
    folder = checkpoint("llama")
    quantize(resolve(folder), TEXT, tmp_path / "exact", SMALL)
    quantize(resolve(folder), TEXT, tmp_path / "cache", options)
    first, second = (load_file(tmp_path / name / "model-00001.safetensors") for name in ("exact", "cache"))
    q, o = "model.layers.0.self_attn.q_proj.weight_packed", "model.layers.0.self_attn.o_proj.weight_packed"
    assert torch.equal(first[q], second[q]) and not torch.equal(first[o], second[o])


# What can't be quantized.


def test_what_cannot_be_done_is_said_before_work(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = resolve(checkpoint("llama"))
    quantize(folder, TEXT, tmp_path / "out", SMALL)
    with pytest.raises(SkvError, match="exists already"):
        quantize(folder, TEXT, tmp_path / "out", SMALL)
    quantize(folder, TEXT, tmp_path / "out", SMALL, force=True)
    with pytest.raises(SkvError, match="quantized already"):
        quantize(resolve(tmp_path / "out"), TEXT, tmp_path / "again", SMALL)
    with pytest.raises(SkvError, match="too short"):
        quantize(folder, "short", tmp_path / "again", SMALL)
    for wrong in ({"method": "gtpq"}, {"form": Form(3, 32)}, {"form": Form(4, 24)}):
        with pytest.raises(SkvError, match=r"expected"):
            Options(**wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "again").exists()


def test_weights_that_are_not_numbers_are_an_error(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in checkpoint("llama").iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(checkpoint("llama") / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SkvError, match=r"up_proj|not finite"):
        quantize(resolve(folder), TEXT, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_matrices_whose_inputs_make_no_groups_stay(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    made = quantize(
        resolve(checkpoint("gpt_neox")), TEXT, tmp_path / "out", Options(form=Form(4, 64), windows=2, window=128)
    )
    assert made.matrices == 6  # of 8; what reads the 96 of the MLP stays
    assert set(made.plain.values()) == {"96 inputs are no multiple of 64"}
    logits(tmp_path / "out", torch.arange(3, 20)[None])
    with pytest.raises(SkvError, match="nothing to quantize"):
        quantize(
            resolve(checkpoint("llama")), TEXT, tmp_path / "none", Options(form=Form(4, 128), windows=2, window=128)
        )
    assert not (tmp_path / "none").exists()


# The command line.


def test_an_export_that_fits_its_weights_on_the_way(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """One command: the export holds the codes of the checkpoint that stands beside it, and names it."""
    (tmp_path / "text.txt").write_text(TEXT * 8)
    folder, out = str(checkpoint("llama")), str(tmp_path / "out")
    fitting = ["--weight-method", "qep", "--weight-text", str(tmp_path / "text.txt")]
    run = CliRunner().invoke
    for wrong, message in (
        (["--weight-text", str(tmp_path / "text.txt")], "nothing is fitted"),
        (fitting, "int4 or int8"),
        ([*fitting, "--weights", "int4", "--calibration", "x"], "both"),
        ([*fitting, "--weights", "int4", "--weight-bits-budget", "4"], "at least 4.625"),
    ):
        result = run(main, ["model", folder, "--out", out, *wrong])
        assert result.exit_code == 1 and message in result.output, result.output
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-weights").exists()
    result = run(main, ["model", folder, "--out", out, *fitting, "--weights", "int4", "--head-bits", "8"])
    assert result.exit_code == 0, result.output
    session = Session(tmp_path / "out")
    assert (session.config.source["name"], session.config.weights) == ("out-weights", "as-is")
    ids = list(range(3, 43))
    got = torch.from_numpy(session.append([ids], session.cache(max_length=64)))[0].log_softmax(-1)
    expected = logits(tmp_path / "out-weights", torch.tensor([ids]))[0, -1]
    torch.testing.assert_close(got.flatten(), expected, rtol=2e-2, atol=2e-2)


def test_command_and_comparison(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    folder = str(checkpoint("llama"))
    text = ["--text", str(tmp_path / "text.txt"), "--windows", "2", "--window", "160"]
    run = CliRunner().invoke
    result = run(
        main, ["quantize", folder, *text, "--group-size", "16", "--out", str(tmp_path / "int4"), "--json", "-"]
    )
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["matrices"] == 14 and figures["out"] == str(tmp_path / "int4")
    result = run(main, ["quality", folder, *text, "--configs", "K16V16,K4V2", "--weights", str(tmp_path / "int4")])
    assert result.exit_code == 0, result.output
    for name in ("K16V16", "K4V2", "K16V16 on int4", "K4V2 on int4"):
        assert name in result.stdout
    assert "both MiB" in result.stdout
    other = str(checkpoint("gemma2"))
    result = run(main, ["quality", folder, *text, "--configs", "K4V2", "--weights", other])
    assert result.exit_code == 1 and "not a form of the same model" in result.output


# Bits where they are needed.


@pytest.fixture(scope="module")
def uneven(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose second layer's MLP gives next to nothing: its bits do not matter."""
    folder = tmp_path_factory.mktemp("uneven") / "llama"
    shutil.copytree(checkpoint("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_budget_goes_where_rounding_does_most(uneven: Path, tmp_path: Path) -> None:
    """The divergence that is measured is that of the model with these matrices rounded, and bits follow it."""
    options = Options("rtn", Form(4, 16), windows=2, window=128, budget=7.0)
    made = quantize(resolve(uneven), TEXT, tmp_path / "out", options)
    dead = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert made.wide and not dead & set(made.wide)
    assert 5.25 < made.effective_bits <= 7.0
    assert all(made.kld[name] < 1e-3 * max(made.kld.values()) for name in dead)
    ids = torch.from_numpy(cut_windows(load_tokenizer(resolve(uneven)), TEXT, 2, 128))
    exact, model = load_model(resolve(uneven)), load_model(resolve(uneven))
    module = model.model.layers[0].self_attn.o_proj
    grid = fit_grid(module.weight.data, Form(4, 16))
    module.weight.data = grid.values(grid.codes(module.weight.data))
    with torch.no_grad():
        p, q = (m(ids).logits.log_softmax(-1) for m in (exact, model))
    assert made.kld["model.layers.0.self_attn.o_proj"] == pytest.approx(divergence(p, q), rel=1e-3)


def test_matrices_of_two_widths_lose_less(uneven: Path, tmp_path: Path) -> None:
    """And the library compressed-tensors reads each matrix as our loader does, by its group's scheme."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationScheme

    ids = torch.arange(3, 67)[None]
    reference, losses = logits(uneven, ids), {}
    for name, budget in (("narrow", None), ("mixed", 7.0)):
        options = Options("qep", Form(4, 16), windows=2, window=128, budget=budget)
        quantize(resolve(uneven), TEXT, tmp_path / name, options)
        losses[name] = divergence(reference, logits(tmp_path / name, ids))
    assert losses["mixed"] < 0.5 * losses["narrow"], losses
    ours = load_model(resolve(tmp_path / "mixed")).state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "mixed").glob("*.safetensors"):
        tensors |= load_file(file)
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    library = compressors.BaseCompressor.get_value_from_registry(config["format"])
    assert sorted(g["weights"]["num_bits"] for g in config["config_groups"].values()) == [4, 8]
    for group in config["config_groups"].values():
        for module in group["targets"]:
            parts = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
            theirs = library.decompress(parts, QuantizationScheme(**group))["weight"]
            torch.testing.assert_close(theirs.float(), ours[f"{module}.weight"].float(), rtol=1e-3, atol=1e-4)


def test_a_budget_that_holds_no_codes_is_refused() -> None:
    with pytest.raises(SkvError, match=r"at least 5\.250.*larger groups"):
        Options(form=Form(4, 16), budget=5.0)
    assert Options(form=Form(4, 128), budget=4.25).budget == 4.25


def test_a_budget_beyond_eight_bits_is_refused() -> None:
    with pytest.raises(SkvError, match=r"got 50 bits.*at most 8\.750"):
        Options(budget=50)
    assert Options(budget=8.75).budget == 8.75
