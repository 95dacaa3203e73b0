"""Against what a user would pick instead: ONNX Runtime, llama.cpp and OpenVINO, in one run.

    python benchmarks/peers.py [--json benchmarks/peers.json] [--threads 2] [--clock wall] [--context 128,2048,7000]
    python benchmarks/peers.py --render benchmarks/peers.json      # writes the tables of README.md and RESULTS.md anew

One decode step of attention in four shapes, then the demo model's GGUF file: exported as it is (with exact products and
with int8 ones, which is what llama.cpp and OpenVINO compute), exported in float32, and run by the others. K4V2. Then
perplexity: windows of the shipped prose, each in one call, so that every candidate's attention is exact and what
differs is the weights' arithmetic. The peers' packages are optional: llama-cpp-python and openvino-genai; what is not
installed is left out and named. Times by the wall clock are worth as much as the machine is idle; on a busy one,
--threads 1 and --clock cpu count the processor time of one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from skv_export.bench.attention import DEFAULT_BASELINES, bench_attention
from skv_export.bench.attention_candidates import BASELINES, AttentionShape
from skv_export.bench.model import bench_model
from skv_export.bench.model_peers import PEERS
from skv_export.bench.noise import CLOCKS, remark
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.evaluation.text import cut_windows, read_text
from skv_export.provenance import versions
from skv_export.runtime.prompts import load_tokenizer
from skv_export.spec.recipe import LayerConfig, Recipe

ROOT = Path(__file__).resolve().parents[1]
SHAPES = (
    AttentionShape(4096, 32, 8, 128),
    AttentionShape(32768, 32, 8, 128),
    AttentionShape(32768, 8, 8, 128),
    AttentionShape(32768, 9, 3, 64),
)
OURS = {
    "int8 products": {"weights": "as-is", "accuracy_level": 4},
    "exact products": {"weights": "as-is"},
    "fp32 weights": {"weights": "fp32"},
}
THEIRS = ("llama.cpp", "llama.cpp-q8_0", "llama.cpp-q4_0", "openvino-u8", "openvino-u8-u4")
BEGIN, END = "<!-- peers: written by benchmarks/peers.py -->", "<!-- end of peers -->"


def installed(name: str) -> bool:
    """Whether a peer's package is there."""
    return importlib.util.find_spec(PEERS[name].module) is not None


def attention(threads: int, clock: str, repetitions: int) -> list[dict[str, Any]]:
    """One decode step of each shape, in turns."""
    names = [*DEFAULT_BASELINES, *(n for n, found in BASELINES.items() if found.ggml and installed("llama.cpp"))]
    found = []
    for shape in SHAPES:
        rows = bench_attention(
            shape, [LayerConfig()], baselines=names, threads=threads, repetitions=repetitions, clock=clock
        )
        found.append({"shape": dataclasses.asdict(shape), "noise": remark(rows), "rows": [vars(row) for row in rows]})
    return found


def models(file: Path, folders: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Prefill, decode and memory of whole models, in turns."""
    first, *others = folders.values()
    against = [str(folder) for folder in others] + [f"{name}={file}" for name in THEIRS if installed(name)]
    rows = bench_model(
        first,
        against=against,
        context=[int(part) for part in given.context.split(",")],
        threads=given.threads,
        rounds=given.rounds,
        steps=given.steps,
        clock=given.clock,
    )
    names = {f"skv {folder.name}": name for name, folder in folders.items()} | {"skv": next(iter(folders))}
    named = [{**vars(row), "name": f"K4V2, {names[row.name]}" if row.name in names else row.name} for row in rows]
    return {"noise": remark(rows), "rows": named}


def quality(file: Path, folders: dict[str, Path], windows: int, tokens: int) -> list[dict[str, Any]]:
    """Perplexity of the same text, exact attention."""
    from skv_export.verification import graph_variants

    cut = cut_windows(load_tokenizer(next(iter(folders.values()))), read_text(None), windows, tokens).tolist()
    found: dict[str, float] = {}
    for name, folder in folders.items():
        session = graph_variants.all_logits(folder)
        run = [nll(session.run([ids], None, None, session.cache(1, len(ids)))[0], ids) for ids in cut]
        found[name] = float(np.mean(run))
    if installed("llama.cpp"):
        job = json.dumps({"path": str(file), "windows": cut})
        done = subprocess.run(
            [sys.executable, __file__, "--worker"], input=job, capture_output=True, text=True, check=True
        )
        found["llama.cpp"] = float(json.loads(done.stdout.splitlines()[-1]))
    sizes = {name: (folder / "model.onnx.data").stat().st_size for name, folder in folders.items()}
    return [
        {
            "name": name,
            "perplexity": float(np.exp(value)),
            "against_fp32_percent": 100 * float(np.expm1(value - found["fp32 weights"])),
            "bytes": sizes.get(name, file.stat().st_size),
        }
        for name, value in found.items()
    ]


def nll(logits: np.ndarray, ids: list[int]) -> float:
    """Mean negative logarithm of the probabilities of a text's tokens but the first."""
    rows = logits[:-1].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    taken = rows[np.arange(len(rows)), ids[1:]]
    return float((np.log(np.exp(rows).sum(-1)) - taken).mean())


def worker(job: dict[str, Any]) -> float:
    """llama.cpp, in its own process: the mean over windows of ``nll``."""
    import llama_cpp

    longest = max(map(len, job["windows"]))
    llama = llama_cpp.Llama(job["path"], n_ctx=longest, n_batch=512, flash_attn=True, logits_all=True, verbose=False)
    found = []
    for ids in job["windows"]:
        llama.reset()
        llama.eval(ids)
        found.append(nll(np.array(llama.scores[: len(ids)]), ids))
    return float(np.mean(found))


# From figures to tables.


def table(titles: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, ["---"] * len(titles), *lines])


