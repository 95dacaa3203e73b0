"""A short run of a shim library, for the sanitizers and for the planted bugs, which it must detect.

``check.py LIBRARY`` runs all cases, ``check.py LIBRARY short`` those that a run ten times slower has time for.

Exits with 1 and the first failure, or with what the shim or a sanitizer makes of it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
from harness import AUTO, SIMPLE, HostMemory, Library, difference  # noqa: E402

from skv_export.spec.conformance import Case, op_cases  # noqa: E402
from skv_export.spec.recipe import LayerConfig  # noqa: E402

NAMES = (
    "default",
    "gqa 16",
    "recent just filled",
    "the call flushes the first tile",
    "eight query tokens flush",
    "chunk with a past",
    "prompt in one call",
    "ragged batch",
    "ragged chunks",
    "one sequence idle",
    "sliding window, ring wrapped",
    "softcap",
    "head sink",
    "odd sinks and recent",
    "keys per token, rotated",
    "values per channel",
    "byte channels, both",
    "token_channel, both",
    "token_channel, chunk over three tiles",
    "calibrated, both",
    "calibrated, the default form",
    "calibrated, chunk over three tiles",
)
LONG = Case(
    "three slabs for every warp of a block",
    LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32),
    num_heads=2,
    kv_num_heads=1,
    past_lengths=(1700,),
    dtype="float16",
)
LONG_MEANS = dataclasses.replace(
    LONG,
    name="the same around means",
    config=dataclasses.replace(LONG.config, k_granularity="token_channel", v_granularity="token_channel"),
)
CHUNK = dataclasses.replace(LONG, name="few new tokens behind a long past", new_tokens=12, past_lengths=(700,))
FLUSH = dataclasses.replace(LONG_MEANS, name="one token flushes a tile around means", past_lengths=(67,))
ROWS = Case(
    "rows of a 16-bit tile overwritten by the call that moves it",
    LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32, k_bits=16, v_bits=16),
    past_lengths=(65,),
    new_tokens=8,
    dtype="float16",
)
SHORT = (
    "the call flushes the first tile",
    "chunk with a past",
    "ragged batch",
    "keys per token, rotated",
    "token_channel, chunk over three tiles",
    "calibrated, the default form",
)


def cases(names: tuple[str, ...]) -> list[Case]:
    """Cases with float16 inputs that take every kernel for head_dim 64 and K4V2."""
    everything = op_cases()
    chosen = [case for case in everything if case.name in names]
    assert len(chosen) == len(names)
    return [dataclasses.replace(case, dtype="float16") for case in chosen]


def main() -> int:
    """Runs the cases."""
    short = sys.argv[2:] == ["short"]
    kernels = Library(Path(sys.argv[1]), HostMemory(), multiprocessors=1)
    paths = set()
    for case in [ROWS, FLUSH, *cases(SHORT)] if short else [ROWS, LONG, LONG_MEANS, CHUNK, FLUSH, *cases(NAMES)]:
        for path in (AUTO, SIMPLE) if case.new_tokens == 1 else (AUTO,):
            error, taken = difference(case, kernels, path)
            paths.add(taken.split()[0].rstrip(":"))
            if not error <= case.tolerance:
                print(f"{case.name}, {taken}: {error:.1e}, tolerance {case.tolerance:.1e}")
                return 1
    assert paths == {"decode_mma", "decode_simple", "prefill"}, paths
    return 0


if __name__ == "__main__":
    sys.exit(main())
