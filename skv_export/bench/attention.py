"""Times the attention op against the attention of other runtimes.

Each candidate is one decode step of one layer over a cache of its own. The candidates take turns, so that noise of the
machine affects all of them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skv_export.bench import attention_candidates
from skv_export.bench.attention_candidates import BASELINES, AttentionShape, Candidate
from skv_export.bench.noise import CLOCKS, spread
from skv_export.errors import SkvError
from skv_export.spec.recipe import LayerConfig

DEFAULT_BASELINES = ("ort-gqa-fp32", "ort-gqa-int8", "ort-gqa-int8-vnni", "ort-gqa-int4")
"""Those that need nothing but ONNX Runtime."""
_WARM_UP = 3


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


def bench_attention(
    shape: AttentionShape,
    configs: Sequence[LayerConfig] = (LayerConfig(),),
    *,
    baselines: Sequence[str] = DEFAULT_BASELINES,
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
        SkvError: An unknown baseline, one whose package is missing, or numbers that make no shape.
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
    baselines = list(dict.fromkeys(baselines))
    if baselines and shape.head_dim % 8:
        raise SkvError(
            "bench: head_dim",
            got=shape.head_dim,
            expected="a multiple of 8, as the baselines need",
            fix='Time it alone: --baseline "".',
        )
    with contextlib.ExitStack() as open_:
        candidates = [
            attention_candidates.ours(shape, config, threads, clock, calibrated=basis)
            for basis in ((False, True) if calibrated else (False,))
            for config in configs
        ]
        candidates += [
            open_.enter_context(attention_candidates.baseline(shape, name, threads, clock)) for name in baselines
        ]
        return _rows(candidates, _in_turns(candidates, repetitions), baselines)


def _in_turns(candidates: list[Candidate], repetitions: int) -> list[list[float]]:
    """Milliseconds ``[candidate][repetition]``."""
    times: list[list[float]] = [[] for _ in candidates]
    for repetition in range(_WARM_UP + repetitions):
        for candidate, taken in zip(candidates, times, strict=True):
            milliseconds = candidate.step()
            if repetition >= _WARM_UP:
                taken.append(milliseconds)
    return times


def _rows(candidates: list[Candidate], times: list[list[float]], baselines: Sequence[str]) -> list[Row]:
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
