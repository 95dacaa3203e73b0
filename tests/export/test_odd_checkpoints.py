"""Checkpoints that are not what they seem: exported as transformers reads them, or refused by what was found."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_models import save_random, small_config, tiny_config
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from skv_export.checkpoints.model_config import context_length
from skv_export.checkpoints.purpose import check_purpose
from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.export import pipeline
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.runtime.session import Session
from skv_export.spec.recipe import Recipe
from skv_export.verification import run

EXACT = Recipe().with_options(k_bits=16, v_bits=16, num_sink_tokens=2, recent_type="float")


def quiet(phase: str, fraction: float) -> None:
    """A progress callback for tests."""


def edited(checkpoint: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None], **changes: Any) -> Path:
    """A copy of a checkpoint with other tensors, and other values in config.json."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def session_logits(folder: Path, ids: torch.Tensor) -> np.ndarray:
    session = Session(folder)
    return session.run(ids.numpy(), None, None, session.cache(1, ids.shape[1]))[0, -1]


def expected_logits(checkpoint: Path, ids: torch.Tensor) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(ids).logits[0, -1].numpy()


# What a checkpoint was saved as.


@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModel])
def test_what_is_no_language_model_is_exported_only_when_asked(kind: Any, tmp_path: Path, library: Path) -> None:
    torch.manual_seed(3)
    folder = tmp_path / "model"
    saved = kind.from_config(tiny_config("llama", num_labels=3))
    saved.save_pretrained(folder)
    name = type(saved).__name__
    with pytest.raises(SkvError, match=rf"no language model: architectures; got {name}.*--as-causal-lm"):
        pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet)
    refused = CliRunner().invoke(main, ["model", str(folder), "--dry-run"])
    assert refused.exit_code == 1 and name in refused.output
    assert CliRunner().invoke(main, ["model", str(folder), "--dry-run", "--as-causal-lm"]).exit_code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the classifier's head is left out, and said so
        pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet, as_causal_lm=True)
    ids = torch.arange(3, 40)[None]
    np.testing.assert_allclose(session_logits(tmp_path / "out", ids), expected_logits(folder, ids), atol=1e-3, rtol=0)


def test_language_models_by_all_their_names() -> None:
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        check_purpose("llama", [name] if isinstance(name, str) else list(name))
    for names in (None, [], ["LlamaForCausalLM"], ["GPT2LMHeadModel"], ["Gemma3ForConditionalGeneration"]):
        check_purpose("llama", names)


# An output embedding of its own.


def test_an_output_embedding_that_is_not_the_tied_one_is_kept(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path
) -> None:
    def untie(tensors: dict[str, torch.Tensor]) -> None:
        torch.manual_seed(5)
        tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"]) / 4

    folder = edited(tiny_checkpoint("llama"), tmp_path / "model", untie, tie_word_embeddings=True)
    with pytest.warns(RuntimeWarning, match=r"ties lm_head\.weight.*both are exported"):
        pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet)
    ids = torch.arange(3, 40)[None]
    expected = expected_logits(folder, ids)
    np.testing.assert_allclose(session_logits(tmp_path / "out", ids), expected, atol=1e-3, rtol=0)
    assert np.abs(expected - expected_logits(tiny_checkpoint("llama"), ids)).max() > 0.5


def test_an_output_embedding_that_is_the_same_stays_tied(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = edited(tiny_checkpoint("llama"), tmp_path / "model", copy)
    assert pipeline.plan(folder, EXACT).weight_bytes == pipeline.plan(tiny_checkpoint("llama"), EXACT).weight_bytes


# Tensors of others.

FOREIGN = {
    "model.layers.0.self_attn.q_proj.lora_A.default.weight": r"a LoRA adapter.*merge_and_unload",
    "model.layers.0.self_attn.q_proj.g_idx": "quantized by GPTQ",
    "model.layers.0.self_attn.q_proj.qweight": "quantized by AWQ or GPTQ",
    "model.layers.0.self_attn.q_proj.weight.absmax": "quantized by bitsandbytes",
    "model.layers.0.self_attn.q_proj.SCB": "quantized by bitsandbytes",
    "model.layers.0.self_attn.q_proj.weight_packed": "stored quantized",
    "score.weight": "a head that is no language model's",
    "model.other.weight": r"missing or have another shape: model\.layers\.0\.self_attn\.q_proj\.weight; got \d+ ten",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_was_found_is_said(name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def replace(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors.pop("model.layers.0.self_attn.q_proj.weight")

    folder = edited(tiny_checkpoint("qwen3"), tmp_path / "model", replace)
    with pytest.raises(SkvError, match=FOREIGN[name]):
        pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet)


def test_an_adapter_among_whole_weights_is_refused_and_other_tensors_are_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path
) -> None:
    def lora(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.lora_B.weight"] = torch.ones(2, 2)

    folder = edited(tiny_checkpoint("qwen3"), tmp_path / "lora", lora)
    with pytest.raises(SkvError, match="LoRA adapter"):
        pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet)

    def bias(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(256)
        tensors["vision_tower.patch.weight"] = torch.ones(2)

    folder = edited(tiny_checkpoint("qwen3"), tmp_path / "bias", bias)
    with pytest.warns(RuntimeWarning, match=r"no place for 1 tensors.*: model\.layers\.0\.self_attn\.q_proj\.bias$"):
        pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet)


# The context.


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 100}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 512),
    ],
)
def test_yarn_reaches_its_factor_times_the_original_length(rope: dict[str, Any], context: int) -> None:
    config = tiny_config("qwen3", max_position_embeddings=512, rope_parameters={"rope_theta": 1e4, **rope})
    assert context_length(config) == context


