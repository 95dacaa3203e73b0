"""How fast is `analyze`? Seconds, bytes and peak memory for an 8B- and a 70B-shaped set of projections.

    python benchmarks/analyze_speed.py FOLDER [--shape 8b|70b] [--layers N] [--svd-layers 1]

Writes random bf16 shards to FOLDER if they are not there (only the projections and norms exist), then times, each in a
process of its own, page cache dropped where that is allowed: a copy of the shards, reading them, the analysis, and
torch.linalg.svdvals on the matrices of --svd-layers layers (scaled up to all; 0 = not).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHAPES = {"8b": (32, 4096, 32, 8, 128), "70b": (80, 8192, 64, 8, 128)}


def make(folder: Path, shape: str, layers: int) -> None:
    _, hidden, heads, kv_heads, dim = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "max_position_embeddings": 131072,
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weight_map = {}
    for i in range(layers):
        base = f"model.layers.{i}."
        tensors = {base + "input_layernorm.weight": np.ones(hidden, ml_dtypes.bfloat16)}
        for part, rows in (("q", heads * dim), ("k", kv_heads * dim), ("v", kv_heads * dim)):
            w = rng.standard_normal((rows, hidden), dtype=np.float32)
            tensors[f"{base}self_attn.{part}_proj.weight"] = (w / hidden**0.5).astype(ml_dtypes.bfloat16)
        name = f"model-{i:05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        if not (folder / name).exists():
            save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def drop_caches() -> bool:
    """Empties the page cache, where this process may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def copy(folder: Path, _: int) -> dict[str, float]:
    start, total = time.perf_counter(), 0
    target = folder / "copy"
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as source, target.open("wb") as out:
            while chunk := source.read(1 << 24):
                total += out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    target.unlink()
    return {"seconds": time.perf_counter() - start, "bytes": total}


def read(folder: Path, _: int) -> dict[str, float]:
    start, total = time.perf_counter(), 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as source:
            while chunk := source.read(1 << 24):
                total += len(chunk)
    return {"seconds": time.perf_counter() - start, "bytes": total}


def run(folder: Path, _: int) -> dict[str, float]:
    from skv_export.analysis.pipeline import analyze

    base = peak_mib()
    start, cpu = time.perf_counter(), time.process_time()
    found = analyze(folder)
    used = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return {**used, "bytes": found.bytes_read, "peak_mib": peak_mib(), "imports_mib": base}


def peak_mib() -> float:
    """Peak resident memory, mapped pages of files included (getrusage would count the parent's too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def svd(folder: Path, layers: int) -> dict[str, float]:
    import torch

    from skv_export.checkpoints.attention_weights import AttentionReader
    from skv_export.checkpoints.checkpoint import Checkpoint

    reader = AttentionReader(Checkpoint.open(folder))
    start, cpu = time.perf_counter(), time.process_time()
    for i in range(layers):
        layer = reader.layer(i)
        for w in (layer.q, layer.k, layer.v):
            torch.linalg.svdvals(torch.from_numpy(np.asarray(w, np.float32)))
    scale = reader.config.num_hidden_layers / layers
    return {"seconds": (time.perf_counter() - start) * scale, "cpu_seconds": (time.process_time() - cpu) * scale}


STEPS = {"copy": copy, "read": read, "analyze": run, "svdvals": svd}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--svd-layers", type=int, default=1)
    parser.add_argument("--step", choices=STEPS)
    a = parser.parse_args()
    if a.step:
        print(json.dumps(STEPS[a.step](a.folder, a.svd_layers)))
        return
    layers = a.layers or SHAPES[a.shape][0]
    make(a.folder, a.shape, layers)
    projection = SHAPES[a.shape][1] * SHAPES[a.shape][2] * SHAPES[a.shape][4] * 2 / 2**20
    print(f"{a.shape}, {layers} layers; one query projection is {projection:.0f} MiB; cold cache: {drop_caches()}\n")
    for step in STEPS:
        if step == "svdvals" and not a.svd_layers:
            continue
        drop_caches()
        command = [sys.executable, __file__, str(a.folder), "--step", step, "--svd-layers", str(a.svd_layers)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{step:8} " + "  ".join(f"{key} {value:,.1f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
