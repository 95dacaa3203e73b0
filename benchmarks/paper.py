"""The paper's measurements on one model: norms of keys and values by layer, and their quantization error.

    python benchmarks/paper.py [CHECKPOINT] [--text FILE] [--json FILE]

Norms of the projections and their spectra come from `skv-export analyze`. Here: norms of activations, relative error
of keys and values at 2, 3 and 4 bits, with scales per token, plain and rotated (the paper's quantizers are per token or
per channel, not rotated), per channel, and around the tile's mean; means over layers of one window of text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skv_export.checkpoints.checkpoint import resolve
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.evaluation import comparison
from skv_export.evaluation.decode_simulation import FullCache, LayoutCache, Simulation, simulated_logits
from skv_export.evaluation.text import cut_windows, read_text
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

FORMS = {
    "token": ("token", "none"),
    "token, rotated": ("token", "hadamard"),
    "channel": ("channel", "none"),
    "channel, rotated": ("channel", "hadamard"),
    "token_channel": ("token_channel", "none"),
    "token_channel, rotated": ("token_channel", "hadamard"),
}
BITS = (2, 3, 4)


class Recorder(FullCache):
    """A cache that keeps what passes through it."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """Keeps the tensor."""
        self.seen.append(x.clone())  # type: ignore[attr-defined]
        return x


def error(x: torch.Tensor, bits: int, form: str) -> float:
    """Squared error of the quantized tokens ``[H, S, D]`` over their energy."""
    granularity, rotation = FORMS[form]
    config = LayerConfig(k_bits=bits, k_granularity=granularity, k_rotation=rotation)
    layout = CacheLayout.pair(config, x.shape[-1])[0]
    back = LayoutCache(layout).quantized(x)
    span = slice(4, 4 + (x.shape[1] - 4) // layout.tile_tokens * layout.tile_tokens)
    return float((back - x)[:, span].pow(2).sum() / x[:, span].pow(2).sum())


def measure(checkpoint: str, text: str, window: int) -> dict[str, Any]:
    """Returns norms and errors by layer."""
    model, tokenizer = comparison.load(resolve(checkpoint))
    ids = torch.from_numpy(cut_windows(tokenizer, text, 3, window)[1])
    caches: dict[int, tuple[Recorder, Recorder]] = {}

    def make(index: int, head_dim: int, window: int) -> tuple[Recorder, Recorder]:
        return caches.setdefault(index, (Recorder(), Recorder()))

    with torch.no_grad():
        simulated_logits(model, ids, Simulation(make))
    layers = []
    for _, pair in sorted(caches.items()):
        key, value = (cache.seen[0] for cache in pair)  # type: ignore[attr-defined]
        row: dict[str, Any] = {"k_norm": float(key.norm(dim=-1).mean()), "v_norm": float(value.norm(dim=-1).mean())}
        row["k_mean_share"] = mean_share(key)
        row["v_mean_share"] = mean_share(value)
        for name, x in (("k", key), ("v", value)):
            row[name] = {form: {bits: error(x, bits, form) for bits in BITS} for form in FORMS}
        layers.append(row)
    return {"checkpoint": checkpoint, "layers": layers}


def mean_share(x: torch.Tensor) -> float:
    """Share of the energy that is the mean of 64 tokens, past the first four."""
    tiles = x[:, 4 : 4 + (x.shape[1] - 4) // 64 * 64].unflatten(1, (-1, 64))
    return float(64 * tiles.mean(2).pow(2).sum() / tiles.pow(2).sum())


def table(found: dict[str, Any]) -> str:
    """Markdown: means over the layers."""
    layers = found["layers"]
    larger = sum(row["k_norm"] > row["v_norm"] for row in layers)
    k, v, kv_share, vv_share = (
        np.mean([row[n] for row in layers]) for n in ("k_norm", "v_norm", "k_mean_share", "v_mean_share")
    )
    lines = [
        f"Mean norm of a key {k:.2f}, of a value {v:.2f}; keys larger in {larger} of {len(layers)} layers. "
        f"Share of the energy that is the mean of 64 tokens: keys {kv_share:.0%}, values {vv_share:.0%}.",
        "",
        "| form | " + " | ".join(f"K {b} bits" for b in BITS) + " | " + " | ".join(f"V {b} bits" for b in BITS) + " |",
        "|---" * (1 + 2 * len(BITS)) + "|",
    ]
    for form in FORMS:
        cells = [f"{np.mean([row[name][form][bits] for row in layers]):.4f}" for name in "kv" for bits in BITS]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.checkpoint or str(demo_checkpoint()), read_text(given.text), given.window)
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
