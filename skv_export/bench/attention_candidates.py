"""What the bench of attention times: the op, and the attention of other runtimes, each behind one call.

A candidate whose arithmetic is chosen by an environment variable, or whose runtime is not ours, runs in a process of
its own; it measures each step itself, so the way to it does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from skv_export.bench.noise import CLOCKS
from skv_export.errors import SkvError
from skv_export.native.library import library_path
from skv_export.spec.conformance import make_basis
from skv_export.spec.key_basis import INPUTS, MATRICES
from skv_export.spec.layout import Bytes, CacheLayout
from skv_export.spec.op import (
    INPUT_NAMES,
    OUTPUT_NAMES,
    AttentionParams,
    LayerAttention,
    attention_node,
    one_node_model,
)
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import append

_PAUSE = 0.005
"""Seconds after a step in another process: its threads spin for a while, and would take the next candidate's cores."""
_ORT_INPUTS = INPUT_NAMES[:7]
"""Those that both ops need, of the same names and meaning."""


@dataclass(frozen=True)
class Baseline:
    """The attention of another runtime.

    Attributes:
        bits: Of its cache, scales included; keys and values share them.
        type: Of its cache, as the runtime calls it.
        ggml: llama.cpp's; else ONNX Runtime's GroupQueryAttention.
        environment: Variables that choose its arithmetic; it runs in a process of its own if there are any.
    """

    bits: float
    type: str
    ggml: bool = False
    environment: tuple[tuple[str, str], ...] = ()


BASELINES = {
    "ort-gqa-fp32": Baseline(32, "float32"),
    "ort-gqa-int8": Baseline(8, "PER_CHANNEL"),
    "ort-gqa-int8-vnni": Baseline(8, "PER_TENSOR", environment=(("ORT_MLAS_QKGEMM_S8_APPROX_VNNI", "1"),)),
    "ort-gqa-int4": Baseline(4, "PER_CHANNEL"),
    "ggml-f16": Baseline(16, "f16", ggml=True),
    "ggml-q8_0": Baseline(8.5, "q8_0", ggml=True),
    "ggml-q4_0": Baseline(4.5, "q4_0", ggml=True),
}
"""By name. GroupQueryAttention's float32 code is plain (SSE2), its int8 cache with a scale per tensor and the products
rounded to int8 (``-vnni``) is its fastest; ggml's are llama.cpp's flash attention."""


@dataclass(frozen=True)
class AttentionShape:
    """One decode step of one layer.

    Attributes:
        context: Tokens in the cache.
        num_heads: Query heads.
        kv_num_heads: Key and value heads.
        head_dim: Channels per head.
        batch: Sequences.
    """

    context: int = 4096
    num_heads: int = 32
    kv_num_heads: int = 8
    head_dim: int = 128
    batch: int = 1


@dataclass(frozen=True)
class Candidate:
    """One thing that is timed.

    Attributes:
        name: ``skv-K4V2``, or a key of ``BASELINES``.
        step: Runs one decode step; returns its milliseconds.
        cache_bytes: Bytes of keys and values that a step has to read.
    """

    name: str
    step: Callable[[], float]
    cache_bytes: int


def ours(shape: AttentionShape, config: LayerConfig, threads: int, clock: str, calibrated: bool = False) -> Candidate:
    """The op with a filled cache. Each step writes the same position again, so all steps cost the same.

    What a tile's codes mean does not matter to the time: calibrated keys are read from the cache of plain ones.
    """
    layouts = CacheLayout.pair(config, shape.head_dim)
    caches = [_filled(shape, layout, seed) for seed, layout in enumerate(layouts)]
    attention = LayerAttention(AttentionParams(shape.num_heads, shape.kv_num_heads), layouts)
    more: dict[str, NDArray[Any]] = {}
    if calibrated:
        basis = make_basis(shape.kv_num_heads, shape.head_dim, layouts[0].padded_dim)
        basis.check(layouts[0], shape.kv_num_heads)
        more = {name: getattr(basis, field) for name, field in zip(INPUTS, MATRICES, strict=True)}
    node = attention_node([*_ORT_INPUTS, *more], attention.attributes())
    used = shape.batch * shape.kv_num_heads * sum(layout.block_bytes(shape.context) for layout in layouts)
    name = f"skv-{config.name}{'+cal' if calibrated else ''}"
    return Candidate(name, timed(_step(shape, node, caches, more, threads), clock), used)


