"""The runtimes that a whole model is timed against: how they are named, and that they run."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_graph import Tiny

from skv_export.bench import model, model_peers
from skv_export.bench.model_peers import Job, parse
from skv_export.checkpoints.demo_model import demo_checkpoint
from skv_export.errors import SkvError


def _made(folder: Path, *files: str) -> Path:
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    return folder


def test_what_a_path_holds_tells_who_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    exported = _made(tmp_path / "a", "skv_config.json", "genai_config.json", "config.json")
    built = _made(tmp_path / "b", "genai_config.json", "config.json")
    checkpoint = _made(tmp_path / "c", "config.json")
    file = tmp_path / "d=e.gguf"
    file.write_bytes(b"GGUF")
    found = [parse(str(path))[0] for path in (exported, built, checkpoint, file)]
    assert found == ["skv", "genai", "transformers", "llama.cpp"]
    assert parse(f"openvino-u8={file}") == ("openvino-u8", file)


def test_what_can_not_be_timed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = _made(tmp_path / "empty")
    for text, message in (
        (str(tmp_path / "missing"), "bench: what to time; got .*missing"),
        ("genai=nowhere", "bench: what to time; got genai=nowhere"),
        (f"tensorrt={empty}", "the name of a runtime; got tensorrt; expected skv, genai, llama.cpp"),
        (str(empty), "bench: what runs it"),
    ):
        with pytest.raises(SkvError, match=message):
            parse(text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SkvError, match=r"openvino-u8 is not installed.*pip install openvino-genai"):
        parse(f"openvino-u8={empty}")


def test_two_exports_take_turns(tmp_path: Path) -> None:
    one, two = (Tiny().write(tmp_path / name) for name in ("one", "two"))
    rows = model.bench_model(one, against=[two], context=(8,), threads=1, rounds=1, steps=2)
    assert [row.name for row in rows] == ["skv", "skv two"]
    assert rows[1].speedup == {"skv": pytest.approx(rows[0].ms_median / rows[1].ms_median)}
    table = model.format_rows(rows).splitlines()
    assert table[-1].endswith(f"{rows[1].ms_median / rows[0].ms_median:.2f}x |") and table[-2].endswith("|  |")
    with pytest.raises(SkvError, match="the same candidate twice"):
        model.bench_model(one, against=[two, two], context=(8,), rounds=1)


def test_the_first_step_is_not_a_measurement() -> None:
    run = model_peers._run([10.0, 12.0, 99.0, 99.5, 100.25], [[1, 2], [3, 4], [5, 6], [7, 8]])
    assert run.prefill_seconds == 2 and run.decode_ms == (500.0, 750.0)
    assert run.tokens == ((1, 3, 5, 7), (2, 4, 6, 8))


def test_a_step_that_leaves_a_sequence_out_is_not_a_measurement() -> None:
    job = Job("skv", "", context=8, threads=1, steps=1, clock="cpu", sequences=2)
    with pytest.raises(SkvError, match=r"tokens of a step of skv; got \[2, 1, 1\]; expected 2"):
        model_peers._timed(job, lambda: [1, 2], lambda: [1])


def _genai(checkpoint: Path, out: Path) -> Path:
    """A folder of genai's model builder."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(checkpoint)
    cache = str(out / "cache")
    options = parse_extra_options("", str(checkpoint), str(out), "fp32", "cpu", cache, [])
    create_model("", str(checkpoint), str(out), "fp32", "cpu", cache, **options)
    return out


