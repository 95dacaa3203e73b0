"""A GGUF file as it is, against llama.cpp with the same file and against its dequantized export: speed, size, quality.

    python benchmarks/gguf_peers.py [FILE.gguf] [--context 128,2048,7000] [--rounds 2] [--windows 4]

Needs llama-cpp-python, in this environment or in the folder SKV_LLAMA_CPP. Speed: each measurement in a process of its
own, the candidates in turns; ours with K4V2, llama.cpp with flash attention and its cache in f16 and in
q4_0. Perplexity: windows of the shipped prose, each in one call, so that every candidate's attention is exact and what
differs is the weights' arithmetic. Times by the wall clock are worth as much as the machine is idle; on a busy one,
--threads 1 and --clock cpu count the processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from skv_export.bench import model as bench
from skv_export.bench.attention import CLOCKS
from skv_export.checkpoints.checkpoint import demo_checkpoint
from skv_export.evaluation.text import cut_windows, read_text
from skv_export.runtime.prompts import load_tokenizer
from skv_export.spec.recipe import Recipe

STEPS = 24
OURS = {
    "as-is": {"weights": "as-is"},
    "as-is, int8 products": {"weights": "as-is", "accuracy_level": 4},
    "fp32": {"weights": "fp32"},
}
LLAMA = {"llama.cpp, f16 cache": "f16", "llama.cpp, q4_0 cache": "q4_0"}


def _worker(job: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp, in its own process: a prompt and some steps, or the logarithms of the probabilities of a text."""
    import llama_cpp

    kind = {"f16": llama_cpp.GGML_TYPE_F16, "q4_0": llama_cpp.GGML_TYPE_Q4_0}[job["cache"]]
    ids = job["ids"]
    llama = llama_cpp.Llama(
        job["path"], n_ctx=len(ids) + STEPS + 8, n_batch=512, type_k=kind, type_v=kind, flash_attn=True,
        n_threads=job["threads"], n_threads_batch=job["threads"], n_gpu_layers=0, logits_all=job["logits"],
        verbose=False,
    )  # fmt: skip
    if job["logits"]:
        llama.eval(ids)
        return {"nll": nll(np.array(llama.scores[: len(ids)]), ids)}
    run = bench._measure(lambda: llama.eval(ids), lambda: llama.eval([ids[0]]), STEPS, job["clock"])
    return {"prefill_seconds": run.prefill_seconds, "decode_ms": run.decode_ms, "peak_bytes": run.peak_bytes}


def nll(logits: np.ndarray, ids: list[int]) -> float:
    """Mean negative logarithm of the probabilities of a text's tokens but the first."""
    rows = logits[:-1].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    taken = rows[np.arange(len(rows)), ids[1:]]
    return float((np.log(np.exp(rows).sum(-1)) - taken).mean())


def _llama(
    path: Path, cache: str, ids: list[int], logits: bool, threads: int = 2, clock: str = "wall"
) -> dict[str, Any]:
    job = json.dumps(
        {"path": str(path), "cache": cache, "ids": ids, "logits": logits, "threads": threads, "clock": clock}
    )
    folder = os.environ.get("SKV_LLAMA_CPP", "")
    done = subprocess.run(
        [sys.executable, __file__, "--worker"], input=job, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": folder},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _speed(path: Path, folders: dict[str, Path], contexts: list[int], rounds: int, threads: int, clock: str) -> None:
    tokenizer, prose = load_tokenizer(folders["as-is"]), read_text(None)
    print(
        "| context | | prompt s | ms per token, median (rounds) | peak MiB | as-is over it |\n|---|---|---|---|---|---|"
    )
    for context in contexts:
        (ids,) = cut_windows(tokenizer, prose, 1, context).tolist()
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*folders, *LLAMA)}
        for _ in range(rounds):
            for name, folder in folders.items():
                job = {"name": "skv", "folder": str(folder), "context": context, "threads": threads, "steps": STEPS}
                runs[name].append(vars(bench._in_a_process({**job, "clock": clock})))
            for name, cache in LLAMA.items():
                runs[name].append(_llama(path, cache, ids, False, threads, clock))
        steps = {name: [median(run["decode_ms"]) for run in found] for name, found in runs.items()}
        for name, found in runs.items():
            prompt = median(run["prefill_seconds"] for run in found)
            peak = max(run["peak_bytes"] for run in found) / 2**20
            each = ", ".join(f"{ms:.1f}" for ms in steps[name])
            ratio = median(steps[name]) / median(steps["as-is"])
            speed = f"{median(steps[name]):.1f} ({each})"
            print(f"| {context:,} | {name} | {prompt:.2f} | {speed} | {peak:,.0f} | {ratio:.2f}x |")
        sys.stdout.flush()


def _quality(path: Path, folders: dict[str, Path], windows: int, tokens: int) -> None:
    from skv_export.verification import graph_variants

    cut = cut_windows(load_tokenizer(folders["as-is"]), read_text(None), windows, tokens).tolist()
    found: dict[str, float] = {"llama.cpp": float(np.mean([_llama(path, "f16", ids, True)["nll"] for ids in cut]))}
    for name, folder in folders.items():
        session = graph_variants.all_logits(folder)
        found[name] = float(
            np.mean([nll(session.run([ids], None, None, session.cache(1, len(ids)))[0], ids) for ids in cut])
        )
    print("\n| | perplexity | against fp32 | data file MB |\n|---|---|---|---|")
    for name, value in found.items():
        size = f"{(folders[name] / 'model.onnx.data').stat().st_size / 1e6:.0f}" if name in folders else ""
        size = size or f"{path.stat().st_size / 1e6:.0f}"
        print(f"| {name} | {np.exp(value):.4f} | {np.exp(value - found['fp32']) - 1:+.3%} | {size} |", flush=True)


def main() -> None:
    """Measures and prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--context", default="128,2048,7000")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(_worker(json.loads(sys.stdin.read()))))
        return
    from skv_export.export.pipeline import export_model  # not in a worker, whose memory is measured

    path = given.file or demo_checkpoint()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(i) for i, name in enumerate(OURS)}
        for name, options in OURS.items():
            recipe = Recipe().with_options(**options)
            export_model(path, out=folders[name], recipe=recipe, progress=lambda phase, fraction: None)
        if given.windows:
            _quality(path, folders, given.windows, given.window)
        if contexts := [int(part) for part in given.context.split(",") if part]:
            _speed(path, folders, contexts, given.rounds, given.threads, given.clock)


if __name__ == "__main__":
    main()
