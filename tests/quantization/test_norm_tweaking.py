"""Norms that are moved until a quantized layer's output is distributed as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from log_probabilities import divergence, logits
from safetensors.torch import load_file

from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.pretrained import load_tokenizer
from skv_export.evaluation.decode_simulation import Simulation
from skv_export.evaluation.text import CALIBRATION_TEXT, cut_windows, read_text
from skv_export.quantization import norm_tweaking
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.quantization.norm_tweaking import tweak
from skv_export.quantization.pipeline import Options, quantize
from skv_export.quantization.solver import Form
from skv_export.spec.recipe import Recipe

TEXT = read_text(None, CALIBRATION_TEXT)[2000:12000]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_neox"])  # norms of three kinds: w, 1 + w, with a bias
@pytest.mark.parametrize("cache", [False, True])
def test_norms_find_back(
    arch: str, cache: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm is off by a fifth and nothing else is: its steps bring the layer's output back, through a cache too."""
    monkeypatch.setattr(norm_tweaking, "RATE", 1e-2)
    source = resolve(checkpoint(arch))
    recipe = Recipe().with_options(k_bits=4, v_bits=4, recent_tokens=32, tile_tokens=32)
    simulation = Simulation.of_recipe(recipe) if cache else Simulation.full_precision()
    model = LayerByLayer(source)
    states = model.embed(torch.from_numpy(cut_windows(load_tokenizer(source), TEXT, 16, 96)))
    with model.loaded(1) as layer:
        exact = [model.run(1, hidden, simulation) for hidden in states]
        name = "post_feedforward_layernorm" if arch == "gemma2" else "input_layernorm"
        norm = layer.get_submodule(name)
        more = float(arch == "gemma2")
        norm.weight.data = (norm.weight.data + more) * 1.2 - more
        before = sum(
            float((model.run(1, h, simulation) - y).square().sum()) for h, y in zip(states, exact, strict=True)
        )
        changed = tweak(model, 1, layer, states, exact, simulation)
        after = sum(float((model.run(1, h, simulation) - y).square().sum()) for h, y in zip(states, exact, strict=True))
        assert after < 0.95 * before
        assert torch.equal(changed[f"{name}.weight"], norm.weight.data)
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_steps_that_do_harm_are_taken_back(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_tweaking, "RATE", 10.0)
    source = resolve(checkpoint("llama"))
    model = LayerByLayer(source)
    states = model.embed(torch.from_numpy(cut_windows(load_tokenizer(source), TEXT, 4, 96)))
    with model.loaded(0) as layer:
        exact = [model.run(0, hidden, Simulation.full_precision()) for hidden in states]
        before = {name: parameter.data.clone() for name, parameter in layer.named_parameters()}
        layer.get_submodule("mlp.down_proj").weight.data *= 1.01
        assert tweak(model, 0, layer, states, exact, Simulation.full_precision()) == {}
        for name, parameter in layer.named_parameters():
            assert name == "mlp.down_proj.weight" or torch.equal(parameter.data, before[name])


def test_a_checkpoint_gets_the_norms(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("qwen3")
    ids = torch.from_numpy(cut_windows(load_tokenizer(resolve(folder)), read_text(None)[:9000], 4, 128))
    tensors, losses = {}, {}
    for on in (False, True):
        options = Options("rtn", Form(4, 16), windows=12, window=128, norm_tweaking=on)
        quantize(resolve(folder), TEXT, tmp_path / str(on), options)
        tensors[on] = load_file(tmp_path / str(on) / "model-00001.safetensors")
        losses[on] = divergence(logits(folder, ids), logits(tmp_path / str(on), ids))
    moved = {name for name in tensors[True] if not torch.equal(tensors[True][name], tensors[False][name])}
    assert moved and all("norm" in name for name in moved)
    assert losses[True] < losses[False], losses
