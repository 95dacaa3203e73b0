"""What the input ``inputs_embeds`` costs a model that runs on tokens: the same export with and without it, in turns.

    python benchmarks/embeddings_input.py [--hidden 1024] [--layers 8] [--prompt 512] [--rounds 5]

A llama of random weights. Times are the medians of the rounds, the ratio is of the two in this run. Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from skv_export.export.pipeline import export_model
from skv_export.runtime.session import Session

STEPS = 40


def make(folder: Path, hidden: int, layers: int) -> Path:
    """Writes a llama of random weights."""
    config = AutoConfig.for_model(
        "llama", vocab_size=8192, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def timed(session: Session, ids: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Milliseconds of a prompt, and of a step after it."""
    cache = session.cache(1, ids.shape[1] + STEPS)
    start = time.perf_counter()
    session.run(ids, None, None, cache)
    prompt = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(STEPS):
        session.run(ids[:, :1], None, None, cache)
    return 1e3 * prompt, 1e3 * (time.perf_counter() - start) / STEPS


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("layers", 8), ("prompt", 512), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make(Path(folder) / "llama", options.hidden, options.layers)
        sessions = [
            Session(export_model(checkpoint, out=Path(folder) / str(embeds), inputs_embeds=embeds), num_threads=1)
            for embeds in (False, True)
        ]
        ids = np.random.default_rng(0).integers(3, 8192, (1, options.prompt))
        rounds = np.array([[timed(session, ids) for session in sessions] for _ in range(options.rounds)])
    median = np.median(rounds, 0)
    print("| | tokens only | with `inputs_embeds` | ratio |\n|---|---|---|---|")
    for i, name in enumerate((f"prompt of {options.prompt} tokens", "step")):
        a, b = median[:, i]
        ratio = np.median(rounds[:, 1, i] / rounds[:, 0, i])
        print(f"| {name} | {a:.1f} ms | {b:.1f} ms | {ratio:.3f} |")


if __name__ == "__main__":
    main()
