"""How long does `skv-export model` take, and how much memory, for models of real size? And beside genai's builder?

    python benchmarks/export_scale.py shape 1.1b 8b --options "--weights bf16" --options "--weights int4"
    python benchmarks/export_scale.py shape layers-16 layers-32 layers-80
    python benchmarks/export_scale.py genai --precision fp32 --precision int4 --rounds 3

`shape` writes a llama checkpoint of that shape (random bf16 weights in safetensors shards, tensor by tensor, no
tokenizer), exports it once per --options, and copies the checkpoint; all of it is deleted again. `genai` exports
the demo model and builds it with onnxruntime-genai's model builder, from the same safetensors, in turns.

Every export is a process of its own. Its peak is that of its resident memory, mapped pages of files included, beside
the peak of the anonymous part, which can't be given back; both are sampled. Files are dropped from the page cache
before they are read, and a copy ends when it is on the disk, as an export does. Output: Markdown for RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHARD_BYTES = 2 << 30
BLOCK = 1 << 23
"""Numbers that are made at once."""
SAMPLE_SECONDS = 0.02
EXPORT = [sys.executable, "-P", "-c", "from skv_export.cli.main import main; main()", "model"]


# The checkpoint.


@dataclass(frozen=True)
class Shape:
    """A llama architecture, embeddings untied."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
            "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
            "attention_bias": False, "mlp_bias": False, **vars(self),
        }  # fmt: skip

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name to shape, in the order of the files."""
        hidden, middle = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.num_hidden_layers):
            base = f"model.layers.{i}."
            shapes |= {f"{base}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
            shapes |= {
                f"{base}self_attn.{p}_proj.weight": (n, hidden) for p, n in (("q", queries), ("k", keys), ("v", keys))
            }
            shapes[f"{base}self_attn.o_proj.weight"] = (hidden, queries)
            shapes |= {f"{base}mlp.{p}_proj.weight": (middle, hidden) for p in ("gate", "up")}
            shapes[f"{base}mlp.down_proj.weight"] = (hidden, middle)
        return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocab_size, hidden)}


def _layers(count: int) -> Shape:
    return Shape(256, 768, count, 4, 2, 64, 1024)


SHAPES = {
    "1.1b": Shape(2048, 5632, 22, 32, 4, 64, 32_000),  # TinyLlama
    "8b": Shape(4096, 14_336, 32, 32, 8, 128, 128_256, 8192, 500_000.0),  # Llama 3
    **{f"layers-{count}": _layers(count) for count in (16, 32, 80)},
}


def make(folder: Path, shape: Shape, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a checkpoint: matrices uniform with the variance of a trained one's start, norms of ones."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in shape.tensors().items():
        if shards[-1] and sum(map(_bytes, shards[-1].values())) + _bytes(size) > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    rng, weight_map = np.random.default_rng(0), dict[str, str]()
    for i, tensors in enumerate(shards, 1):
        file = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(file, tensors, rng)
        weight_map |= dict.fromkeys(tensors, file.name)
    index = {"metadata": {"total_size": size_of_weights(shape)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(file: Path, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header, offset = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [offset, offset + _bytes(size)]}
        offset += _bytes(size)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for size in tensors.values():
            count = math.prod(size)
            for start in range(0, count, BLOCK):
                out.write(_numbers(min(BLOCK, count - start), size, rng))


def _numbers(count: int, size: tuple[int, ...], rng: np.random.Generator) -> bytes:
    """So many bfloat16: the upper halves of float32."""
    if len(size) == 1:
        values = np.ones(count, np.float32)
    else:
        values = (rng.random(count, np.float32) - np.float32(0.5)) * np.float32((12 / size[1]) ** 0.5)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def _bytes(size: tuple[int, ...]) -> int:
    return 2 * math.prod(size)


def size_of_weights(shape: Shape) -> int:
    return sum(map(_bytes, shape.tensors().values()))


# Measuring.


@dataclass(frozen=True)
class Run:
    """One process: wall and processor time, peak of the resident memory and of its anonymous part, in bytes."""

    seconds: float
    cpu_seconds: float
    peak: int
    anonymous: int


def measured(command: Sequence[str]) -> Run:
    """Runs a command to its end; exits with the end of what it said where it fails."""
    peak = anonymous = 0
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            # Not the usage's ru_maxrss: on Linux that is the parent's at least.
            peak = max(peak, _status(process.pid, "VmHWM"))
            anonymous = max(anonymous, _status(process.pid, "RssAnon"))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{shlex.join(command)}: exit code {process.returncode}\n{log.read().decode()[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak, anonymous)


def _status(pid: int, key: str) -> int:
    """Bytes of an entry of /proc/PID/status; 0 once the process has ended."""
    _, found, rest = Path(f"/proc/{pid}/status").read_text().partition(f"{key}:")
    return 1024 * int(rest.split()[0]) if found else 0


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache, so that they are read from the disk."""
    for file in _files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copied(source: Path, target: Path) -> float:
    """Seconds that a plain copy of a folder's files takes, each until it is on the disk; a copy is deleted at once."""
    forget(source)
    seconds = 0.0
    for file in _files(source):
        start = time.perf_counter()
        shutil.copyfile(file, target)
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        seconds += time.perf_counter() - start
        target.unlink()
    return seconds


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


# The comparisons.


