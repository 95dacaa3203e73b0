"""Times the attention op against ONNX Runtime's GroupQueryAttention, in one process.

Each candidate is a one-node graph in its own session, with its cache bound in place. The sessions take turns, so that
noise of the machine affects all of them alike.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from skv_export.bench.noise import spread
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

BASELINES = {"ort-gqa-fp32": 32, "ort-gqa-int8": 8, "ort-gqa-int4": 4}
"""ONNX Runtime's GroupQueryAttention by the bits of its cache, which keys and values share."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_WARM_UP = 3
_INPUTS = INPUT_NAMES[:7]
"""Those that both ops need, of the same names and meaning."""


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
class Row:
    """What one candidate needed for one step.

    Attributes:
        name: ``skv-K4V2``, or a key of ``BASELINES``.
        ms_median: Milliseconds, median of the repetitions.
        ms_min: The fastest.
        ms_max: The slowest.
        bytes: Bytes of keys and values that the step has to read.
        gb_per_s: ``bytes`` over the median.
        speedup: Median of each baseline over this one's.
        spread: Of the times; see ``noise.spread``.
    """

    name: str
    ms_median: float
    ms_min: float
    ms_max: float
    bytes: int
    gb_per_s: float
    speedup: dict[str, float]
    spread: float


@dataclass(frozen=True)
class _Candidate:
    name: str
    step: Callable[[], None]
    cache_bytes: int


def bench_attention(
    shape: AttentionShape,
    configs: Sequence[LayerConfig] = (LayerConfig(),),
    *,
    baselines: Sequence[str] = tuple(BASELINES),
    threads: int = 0,
    repetitions: int = 30,
    clock: str = "wall",
    calibrated: bool = False,
) -> list[Row]:
    """Times a decode step of attention for each config and baseline.

    Args:
        shape: What is computed.
        configs: The caches of ours.
        baselines: Keys of ``BASELINES``.
        threads: Threads of each session; 0 = as many as there are cores.
        repetitions: Steps of each candidate that are timed, in turns.
        clock: ``wall``, or ``cpu`` = the processor time of all threads: with one thread, what other processes take does
            not count.
        calibrated: Time each config a second time, with calibrated keys.

    Returns:
        One row per candidate, ours first.

    Raises:
        SkvError: An unknown baseline, or numbers that make no shape.
    """
    for field in dataclasses.fields(shape):
        if getattr(shape, field.name) < 1:
            raise SkvError(f"bench: {field.name}", got=getattr(shape, field.name), expected="at least 1")
    if shape.num_heads % shape.kv_num_heads:
        raise SkvError("bench: num_heads", got=shape.num_heads, expected=f"a multiple of {shape.kv_num_heads}")
    if repetitions < 1:
        raise SkvError("bench: repetitions", got=repetitions, expected="at least 1")
    if clock not in CLOCKS:
        raise SkvError("bench: clock", got=clock, expected=" or ".join(CLOCKS))
    for name in baselines:
        if name not in BASELINES:
            raise SkvError("bench: baseline", got=name, expected=", ".join(BASELINES))
    candidates = [_ours(shape, config, threads) for config in configs]
    candidates += [_ours(shape, config, threads, calibrated=True) for config in configs if calibrated]
    candidates += [_group_query_attention(shape, name, threads) for name in baselines]
    return _rows(candidates, _in_turns(candidates, repetitions, CLOCKS[clock]), baselines)


def _in_turns(candidates: list[_Candidate], repetitions: int, now: Callable[[], float]) -> list[list[float]]:
    """Milliseconds ``[candidate][repetition]``."""
    times: list[list[float]] = [[] for _ in candidates]
    for repetition in range(_WARM_UP + repetitions):
        for candidate, taken in zip(candidates, times, strict=True):
            start = now()
            candidate.step()
            elapsed = now() - start
            if repetition >= _WARM_UP:
                taken.append(1e3 * elapsed)
    return times