def _source(name: str, place: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    """What a runtime runs, or the test is skipped."""
    if name == "skv":
        return Tiny().write(place / "model")
    if name == "genai":
        return _genai(tiny_checkpoint("llama", head_dim=64), place)
    if name == "transformers":
        return tiny_checkpoint("llama")
    if name.startswith("llama.cpp") and "SKV_LLAMA_CPP" not in os.environ:
        pytest.skip("SKV_LLAMA_CPP is not set: no llama.cpp")
    if name.startswith("openvino"):
        pytest.importorskip("openvino_genai")
    return demo_checkpoint()


@pytest.mark.parametrize("name", ["skv", "genai", "transformers", "llama.cpp", "llama.cpp-q8_0", "openvino-u8"])
def test_sequences_decode_together_what_each_decodes_alone(
    name: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _source(name, tmp_path, tiny_checkpoint)
    if "SKV_LLAMA_CPP" in os.environ:
        monkeypatch.syspath_prepend(os.environ["SKV_LLAMA_CPP"])
    job = Job(name, str(path), context=24, threads=1, steps=3, clock="cpu", sequences=3)
    together = model_peers.measure(job)
    assert len(together.decode_ms) == 3 and {len(row) for row in together.tokens} == {5}
    of_each = Job.prompts
    for i in range(3):
        monkeypatch.setattr(Job, "prompts", lambda self, size, i=i: [of_each(job, size)[i]])
        assert model_peers.measure(dataclasses.replace(job, sequences=1)).tokens == (together.tokens[i],)
    assert len(set(together.tokens)) == 3, "prompts that are not alike"


def test_no_two_prompts_begin_alike() -> None:
    job = Job("skv", "", context=8, threads=1, steps=1, clock="cpu", sequences=8)
    prompts = job.prompts(50_000)
    assert len(prompts) == 8 and {len(prompt) for prompt in prompts} == {8}
    assert len({prompt[0] for prompt in prompts}) == 8
    assert min(map(min, prompts)) >= 12_500 and max(map(max, prompts)) < 37_500, "no special tokens"
    assert prompts[:1] == dataclasses.replace(job, sequences=1).prompts(50_000)


def test_more_sequences_than_a_runtime_takes_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(model, "_in_a_process", lambda job: pytest.fail("something ran"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    one = Tiny().write(tmp_path / "one")
    able = "skv, genai, openvino, openvino-u8, openvino-u8-u4, transformers"
    with pytest.raises(SkvError, match=rf"that llama\.cpp decodes together; got 257; expected at most 256.*{able}"):
        model.bench_model(one, against=[file], sequences=(1, 257))
    with pytest.raises(SkvError, match=r"bench: sequences; got \[1, 0\]"):
        model.bench_model(one, sequences=(1, 0))


def test_rows_are_of_all_sequences(tmp_path: Path) -> None:
    one, two = (Tiny().write(tmp_path / name) for name in ("one", "two"))
    rows = model.bench_model(one, against=[two], context=(8,), sequences=(1, 4), threads=1, rounds=1, steps=2)
    assert [(row.sequences, row.name) for row in rows] == [(1, "skv"), (1, "skv two"), (4, "skv"), (4, "skv two")]
    assert [row.tokens_per_s * row.ms_median for row in rows] == pytest.approx([1e3, 1e3, 4e3, 4e3])
    assert rows[3].speedup == {"skv": pytest.approx(rows[2].ms_median / rows[3].ms_median)}
    table = model.format_rows(rows).splitlines()
    assert table[0].startswith("| sequences | context |") and table[4].startswith("| 4 | 8 | skv |")
    assert model.format_rows(rows[:2]).startswith("| context |")


@pytest.mark.skipif("SKV_LLAMA_CPP" not in os.environ, reason="SKV_LLAMA_CPP is not set: no llama.cpp")
def test_llama_cpp_runs_a_gguf_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.environ["SKV_LLAMA_CPP"])
    run = model._in_a_process(
        Job("llama.cpp-q4_0", str(demo_checkpoint()), context=16, threads=1, steps=2, clock="cpu")
    )
    assert run.prefill_seconds > 0 and len(run.decode_ms) == 2 and min(run.decode_ms) > 0
    assert run.peak_bytes > demo_checkpoint().stat().st_size


def test_transformers_runs_a_checkpoint(tiny_checkpoint: Callable[..., Path]) -> None:
    job = Job("transformers", str(tiny_checkpoint("llama")), context=16, threads=1, steps=2, clock="cpu")
    run = model._in_a_process(job)
    assert run.prefill_seconds > 0 and len(run.decode_ms) == 2 and run.peak_bytes > 50 << 20
