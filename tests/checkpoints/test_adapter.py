"""LoRA adapters merged while tensors are read, beside peft's own arithmetic on the running model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from skv_export.checkpoints.checkpoint import Checkpoint, resolve
from skv_export.checkpoints.pretrained import load_model, load_untouched
from skv_export.cli.main import main
from skv_export.errors import SkvError

peft = pytest.importorskip("peft")
EMBEDDINGS = ["embed_tokens", "lm_head"]
PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen3", {"target_modules": PROJECTIONS}),
    "rank-stabilized": ("qwen3", {"target_modules": PROJECTIONS, "use_rslora": True}),
    "patterns": (
        "qwen3",
        {
            "target_modules": PROJECTIONS,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 5},
            "alpha_pattern": {"model.layers.0.self_attn.v_proj": 3},
        },
    ),
    "DoRA": ("qwen3", {"target_modules": PROJECTIONS, "use_dora": True}),
    "every linear layer": ("qwen3", {"target_modules": "all-linear"}),
    "one layer": ("qwen3", {"target_modules": PROJECTIONS, "layers_to_transform": [1]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D, DoRA": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "embeddings": ("qwen3", {"target_modules": [*EMBEDDINGS, "k_proj"]}),
    "tied, input embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "tied, output embedding": ("llama", {"target_modules": ["lm_head", "k_proj"]}),
    "tied, both trained whole": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tied, one trained whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "norms trained whole": ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]}),
    "biases of the adapted": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "all biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
}
"""What LoRA is, and its options in peft."""


def make_adapter(checkpoint: Path, folder: Path, **options: Any) -> Path:
    """Saves an adapter whose every number is random, large enough to change the logits."""
    torch.manual_seed(7)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(torch.arange(3, 60)[None]).logits
    return result


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_computes_what_peft_computes_beside_the_model(
    kind: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    arch, options = KINDS[kind]
    checkpoint = tiny_checkpoint(arch)
    adapter = make_adapter(checkpoint, tmp_path / "adapter", **options)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    plain = logits(base)
    expected = logits(peft.PeftModel.from_pretrained(base, adapter))
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(load_model(resolve(checkpoint, adapter=adapter))), expected, atol=2e-4, rtol=0)


def test_the_untouched_model_is_merged_by_peft(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("qwen3")
    source = resolve(checkpoint, adapter=make_adapter(checkpoint, tmp_path / "adapter", target_modules=PROJECTIONS))
    torch.testing.assert_close(logits(load_untouched(source)), logits(load_model(source)), atol=2e-4, rtol=0)


def test_rows_are_merged_in_float32_and_read_alike_in_pieces(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A bfloat16 matrix and its adapter are added up in float32: rounding the sum would be another model."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3"), dtype=torch.bfloat16).save_pretrained(half)
    adapter = make_adapter(half, tmp_path / "adapter", target_modules=PROJECTIONS, use_dora=True)
    name = "model.layers.1.mlp.down_proj.weight"
    merged, stored = Checkpoint.open(resolve(half, adapter=adapter)), load_file(half / "model.safetensors")[name]
    entry, whole = merged.entries[name], merged.tensor(name)
    assert (entry.dtype, entry.shape) == ("F32", tuple(stored.shape))
    tensors = load_file(adapter / "adapter_model.safetensors")
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    a, b, m = (tensors[f"base_model.model.{name.removesuffix('.weight')}.{part}"].double() for part in parts)
    added = stored.double() + 6 / 4 * (b @ a)
    expected = m[:, None] * added / added.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.from_numpy(whole.copy()).double(), expected, atol=1e-5, rtol=1e-5)
    data = bytes(entry.file.read(entry.start, entry.stop))
    pieces = [bytes(entry.file.read(i, min(i + 1000, entry.stop))) for i in range(entry.start, entry.stop, 1000)]
    assert b"".join(pieces) == data == whole.tobytes()


# As the command line takes it.


def test_an_adapters_folder_is_a_checkpoint_if_its_base_is_here(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("qwen3")
    adapter = make_adapter(checkpoint, tmp_path / "adapter", target_modules=PROJECTIONS)
    source = resolve(adapter)
    assert (source.path, source.adapter) == (checkpoint, adapter)
    plan = CliRunner().invoke(main, ["model", str(adapter), "--dry-run"])
    assert plan.exit_code == 0 and f"{checkpoint} with {adapter}" in plan.output
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    said = CliRunner().invoke(main, ["model", str(adapter), "--dry-run"]).output
    assert "an adapter of org/base" in said and f"skv-export model org/base --adapter {adapter}" in said
    assert CliRunner().invoke(main, ["model", str(checkpoint), "--adapter", str(adapter), "--dry-run"]).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights 'pissa' changed.*merge_and_unload"),
        ({"lora_bias": True}, "can't be merged here: lora_bias"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow"),
        ({"r": 0}, "r or lora_alpha; got 0"),
        ({"lora_alpha": "x"}, "r or lora_alpha; got 'x'"),
        ({"r": 3}, "an adapter of another model"),
        ({"use_dora": True}, "expected lora_A, lora_B, lora_magnitude_vector"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern.*names of modules"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern.*names of modules"),
    ],
)
def test_what_is_not_known_of_an_adapter_is_refused_by_name(
    options: dict[str, Any], message: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("qwen3")
    adapter = make_adapter(checkpoint, tmp_path / "adapter", target_modules=PROJECTIONS)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | options))
    with pytest.raises(SkvError, match=message):
        resolve(checkpoint, adapter=adapter)


def test_damaged_adapters_are_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, other = tiny_checkpoint("qwen3"), tiny_checkpoint("qwen2")
    adapter = make_adapter(checkpoint, tmp_path / "adapter", target_modules=PROJECTIONS)
    with pytest.raises(SkvError, match="an adapter of another model"):
        resolve(other, adapter=adapter)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)

    def without(*names: str, **more: torch.Tensor) -> None:
        kept = {k: v for k, v in tensors.items() if not any(name in k for name in names)}
        save_file(kept | more, weights)

    for change, message in (
        (lambda: without("layers.0.self_attn.q_proj.lora_B"), r"q_proj; got lora_A; expected lora_A, lora_B"),
        (lambda: without(**{"base_model.model.x.lora_A.weight": torch.ones(4, 4)}), "has no tensor x.weight"),
        (lambda: without(**{"base_model.model.x.bias": torch.ones(4)}), "has no tensor x.bias"),
        (lambda: without(**{"base_model.model.x.lora_C": torch.ones(4)}), "tensor base_model.model.x.lora_C"),
        (lambda: without("lora"), "no tensors in it"),
        (lambda: weights.write_bytes(b"x" * 50), "the header's length"),
        (lambda: weights.rename(adapter / "adapter_model.bin"), "is a pickle"),
        (lambda: (adapter / "adapter_config.json").write_text("["), "not valid JSON"),
        (lambda: (adapter / "adapter_config.json").unlink(), "no adapter_config.json"),
    ):
        change()
        with pytest.raises(SkvError, match=message):
            resolve(checkpoint, adapter=adapter)


def test_gguf_files_take_no_adapter(demo_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SkvError, match="merged into safetensors; got a GGUF file"):
        resolve(demo_checkpoint, adapter=tmp_path)


def test_a_model_with_an_adapter_beside_it_is_merged_when_asked(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "model")
    make_adapter(folder, tmp_path / "adapter", target_modules=PROJECTIONS)
    shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
    with pytest.raises(SkvError, match=r"an adapter \(LORA\) of .*--adapter"):
        resolve(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = Checkpoint.open(resolve(folder, adapter=folder)).tensor(name)
    assert abs(merged - Checkpoint.open(tiny_checkpoint("qwen3")).tensor(name)).max() > 0.01