def attention_table(figures: dict[str, Any]) -> str:
    """A line per shape: our milliseconds, and by how much each baseline takes longer."""
    names = list(figures["attention"][0]["rows"][0]["speedup"])
    lines = []
    for each in figures["attention"]:
        shape, ours = each["shape"], each["rows"][0]
        head = f"{shape['num_heads']} / {shape['kv_num_heads']} / {shape['head_dim']}, {shape['context']:,}"
        ratios = [f"{ours['speedup'][name]:.1f}x" for name in names]
        lines.append([head, f"{ours['ms_median']:.2f}", *ratios])
    return table(["N / N_kv / D, context", "K4V2 ms", *(f"`{name}`" for name in names)], lines)


def model_table(figures: dict[str, Any], wanted: Callable[[str], bool] = lambda name: True) -> str:
    """A line per candidate, columns by context."""
    rows = figures["model"]["rows"]
    contexts = sorted({row["context"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows if wanted(row["name"])):
        mine = {row["context"]: row for row in rows if row["name"] == name}
        cells = [[f"{mine[n]['prefill_seconds']:.2f}", f"{mine[n]['ms_median']:.1f}"] for n in contexts]
        peaks = " / ".join(f"{mine[n]['peak_bytes'] / 2**20:.0f}" for n in contexts)
        lines.append([name, *(cell for pair in cells for cell in pair), peaks])
    titles = [title for n in contexts for title in (f"prompt of {n:,}, s", "ms per token")]
    return table(["", *titles, "peak MiB"], lines)


def quality_table(figures: dict[str, Any]) -> str:
    """A line per form of the weights."""
    lines = [
        [row["name"], f"{row['bytes'] / 1e6:.0f}", f"{row['perplexity']:.4f}", f"{row['against_fp32_percent']:+.3f}%"]
        for row in figures["quality"]
    ]
    return table(["", "MB", "perplexity", "against fp32 weights"], lines)


def conditions(figures: dict[str, Any]) -> str:
    """How it was measured, in a sentence."""
    kind = "the wall's clock" if figures["clock"] == "wall" else "processor time"
    noise = [each["noise"] for each in [*figures["attention"], figures["model"]] if each["noise"]]
    used = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    loud = f" {len(noise)} of its parts had times too noisy to read." if noise else ""
    return textwrap.fill(f"{figures['machine']}, {figures['threads']} threads, {kind}; {used}.{loud}", 120)


def render(figures: dict[str, Any], results: Path, readme: Path) -> None:
    """Replaces what stands between the marks in the two files."""
    parts = [conditions(figures), "Attention, one decode step; by how much the others take longer:"]
    parts += [attention_table(figures), "Whole models:", model_table(figures), "Perplexity:", quality_table(figures)]
    _between(results, "\n\n".join(parts))
    short = model_table(figures, lambda name: not name.endswith(("q8_0", "u8-u4", "fp32 weights")))
    _between(readme, short)


def _between(path: Path, text: str) -> None:
    whole = path.read_text(encoding="utf-8")
    before, _, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{path}: no {BEGIN} ... {END}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def machine() -> str:
    """The processor's name and its number of cores."""
    import os

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip() if names else 'a processor'}, {os.cpu_count()} cores"


def main() -> None:
    """Measures, writes JSON, prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="A GGUF file; default: the demo model's.")
    parser.add_argument("--context", default="128,2048,7000")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "peers.json")
    parser.add_argument("--render", type=Path, help="Figures of an earlier run: measure nothing.")
    parser.add_argument("--quality-only", action="store_true", help="Perplexity alone, printed; writes nothing.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(worker(json.loads(sys.stdin.read())))
        return
    if given.render:
        render(json.loads(given.render.read_text()), ROOT / "benchmarks" / "RESULTS.md", ROOT / "README.md")
        return
    from skv_export.export.pipeline import export_model

    for name in THEIRS:
        if not installed(name):
            print(f"{name}: left out, pip install {PEERS[name].package}", file=sys.stderr)
    file = given.file or demo_checkpoint()
    figures = {"machine": machine(), "threads": given.threads, "clock": given.clock, "versions": versions()}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / f"export-{i}" for i, name in enumerate(OURS)}
        for name, options in OURS.items():
            recipe = Recipe().with_options(**options)
            export_model(file, out=folders[name], recipe=recipe, progress=lambda phase, fraction: None)
        figures["quality"] = quality(file, folders, given.windows, given.window)
        if given.quality_only:
            print(quality_table(figures))
            return
        figures["attention"] = attention(given.threads, given.clock, given.repetitions)
        figures["model"] = models(file, folders, given)
    given.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(conditions(figures), attention_table(figures), model_table(figures), quality_table(figures), sep="\n\n")
    for each in [*figures["attention"], figures["model"]]:
        if each["noise"]:
            print(each["noise"], file=sys.stderr)


if __name__ == "__main__":
    main()