def baseline(shape: AttentionShape, name: str, threads: int, clock: str) -> AbstractContextManager[Candidate]:
    """Another runtime's attention over a cache of the same tokens, for as long as the context is open.

    Raises:
        SkvError: Its process could not start; the message carries the end of what it said.
    """
    if BASELINES[name].ggml or BASELINES[name].environment:
        return _in_a_process(shape, name, threads, clock)
    return contextlib.nullcontext(_here(shape, name, threads, clock))


def timed(step: Callable[[], object], clock: str) -> Callable[[], float]:
    """Returns a function that runs ``step`` and returns its milliseconds."""
    now = CLOCKS[clock]

    def run() -> float:
        start = now()
        step()
        return 1e3 * (now() - start)

    return run


def group_query_attention(
    shape: AttentionShape, bits: int, dtype: type[np.floating[Any]] = np.float32, scales: str = "PER_CHANNEL"
) -> tuple[onnx.NodeProto, dict[str, tuple[np.dtype[Any], tuple[int, ...]]]]:
    """ONNX Runtime's op, one new token per sequence, with static scales where its cache is quantized.

    Args:
        shape: What is computed.
        bits: Of the cache: 8, 4, or those of ``dtype``.
        dtype: Of queries, keys, values and output.
        scales: ``PER_CHANNEL`` or ``PER_TENSOR``.

    Returns:
        The node, and its inputs; a cache has room for ``context + 1`` tokens.
    """
    rows = {"query": shape.num_heads, "key": shape.kv_num_heads, "value": shape.kv_num_heads}
    specs: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        name: (np.dtype(dtype), (shape.batch, 1, heads * shape.head_dim)) for name, heads in rows.items()
    }
    width = shape.head_dim // 2 if bits == 4 else shape.head_dim
    held = np.dtype({8: np.int8, 4: np.uint8}.get(bits, dtype))
    for name in ("past_key", "past_value"):
        specs[name] = held, (shape.batch, shape.kv_num_heads, shape.context + 1, width)
    specs["seqlens_k"] = np.dtype(np.int32), (shape.batch,)
    specs["total_sequence_length"] = np.dtype(np.int32), ()
    inputs = list(_ORT_INPUTS)
    attributes: dict[str, Any] = {"num_heads": shape.num_heads, "kv_num_heads": shape.kv_num_heads}
    if bits in (4, 8):
        inputs += [""] * (12 - len(inputs)) + ["k_scale", "v_scale"]
        for name in ("k_scale", "v_scale"):
            size = shape.kv_num_heads * shape.head_dim if scales == "PER_CHANNEL" else 1
            specs[name] = np.dtype(np.float32), (size,)
        attributes |= {"k_quant_type": scales, "v_quant_type": scales, "kv_cache_bit_width": bits}
    return helper.make_node("GroupQueryAttention", inputs, OUTPUT_NAMES, domain="com.microsoft", **attributes), specs


def _here(shape: AttentionShape, name: str, threads: int, clock: str) -> Candidate:
    found = BASELINES[name]
    used = int(2 * shape.batch * shape.kv_num_heads * shape.context * shape.head_dim * found.bits / 8)
    if found.ggml:
        from skv_export.bench.ggml_attention import flash_attention

        return Candidate(name, timed(flash_attention(shape, found.type, threads), clock), used)
    node, specs = group_query_attention(shape, int(found.bits), scales=found.type)
    rng = np.random.default_rng(0)
    caches: list[NDArray[Any]] = []
    for dtype, past in (specs["past_key"], specs["past_value"]):
        if dtype == np.float32:
            caches.append(rng.standard_normal(past, np.float32))
        else:
            caches.append(rng.integers(0, 100, past, np.int8).view(dtype))
    scales = {name: np.full(size, 0.02, np.float32) for name, (_, size) in specs.items() if name.endswith("_scale")}
    return Candidate(name, timed(_step(shape, node, caches, scales, threads), clock), used)


