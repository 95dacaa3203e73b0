"""The CUDA kernels on a real GPU against the reference: ``python tests/cuda/gpu_test.py [--short] [--sanitizer TOOL]``.

Byte equality of the cache, attention within each case's tolerance, and a captured graph whose lengths change between
replays. ``--sanitizer memcheck`` (or ``racecheck``, ``synccheck``, ``initcheck``) runs the short form under
compute-sanitizer. Needs only the source tree, nvcc, torch and numpy.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu  # first: it finds the package  # isort: skip
from harness import AUTO, MMA, SIMPLE, Library, check_dense, difference  # isort: skip

from skv_export.spec.conformance import Case, all_layouts, make_inputs, not_a_number_cases, op_cases
from skv_export.spec.quantizer import decode_tile
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import quantized_kv_attention

FOLDED_TOLERANCE = 6e-3  # as in test_shim.py
PAIRS = ((8, 8), (4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))


def jobs(short: bool) -> Iterator[tuple[Case, int, float]]:
    """Cases, paths and tolerances."""
    for case in (*op_cases(), *not_a_number_cases()):
        config = case.config
        if not gpu.can_pack(min(config.k_parameter_bits, config.v_parameter_bits), config.recent_type):
            continue
        if short and case.new_tokens > 8:
            continue
        yield case, SIMPLE, case.tolerance
        half = dataclasses.replace(case, dtype="float16")
        yield half, AUTO, half.tolerance
    if not short:  # more splits than a warp has lanes
        yield Case("a long past", LayerConfig(), 128, 4, 1, (20000,), dtype="float16"), MMA, FOLDED_TOLERANCE
    granularities = ("channel", "token", "token_channel")
    for d, (k, v), kg, vg in itertools.product((64, 128, 256), PAIRS, granularities, granularities):
        if (d, v, vg) == (256, 3, "channel") and kg != "channel":
            continue  # see mma_instances.cuh
        config = LayerConfig(k_bits=k, v_bits=v, k_granularity=kg, v_granularity=vg)
        for heads, tokens, past in ((4, 1, 700), (5, 3, 300)) if short else ((4, 1, 5000), (5, 3, 3000), (16, 8, 900)):
            name = f"D{d} K{k}V{v} {kg} {vg}, {heads} heads, {tokens} tokens"
            yield Case(name, config, d, heads, 1, (past,), tokens, dtype="float16"), MMA, FOLDED_TOLERANCE


def compile_kernels(kernels: Library, short: bool) -> None:
    """Compiles the kernels that are not built in side by side; what can't be is found out when a case asks for it."""
    if kernels.architecture:
        pairs = {case.layouts for case, path, _ in jobs(short) if path == MMA}
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda pair: kernels.compile(pair), pairs))


def captured(call: Callable[[int], None]) -> Callable[[], None]:
    """A CUDA graph of what ``call`` puts on a stream; returns what starts it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        call(torch.cuda.current_stream().cuda_stream)
    return graph.replay


def check_graph(kernels: Library) -> None:
    """One capture serves every length: nothing of a call is decided by lengths on the host."""
    case = Case("graph", LayerConfig(), 128, 8, 2, past_lengths=(900, 131), dtype="float16", spare_tokens=200)
    inputs = make_inputs(case)
    buffers, call, context = kernels.prepare(case, inputs)
    context.max_length += case.spare_tokens

    def attention(stream: int) -> None:
        context.stream = stream
        kernels.check(kernels.lib.skv_cuda_attention(ctypes.byref(call), ctypes.byref(context)))

    replay = captured(attention)
    key, value, seqlens = inputs.past_key, inputs.past_value, inputs.seqlens_k.copy()
    for step in range(70):  # past a flush
        replay()
        expected, key, value = quantized_kv_attention(
            case.params, case.layouts, inputs.query, inputs.key, inputs.value, key, value, seqlens
        )
        got = kernels.memory.get(buffers["output"]).astype(np.float32)
        assert np.abs(got - expected).max() <= case.tolerance * np.abs(expected).max(), f"replay {step}"
        seqlens = seqlens + 1
        kernels.memory.set(buffers["seqlens_k"], seqlens)
    assert np.array_equal(kernels.memory.get(buffers["past_key"]), key)
    assert np.array_equal(kernels.memory.get(buffers["past_value"]), value)


def main() -> int:
    """Runs everything; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--sanitizer", choices=["memcheck", "racecheck", "synccheck", "initcheck"])
    options = parser.parse_args()
    print(gpu.require(), flush=True)
    if options.sanitizer:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            sys.exit("gpu_test: compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
        gpu.load()
        command = [tool, "--tool", options.sanitizer, "--error-exitcode", "1", sys.executable, __file__, "--short"]
        return subprocess.run(command).returncode
    kernels = gpu.load()
    compile_kernels(kernels, options.short)
    failures, paths = [], Counter[str]()
    for case, path, tolerance in jobs(options.short):
        try:
            error, taken = difference(case, kernels, path)
        except AssertionError as reason:
            failures.append(str(reason))
            continue
        paths[taken.split()[0].rstrip(":")] += 1
        if path == MMA and not taken.startswith("decode_mma"):
            failures.append(f"{case.name}: {taken}; expected decode_mma: is there an NVRTC? (docs/gpu.md)")
        if not error <= tolerance:
            failures.append(f"{case.name}: {taken}: difference {error:.1e}, tolerance {tolerance:.1e}")
    for layout in itertools.islice(all_layouts(), 0, None, 7):
        if not gpu.can_pack(layout.parameter_bits, layout.recent_type):
            continue
        tile = np.random.default_rng(0).integers(0, 60, layout.tile_bytes).astype(np.uint8)  # finite parameters
        if not np.array_equal(kernels.decode_tile(layout, tile), decode_tile(layout, tile)):
            failures.append(f"decode_tile: {layout}")
    for check in (check_dense, check_graph):
        try:
            check(kernels)
        except AssertionError as reason:
            failures.append(f"{check.__name__}: {reason}")
    print(", ".join(f"{count} {path}" for path, count in paths.items()), f"cases, {len(failures)} failed")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
