"""Decode attention on a GPU: bandwidth, share of the copy bandwidth, and the ratio to fp16 attention.

``python benchmarks/gpu_bench.py [--json FILE]``; needs only the source tree, nvcc, torch and numpy. Every row compares
calls timed in the same run: the kernels (attention and append of one token per sequence) and torch's
scaled_dot_product_attention with GQA over an fp16 cache of the same length, by the fastest of its kernels
(FlashAttention, cuDNN). Where onnxruntime-gpu and onnx are at hand, ONNX Runtime's own GroupQueryAttention over fp16
and int8 caches has rows too. A second table has the time of a layer when many are captured in one CUDA graph, as a
session does.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cuda"))
import gpu  # isort: skip
from harness import AUTO, Library  # isort: skip

from skv_export.native.library import SkvAttention, SkvCache, SkvCudaContext, SkvLayout, SkvTokens
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

REPEATS = 50
D = 128
KV_HEADS = 8
SHAPES = [(heads, batch, tokens) for heads in (32, 64) for batch in (1, 8) for tokens in (4096, 32768, 131072)]
BITS = ((4, 2), (4, 4), (3, 2), (2, 2), (8, 8))
LAYERS = 16
IN_GRAPH = [(1, 1024), (1, 4096), (1, 32768), (1, 131072), (8, 4096), (8, 32768)]
"""Batches and tokens of the second table."""
DEVICE = "cuda"


def median_us(call: Callable[[], object]) -> float:
    """Median of the time on the device, in microseconds, with the second-level cache overwritten before each call."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(REPEATS + 5):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if i >= 5:
            times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_us(lambda: target.copy_(source)) * 1e6


class Decode:
    """One decode call of ``batch`` sequences at ``length`` tokens; the cache holds random bytes with finite scales."""

    def __init__(
        self, kernels: Library, config: LayerConfig, batch: int, heads: int, kv_heads: int, length: int
    ) -> None:
        self.kernels = kernels
        layouts = CacheLayout.pair(config, D)
        blocks = [int(np.prod(x.shape(length + 64))) for x in layouts]
        random = [torch.randint(0, 60, (batch * kv_heads * n,), dtype=torch.uint8, device=DEVICE) for n in blocks]
        query, self.output = (torch.randn(batch, heads * D, device=DEVICE, dtype=torch.half) for _ in range(2))
        key, value = (torch.randn(batch, kv_heads * D, device=DEVICE, dtype=torch.half) for _ in range(2))
        seqlens = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
        caches = [SkvCache(SkvLayout.of(x), r.data_ptr(), n) for x, r, n in zip(layouts, random, blocks, strict=True)]
        tokens = [SkvTokens(x.data_ptr(), x.shape[1]) for x in (query, key, value)]
        lengths_and_sink = seqlens.data_ptr(), None, None
        half, tokens_each, scale, softcap, not_finite = 0, 1, 0.0, 0.0, None
        numbers = half, batch, tokens_each, heads, kv_heads, scale, softcap, not_finite
        self.call = SkvAttention(*caches, *tokens, self.output.data_ptr(), *lengths_and_sink, *numbers)
        kernels.load(caches)
        own = kernels.multiprocessors, kernels.rows_bytes, kernels.architecture
        self.context = SkvCudaContext(None, None, 0, length + 1, AUTO, -1, *own)
        self.arguments = ctypes.byref(self.call), ctypes.byref(self.context)
        size = kernels.lib.skv_cuda_scratch_bytes(*self.arguments)
        scratch = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        self.context.scratch, self.context.scratch_bytes = scratch.data_ptr(), size
        self.held = random, query, key, value, seqlens, scratch
        self.path = kernels.lib.skv_cuda_path(*self.arguments).decode()
        tiles = [x.quantized_tokens(length) // x.tile_tokens * x.tile_bytes for x in layouts]
        rows = [(length - x.quantized_tokens(length)) * x.row_bytes for x in layouts]
        self.bytes = batch * kv_heads * (sum(tiles) + sum(rows))

    def __call__(self) -> None:
        self.context.stream = torch.cuda.current_stream().cuda_stream  # which a capture changes
        self.kernels.check(self.kernels.lib.skv_cuda_attention(*self.arguments))


class TorchAttention:
    """torch's attention of one token over an fp16 cache."""

    BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)

    def __init__(self, batch: int, heads: int, kv_heads: int, length: int) -> None:
        self.query = torch.randn(batch, heads, 1, D, device=DEVICE, dtype=torch.half)
        self.key, self.value = (
            torch.randn(batch, kv_heads, length, D, device=DEVICE, dtype=torch.half) for _ in range(2)
        )

    def __call__(self) -> torch.Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(self.query, self.key, self.value, enable_gqa=True)


def fastest(calls: Sequence[TorchAttention], time: Callable[[Sequence[TorchAttention]], float]) -> float:
    """The time of torch's attention by the faster of its kernels, of those that this card and torch have."""
    times = []
    for backend in TorchAttention.BACKENDS:
        try:
            with sdpa_kernel(backend):
                times.append(time(calls))
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
    if not times:
        sys.exit("gpu_bench: torch has neither FlashAttention nor cuDNN's attention for a query of one token here")
    return min(times)


def in_graph_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of a call when all are captured in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return median_us(graph.replay) / len(calls)


