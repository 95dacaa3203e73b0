"""Latent attention in its absorbed form: transformers' expanded form is the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_random, small_config
from transformers import AutoModelForCausalLM

from skv_export.analysis.pipeline import analyze
from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import load_model, replace_attention
from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import ATTENTION_NAME, Simulation, simulated_logits
from skv_export.export import latent_attention, pipeline
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.runtime.session import Session
from skv_export.spec.recipe import Recipe
from skv_export.verification import graph_level, graph_variants

pytestmark = pytest.mark.usefixtures("library")
RECIPE = Recipe().with_options(k_bits=4, v_bits=2, tile_tokens=32, recent_tokens=8, num_sink_tokens=2)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind == "minicpm3" else pytest.mark.slow) for kind in latent_attention.LATENT],
)
def test_latents_are_cached_and_logits_are_transformers(kind: str, tmp_path: Path) -> None:
    checkpoint = save_random(tmp_path / "checkpoint", small_config(kind))
    out = pipeline.export_model(checkpoint, out=tmp_path / "out", recipe=RECIPE, progress=lambda *_: None)
    original = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    ids = torch.randint(3, 320, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(ids).logits[0].numpy()
    session = graph_variants.unquantized(out)
    layer = session.config.layers[0]
    assert (layer.num_key_value_heads, layer.key.head_dim) == (1, 64 + 16)  # one latent and its part with RoPE
    cache = session.cache(1, 60)
    got = [session.run(ids[:, :40].numpy(), None, None, cache)[0, 0]]
    got += [session.run(ids[:, i : i + 1].numpy(), None, None, cache)[0, 0] for i in range(40, 60)]
    np.testing.assert_allclose(got, expected[39:], atol=1e-3, rtol=0)

    model = load_model(Source("safetensors", checkpoint))
    count = sum(graph_level.step_counts(Session(out).config))
    tokens = torch.randint(3, 320, (count,), generator=torch.Generator().manual_seed(2)).tolist()
    tolerance = graph_level.Tolerance(median=1e-3)  # MiniCPM's logits are of size 30
    assert not graph_level.check(model, out, tokens, tolerance=tolerance).failures
    with torch.no_grad():  # which leaves the model with its own attention again
        np.testing.assert_allclose(model(ids).logits[0].numpy(), expected, atol=1e-3, rtol=0)

    plan = pipeline.plan(checkpoint, RECIPE)
    assert plan.half_cache_bytes(1000) == 1000 * 2 * (64 + 16) * 2  # an fp16 cache has each latent once
    replace_attention(model, ATTENTION_NAME)
    with pytest.raises(SkvError, match=f"{kind}: measured layer by layer; got multi-head latent attention"):
        LayerByLayer(Source("safetensors", checkpoint))
    with pytest.raises(SkvError, match=r"multi-head latent attention; got one latent.*--k-bits"):
        analyze(checkpoint)
    with pytest.raises(SkvError, match="the simulation has no cache of latents"), torch.no_grad():
        simulated_logits(model, ids[0], Simulation.full_precision())
