"""What appending to a cache costs: tokens in blocks, with calibrated keys beside plain ones, per KV head.

    python benchmarks/append_speed.py [--k-bits 2] [--tokens 1024] [--repetitions 60]

Processor time of skv_append alone, one thread; the forms take turns, so that only ratios depend on what else the
machine does.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable

import numpy as np

from skv_export.native.library import SkvAttention, SkvCache, SkvTokens, library_path, load_library
from skv_export.spec.conformance import make_basis
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import Recipe

HEAD_DIMS = (64, 128, 256)


def appending(k_bits: int, dim: int, tokens: int, calibrated: bool) -> Callable[[], float]:
    """Returns a function that appends keys and values of one head to an empty cache, and gives its microseconds."""
    c = ctypes.CDLL(str(library_path()))
    layouts = CacheLayout.pair(Recipe().with_options(k_bits=k_bits).layer(0), dim)
    basis = make_basis(1, dim, layouts[0].padded_dim) if calibrated else None
    blocks = [np.zeros(layout.block_bytes(tokens), np.uint8) for layout in layouts]
    rows = np.random.default_rng(0).standard_normal((2, tokens, dim)).astype(np.float32)
    length = np.array([tokens - 1], np.int32)
    call = SkvAttention(
        key_cache=SkvCache.of(layouts[0], blocks[0].ctypes.data, blocks[0].nbytes, basis),
        value_cache=SkvCache.of(layouts[1], blocks[1].ctypes.data, blocks[1].nbytes),
        key=SkvTokens(rows[0].ctypes.data, dim),
        value=SkvTokens(rows[1].ctypes.data, dim),
        query=SkvTokens(rows[0].ctypes.data, dim),
        output=rows.ctypes.data,
        seqlens_k=length.ctypes.data,
        batch=1,
        tokens=tokens,
        num_heads=1,
        kv_num_heads=1,
    )
    kept = (basis, blocks, rows, length)  # what the call points to

    def run() -> float:
        start = time.process_time_ns()
        status = c.skv_append(ctypes.byref(call), None)
        taken = (time.process_time_ns() - start) / 1e3
        assert status == 0 and kept
        return taken

    return run


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k-bits", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=60)
    given = parser.parse_args()
    print(f"{given.tokens} tokens, {load_library().cpu_isa}, us per KV head, fastest of {given.repetitions}")
    for dim in HEAD_DIMS:
        runs = [appending(given.k_bits, dim, given.tokens, calibrated) for calibrated in (False, True)]
        times = np.array([[run() for run in runs] for _ in range(given.repetitions)]).min(0)
        print(f"head_dim {dim}: plain {times[0]:.0f}, calibrated {times[1]:.0f}: {times[1] / times[0]:.2f}x")


if __name__ == "__main__":
    main()