class GroupQueryAttention:
    """The same call of ONNX Runtime's own op, its cache bound in place.

    Args:
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key and value heads.
        length: Tokens in the cache.
        bits: Of the cache: 16 (on a CPU 32) or 8.
        device: ``cuda``, on the current stream, or ``cpu``.
    """

    path = "ONNX Runtime GroupQueryAttention"

    def __init__(self, batch: int, heads: int, kv_heads: int, length: int, bits: int, device: str = "cuda") -> None:
        import onnxruntime as ort

        from skv_export.bench.attention_candidates import AttentionShape, group_query_attention
        from skv_export.spec.op import one_node_model

        shape = AttentionShape(length, heads, kv_heads, D, batch)
        node, specs = group_query_attention(shape, bits, np.float32 if device == "cpu" else np.float16)
        providers: list[object] = ["CPUExecutionProvider"]
        if device == "cuda":
            stream = str(torch.cuda.current_stream().cuda_stream)
            providers.insert(0, ("CUDAExecutionProvider", {"user_compute_stream": stream}))
        session = ort.InferenceSession(one_node_model(node, specs), providers=providers)
        if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
            sys.exit("gpu_bench: onnxruntime's CUDA provider did not start: pip install '.[gpu]'")
        self.tensors = {name: self.values(name, dtype, size, device) for name, (dtype, size) in specs.items()}
        self.tensors["seqlens_k"].fill_(length)
        self.tensors["output"] = torch.empty_like(self.tensors["query"])
        total = np.array(length + 1, np.int32)
        self.binding = session.io_binding()
        self.binding.bind_cpu_input("total_sequence_length", total)
        at = {name: (device, 0, specs[name][0], specs[name][1]) for name in specs}
        for name in (name for name in specs if name != "total_sequence_length"):
            self.binding.bind_input(name, *at[name], self.tensors[name].data_ptr())
        for name, like in (("output", "query"), ("present_key", "past_key"), ("present_value", "past_value")):
            held = self.tensors[name if name == "output" else like]
            self.binding.bind_output(name, *at[like], held.data_ptr())
        options = ort.RunOptions()  # the events time the stream; waiting for it here would add the host's part
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.run = lambda: session.run_with_iobinding(self.binding, options)
        self.bytes = 2 * batch * kv_heads * length * D * bits // 8

    @staticmethod
    def values(name: str, dtype: np.dtype[Any], size: tuple[int, ...], device: str) -> torch.Tensor:
        if name.endswith("_scale"):
            return torch.full(size, 0.02, device=device)
        if dtype == np.int8:
            return torch.randint(-100, 100, size, dtype=torch.int8, device=device)
        if dtype == np.int32:
            return torch.zeros(size, dtype=torch.int32, device=device)
        return torch.randn(size, dtype=torch.half if dtype == np.float16 else torch.float, device=device)

    def __call__(self) -> None:
        self.run()


def has_onnxruntime() -> bool:
    """Whether ONNX Runtime can take part."""
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        return False
    import onnxruntime as ort

    return "CUDAExecutionProvider" in ort.get_available_providers()


def contenders(
    kernels: Library, batch: int, heads: int, length: int, with_onnxruntime: bool
) -> Iterator[tuple[str, Decode | GroupQueryAttention]]:
    """Caches and calls for one shape, one at a time: together they would not fit."""
    for k_bits, v_bits in BITS:
        config = dataclasses.replace(LayerConfig(), k_bits=k_bits, v_bits=v_bits)
        yield config.name, Decode(kernels, config, batch, heads, KV_HEADS, length)
    for bits, name in ((16, "fp16"), (8, "int8")) if with_onnxruntime else ():
        yield name, GroupQueryAttention(batch, heads, KV_HEADS, length, bits)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    card, kernels, with_onnxruntime = gpu.require(), gpu.load(), has_onnxruntime()
    torch.cuda.set_stream(torch.cuda.Stream())  # one for all
    copy = copy_bandwidth()
    print(f"{card}: copy {copy / 1e9:.0f} GB/s (bytes read and written)\n")
    if not with_onnxruntime:
        print("ONNX Runtime takes no part: onnxruntime-gpu and onnx are not installed.\n")
    print("| heads | batch | tokens | cache | us | GB/s | of copy | fp16 us | speedup | path |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for heads, batch, length in SHAPES:
        full = fastest([TorchAttention(batch, heads, KV_HEADS, length)], lambda calls: median_us(calls[0]))
        for cache, call in contenders(kernels, batch, heads, length, with_onnxruntime):
            us = median_us(call)
            rate = call.bytes / us * 1e6
            row = {"heads": heads, "batch": batch, "tokens": length, "cache": cache, "us": us, "gb_s": rate / 1e9,
                   "of_copy": rate / copy, "fp16_us": full, "speedup": full / us, "path": call.path}  # fmt: skip
            rows.append(row)
            print(
                f"| {heads}/{KV_HEADS} | {batch} | {length} | {cache} | {us:.1f} | {rate / 1e9:.0f} "
                f"| {rate / copy:.0%} | {full:.1f} | {full / us:.2f} | {call.path} |",
                flush=True,
            )
            del call
        torch.cuda.empty_cache()
    print(f"\nA layer of {LAYERS} in one CUDA graph, 32/{KV_HEADS} heads:\n")
    print("| batch | tokens | K4V2 us | fp16 us | speedup |")
    print("|---|---|---|---|---|")
    layers = []
    for batch, length in IN_GRAPH:
        full = fastest([TorchAttention(batch, 32, KV_HEADS, length) for _ in range(LAYERS)], in_graph_us)
        us = in_graph_us([Decode(kernels, LayerConfig(), batch, 32, KV_HEADS, length) for _ in range(LAYERS)])
        layers.append({"batch": batch, "tokens": length, "us": us, "fp16_us": full, "speedup": full / us})
        print(f"| {batch} | {length} | {us:.1f} | {full:.1f} | {full / us:.2f} |", flush=True)
        torch.cuda.empty_cache()
    if options.json:
        figures = {"card": card, "copy_gb_s": copy / 1e9, "rows": rows, "layers": layers}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
