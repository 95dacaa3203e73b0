"""The exporter: every architecture against PyTorch, padded batches, refusals, the folder, all or nothing."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from padding import padded
from safetensors.torch import load_file, save_file
from tiny_models import ROOT, TINY, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from skv_export.checkpoints import pretrained
from skv_export.checkpoints.shared_caches import count_caches
from skv_export.checkpoints.tensor_files import TensorEntry
from skv_export.errors import SkvError
from skv_export.export import lazy_weights, pipeline, supported, to_onnx
from skv_export.export.architectures import TESTED
from skv_export.export.decoder import AttentionCall, Lengths, SkvDecoder
from skv_export.model_folder import output, writer
from skv_export.model_folder.names import DATA_FILE, LIBRARY_FILE, MODEL_FILE
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.runtime.session import Session
from skv_export.spec.recipe import LayerConfig, Recipe

EXACT = Recipe().with_options(
    k_bits=16, v_bits=16, tile_tokens=32, recent_tokens=8, num_sink_tokens=2, recent_type="float"
)
"""Nothing is rounded, and tiles fill after 42 tokens: what differs from PyTorch is the graph's fault."""
TOLERANCE = 1e-3
"""Of the logits, which are of size 1 to 10; measured: 1e-5 to 4e-5."""
PROMPT, TOKENS = 20, 60
RECIPES = ROOT / "recipes"
QUICK = ("llama", "gemma2", "gpt_oss", "gpt2", "falcon")
"""Architectures that are tried while developing: the others are slow tests."""
EVERY = [pytest.param(arch, marks=[] if arch in QUICK else pytest.mark.slow) for arch in TINY]
Export = Callable[..., Path]


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, library: Path) -> Export:
    """A function: the folder that a tiny architecture is exported to, with ``EXACT`` unless given, made once."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(arch: str, recipe: Recipe = EXACT, **options: Any) -> Path:
        key = (arch, recipe, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("exported") / arch
            made[key] = pipeline.export_model(tiny_checkpoint(arch), out=out, recipe=recipe, progress=quiet, **options)
        return made[key]

    return get


def quiet(phase: str, fraction: float) -> None:
    """A progress callback for tests."""


def load(checkpoint: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager", **options)
    return model.eval()


def token_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def torch_logits(model: PreTrainedModel, ids: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return model(ids).logits[0].float().numpy()


# Equal to PyTorch.


@pytest.mark.parametrize("arch", EVERY)
def test_logits_are_pytorchs_through_prefill_flush_and_decode(
    arch: str, exported: Export, tiny_checkpoint: Callable[..., Path]
) -> None:
    expected = torch_logits(load(tiny_checkpoint(arch)), ids := token_ids(TOKENS))
    session = Session(exported(arch))
    cache = session.cache(1, TOKENS)
    got = [session.run(ids[:, :PROMPT].numpy(), None, None, cache)[0, 0]]
    got += [session.run(ids[:, i : i + 1].numpy(), None, None, cache)[0, 0] for i in range(PROMPT, TOKENS)]
    np.testing.assert_allclose(np.stack(got), expected[PROMPT - 1 :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("arch", EVERY)
@pytest.mark.parametrize("chunk", [1, 7])
def test_decoder_in_torch_is_the_plain_model_chunk_by_chunk(
    arch: str, chunk: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    assert_decoder_is_the_plain_model(tiny_checkpoint(arch), chunk)


@pytest.mark.parametrize("multi_query", [True, False])
def test_falcons_older_architectures(multi_query: bool, tiny_checkpoint: Callable[..., Path]) -> None:
    """One KV head for all queries, or one for each; their fused projections have orders of their own."""
    older = {"new_decoder_architecture": False, "multi_query": multi_query, "num_kv_heads": None}
    assert_decoder_is_the_plain_model(tiny_checkpoint("falcon", **older), 7)


def assert_decoder_is_the_plain_model(checkpoint: Path, chunk: int) -> None:
    model = load(checkpoint)
    count = 49 if chunk == 7 else 12
    expected = torch_logits(model, ids := token_ids(count))
    supported.prepare_model(model)
    decoder = SkvDecoder(model, EXACT.layers(count_caches(model.config)), all_logits=True)
    planned = pipeline.plan(checkpoint, EXACT)
    past = [
        [
            torch.full((1, x.params.kv_num_heads, *x.layouts[which].shape(count)), 0xFF, dtype=torch.uint8)
            for x in planned.layers
        ]
        for which in (0, 1)
    ]
    got = []
    for start in range(0, count, chunk):
        stop = start + chunk
        mask = torch.ones(1, stop, dtype=torch.int64)
        with torch.no_grad():
            logits, *past = decoder(ids[:, start:stop], mask, torch.arange(start, stop)[None], *past)
        got.append(logits[0].numpy())
    np.testing.assert_allclose(np.concatenate(got), expected, atol=TOLERANCE, rtol=0)
    assert decoder.layers == planned.layers


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_one_by_one(
    arch: str, side: str, exported: Export, tiny_checkpoint: Callable[..., Path]
) -> None:
    model, session = load(tiny_checkpoint(arch)), Session(exported(arch))
    lengths, steps = (3, 11, 7), 4
    texts = [token_ids(n + steps, seed=n) for n in lengths]
    ids, mask = padded([text[0, :n] for n, text in zip(lengths, texts, strict=True)], side)
    cache = session.cache(3, max(lengths) + steps)
    got = [session.run(ids, mask, None, cache)[:, 0]]
    for step in range(steps - 1):
        mask = np.concatenate([mask, np.ones((3, 1), np.int64)], axis=1)
        new = np.stack([text[0, n + step : n + step + 1] for n, text in zip(lengths, texts, strict=True)])
        got.append(session.run(new, mask, None, cache)[:, 0])
    for i, (n, text) in enumerate(zip(lengths, texts, strict=True)):
        expected = torch_logits(model, text)[n - 1 : n - 1 + steps]
        np.testing.assert_allclose(np.stack(got)[:, i], expected, atol=TOLERANCE, rtol=0)


def test_all_logits_stand_where_the_tokens_stood(exported: Export, tiny_checkpoint: Callable[..., Path]) -> None:
    model, session = load(tiny_checkpoint("qwen3")), Session(exported("qwen3", all_logits=True))
    text = token_ids(9)
    ids = np.zeros((2, 12), np.int64)
    mask = np.zeros((2, 12), np.int64)
    ids[0, 3:], mask[0, 3:] = text[0], 1
    ids[1, 1:6], mask[1, 1:6] = text[0, :5], 1
    got = session.run(ids, mask, None, session.cache(2, 12))
    expected = torch_logits(model, text)
    assert got.shape == (2, 12, 320)
    np.testing.assert_allclose(got[0, 3:], expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(got[1, 1:6], expected[:5], atol=TOLERANCE, rtol=0)


def test_half_precision_weights(exported: Export, tiny_checkpoint: Callable[..., Path]) -> None:
    model = load(tiny_checkpoint("qwen3"), dtype=torch.float16)
    session = Session(exported("qwen3", EXACT.with_options(dtype="fp16")))
    expected = torch_logits(model, ids := token_ids(30))
    cache = session.cache(1, 30)
    got = session.run(ids.numpy(), None, None, cache)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0, 0], expected[-1], atol=0.05, rtol=0)  # half precision rounds at 1e-3 of 10


def test_bfloat16_graph(exported: Export) -> None:
    model = onnx.load(exported("gemma3_text", EXACT.with_options(dtype="bf16")) / MODEL_FILE)
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert weights["model.layers.0.self_attn.q_proj.weight"] == onnx.TensorProto.BFLOAT16
    (logits,) = (output for output in model.graph.output if output.name == "logits")
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_decomposed_translation_is_the_same(
    exported: Export, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "_is_plain", lambda module: False)
    out = pipeline.export_model(tiny_checkpoint("mistral"), out=tmp_path / "out", recipe=EXACT, progress=quiet)
    ids = token_ids(30).numpy()
    got, expected = (
        session.run(ids, None, None, session.cache(1, 30)) for session in (Session(out), Session(exported("mistral")))
    )
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


# The graph.


def load_graph(path: Path) -> onnx.GraphProto:
    return onnx.load(path / MODEL_FILE, load_external_data=False).graph


def test_the_graph_holds_nothing_twice(exported: Export) -> None:
    llama = Counter(node.op_type for node in load_graph(exported("llama")).node)
    per_layer = {"MatMul": 7, "RMSNormalization": 2, "RotaryEmbedding": 2, to_onnx.OP_NAME: 1, "Sigmoid": 1}
    for op_type, count in per_layer.items():
        assert llama[op_type] == 2 * count + (op_type == "RMSNormalization"), op_type
    assert (llama["Cos"], llama["Sin"], llama["Transpose"], llama["Gemm"]) == (1, 1, 0, 1)
    gemma = Counter(node.op_type for node in load_graph(exported("gemma3_text")).node)
    assert (gemma["Cos"], gemma["Transpose"]) == (2, 0)  # local and global RoPE


def test_inputs_and_outputs_have_the_ecosystems_names(exported: Export) -> None:
    found = load_graph(exported("qwen2", Recipe()))
    caches = [f"{i}.{name}" for i in range(2) for name in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in caches)]
    assert [value.name for value in found.input] == inputs
    assert [value.name for value in found.output] == ["logits", *(f"present.{name}" for name in caches)]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*found.input, *found.output]
    }
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["logits"] == ["batch_size", 1, 320]
    assert shapes["past_key_values.1.key"][:3] == ["batch_size", 2, "rows.1.key"]


def test_each_layer_has_its_own_bits_and_window(exported: Export) -> None:
    recipe = dataclasses.replace(Recipe.per_layer([(4, 2), (3, 3), (8, 16), (4, 2)]))
    found = load_graph(exported("gemma2", recipe))
    nodes = [node for node in found.node if node.op_type == to_onnx.OP_NAME]
    values = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes]
    assert [(v["k_bits"], v["v_bits"]) for v in values] == [(4, 2), (3, 3), (8, 16), (4, 2)]
    assert [v["local_window_size"] for v in values] == [24, 0, 24, 0]
    assert {round(v["scale"], 6) for v in values} == {round(48**-0.5, 6)}
    assert {v["softcap"] for v in values} == {5.0}
    assert set(values[0]) == {
        "num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved",
        "qk_norm_epsilon", "layout_version", "k_bits", "v_bits", "k_group_size", "v_group_size", "k_granularity",
        "v_granularity", "k_rotation", "v_rotation", "k_parameter_bits", "v_parameter_bits", "num_sink_tokens",
        "recent_tokens", "tile_tokens", "recent_type",
    }  # fmt: skip


def test_tied_embeddings_are_stored_once_and_weights_outside_the_graph(
    exported: Export, tiny_checkpoint: Callable[..., Path]
) -> None:
    path = exported("llama")
    found = load_graph(path)
    large = [t for t in found.initializer if np.prod(t.dims) * 4 > lazy_weights.EXTERNAL_BYTES]
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in large)
    names = {tensor.name for tensor in found.initializer}
    assert len(names & {"lm_head.weight", "model.embed_tokens.weight"}) == 1
    weights = pipeline.plan(tiny_checkpoint("llama"), EXACT).weight_bytes
    assert 0.95 * weights < (path / DATA_FILE).stat().st_size <= weights


def test_two_exports_are_identical(exported: Export, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    again = pipeline.export_model(tiny_checkpoint("qwen3"), out=tmp_path / "other", recipe=EXACT, progress=quiet)
    for name in sorted(path.name for path in exported("qwen3").iterdir()):
        assert (again / name).read_bytes() == (exported("qwen3") / name).read_bytes(), name


# The folder.


def test_folder_describes_itself(exported: Export, tiny_checkpoint: Callable[..., Path]) -> None:
    recipe = Recipe().with_options(k_bits=4, v_bits=2, description="a test")
    path = exported("gpt_oss", recipe)
    names = {p.name for p in path.iterdir()}
    assert names == {
        "model.onnx", "model.onnx.data", "config.json", "generation_config.json", "skv_config.json", "skv_files.json",
        "genai_config.json", "recipe.toml", "README.md", LIBRARY_FILE,
    }  # fmt: skip
    assert Recipe.load(path / "recipe.toml") == recipe
    config = ModelConfig.load(path)
    assert (config.model_type, config.dtype, config.vocab_size, config.context_length) == ("gpt_oss", "fp32", 320, 512)
    assert (config.eos_token_id, config.pad_token_id, config.all_logits) == ((2,), 0, False)
    assert config.source["kind"] == "safetensors"
    planned = pipeline.plan(tiny_checkpoint("gpt_oss"), recipe)
    assert [(x.key, x.value) for x in config.layers] == [x.layouts for x in planned.layers]
    assert [x.local_window_size for x in config.layers] == [24, 0]
    genai = json.loads((path / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert genai["model"]["decoder"]["session_options"]["custom_ops_library"].endswith(".so")
    assert genai["search"]["max_length"] == 512


def test_plan_reads_no_weights(tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(TensorEntry, "array", fail)
    monkeypatch.setattr(TensorEntry, "row_blocks", fail)
    monkeypatch.setattr(pretrained, "load_model", fail)
    planned = pipeline.plan(tiny_checkpoint("gemma2"), Recipe())
    assert [x.params.local_window_size for x in planned.layers] == [24, 0, 24, 0]
    table = planned.table()
    for text in ("gemma2, 4 layers", "K4V2", "window 24", "  512 tokens", "bytes per token"):
        assert text in table
    assert planned.cache_bytes(131072) < planned.half_cache_bytes(131072) / 4
    weights = load_file(tiny_checkpoint("gemma2") / "model.safetensors")
    assert planned.weight_bytes == sum(w.numel() * 4 for w in weights.values())


def test_tiny_models_are_those_that_messages_name() -> None:
    assert set(TINY) == set(TESTED)
    with pytest.raises(SkvError, match=r"expected a decoder such as llama, .*, gptj"):
        supported.check_config(AutoConfig.for_model("bloom"))


@pytest.mark.parametrize("arch", [path.stem for path in RECIPES.glob("*.toml") if path.stem in TESTED])
def test_shipped_recipe_fits_its_family(arch: str, tiny_checkpoint: Callable[..., Path]) -> None:
    planned = pipeline.plan(tiny_checkpoint(arch), Recipe.load(RECIPES / f"{arch}.toml"))
    assert planned.cache_bytes(32768) < planned.half_cache_bytes(32768) / 3


# Refusals.


def test_model_that_does_not_run_with_the_op_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertLMHeadModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(SkvError, match=r"^(bert|BertSelfAttention)"):
        pipeline.plan(tmp_path / "bert")


def test_quantized_and_incomplete_checkpoints_are_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SkvError, match=r"missing.*layers\.1\.mlp\.up_proj"):
        pipeline.export_model(checkpoint, out=tmp_path / "out", recipe=EXACT, progress=quiet)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(SkvError, match="quantized"):
        pipeline.plan(checkpoint, EXACT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_recipe_for_another_model_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    recipe = Recipe.from_dict({"layers": [{"index": 9, "k_bits": 8}]})
    with pytest.raises(SkvError, match="layers that the model does not have"):
        pipeline.plan(tiny_checkpoint("llama"), recipe)


def test_hook_refuses_what_the_op_does_not_do(tiny_checkpoint: Callable[..., Path]) -> None:
    model = load(tiny_checkpoint("llama"))
    SkvDecoder(model, [LayerConfig()] * 2)
    ids = token_ids(3)
    with pytest.raises(SkvError, match="called outside SkvDecoder"):
        model(ids)
    lengths = Lengths(torch.tensor([2], dtype=torch.int32), torch.tensor([3], dtype=torch.int32), 3)
    call = AttentionCall(dict(enumerate([LayerConfig()] * 2)), lengths, [torch.zeros(1)] * 2, [torch.zeros(1)] * 2)
    with call.running(), pytest.raises(SkvError, match=r"LlamaAttention of layer 0 asks for.*position_bias"):
        model(ids, position_bias=torch.zeros(1), use_cache=False)


def test_window_that_only_the_mask_knows_is_refused() -> None:
    config = tiny_config("mistral")
    supported.check_windows(config, [24, 24])
    with pytest.raises(SkvError, match="does not use the windows"):
        supported.check_windows(config, [24, 0])


# All or nothing.


def test_existing_out_is_kept_unless_forced(
    exported: Export, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = shutil.copytree(exported("qwen3"), tmp_path / "out")
    (out / "recipe.toml").write_text("edited")
    with pytest.raises(SkvError, match=r"exists already.*--force"):
        pipeline.export_model(tiny_checkpoint("qwen3"), out=out, recipe=EXACT, progress=quiet)
    assert (out / "recipe.toml").read_text() == "edited"
    pipeline.export_model(tiny_checkpoint("qwen3"), out=out, recipe=EXACT, force=True, progress=quiet)
    assert (out / "recipe.toml").read_text() == EXACT.to_toml()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_write_leaves_the_old_folder_and_nothing_else(
    exported: Export, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(exported("qwen3"), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(path: Path, values: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_json", full)
    with pytest.raises(SkvError, match=r"can't be written.*No space left"):
        pipeline.export_model(tiny_checkpoint("qwen3"), out=out, recipe=EXACT, force=True, progress=quiet)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_disk_space_is_checked_before_the_weights_are_read(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    phases: list[str] = []
    with pytest.raises(SkvError, match=r"not enough space.*1 MiB free"):
        pipeline.export_model(
            tiny_checkpoint("qwen3"), out=tmp_path / "out", progress=lambda phase, fraction: phases.append(phase)
        )
    assert phases == []
    assert list(tmp_path.iterdir()) == []


# What callers and configurations get wrong.


def test_wrong_types_are_clear_errors(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for source in (5, None, b"x", ["x"]):
        with pytest.raises(SkvError, match="source; got"):
            pipeline.export_model(source, out=tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(SkvError, match=r"recipe; got str .qwen3.; expected Recipe or None"):
        pipeline.export_model(tiny_checkpoint("llama"), out=tmp_path / "out", recipe="qwen3")  # type: ignore[arg-type]
    with pytest.raises(SkvError, match="out; got int"):
        pipeline.export_model(tiny_checkpoint("llama"), out=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "64"},
        {"num_attention_heads": 33},
        {"num_attention_heads": 0},
        {"vocab_size": -1},
        {"architectures": -1.5},
    ],
)
def test_a_configuration_that_transformers_refuses_is_a_clear_error(
    values: dict[str, Any], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(SkvError, match=r"can't read its configuration|can't be exported|makes no sense"):
        pipeline.plan(folder)


def test_the_log_of_an_export_is_short(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline.export_model(tiny_checkpoint("llama"), out=tmp_path / "out", recipe=EXACT)
    out, err = capfd.readouterr()
    assert out == "" and list(pipeline.PHASES) == [line for line in err.splitlines() if line in pipeline.PHASES]
    assert len(err.splitlines()) < 20