@contextlib.contextmanager
def _in_a_process(shape: AttentionShape, name: str, threads: int, clock: str) -> Iterator[Candidate]:
    job = json.dumps({"shape": asdict(shape), "name": name, "threads": threads, "clock": clock})
    # -P: this package, whatever lies in the folder that the command was given in.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, job],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(BASELINES[name].environment),
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    asks, answers, complaints = process.stdin, process.stdout, process.stderr

    def answer() -> str:
        line = answers.readline()
        if not line:
            said = complaints.read().strip().splitlines() or [f"exit code {process.wait()}"]
            raise SkvError(f"bench: {name} failed", got=said[-1])
        return line

    def step() -> float:
        asks.write("step\n")
        asks.flush()
        milliseconds = float(answer())
        time.sleep(_PAUSE)
        return milliseconds

    try:
        yield Candidate(name, step, int(answer()))
    finally:
        process.kill()
        process.communicate()


def _filled(shape: AttentionShape, layout: CacheLayout, seed: int) -> Bytes:
    """A cache of ``context`` random tokens, the same for all heads."""
    rows, width = layout.shape(shape.context + 1)
    block = np.zeros((1, rows * width), np.uint8)
    tokens = np.random.default_rng(seed).standard_normal((1, shape.context, shape.head_dim), np.float32)
    for start in range(0, shape.context, layout.tile_tokens):  # in pieces: the reference works on whole arrays
        append(layout, block, start, tokens[:, start : start + layout.tile_tokens])
    every = np.broadcast_to(block, (shape.batch, shape.kv_num_heads, rows * width))
    return np.ascontiguousarray(every.reshape(shape.batch, shape.kv_num_heads, rows, width))


def _step(
    shape: AttentionShape,
    node: onnx.NodeProto,
    caches: list[NDArray[Any]],
    more: dict[str, NDArray[Any]],
    threads: int,
) -> Callable[[], None]:
    """Makes a one-node session with everything bound; returns a function that runs it once."""
    rng = np.random.default_rng(1)
    arrays = {
        name: rng.standard_normal((shape.batch, 1, heads * shape.head_dim), np.float32)
        for name, heads in zip(_ORT_INPUTS[:3], (shape.num_heads, *(shape.kv_num_heads,) * 2), strict=True)
    }
    arrays |= dict(zip(_ORT_INPUTS[3:5], caches, strict=True)) | more
    arrays["seqlens_k"] = np.full(shape.batch, shape.context, np.int32)
    arrays["total_sequence_length"] = np.array(shape.context + 1, np.int32)
    session = _session(node, arrays, threads)
    binding, kept = session.io_binding(), {name: ort.OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()}
    for name, held in kept.items():
        binding.bind_ortvalue_input(name, held)
    output = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(arrays["query"]))
    for name, held in zip(OUTPUT_NAMES, (output, kept["past_key"], kept["past_value"]), strict=True):
        binding.bind_ortvalue_output(name, held)

    def step() -> None:
        session.run_with_iobinding(binding)

    step()
    if not np.isfinite(output.numpy()).all():
        raise SkvError(f"bench: output of {node.op_type}", got="numbers that are not finite", expected="finite ones")
    return step


def _session(node: onnx.NodeProto, arrays: dict[str, NDArray[Any]], threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # A session whose threads went on spinning would take the cores from the next candidate.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.register_custom_ops_library(str(library_path()))
    model = one_node_model(node, {name: (array.dtype, array.shape) for name, array in arrays.items()})
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main(job: dict[str, Any]) -> None:
    """Serves one baseline: its cache's bytes on a line, then for each line on standard input a step's milliseconds."""
    candidate = _here(AttentionShape(**job.pop("shape")), **job)
    print(candidate.cache_bytes, flush=True)
    for _ in sys.stdin:
        print(candidate.step(), flush=True)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except SkvError as error:
        sys.exit(str(error))
