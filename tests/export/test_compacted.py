"""Exported models with a compacted cache are the checkpoint in PyTorch with one: the runtime and the simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.pretrained import load_model, replace_attention
from skv_export.evaluation.candidates import of_recipe
from skv_export.evaluation.decode_simulation import ATTENTION_NAME
from skv_export.export.pipeline import export_model
from skv_export.runtime.compaction import WINDOW
from skv_export.runtime.session import Session
from skv_export.spec.recipe import LayerConfig, Recipe

pytestmark = pytest.mark.usefixtures("library")

PROMPT, TOKENS = 250, 280
OPTIONS = {"num_sink_tokens": 4, "recent_tokens": 32, "tile_tokens": 32}
RECIPES = {
    "exact": Recipe(LayerConfig(k_bits=16, v_bits=16, recent_type="float", **OPTIONS)),
    "K4V2": Recipe(LayerConfig(k_bits=4, v_bits=2, **OPTIONS)),
}


CASES = [
    ("llama", "exact", 140), ("llama", "K4V2", 140), ("qwen3", "exact", 110), ("gemma2", "exact", 140),
    ("gpt2", "exact", 140),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "recipe", "keep"), CASES)
def test_a_compacted_cache_computes_what_pytorch_does_with_one(
    arch: str, recipe: str, keep: int, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Rotary and learned positions, QK norm, softcap, sliding windows; the prompt token by token, as simulated."""
    source = tiny_checkpoint(arch)
    out = export_model(source, out=tmp_path / "model", recipe=RECIPES[recipe], progress=lambda *_: None)
    session = Session(out, score_window=WINDOW)
    ids = np.random.default_rng(2).integers(3, session.config.vocab_size, TOKENS).tolist()
    cache, rows = session.cache(1, TOKENS), []
    for i, token in enumerate(ids):
        if i == PROMPT:
            session.compact(cache, keep=keep)
        rows.append(session.run([[token]], None, None, cache)[0, -1])
    assert cache.dropped.tolist() == [{140: 128, 110: 160}[keep]] and cache.lengths.tolist() == [TOKENS]
    model = load_model(resolve(source))
    replace_attention(model, ATTENTION_NAME)
    with torch.no_grad():
        wanted = of_recipe("x", RECIPES[recipe], keep=keep).logits(model, torch.tensor(ids), PROMPT).numpy()
        whole = of_recipe("x", RECIPES[recipe]).logits(model, torch.tensor(ids), PROMPT).numpy()
    difference = np.abs(np.array(rows) - wanted)
    change = np.abs(whole - wanted)[PROMPT:]
    if recipe == "exact":
        assert difference.max() < 2e-3 * np.abs(wanted).max() < change.max()
    else:  # codes that differ by rounding
        assert difference[PROMPT:].mean() < 0.2 * change.mean()
