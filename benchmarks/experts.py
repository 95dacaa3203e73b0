"""Mixtures of experts: gathered matrices, MoE and QMoE; time and memory of a prompt and of a step.

    python benchmarks/experts.py [--prompt 128] [--rounds 3]

Two qwen3_moe of random weights, in fp32: a tiny one, and a wide one with 32 experts of which each token takes 4. Each
form runs in a process of its own on one thread; memory is the most that the process took, weights included. Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 20
MODELS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2},
    "wide": {"hidden_size": 512, "moe_intermediate_size": 768, "num_experts": 32, "num_experts_per_tok": 4},
}
FORMS = {"gathered, fp32": ("fp32", False), "MoE, fp32": ("fp32", True), "QMoE, int4": ("int4", True)}


def make(folder: Path, name: str) -> Path:
    """Writes a model of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=1024, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, **MODELS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def export(checkpoint: Path, out: Path, weights: str, operators: bool) -> Path:
    """Exports a model, with operators for its experts or as they were before there were any."""
    from skv_export.export import experts, pipeline
    from skv_export.spec.recipe import Recipe

    before = experts.as_operators
    if not operators:
        experts.as_operators = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc,return-value]
    try:
        recipe = Recipe().with_options(weights=weights)
        return pipeline.export_model(checkpoint, out=out, recipe=recipe, progress=lambda *_: None)
    finally:
        experts.as_operators = before


def peak() -> int:
    """Bytes of this process's memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a prompt and of a step, the least of the rounds, and the process's bytes at most."""
    from skv_export.runtime.session import Session

    session = Session(folder, num_threads=1)
    ids = np.random.default_rng(0).integers(3, 1024, (1, tokens))
    session.run(ids[:, :1], None, None, session.cache(1, 2))
    prompts, steps = [], []
    for _ in range(rounds):
        cache = session.cache(1, tokens + STEPS)
        start = time.perf_counter()
        session.run(ids, None, None, cache)
        prompts.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(STEPS):
            session.run(ids[:, :1], None, None, cache)
        steps.append((time.perf_counter() - start) / STEPS)
    return {"prompt": 1e3 * min(prompts), "step": 1e3 * min(steps), "memory": peak()}


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.prompt, options.rounds)))
        return
    print(f"| model | experts | prompt of {options.prompt} | step | peak memory | weights |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = make(Path(folder) / "checkpoint", name)
            for form, (weights, operators) in FORMS.items():
                out = export(checkpoint, Path(folder) / weights / str(operators), weights, operators)
                size = (out / "model.onnx.data").stat().st_size / (1 << 20)
                given = ["--measure", str(out), "--prompt", str(options.prompt), "--rounds", str(options.rounds)]
                said = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=True)
                found = json.loads(said.stdout.splitlines()[-1])
                print(
                    f"| {name} | {form} | {found['prompt']:.1f} ms | {found['step']:.2f} ms | "
                    f"{found['memory'] / (1 << 20):.0f} MiB | {size:.0f} MiB |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