def scale(names: Sequence[str], options: Sequence[str], work: Path) -> Iterator[str]:
    """A row per shape and options: the export, what it wrote per second, and the same of a copy of the checkpoint."""
    yield (
        "| shape | options | checkpoint GB | written GB | seconds | processor seconds | peak MiB | of it anonymous | "
        "MB/s | copy MB/s |\n" + "|---" * 10 + "|"
    )
    for name in names:
        checkpoint, out = work / name, work / "out"
        _require(work, size_of_weights(SHAPES[name]))  # the export sees for itself whether there is room for its own
        make(checkpoint, SHAPES[name])
        for given in options:
            forget(checkpoint)
            run = measured([*EXPORT, str(checkpoint), "--out", str(out), *shlex.split(given)])
            written = size_of(out)
            size, copy = size_of(checkpoint), copied(checkpoint, work / "copy")
            numbers = [f"{size / 1e9:.2f}", f"{written / 1e9:.2f}", f"{run.seconds:.1f}"]
            numbers += [f"{run.cpu_seconds:.1f}", f"{run.peak / 2**20:.0f}", f"{run.anonymous / 2**20:.0f}"]
            numbers += [f"{written / run.seconds / 1e6:.0f}", f"{size / copy / 1e6:.0f}"]
            yield f"| {name} | {given or 'defaults'} | {' | '.join(numbers)} |"
            shutil.rmtree(out)
        shutil.rmtree(checkpoint)


def against_genai(precisions: Sequence[str], rounds: int, options: str, work: Path) -> Iterator[str]:
    """A row per precision: our export and genai's builder, in turns; medians of the times, the largest peaks."""
    checkpoint, out = work / "demo", work / "out"
    measured([sys.executable, __file__, "convert", str(checkpoint)])
    yield (
        "| weights | ours, seconds | genai, seconds | ratio | of processor time | ours, peak MiB | genai, peak MiB | "
        "ratio |\n" + "|---" * 8 + "|"
    )
    for precision in precisions:
        ours = [*EXPORT, str(checkpoint), "--out", str(out), "--weights", precision, *shlex.split(options)]
        theirs = [sys.executable, __file__, "build", str(checkpoint), str(out), precision]
        runs: tuple[list[Run], list[Run]] = ([], [])
        for _ in range(rounds):
            for command, done in zip((ours, theirs), runs, strict=True):
                forget(checkpoint)
                done.append(measured(command))
                shutil.rmtree(out)
        seconds, cpu = (
            [statistics.median(getattr(r, x) for r in done) for done in runs] for x in ("seconds", "cpu_seconds")
        )
        peaks = [max(r.peak for r in done) / 2**20 for done in runs]
        yield (
            f"| {precision} | {seconds[0]:.1f} | {seconds[1]:.1f} | **{seconds[0] / seconds[1]:.2f}** | "
            f"{cpu[0] / cpu[1]:.2f} | {peaks[0]:.0f} | {peaks[1]:.0f} | **{peaks[0] / peaks[1]:.2f}** |"
        )


def convert(folder: Path) -> None:
    """The demo model's GGUF file as safetensors, which genai's builder reads."""
    from skv_export.checkpoints.checkpoint import resolve
    from skv_export.checkpoints.demo_model import demo_checkpoint
    from skv_export.checkpoints.pretrained import load_model, load_tokenizer

    source = resolve(demo_checkpoint())
    model = load_model(source)
    model.hf_quantizer, model.is_quantized = None, False  # save_pretrained refuses what came from a GGUF file otherwise
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


def build(checkpoint: Path, out: Path, precision: str) -> None:
    """onnxruntime-genai's model builder."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    with tempfile.TemporaryDirectory() as cache:
        options = parse_extra_options("", str(checkpoint), str(out), precision, "cpu", cache, [])
        create_model("", str(checkpoint), str(out), precision, "cpu", cache, **options)


def _require(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if free < needed:
        sys.exit(f"{work}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB needed; give another folder: --work")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shape = commands.add_parser("shape", help="exports of random checkpoints")
    shape.add_argument("names", nargs="+", choices=SHAPES)
    shape.add_argument(
        "--options", action="append", help='of `skv-export model`, e.g. "--weights int4"; may be repeated'
    )
    genai = commands.add_parser("genai", help="the demo model, in turns with onnxruntime-genai's model builder")
    genai.add_argument(
        "--precision", action="append", help="of the weights, for both; may be repeated  [default: fp32, int4]"
    )
    genai.add_argument("--rounds", type=int, default=3)
    genai.add_argument("--options", default="", help="further ones of `skv-export model`")
    for each in (shape, genai):
        each.add_argument("--work", type=Path, help="folder on the disk to measure  [default: the temporary one]")
    steps = {"convert": ["folder"], "build": ["checkpoint", "out", "precision"]}  # processes of the comparison
    for name, arguments in steps.items():
        step = commands.add_parser(name)
        for argument in arguments:
            step.add_argument(argument, type=str if argument == "precision" else Path)
    a = parser.parse_args()
    if a.command == "convert":
        convert(a.folder)
    elif a.command == "build":
        build(a.checkpoint, a.out, a.precision)
    else:
        with tempfile.TemporaryDirectory(dir=a.work, prefix="export-scale-") as name:
            if a.command == "shape":
                rows = scale(a.names, a.options or [""], Path(name))
            else:
                rows = against_genai(a.precision or ["fp32", "int4"], a.rounds, a.options, Path(name))
            for row in rows:
                print(row, flush=True)


if __name__ == "__main__":
    main()
