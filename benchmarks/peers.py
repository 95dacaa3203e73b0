"""Against what a user would pick instead: ONNX Runtime, llama.cpp and OpenVINO, in one run.

    python benchmarks/peers.py [--json benchmarks/peers.json] [--threads 2] [--clock wall] [--context 128,2048,7000]
    python benchmarks/peers.py --only batch                        # the other parts stay as the JSON file has them
    python benchmarks/peers.py --render benchmarks/peers.json      # writes the tables of README.md and RESULTS.md anew

Four parts. attention: one decode step in four shapes, and how long its bytes take at the rate at which as many threads
read memory. model: the demo model's GGUF file, exported as it is (with exact products and with int8 ones, which is what
llama.cpp and OpenVINO compute), exported in float32, and run by the others; K4V2. batch: several sequences that decode
together, in these runtimes and in onnxruntime-genai, whose builder rounds the same weights to int4. quality:
perplexity, windows of the shipped prose, each in one call, so that every candidate's attention is exact and what
differs is the weights' arithmetic. The peers' packages are optional: llama-cpp-python, openvino-genai and
onnxruntime-genai; what is not installed is left out and named. Times by the wall clock are worth as much as the machine
is idle; on a busy one, --threads 1 and --clock cpu count the processor time of one thread.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
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
from skv_export.provenance import package_version, versions
from skv_export.runtime.prompts import load_tokenizer
from skv_export.spec.recipe import LayerConfig, Recipe

ROOT = Path(__file__).resolve().parents[1]
SHAPES = (
    AttentionShape(4096, 32, 8, 128),
    AttentionShape(32768, 32, 8, 128),
    AttentionShape(32768, 8, 8, 128),
    AttentionShape(32768, 9, 3, 64),
)
OURS: dict[str, dict[str, Any]] = {
    "int8 products": {"weights": "as-is", "accuracy_level": 4},
    "exact products": {"weights": "as-is"},
    "fp32 weights": {"weights": "fp32"},
}
THEIRS = ("llama.cpp", "llama.cpp-q8_0", "llama.cpp-q4_0", "openvino-u8", "openvino-u8-u4")
TOGETHER = ("llama.cpp", "llama.cpp-q8_0", "openvino-u8")
"""Of ``THEIRS``, those that decode several sequences here."""
PARTS = {"attention": "attention", "model": "whole models", "batch": "sequences together", "quality": "perplexity"}
READ_BYTES = 64 << 20
"""That a thread reads to tell the memory's rate: more than a processor's caches hold, as a rule."""
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
        found.append(
            {
                "shape": dataclasses.asdict(shape),
                "noise": remark(rows),
                "rows": [vars(row) for row in rows],
                "read_gb_per_s": read_rate(threads, clock),
            }
        )
    return found


def read_rate(threads: int, clock: str, repetitions: int = 9) -> float:
    """GB/s at which so many threads read memory, the best of some passes; numpy's loop does hardly more than that."""
    now, count = CLOCKS[clock], threads or os.cpu_count() or 1
    buffers = [np.ones(READ_BYTES // 8, np.uint64) for _ in range(count)]
    seconds = []
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        for _ in range(repetitions):
            start = now()
            list(pool.map(np.bitwise_or.reduce, buffers))
            seconds.append(now() - start)
    return count * READ_BYTES / min(seconds) / 1e9


def models(file: Path, folders: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Prefill, decode and memory of whole models, in turns."""
    first, *others = folders.values()
    against = [str(folder) for folder in others] + [f"{name}={file}" for name in THEIRS if installed(name)]
    context = [int(part) for part in given.context.split(",")]
    return _timed(folders, given, first, against=against, context=context, steps=given.steps)


def batch(file: Path, folders: dict[str, Path], genai: Path | None, given: argparse.Namespace) -> dict[str, Any]:
    """The same where several sequences decode together: exports of the file's own weights, and the others."""
    first, second = (folders[name] for name in OURS if OURS[name]["weights"] == "as-is")
    against = [str(second), *([str(genai)] if genai else [])]
    against += [f"{name}={file}" for name in TOGETHER if installed(name)]
    counts = [int(part) for part in given.sequences.split(",")]
    return _timed(
        folders, given, first, against=against, context=[given.batch_context], sequences=counts, steps=given.batch_steps
    )


def _timed(folders: dict[str, Path], given: argparse.Namespace, first: Path, **what: Any) -> dict[str, Any]:
    rows = bench_model(first, threads=given.threads, rounds=given.rounds, clock=given.clock, **what)
    names = {f"skv {folder.name}": f"K4V2, {name}" for name, folder in folders.items()}
    names |= {"skv": f"K4V2, {next(iter(folders))}", "genai": "genai, int4 weights"}
    return {"noise": remark(rows), "rows": [{**vars(row), "name": names.get(row.name, row.name)} for row in rows]}


def genai_folder(place: Path) -> Path | None:
    """The demo model as onnxruntime-genai's builder writes it, in int4; None where it can't."""
    if not installed("genai"):
        return None
    checkpoint, out = str(place / "checkpoint"), place / "genai"
    for step in (["convert", checkpoint], ["build", checkpoint, str(out), "int4"]):
        command = [sys.executable, str(ROOT / "benchmarks" / "export_scale.py"), *step]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print("genai: left out,", (done.stderr.strip().splitlines() or ["no word"])[-1], file=sys.stderr)
            return None
    return out


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
        ours = each["rows"][0]
        ratios = [f"{ours['speedup'][name]:.1f}x" for name in names]
        lines.append([_head(each["shape"]), f"{ours['ms_median']:.2f}", *ratios])
    return table(["N / N_kv / D, context", "K4V2 ms", *(f"`{name}`" for name in names)], lines)


def bound_table(figures: dict[str, Any]) -> str:
    """A line per shape: what a step reads, how long that takes at the memory's rate, its fastest time."""
    lines = []
    for each in figures["attention"]:
        ours, rate = each["rows"][0], each["read_gb_per_s"]
        bound = ours["bytes"] / rate / 1e6
        numbers = [f"{ours['bytes'] / 1e6:.1f}", f"{rate:.1f}", f"{bound:.2f}", f"{ours['ms_min']:.2f}"]
        lines.append([_head(each["shape"]), *numbers, f"{bound / ours['ms_min']:.0%}"])
    titles = ["N / N_kv / D, context", "MB read", "GB/s of memory", "bound by bytes, ms", "fastest, ms", "ratio"]
    return table(titles, lines)


def _head(shape: dict[str, int]) -> str:
    return f"{shape['num_heads']} / {shape['kv_num_heads']} / {shape['head_dim']}, {shape['context']:,}"


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


def batch_table(figures: dict[str, Any]) -> str:
    """A line per candidate, a column per number of sequences: tokens of all of them per second."""
    rows = figures["batch"]["rows"]
    counts = sorted({row["sequences"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = {row["sequences"]: row for row in rows if row["name"] == name}
        rates = [f"{mine[n]['tokens_per_s']:.0f}" for n in counts]
        prompts = " / ".join(f"{mine[n]['prefill_seconds']:.1f}" for n in counts)
        peaks = " / ".join(f"{mine[n]['peak_bytes'] / 2**20:.0f}" for n in counts)
        lines.append([name, *rates, prompts, peaks])
    titles = [f"{n} sequence{'s' * (n > 1)}, tokens/s" for n in counts]
    return table(["", *titles, "prompts, s", "peak MiB"], lines)


def quality_table(figures: dict[str, Any]) -> str:
    """A line per form of the weights."""
    lines = [
        [row["name"], f"{row['bytes'] / 1e6:.0f}", f"{row['perplexity']:.4f}", f"{row['against_fp32_percent']:+.3f}%"]
        for row in figures["quality"]
    ]
    return table(["", "MB", "perplexity", "against fp32 weights"], lines)


def conditions(figures: dict[str, Any]) -> str:
    """How it was measured: a sentence, or one for each of the parts that were measured apart."""
    groups: dict[str, list[str]] = {}
    for part, given in figures["conditions"].items():
        kind = "the wall's clock" if given["clock"] == "wall" else "processor time"
        used = ", ".join(f"{name} {version}" for name, version in given["versions"].items())
        groups.setdefault(f"{given['machine']}, {given['threads']} threads, {kind}; {used}.", []).append(part)
    lines = []
    for text, parts in groups.items():
        count = len(noises(figures, parts))
        loud = f" {count} of its parts had times too noisy to read." if count else ""
        names = ", ".join(PARTS[part] for part in PARTS if part in parts)
        lines.append(textwrap.fill(f"{names.capitalize()}: {text}{loud}" if len(groups) > 1 else text + loud, 120))
    return "\n\n".join(lines)


def noises(figures: dict[str, Any], parts: Sequence[str] = tuple(PARTS)) -> list[str]:
    """What was said of noise in these parts."""
    each = [x for part in parts for x in (figures.get(part, []) if part == "attention" else [figures.get(part, {})])]
    return [x["noise"] for x in each if isinstance(x, dict) and x.get("noise")]


def sections(figures: dict[str, Any]) -> list[str]:
    """Titles and tables of the parts that there are."""
    found = []
    if "attention" in figures:
        found += ["Attention, one decode step; by how much the others take longer:", attention_table(figures)]
        if all("read_gb_per_s" in each for each in figures["attention"]):
            found += ["What bounds a step of K4V2, at the rate at which its threads read memory:", bound_table(figures)]
    if "model" in figures:
        found += ["Whole models:", model_table(figures)]
    if "batch" in figures:
        context = figures["batch"]["rows"][0]["context"]
        found += [f"Sequences of {context:,} tokens that decode together:", batch_table(figures)]
    if "quality" in figures:
        found += ["Perplexity:", quality_table(figures)]
    return found


def render(figures: dict[str, Any], results: Path, readme: Path) -> None:
    """Replaces what stands between the marks in the two files."""
    _between(results, "\n\n".join([conditions(figures), *sections(figures)]))
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
    parser.add_argument("--sequences", default="1,2,4,8", help="That decode together, in the part batch.")
    parser.add_argument("--batch-context", type=int, default=2048, help="Tokens of each of their prompts.")
    parser.add_argument("--batch-steps", type=int, default=8)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "peers.json")
    parser.add_argument("--only", default=",".join(PARTS), help="Parts, commas between; the file keeps the others.")
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
    only = ["quality"] if given.quality_only else given.only.split(",")
    if unknown := [part for part in only if part not in PARTS]:
        parser.error(f"--only: {', '.join(unknown)}; expected {', '.join(PARTS)}")
    for name in ("genai", *THEIRS):
        if not installed(name):
            print(f"{name}: left out, pip install {PEERS[name].package}", file=sys.stderr)
    file = given.file or demo_checkpoint()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / f"export-{i}" for i, name in enumerate(OURS)}
        if only != ["attention"]:
            export(file, folders)
        if given.quality_only:
            print(quality_table({"quality": quality(file, folders, given.windows, given.window)}))
            return
        # Another file's weights are not the demo model's, which is all that the builder gets here.
        genai = genai_folder(Path(scratch)) if "batch" in only and not given.file else None
        measures: dict[str, Callable[[], Any]] = {
            "quality": lambda: quality(file, folders, given.windows, given.window),
            "attention": lambda: attention(given.threads, given.clock, given.repetitions),
            "model": lambda: models(file, folders, given),
            "batch": lambda: batch(file, folders, genai, given),
        }
        figures = measure({part: measures[part] for part in measures if part in only}, given)
    print(conditions(figures), *sections(figures), sep="\n\n")
    for each in noises(figures, only):
        print(each, file=sys.stderr)


def export(file: Path, folders: dict[str, Path]) -> None:
    """Our forms of a file."""
    from skv_export.export.pipeline import export_model

    for name, options in OURS.items():
        recipe = Recipe().with_options(**options)
        export_model(file, out=folders[name], recipe=recipe, progress=lambda phase, fraction: None)


def measure(parts: dict[str, Callable[[], Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Measures parts, and writes each to the JSON file, beside what stands there of others; returns what stands there.

    Each has the conditions under which it was measured.
    """
    figures: dict[str, Any] = json.loads(given.json.read_text()) if given.json.exists() else {"conditions": {}}
    packages = {PEERS[name].package for name in ("genai", *THEIRS)}
    used = versions() | {name: version for name in sorted(packages) if (version := package_version(name))}
    for part, run in parts.items():
        figures[part] = run()
        figures["conditions"][part] = {
            "machine": machine(), "threads": given.threads, "clock": given.clock, "versions": used,
        }  # fmt: skip
        given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main()