def test_a_model_with_yarn_serves_its_whole_context(tmp_path: Path, library: Path) -> None:
    from tiny_models import make_tiny

    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    folder = make_tiny(tmp_path / "qwen3", "qwen3", rope_parameters=rope, max_position_embeddings=64)
    out = pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet)
    assert json.loads((out / "genai_config.json").read_text())["model"]["context_length"] == 256
    ids = torch.randint(3, 320, (1, 200), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(session_logits(out, ids), expected_logits(folder, ids), atol=1e-3, rtol=0)


# Tokens.


def test_tokens_that_the_vocabulary_does_not_hold_are_left_out_and_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path
) -> None:
    changes = {"eos_token_id": [2, 50256], "bos_token_id": -1, "pad_token_id": -1}
    folder = edited(tiny_checkpoint("qwen3"), tmp_path / "model", lambda _: None, **changes)
    (folder / "generation_config.json").unlink()
    with pytest.warns(RuntimeWarning, match="eos_token_id of the checkpoint: 50256 is no token of the model's 320"):
        out = pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet)
    config = ModelConfig.load(out)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, (2,), 2)


@pytest.mark.parametrize("content", ['{"eos_token_id": "2"}', '{"eos_token_id": [[2]]}', "[]", "{"])
def test_a_generation_config_of_nonsense_is_found_out_by_the_plan(
    content: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = edited(tiny_checkpoint("qwen3"), tmp_path / "model", lambda _: None)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(SkvError, match=r"generation_config\.json|eos_token_id of the checkpoint"):
        pipeline.plan(folder, EXACT)


# What the files hold, compared with what the configuration says.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, r"another shape.*k_proj|3.*4"),
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, r"missing.*layers\.2\."),
        ({"intermediate_size": 95}, "another shape.*mlp"),
        ({"vocab_size": 319}, r"another shape.*embed_tokens"),
        ({"num_attention_heads": 2}, r"another shape.*q_proj"),
    ],
)
def test_a_plan_compares_shapes_with_the_files(
    changes: dict[str, Any], message: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = edited(tiny_checkpoint("qwen3"), tmp_path / "model", lambda _: None, **changes)
    refused = CliRunner().invoke(main, ["model", str(folder), "--dry-run"])
    assert refused.exit_code == 1
    assert re.search(message, refused.output)


# Files that change while they are read.


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_checkpoint_that_is_overwritten_meanwhile_is_no_export(
    name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "model")
    save = pipeline.save

    def overwrite(*arguments: Any) -> None:
        save(*arguments)
        file = folder / name
        file.write_bytes(file.read_bytes())

    monkeypatch.setattr(pipeline, "save", overwrite)
    with pytest.raises(SkvError, match=rf"files changed while they were exported.*{name}"):
        pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_file_that_becomes_shorter_is_an_error_and_kills_nothing(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "model")
    build = pipeline._build

    def shorten(*arguments: Any) -> Any:
        graph = build(*arguments)
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(4096)
        return graph

    monkeypatch.setattr(pipeline, "_build", shorten)
    with pytest.raises(SkvError, match=r"chang.*model\.safetensors|model\.safetensors.*changed"):
        pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet)
    assert not (tmp_path / "out").exists()


# An adapter.


def test_an_export_with_an_adapter_is_the_adapted_model_and_verify_knows_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path
) -> None:
    peft = pytest.importorskip("peft")
    checkpoint = tiny_checkpoint("qwen3")
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, options).eval()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    out = pipeline.export_model(
        checkpoint, out=tmp_path / "out", recipe=EXACT, adapter=tmp_path / "adapter", progress=quiet
    )
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = adapted(ids).logits[0, -1].numpy()
    np.testing.assert_allclose(session_logits(out, ids), expected, atol=1e-3, rtol=0)
    assert np.abs(expected - expected_logits(checkpoint, ids)).max() > 0.1
    config = ModelConfig.load(out)
    assert config.source["adapter"] == "adapter"
    with pytest.raises(SkvError, match=r"verify: adapter; got none; expected adapter.*--adapter"):
        run._source(config, checkpoint, None)
    assert run._source(config, checkpoint, tmp_path / "adapter").adapter == tmp_path / "adapter"


# A model without a graph.


def test_a_model_that_torch_export_finds_no_graph_of_is_refused(tmp_path: Path, library: Path) -> None:
    folder = save_random(tmp_path / "model", small_config("aria_text"))
    with pytest.raises(SkvError, match=r"aria_text: can't be exported: torch\.export finds no graph of its model"):
        pipeline.export_model(folder, out=tmp_path / "out", recipe=EXACT, progress=quiet)
    assert not (tmp_path / "out").exists()
