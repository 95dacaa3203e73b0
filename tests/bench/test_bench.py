"""The bench of attention: what a row says, that candidates take turns, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_graph import Tiny

from skv_export.bench import attention, attention_candidates, ggml_attention, model, noise
from skv_export.bench.attention import DEFAULT_BASELINES, Row, bench_attention, format_rows
from skv_export.bench.attention_candidates import AttentionShape, Candidate
from skv_export.cli.main import main
from skv_export.errors import SkvError
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

SMALL = AttentionShape(context=300, num_heads=4, kv_num_heads=2, head_dim=64)


def test_rows_of_ours_and_of_every_baseline() -> None:
    configs = [LayerConfig(), LayerConfig(k_bits=3, v_bits=3)]
    rows = bench_attention(SMALL, configs, threads=1, repetitions=3)
    assert [row.name for row in rows] == ["skv-K4V2", "skv-K3V3", *DEFAULT_BASELINES]
    for row in rows:
        assert 0 < row.ms_min <= row.ms_median <= row.ms_max
        assert row.gb_per_s == pytest.approx(row.bytes / row.ms_median / 1e6)
        assert row.speedup == {
            base.name: pytest.approx(base.ms_median / row.ms_median) for base in rows if base.name in DEFAULT_BASELINES
        }
    assert rows[0].bytes == 2 * sum(layout.block_bytes(300) for layout in CacheLayout.pair(LayerConfig(), 64))
    assert [row.bytes for row in rows[2:]] == [2 * 2 * 300 * 64 * bits // 8 for bits in (32, 8, 8, 4)]


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

    def step(name: str) -> float:
        calls.append(name)
        return next(clock)

    candidates = [Candidate(name, functools.partial(step, name), 10) for name in "ab"]
    assert attention._in_turns(candidates, 2) == [[6.0, 8.0], [7.0, 9.0]]
    assert calls == list("ab" * 5)


def test_a_step_is_timed_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((1.0, 1.25))
    monkeypatch.setitem(noise.CLOCKS, "wall", lambda: next(clock))
    assert attention_candidates.timed(lambda: None, "wall")() == 250.0


def test_a_baseline_of_its_own_process_has_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    popen = subprocess.Popen

    def spy(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        seen.update(env)
        return popen(command, env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", spy)
    with attention_candidates.baseline(SMALL, "ort-gqa-int8-vnni", 1, "cpu") as candidate:
        assert candidate.cache_bytes == 2 * 2 * 300 * 64 and candidate.step() > 0
    assert seen["ORT_MLAS_QKGEMM_S8_APPROX_VNNI"] == "1"
    assert "ORT_MLAS_QKGEMM_S8_APPROX_VNNI" not in os.environ


def test_a_baseline_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        pytest.raises(SkvError, match=r"ggml-f16 failed; got bench: llama\.cpp's libraries can't be used"),
        attention_candidates.baseline(SMALL, "ggml-f16", 1, "cpu"),
    ):
        pass


@pytest.mark.skipif("SKV_LLAMA_CPP" not in os.environ, reason="SKV_LLAMA_CPP is not set: no llama.cpp")
@pytest.mark.parametrize(("cache_type", "tolerance"), [("f16", 0.01), ("q8_0", 0.02), ("q4_0", 0.2)])
def test_llama_cpps_attention_is_the_attention_that_is_timed(
    cache_type: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(os.environ["SKV_LLAMA_CPP"])
    shape = dataclasses.replace(SMALL, batch=2)
    q, k, v = (x.astype(np.float64) for x in ggml_attention.tokens(shape))
    scores = np.einsum("bngd,bntd->bngt", q.reshape(2, 2, 2, 64), k) / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bngt,bntd->bngd", weights / weights.sum(-1, keepdims=True), v).reshape(2, 4, 64)
    got = ggml_attention.flash_attention(shape, cache_type, 1)()
    assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()


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
        assert row.peak_bytes > 10 << 20 and row.speedup == {}
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
    refused = CliRunner().invoke(main, ["bench", "model", str(tmp_path), "--sequences", "0"])
    assert refused.exit_code == 1 and "--sequences; got '0'; expected numbers such as 1,2,4,8" in refused.output


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
