"""The bench of attention: what a row says, that candidates take turns, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_graph import Tiny

from skv_export.bench import attention, model, noise
from skv_export.bench.attention import BASELINES, AttentionShape, Row, bench_attention, format_rows
from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

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
    candidates = [attention._Candidate(name, lambda name=name: calls.append(name), 10) for name in "ab"]
    times = attention._in_turns(candidates, 2, lambda: next(clock))
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
    rows = [Row("skv-K4V2", 2.5, 2.4, 3.0, 28_700_000, 11.48, {"ort-gqa-int8": 4.0}, 0.1)]
    assert format_rows(rows).splitlines() == [
        "| name | ms | min | max | MB read | GB/s | over ort-gqa-int8 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| skv-K4V2 | 2.50 | 2.40 | 3.00 | 28.7 | 11.5 | 4.00x |",
    ]


def test_a_whole_model_is_timed_in_processes_of_their_own(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    short, long = model.bench_model(folder, context=(8, 64), threads=1, rounds=1, steps=3)
    assert (short.name, short.context, long.context) == ("skv", 8, 64)
    for row in (short, long):
        assert 0 < row.ms_min <= row.ms_median <= row.ms_max and row.prefill_seconds > 0
        assert row.tokens_per_s == pytest.approx(1e3 / row.ms_median)
        assert row.peak_bytes > 10 << 20 and row.speedup is None
    assert "| 64 | skv |" in model.format_rows([short, long])


def test_what_lies_in_the_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout of another version, say."""
    (tmp_path / "skv_export").mkdir()
    (tmp_path / "skv_export" / "__init__.py").write_text("raise SystemExit('another version')")
    folder = Tiny().write(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (row,) = model.bench_model(folder, context=(8,), threads=1, rounds=1, steps=1)
    assert row.ms_median > 0


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SkvError, match=r"skv at 8 tokens failed; got .*skv_config.json: no such file"):
        model.bench_model(tmp_path, context=(8,), rounds=1)


def test_command_line_prints_the_rows_and_how_to_repeat_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "bench attention --context 300 --num-heads 4 --kv-num-heads 2 --head-dim 64 --repetitions 2"
    monkeypatch.setattr("sys.argv", ["skv-export", *arguments.split()])
    result = CliRunner().invoke(main, [*arguments.split(), "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    assert f"Repeat with: skv-export {arguments}" in result.output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert set(rows[0]) == {"name", "ms_median", "ms_min", "ms_max", "bytes", "gb_per_s", "speedup", "spread"}
    refused = CliRunner().invoke(main, ["bench", "model", str(tmp_path), "--context", "some"])
    assert refused.exit_code == 1 and "--context; got 'some'" in refused.output


def test_times_too_noisy_to_read_are_said_to_be() -> None:
    assert noise.spread([1.0, 1.0, 1.0, 1.0]) == 0 and noise.spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
    calm, loud = (SimpleNamespace(name=name, spread=spread) for name, spread in (("calm", 0.1), ("loud", 0.4)))
    assert noise.remark([calm, calm]) == ""
    said = noise.remark([calm, loud])
    assert said.startswith("Too noisy to read: loud.") and "40% of their median" in said


def test_the_command_warns_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "MAX_SPREAD", -1.0)
    arguments = "bench attention --context 300 --num-heads 4 --kv-num-heads 2 --head-dim 64 --repetitions 2 --json -"
    result = CliRunner().invoke(main, arguments.split())
    assert "Too noisy to read: skv-K4V2, ort-gqa-fp32" in result.stderr
    assert json.loads(result.stdout)["noise"].startswith("Too noisy")


def test_the_clock_is_passed_on(tmp_path: Path) -> None:
    """Processor time of one thread: no more than the wall's, and what the process did before does not count."""
    folder = Tiny().write(tmp_path / "model")
    arguments = ["bench", "model", str(folder), "--context", "64", "--rounds", "1", "--steps", "3", "--threads", "1"]
    result = CliRunner().invoke(main, [*arguments, "--clock", "cpu", "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert 0 < row["ms_min"] <= row["ms_median"] < 1e3 and 0 < row["prefill_seconds"] < 1
    with pytest.raises(SkvError, match="bench: clock; got moon; expected wall or cpu"):
        model.bench_model(folder, clock="moon")
