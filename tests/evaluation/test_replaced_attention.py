"""The simulation in models whose attention does not go through transformers' AttentionInterface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_random, tiny_config
from transformers import AutoModelForCausalLM

from skv_export.analysis.attention_capture import DecodeModel
from skv_export.checkpoints import pretrained
from skv_export.checkpoints.checkpoint import resolve
from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import ATTENTION_NAME, Simulation, simulated_logits
from skv_export.export.pipeline import export_model
from skv_export.runtime.session import Session
from skv_export.spec.recipe import Recipe

SMALL = {"recent_type": "float", "recent_tokens": 32, "tile_tokens": 32}
EXACT = Recipe().with_options(k_bits=16, v_bits=16, **SMALL)
COARSE = Recipe().with_options(k_bits=2, v_bits=2, **SMALL)
TOKENS = 120
ARCHITECTURES = ("falcon", "gpt_neo", "gptj", "codegen")


def prompt() -> torch.Tensor:
    return torch.randint(3, 320, (TOKENS,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "stablelm", "nemotron"])
@torch.no_grad()
def test_simulated_logits_are_the_untouched_models_and_the_exports(
    arch: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, library: Path
) -> None:
    checkpoint, ids = tiny_checkpoint(arch), prompt()
    untouched = (
        AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()(ids[None]).logits[0]
    )
    model = pretrained.load_model(resolve(checkpoint))
    pretrained.replace_attention(model, ATTENTION_NAME)
    torch.testing.assert_close(simulated_logits(model, ids, Simulation.of_recipe(EXACT)), untouched, atol=5e-4, rtol=0)
    coarse = simulated_logits(model, ids, Simulation.of_recipe(COARSE))
    assert (coarse - untouched).abs().max() > 0.5
    session = Session(export_model(checkpoint, out=tmp_path / "out", recipe=COARSE, progress=lambda *_: None))
    cache = session.cache(1, TOKENS)
    exported = np.stack([session.run([[token]], None, None, cache)[0, -1] for token in ids.tolist()])
    # A code may round the other way; then its token's error is another, and a few logits are off by a step.
    difference = np.abs(coarse.numpy() - exported).max(1)
    assert np.median(difference) < 1e-3 and difference.max() < 0.2 * (coarse - untouched).abs().max()


@torch.no_grad()
def test_own_attention_comes_back_and_is_replaced_again(tiny_checkpoint: Callable[..., Path]) -> None:
    model, ids = pretrained.load_model(resolve(tiny_checkpoint("gptj"))), prompt()
    untouched = model(ids[None]).logits[0]
    pretrained.replace_attention(model, ATTENTION_NAME)
    coarse = simulated_logits(model, ids, Simulation.of_recipe(COARSE))
    with pretrained.own_attention(model):
        torch.testing.assert_close(model(ids[None]).logits[0], untouched, atol=1e-5, rtol=0)
    assert torch.equal(simulated_logits(model, ids, Simulation.of_recipe(COARSE)), coarse)


def test_every_layer_of_such_a_model_is_captured_with_its_window(tiny_checkpoint: Callable[..., Path]) -> None:
    from tiny_models import write_tokenizer

    checkpoint = tiny_checkpoint("gpt_neo")
    write_tokenizer(checkpoint, 320)
    layers = DecodeModel(resolve(checkpoint)).capture(prompt())
    assert [layer.window for layer in layers] == [0, 24]
    assert all(layer.gradient is not None and layer.gradient.abs().max() > 0 for layer in layers)
    assert all(layer.scale == 1.0 for layer in layers)


def test_alibi_is_refused_and_not_left_out(tmp_path: Path) -> None:
    config = tiny_config("falcon", alibi=True, new_decoder_architecture=False, num_kv_heads=None)
    model = pretrained.load_model(resolve(save_random(tmp_path / "model", config)))
    pretrained.replace_attention(model, ATTENTION_NAME)
    with pytest.raises(SkvError, match="ALiBi"):
        simulated_logits(model, prompt(), Simulation.full_precision())


def test_an_attention_that_is_not_among_the_patches_is_refused(tiny_checkpoint: Callable[..., Path]) -> None:
    model = pretrained.load_model(resolve(tiny_checkpoint("gptj")))
    with pytest.raises(SkvError, match="does not go through AttentionInterface"):
        pretrained.replace_attention(model, ATTENTION_NAME, {})