def _rows(candidates: list[_Candidate], times: list[list[float]], baselines: Sequence[str]) -> list[Row]:
    medians = {c.name: float(np.median(taken)) for c, taken in zip(candidates, times, strict=True)}
    return [
        Row(
            name=c.name,
            ms_median=medians[c.name],
            ms_min=min(taken),
            ms_max=max(taken),
            bytes=c.cache_bytes,
            gb_per_s=c.cache_bytes / medians[c.name] / 1e6,
            speedup={name: medians[name] / medians[c.name] for name in baselines},
            spread=spread(taken),
        )
        for c, taken in zip(candidates, times, strict=True)
    ]


# The candidates.


def _ours(shape: AttentionShape, config: LayerConfig, threads: int, calibrated: bool = False) -> _Candidate:
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
    node = attention_node([*_INPUTS, *more], attention.attributes())
    used = shape.batch * shape.kv_num_heads * sum(layout.block_bytes(shape.context) for layout in layouts)
    name = f"skv-{config.name}{'+cal' if calibrated else ''}"
    return _Candidate(name, _step(shape, node, caches, more, threads), used)


def group_query_attention(
    shape: AttentionShape, bits: int, dtype: type[np.floating[Any]] = np.float32
) -> tuple[onnx.NodeProto, dict[str, tuple[np.dtype[Any], tuple[int, ...]]]]:
    """ONNX Runtime's op, one new token per sequence, with static scales per channel where its cache is quantized.

    Args:
        shape: What is computed.
        bits: Of the cache: 8, 4, or those of ``dtype``.
        dtype: Of queries, keys, values and output.

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
    inputs = list(_INPUTS)
    attributes: dict[str, Any] = {"num_heads": shape.num_heads, "kv_num_heads": shape.kv_num_heads}
    if bits in (4, 8):
        inputs += [""] * (12 - len(inputs)) + ["k_scale", "v_scale"]
        for name in ("k_scale", "v_scale"):
            specs[name] = np.dtype(np.float32), (shape.kv_num_heads * shape.head_dim,)
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
    return helper.make_node("GroupQueryAttention", inputs, OUTPUT_NAMES, domain="com.microsoft", **attributes), specs


def _group_query_attention(shape: AttentionShape, name: str, threads: int) -> _Candidate:
    """ONNX Runtime's op over a cache of 32, 8 or 4 bits."""
    bits = BASELINES[name]
    node, specs = group_query_attention(shape, bits)
    rng = np.random.default_rng(0)
    caches: list[NDArray[Any]] = []
    for dtype, past in (specs["past_key"], specs["past_value"]):
        if bits == 32:
            caches.append(rng.standard_normal(past, np.float32))
        else:
            caches.append(rng.integers(0, 100, past, np.int8).view(dtype))
    scales = {name: np.full(size, 0.02, np.float32) for name, (_, size) in specs.items() if name.endswith("_scale")}
    used = 2 * shape.batch * shape.kv_num_heads * shape.context * shape.head_dim * bits // 8
    return _Candidate(name, _step(shape, node, caches, scales, threads), used)


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
        for name, heads in zip(_INPUTS[:3], (shape.num_heads, *(shape.kv_num_heads,) * 2), strict=True)
    }
    arrays |= dict(zip(_INPUTS[3:5], caches, strict=True)) | more
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


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    baselines = list(rows[0].speedup) if rows else []
    titles = ["name", "ms", "min", "max", "MB read", "GB/s", *(f"over {name}" for name in baselines)]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        numbers = [row.ms_median, row.ms_min, row.ms_max, row.bytes / 1e6, row.gb_per_s]
        lines.append([row.name, *(_digits(x) for x in numbers), *(f"{row.speedup[b]:.2f}x" for b in baselines)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _digits(x: float) -> str:
    """Three significant digits."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}" if x > 0 else "0"
