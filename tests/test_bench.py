"""The bench of attention: what a row says, that contenders take turns, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from skv_export import bench
from skv_export.bench import BASELINES, AttentionShape, Row, bench_attention, format_rows
from skv_export.errors import SkvError
from skv_export.layout import CacheLayout
from skv_export.recipe import LayerConfig

SMALL = AttentionShape(context=300, num_heads=4, kv_num_heads=2, head_dim=64)


def test_rows_of_ours_and_of_every_baseline() -> None:
    configs = [LayerConfig(), LayerConfig(k_bits=3, v_bits=3)]
    rows = bench_attention(SMALL, configs, threads=1, repetitions=3)
    assert [row.name for row in rows] == ["skv-K4V2", "skv-K3V3", *BASELINES]
    for row in rows:
        assert 0 < row.ms_min <= row.ms_median <= row.ms_max
        assert row.gb_per_s == pytest.approx(row.bytes / row.ms_median / 1e6)
        assert row.speedup == {
            base.name: pytest.approx(base.ms_median / row.ms_median) for base in rows if base.name in BASELINES
        }
    assert rows[0].bytes == 2 * sum(layout.block_bytes(300) for layout in CacheLayout.pair(LayerConfig(), 64))
    assert [row.bytes for row in rows[2:]] == [2 * 2 * 300 * 64 * bits // 8 for bits in (32, 8, 4)]


def test_the_context_changes_the_work() -> None:
    """Attention to 20,000 tokens takes longer than to 100, or nothing is measured."""
    short, long = (
        bench_attention(
            dataclasses.replace(SMALL, context=n), baselines=("ort-gqa-fp32",), threads=1, repetitions=9, clock="cpu"
        )
        for n in (100, 20_000)
    )
    for a, b in zip(short, long, strict=True):
        assert b.ms_min > 2 * a.ms_min


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    clock = iter(np.arange(1000.0))
    contenders = [bench._Contender(name, lambda name=name: calls.append(name), 10) for name in "ab"]
    times = bench._in_turns(contenders, 2, lambda: next(clock))
    assert calls == list("ab" * 5) and times == [[1000.0, 1000.0], [1000.0, 1000.0]]


@pytest.mark.parametrize(("change", "message"), [
    ({"context": 0}, "bench: context; got 0"),
    ({"kv_num_heads": 3}, "bench: num_heads; got 4; expected a multiple of 3"),
])  # fmt: skip
def test_impossible_shapes_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(SkvError, match=message):
        bench_attention(dataclasses.replace(SMALL, **change))


def test_unknown_baselines_are_refused() -> None:
    with pytest.raises(SkvError, match="bench: baseline; got ort-gqa-int3; expected ort-gqa-fp32"):
        bench_attention(SMALL, baselines=("ort-gqa-int3",))
    with pytest.raises(SkvError, match="bench: repetitions"):
        bench_attention(SMALL, repetitions=0)
    with pytest.raises(SkvError, match="bench: clock; got moon; expected wall or cpu"):
        bench_attention(SMALL, clock="moon")


def test_the_table_has_a_line_per_row() -> None:
    rows = [Row("skv-K4V2", 2.5, 2.4, 3.0, 28_700_000, 11.48, {"ort-gqa-int8": 4.0})]
    assert format_rows(rows).splitlines() == [
        "| name | ms | min | max | MB read | GB/s | over ort-gqa-int8 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| skv-K4V2 | 2.50 | 2.40 | 3.00 | 28.7 | 11.5 | 4.00x |",
    ]
