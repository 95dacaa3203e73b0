"""Keys before RoPE: what a layer applied is undone, nothing else, and what can't be undone is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, randomize, small_config, tiny_config
from transformers import AutoModelForCausalLM

from skv_export.checkpoints.pretrained import replace_attention
from skv_export.errors import SkvError
from skv_export.evaluation.baselines import parse_baselines
from skv_export.evaluation.decode_simulation import ATTENTION_NAME, Simulation
from skv_export.evaluation.literature.rope import Rope, watched

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def seen_by(model: Any) -> tuple[dict[int, Rope], list[torch.Tensor]]:
    """RoPE and keys after it, by layer, of a text."""
    ropes: dict[int, Rope] = {}
    with torch.no_grad(), watched(model, ropes):
        cache = model(torch.arange(20)[None] * 7 % 300, use_cache=True).past_key_values
    return ropes, [layer.keys[0].float() for layer in cache.layers]


@pytest.mark.parametrize("arch", ["llama", "gpt_neox", "gemma2", "gpt2"])
def test_keys_before_rope_are_those_that_the_model_had(arch: str, tiny_checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(arch), dtype=torch.float32).eval()
    seen_keys: list[torch.Tensor] = []

    def note(module: Any, args: Any, output: torch.Tensor) -> None:
        seen_keys.append(output)

    layers = getattr(getattr(model, "model", None), "layers", None)
    if arch in ("llama", "gemma2"):
        layers[1].self_attn.k_proj.register_forward_hook(note)
    ropes, after = seen_by(model)
    if arch == "gpt2":
        assert not ropes
        return
    keys = after[1]
    before = ropes[1].undo(keys)
    assert torch.allclose(ropes[1].apply(before), keys, atol=1e-4)
    assert torch.allclose(before[:, 0], keys[:, 0], atol=1e-5) and not torch.allclose(
        before[:, 9], keys[:, 9], atol=0.1
    )
    if seen_keys:
        expected = seen_keys[0][0].unflatten(-1, (len(keys), -1)).transpose(0, 1)
        assert torch.allclose(before, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("arch", "with_rope", "options"),
    [
        ("smollm3", {0, 2}, {}),
        ("cohere2", {0, 2}, {}),
        ("stablelm", {0, 1}, {"qk_layernorm": False}),
        ("phi", {0, 1, 2, 3}, {}),
        ("persimmon", {0, 1, 2, 3}, {"qk_layernorm": False}),
        ("falcon", {0, 1}, {}),
        ("gpt_oss", {0, 1}, {"rope_parameters": YARN}),
    ],
)
def test_only_the_rope_that_a_layer_applied_is_undone(arch: str, with_rope: set[int], options: dict[str, Any]) -> None:
    """Layers without RoPE, a part of the channels with it, scaled cos and sin: what the projections gave comes back."""
    config = tiny_config(arch, **options) if arch in TINY else small_config(arch)
    vars(config).update(options)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    projected: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "query_key_value")):
            module.register_forward_hook(lambda module, args, output: projected.append(output[0]))
    replace_attention(model, ATTENTION_NAME)
    with Simulation.full_precision().active():
        ropes, after = seen_by(model)
    assert {*ropes} == with_rope
    for i, keys in enumerate(after):
        before = ropes[i].undo(keys) if i in ropes else keys
        assert torch.allclose(before, keys, atol=1e-4) == (i not in ropes)
        heads = projected[i].unflatten(-1, (len(keys), -1, keys.shape[-1]))
        heads = heads[
            :, :, -2 if heads.shape[2] > 1 else 0
        ]  # falcon and persimmon project queries and values with them
        assert torch.allclose(before, heads.transpose(0, 1), atol=1e-4)
        if i in ropes:
            assert torch.allclose(ropes[i].apply(before), keys, atol=1e-4)


@pytest.mark.parametrize("arch", ["gptj", "llama4_text", "hunyuan_v1_dense"])
def test_keys_after_a_rope_of_unknown_form_do_not_pass_for_keys_before_it(arch: str) -> None:
    """Functions of other arguments; a norm after RoPE."""
    model = AutoModelForCausalLM.from_config(tiny_config(arch) if arch in TINY else small_config(arch)).eval()
    randomize(model)
    replace_attention(model, ATTENTION_NAME)
    candidates = [c for name in ("kvquant-k3v3", "oscar-k2v2") for c in parse_baselines(name)]
    for candidate in candidates:
        candidate.windows.append((torch.arange(96) * 37 % 300)[None])  # type: ignore[attr-defined]
    with pytest.raises(SkvError, match="keys before RoPE can't be had"):
        candidates[0].logits(model, torch.arange(40), 0)
    assert candidates[1].logits(model, torch.arange(40), 0).isfinite().all()


def test_a_model_that_says_it_has_rope_and_shows_none_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3"), dtype=torch.float32).eval()
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    for says, expected in ((model.config.rope_parameters, {0, 1}), (None, set())):
        model.config.rope_parameters = says
        ropes: dict[int, Rope] = {}
        with torch.no_grad(), watched(model, ropes):
            model(torch.arange(9)[None], use_cache=False)
        assert {*ropes} == expected
        for rope in ropes.values():
            with pytest.raises(SkvError, match="got RoPE of qwen3"):
                rope.undo(torch.ones(2, 9, 64))


def test_bf16_has_keys_before_rope_too(tiny_checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"), dtype=torch.bfloat16).eval()
    ropes, keys = seen_by(model)
    assert ropes[1].cos.dtype == torch.bfloat16
    assert torch.allclose(ropes[1].apply(ropes[1].undo(keys[1])), keys[1], atol=1e-4)
    replace_attention(model, ATTENTION_NAME)
    candidate = parse_baselines("kvquant-k3v3")[0]
    candidate.windows.append((torch.arange(96) * 37 % 300)[None])  # type: ignore[attr-defined]
    with torch.no_grad():
        assert candidate.logits(model, torch.arange(40), 0).isfinite().all()


def test_what_is_no_rotation_is_refused() -> None:
    def moved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x.roll(1, -1) * cos

    with pytest.raises(SkvError, match="keys before RoPE can't be had"):
        Rope("it", moved, torch.ones(1, 4, 8), torch.zeros(1, 4, 8), 8).undo(torch.arange(32.0).view(1, 4, 8))
