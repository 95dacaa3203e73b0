"""SkvForCausalLM: transformers' generate over the runtime gives what the runtime, and PyTorch, give."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_graph import CONTEXT, EXACT, SMALL, VOCAB, Tiny, addresses
from tiny_models import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TextStreamer, pipeline

from skv_export import SkvForCausalLM
from skv_export.errors import SkvError
from skv_export.export.pipeline import export_model
from skv_export.runtime.session import Session
from skv_export.spec.recipe import LayerConfig, Recipe

pytestmark = pytest.mark.usefixtures("library")

TOKENS = np.random.default_rng(3).integers(3, VOCAB, 200).tolist()
PROMPTS = [TOKENS[:30], TOKENS[50:90]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SkvForCausalLM:
    folder = Tiny(SMALL).write_all(tmp_path_factory.mktemp("model"), eos_token_id=[])
    return SkvForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> SkvForCausalLM:
    folder = Tiny(EXACT).write_all(tmp_path_factory.mktemp("exact"), eos_token_id=[])
    return SkvForCausalLM.from_pretrained(folder)


def padded(side: str) -> dict[str, torch.Tensor]:
    ids, mask = torch.zeros((2, 40), dtype=torch.int64), torch.zeros((2, 40), dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        at = slice(40 - len(prompt), None) if side == "left" else slice(None, len(prompt))
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def test_greedy_generation_is_the_token_loops(model: SkvForCausalLM) -> None:
    ids = torch.tensor([TOKENS[:40]])
    made = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert made[:, :40].equal(ids)
    assert made[:, 40:].tolist() == model.session.generate([TOKENS[:40]], max_new_tokens=40)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_generates_what_each_alone_does(model: SkvForCausalLM, side: str) -> None:
    made = model.generate(**padded(side), max_new_tokens=40, do_sample=False)[:, 40:].tolist()
    assert made == [model.session.generate([prompt], max_new_tokens=40)[0] for prompt in PROMPTS]


def test_padded_batch_from_a_folder_with_all_logits(tmp_path: Path, model: SkvForCausalLM) -> None:
    everything = SkvForCausalLM.from_pretrained(Tiny(SMALL, all_logits=True).write_all(tmp_path, eos_token_id=[]))
    inputs = padded("right")
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert everything.generate(**inputs, max_new_tokens=5, do_sample=False).equal(expected)
    assert everything(**inputs).logits.shape == (2, 40, VOCAB)


def test_without_a_cache_the_tokens_are_the_same(exact: SkvForCausalLM) -> None:
    ids = torch.tensor([TOKENS[:40]])
    cached = exact.generate(ids, max_new_tokens=30, do_sample=False)
    assert exact.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False).equal(cached)


def test_beam_search_reorders_the_cache(exact: SkvForCausalLM) -> None:
    ids = torch.tensor(PROMPTS[0])[None]
    cached = exact.generate(ids, max_new_tokens=30, num_beams=4, num_return_sequences=3)
    assert exact.generate(ids, max_new_tokens=30, num_beams=4, num_return_sequences=3, use_cache=False).equal(cached)
    assert not cached[0].equal(exact.generate(ids, max_new_tokens=30, do_sample=False)[0])


def test_sampling_follows_torchs_seed(model: SkvForCausalLM) -> None:
    def run(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return model.generate(**padded("left"), max_new_tokens=20, do_sample=True, num_return_sequences=2).tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(run(1)) == 4


def test_end_token_stops_a_sequence(model: SkvForCausalLM) -> None:
    free = model.generate(**padded("left"), max_new_tokens=12, do_sample=False)[:, 40:].tolist()
    end = free[0][3]
    made = model.generate(**padded("left"), max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0)
    first = free[0].index(end)
    assert made[0, 40 : 40 + first + 1].tolist() == free[0][: first + 1]
    assert not made[0, 40 + first + 1 :].any()


def test_text_streams_as_it_is_generated(model: SkvForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.session.folder)
    inputs = tokenizer("Anne", return_tensors="pt", return_token_type_ids=False)
    made = model.generate(**inputs, max_new_tokens=20, do_sample=False, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip() == tokenizer.decode(made[0]).strip()


def test_a_cache_carries_on(model: SkvForCausalLM) -> None:
    ids, cache = torch.tensor([TOKENS[:40]]), model.new_cache(1)
    before = addresses(cache.cache)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    second = model.generate(first, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert second.equal(model.generate(ids, max_new_tokens=10, do_sample=False))
    assert addresses(cache.cache) == before
    assert cache.get_seq_length() == 49
    cache.reset()
    again = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert again.equal(second)


def test_forward_takes_calls_of_any_length(exact: SkvForCausalLM) -> None:
    ids = torch.tensor([TOKENS[:60]])
    whole = exact(ids).logits
    output = exact(ids[:, :50])
    output = exact(ids[:, 50:], past_key_values=output.past_key_values)
    assert whole.shape == (1, 1, VOCAB)
    assert (whole - output.logits).abs().max() < 1e-4


def test_generation_ends_where_the_context_ends(model: SkvForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    prompt = [*TOKENS, *TOKENS, *TOKENS[:108]]
    logging.getLogger("transformers").propagate = True
    made = model.generate(torch.tensor([prompt]), max_new_tokens=50, do_sample=False)
    assert made[0, len(prompt) :].tolist() == model.session.generate([prompt], max_new_tokens=50)[0]
    assert f"Generation ends after 5 new tokens at most, where max_length = {CONTEXT}" in caplog.text
    short = SkvForCausalLM(model.session, model.config, model.generation_config, max_length=50)
    assert short.generate(torch.tensor([TOKENS[:40]]), max_new_tokens=20, do_sample=False).shape == (1, 51)
    for cached in (True, False):
        with pytest.raises(SkvError, match="generate: prompt; got 51 tokens; expected at most max_length = 50"):
            short.generate(torch.tensor([TOKENS[:51]]), max_new_tokens=20, use_cache=cached)
    with pytest.raises(SkvError, match="at most max_length = 50"):
        short.new_cache(1, 51)
    with pytest.raises(SkvError, match="max_length; got 513"):
        SkvForCausalLM(model.session, model.config, model.generation_config, max_length=CONTEXT + 1)


def test_labels_give_the_loss_where_all_logits_are_there(model: SkvForCausalLM, tmp_path: Path) -> None:
    everything = SkvForCausalLM.from_pretrained(Tiny(SMALL, all_logits=True).write_all(tmp_path, eos_token_id=[]))
    inputs = padded("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = everything(**inputs, labels=labels)
    chances = output.logits[:, :-1].log_softmax(-1)
    counted = [-chances[b, t, labels[b, t + 1]] for b in range(2) for t in range(39) if labels[b, t + 1] >= 0]
    assert len(counted) == 29 + 39 and torch.isclose(output.loss, torch.stack(counted).mean())
    assert everything(**inputs).loss is None
    with pytest.raises(SkvError, match=r"labels: shape; got \[2, 39\]; expected \[2, 40\]"):
        everything(**inputs, labels=labels[:, 1:])
    with pytest.raises(SkvError, match=r"labels: the loss needs the logits of every token.*--all-logits"):
        model(**inputs, labels=labels)


def test_positions_can_be_given(exact: SkvForCausalLM) -> None:
    ids = torch.tensor([TOKENS[:5]])
    assert exact(ids, position_ids=torch.arange(5)[None]).logits.equal(exact(ids).logits)
    assert not exact(ids, position_ids=torch.arange(3, 8)[None]).logits.allclose(exact(ids).logits)


def test_what_users_call_on_a_model_has_a_meaning_or_an_error(model: SkvForCausalLM) -> None:
    same = (model.eval(), model.float(), model.cpu(), model.train(False), model.to("cpu", dtype=torch.float32))
    assert all(other is model for other in same)
    for target in ("cuda", 0, torch.float16):
        with pytest.raises(SkvError, match="of SkvForCausalLM"):
            model.to(target)
    with pytest.raises(SkvError, match=r"dtype of SkvForCausalLM; got torch\.bfloat16"):
        model.to("cpu", dtype=torch.bfloat16)
    for name in (
        "half", "bfloat16", "double", "cuda", "train", "requires_grad_", "gradient_checkpointing_enable", "parameters",
        "named_parameters", "state_dict", "load_state_dict", "add_adapter", "get_input_embeddings",
        "get_output_embeddings", "resize_token_embeddings",
    ):  # fmt: skip
        with pytest.raises(SkvError, match=rf"SkvForCausalLM\.{name}: not supported"):
            getattr(model, name)()


def test_what_it_can_not_do_is_an_error(model: SkvForCausalLM) -> None:
    ids = torch.tensor([TOKENS[:40]])
    contrastive = {"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}
    with pytest.raises(ValueError, match="only supports"):
        model.generate(ids, **contrastive, max_new_tokens=5)
    for mode in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}):
        with pytest.raises(SkvError, match=r"speculative decoding needs the logits of several tokens.*num_logits=16"):
            model.generate(ids, **mode, max_new_tokens=5)
    with pytest.raises(SkvError, match="custom_generate: not supported"):
        model.generate(ids, custom_generate="somebody/code", trust_remote_code=True, max_new_tokens=5)
    with pytest.raises(SkvError, match="inputs_embeds; got a graph that takes tokens only"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 8), max_new_tokens=3)
    with pytest.raises(SkvError, match="past_key_values"):
        model(ids, past_key_values=[])  # type: ignore[arg-type]
    cache = model.new_cache(2)
    model(**padded("left"), past_key_values=cache)
    with pytest.raises(SkvError, match="attention_mask: needed"):
        model(torch.tensor([[5], [5]]), past_key_values=cache)
    for columns in (ids.shape[1] - 1, ids.shape[1] + 2):
        with pytest.raises(SkvError, match=r"generate: attention_mask: shape; got \[1, \d+\]; expected \[1, \d+\]"):
            model.generate(ids, attention_mask=torch.ones(1, columns, dtype=torch.int64), max_new_tokens=2)


def test_folder_without_a_configuration_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SkvError, match=r"config.json: no such file"):
        SkvForCausalLM.from_pretrained(Tiny().write(tmp_path))


@pytest.fixture(scope="module", params=["llama", "mistral"])
def both(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, SkvForCausalLM]:
    """A tiny model in PyTorch, and its export with a cache that rounds nothing."""
    checkpoint = tiny_checkpoint(request.param)
    folder = tmp_path_factory.mktemp("export") / request.param
    export_model(checkpoint, out=folder, recipe=Recipe(EXACT), progress=lambda phase, fraction: None)
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval(), SkvForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 20}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampling", "beams"],
)
def test_generate_gives_what_pytorch_gives(
    both: tuple[PreTrainedModel, SkvForCausalLM], options: dict[str, object]
) -> None:
    made = []
    for model in both:
        torch.manual_seed(5)
        made.append(model.generate(**padded("left"), max_new_tokens=60, eos_token_id=2, **options))
    assert made[0].equal(made[1])


def test_what_users_of_transformers_pass(model: SkvForCausalLM, tmp_path: Path) -> None:
    folder = model.session.folder
    load = SkvForCausalLM.from_pretrained
    for options in (
        {"dtype": "auto"}, {"dtype": torch.float32}, {"torch_dtype": "float32"}, {"device_map": "auto"},
        {"device_map": "cpu"}, {"device_map": {"": torch.device("cpu")}}, {"trust_remote_code": True},
    ):  # fmt: skip
        model = load(folder, **options)
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    for call, message in (
        (lambda: load(folder, dtype=torch.float16), "dtype; got float16; expected fp32"),
        (lambda: load(folder, device_map={"a": 0, "b": "cpu"}), "device_map"),
        (lambda: load(folder, device_map="mps"), "device_map; got mps"),
        (lambda: load(folder, attn_implementation="sdpa"), "attn_implementation: without a meaning"),
        (lambda: load(folder, device_map=0), "cuda"),
        (lambda: load(None), "model; got None"),
        (lambda: model.save_pretrained(tmp_path / "x", safe_serialization=False), "safe_serialization=False"),
        (lambda: model.save_pretrained(tmp_path / "x", max_shard_size="1GB"), "max_shard_size"),
    ):
        with pytest.raises(SkvError, match=message):
            call()


# Prompts that begin alike.


def test_a_second_turn_runs_only_what_is_new(tmp_path: Path) -> None:
    folder = Tiny(SMALL).write_all(tmp_path, eos_token_id=[])
    model = SkvForCausalLM.from_pretrained(folder, prefix_bytes=1 << 30)
    plain, store = SkvForCausalLM.from_pretrained(folder), model.session.prefixes
    assert store is not None and plain.session.prefixes is None
    first = model.generate(torch.tensor([TOKENS[:90]]), max_new_tokens=20, do_sample=False)
    assert first.equal(plain.generate(torch.tensor([TOKENS[:90]]), max_new_tokens=20, do_sample=False))
    second = model.generate(torch.cat([first, torch.tensor([TOKENS[:9]])], dim=1), max_new_tokens=20, do_sample=False)
    assert store.reused_tokens == 109
    cache = plain.new_cache(1)
    plain.generate(torch.tensor([TOKENS[:90]]), max_new_tokens=20, do_sample=False, past_key_values=cache)
    both = torch.cat([first, torch.tensor([TOKENS[:9]])], dim=1)
    assert second.equal(plain.generate(both, max_new_tokens=20, do_sample=False, past_key_values=cache))


def test_what_is_kept_serves_padded_batches_sampling_and_beams(tmp_path: Path) -> None:
    folder = Tiny(EXACT).write_all(tmp_path, eos_token_id=[])
    model = SkvForCausalLM.from_pretrained(folder, prefix_bytes=1 << 30)
    plain, store = SkvForCausalLM.from_pretrained(folder), model.session.prefixes
    assert store is not None
    model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=2, do_sample=False)
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}):
        before, made = store.reused_tokens, []
        for x in (model, plain):
            torch.manual_seed(1)
            made.append(x.generate(**padded("left"), max_new_tokens=15, **options))
        assert made[0].equal(made[1]) and store.reused_tokens > before
    ids = torch.tensor([PROMPTS[0]])
    positions = torch.arange(30)[None] + 3
    got, want = (x(ids, position_ids=positions).logits for x in (model, plain))  # other positions: another run
    assert got.equal(want)


# Speculative decoding.


@pytest.mark.parametrize("config", [SMALL, EXACT, dataclasses.replace(SMALL, num_sink_tokens=0)], ids=["a", "b", "c"])
@pytest.mark.parametrize("windows", [(0, 0), (40, 0)], ids=["full", "window"])
def test_assisted_generation_is_greedy_generation(
    tmp_path: Path, config: LayerConfig, windows: tuple[int, int]
) -> None:
    tiny = Tiny(config, windows=windows)
    model = SkvForCausalLM.from_pretrained(tiny.write_all(tmp_path / "model", eos_token_id=[]), num_logits=9)
    draft = dataclasses.replace(tiny, config=dataclasses.replace(config, k_bits=1, v_bits=1))
    assistant = SkvForCausalLM.from_pretrained(draft.write_all(tmp_path / "draft", eos_token_id=[]))
    for x in (model, assistant):
        x.generation_config.pad_token_id = None  # it may be generated, and is not to be masked then
    assistant.generation_config.num_assistant_tokens = 6  # all of them must be within recent_tokens
    calls, run = [], type(model.session).run

    def counted(session: Session, *arguments: Any) -> np.ndarray:
        calls.append(session)
        return run(session, *arguments)

    for start in (0, 40, 90):
        text = TOKENS[start : start + 12]
        ids = torch.tensor([text * 4])
        greedy = model.generate(ids, max_new_tokens=130, do_sample=False)
        for mode in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": assistant}):
            calls.clear()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(model.session), "run", counted)
                made = model.generate(ids, **mode, max_new_tokens=130, do_sample=False)
            assert made.equal(greedy), (start, list(mode))
            assert mode.get("assistant_model") is None or calls.count(model.session) < 100


def test_assisted_generation_goes_on_from_a_cache_and_samples(tmp_path: Path) -> None:
    model = SkvForCausalLM.from_pretrained(Tiny(EXACT).write_all(tmp_path, eos_token_id=[]), num_logits=9)
    text, made = torch.tensor([TOKENS[:40]]), []
    for mode in ({}, {"prompt_lookup_num_tokens": 5}):
        cache = model.new_cache(1)
        first = model.generate(text, max_new_tokens=30, do_sample=False, past_key_values=cache, **mode)
        more = torch.cat([first, text[:, :9]], dim=1)
        options = {"attention_mask": torch.ones_like(more), "past_key_values": cache, "do_sample": False}
        made.append(model.generate(more, max_new_tokens=60, **options, **mode))
    assert made[0].equal(made[1])
    assert model.generate(text, do_sample=True, max_new_tokens=20, prompt_lookup_num_tokens=4).shape == (1, 60)


# transformers' own ways to load a model.


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> tuple[Path, Path]:
    """A checkpoint with a tokenizer, and its export."""
    checkpoint = tmp_path_factory.mktemp("auto") / "checkpoint"
    shutil.copytree(tiny_checkpoint("qwen3"), checkpoint)
    write_tokenizer(checkpoint, 320)
    return checkpoint, export_model(checkpoint, out=checkpoint.parent / "out", progress=lambda *_: None)


def test_auto_model_loads_an_exported_folder_and_every_other_as_ever(exported: tuple[Path, Path]) -> None:
    checkpoint, folder = exported
    for given in (folder, str(folder)):
        loaded = AutoModelForCausalLM.from_pretrained(given, dtype="auto", device_map="cpu")
        assert isinstance(loaded, SkvForCausalLM) and loaded.session.folder == folder
    with pytest.raises(SkvError, match="load_in_8bit: without a meaning"):
        AutoModelForCausalLM.from_pretrained(folder, load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert isinstance(theirs, PreTrainedModel)
    assert isinstance(AutoModelForCausalLM.from_config(theirs.config), PreTrainedModel)
    assert AutoModelForCausalLM.from_pretrained.__doc__ and isinstance(AutoModelForCausalLM, type)


def test_a_pipeline_loads_a_folder_by_its_name(exported: tuple[Path, Path]) -> None:
    _, folder = exported
    made = pipeline("text-generation", model=str(folder))("Anne", max_new_tokens=6, do_sample=False)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), SkvForCausalLM.from_pretrained(folder)
    (tokens,) = model.session.generate([tokenizer("Anne")["input_ids"]], max_new_tokens=6)
    assert made[0]["generated_text"] == "Anne" + tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("first", ["skv_export", "transformers"])
def test_it_does_not_matter_what_is_imported_first(first: str, exported: tuple[Path, Path]) -> None:
    second = {"skv_export": "transformers", "transformers": "skv_export"}[first]
    code = (
        f"import sys; import {first}, {second}; from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(exported[1])], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "SkvForCausalLM"


def test_parameters_are_counted_as_pytorch_counts_them(exported: tuple[Path, Path]) -> None:
    checkpoint, folder = exported
    ours, theirs = SkvForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(checkpoint)
    assert ours.num_parameters() == theirs.num_parameters() > 0
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(exclude_embeddings=True)
    assert ours.num_parameters(only_trainable=True) == 0


def test_a_model_prints_what_it_is(exported: tuple[Path, Path]) -> None:
    shown = repr(SkvForCausalLM.from_pretrained(exported[1]))
    assert shown == (f"SkvForCausalLM({exported[1]}: qwen3, 2 layers, cache K4V2, weights fp32, context 512, on cpu)")
