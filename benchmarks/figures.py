"""Draws the README's figure: bytes of the KV cache at 128k tokens, for fp16, int8, int4 and split widths.

    python benchmarks/figures.py docs/cache-memory.svg

The shape is Llama-3.1-8B's (32 layers, 8 KV heads, head_dim 128); every byte counts: codes, scales, exact tokens.
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128
CONTEXT = 128 * 1024


def split(k_bits: int, v_bits: int, context: int) -> float:
    """GiB of this project's cache."""
    layouts = CacheLayout.pair(LayerConfig(k_bits=k_bits, v_bits=v_bits), HEAD_DIM)
    return LAYERS * KV_HEADS * sum(layout.block_bytes(context) for layout in layouts) / 2**30


def uniform(bits: int, context: int) -> float:
    """GiB of a cache with static scales, as ONNX Runtime's own."""
    return LAYERS * KV_HEADS * 2 * context * HEAD_DIM * bits / 8 / 2**30


def main(path: str) -> None:
    plt.rcParams.update({"svg.hashsalt": "skv", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7, 2.7), layout="constrained")
    rows = [
        ("fp16", uniform(16, CONTEXT), "#8a8a8a"),
        ("int8, one width for both", uniform(8, CONTEXT), "#c9a15f"),
        ("int4, one width for both", uniform(4, CONTEXT), "#c9a15f"),
        *((f"K{k} V{v}", split(k, v, CONTEXT), "#4a7fb5") for k, v in ((8, 4), (4, 4), (4, 2), (3, 2))),
    ][::-1]
    names, sizes, colours = zip(*rows, strict=True)
    bars = axes.barh(names, sizes, color=colours, height=0.7)
    axes.bar_label(bars, [f"{size:.1f} GiB" for size in sizes], padding=4)
    axes.set_xlim(0, max(sizes) * 1.12)
    axes.set_xlabel(f"KV cache of one sequence of {CONTEXT // 1024}k tokens, GiB")
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1])
