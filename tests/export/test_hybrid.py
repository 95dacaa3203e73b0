"""Models with recurrent layers between those with attention: exported, against PyTorch, and what their states allow."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from padding import padded
from tiny_models import HYBRID, tiny_config, write_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from skv_export.analysis.pipeline import analyze
from skv_export.checkpoints.checkpoint import Source
from skv_export.errors import SkvError
from skv_export.export import architectures, pipeline, supported
from skv_export.export.decoder import SkvDecoder
from skv_export.integrations.transformers_model import SkvForCausalLM
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.runtime.prefixes import PrefixStore
from skv_export.runtime.session import Session
from skv_export.runtime.speculation import PromptLookup, Speculation
from skv_export.spec.recipe import Recipe
from skv_export.spec.state import LayerState
from skv_export.verification import run

pytestmark = pytest.mark.usefixtures("library")

EXACT = Recipe().with_options(
    k_bits=16, v_bits=16, tile_tokens=32, recent_tokens=8, num_sink_tokens=2, recent_type="float"
)
SMALL = Recipe().with_options(k_bits=4, v_bits=2, tile_tokens=32, recent_tokens=8, num_sink_tokens=2)
TOLERANCE = 1e-3
"""Of the logits, which are of size 7 to 10; measured: 6e-6 to 1e-4."""
QUICK = ("lfm2", "falcon_h1", "qwen3_5_text")
"""One of each kind: a convolution alone, a state-space layer, the delta rule; the others are slow tests."""
EVERY = [pytest.param(arch, marks=[] if arch in QUICK else pytest.mark.slow) for arch in HYBRID]
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A function: the folder that a tiny architecture is exported to, with ``EXACT`` unless given, made once."""
    made: dict[tuple[str, Recipe], Path] = {}

    def get(arch: str, recipe: Recipe = EXACT) -> Path:
        if (arch, recipe) not in made:
            out, source = tmp_path_factory.mktemp("exported") / arch, tiny_checkpoint(arch, **HYBRID[arch])
            if not (source / "tokenizer.json").is_file():
                write_tokenizer(source, 320)
            made[arch, recipe] = pipeline.export_model(source, out=out, recipe=recipe, progress=lambda *_: None)
        return made[arch, recipe]

    return get


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """A function: the checkpoint that ``exported`` has exported."""
    return lambda arch: tiny_checkpoint(arch, **HYBRID[arch])


def load(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    return model.eval()


def token_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def torch_logits(model: PreTrainedModel, ids: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return model(ids).logits[0].float().numpy()


# Equal to PyTorch.


def test_every_hybrid_architecture_has_a_tiny_model() -> None:
    assert set(HYBRID) == set(architectures.HYBRID)


@pytest.mark.parametrize("arch", EVERY)
def test_logits_are_pytorchs_through_a_prompt_decoding_and_a_second_prompt(
    arch: str, exported: Export, checkpoint: Callable[[str], Path]
) -> None:
    expected = torch_logits(load(checkpoint(arch)), ids := token_ids(90))
    session = Session(exported(arch))
    cache, got, ends = session.cache(1, 90), [], [20, *range(21, 41), 71, *range(72, 91)]
    for start, end in zip([0, *ends], ends, strict=False):
        got.append(session.run(ids[:, start:end].numpy(), None, None, cache)[0, 0])
    np.testing.assert_allclose(np.stack(got), expected[[end - 1 for end in ends]], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("arch", QUICK)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_one_by_one(arch: str, side: str, exported: Export, checkpoint: Callable[[str], Path]) -> None:
    """A sequence of one token, shorter than a convolution's window, and one that rests for a call are among them."""
    model, session = load(checkpoint(arch)), Session(exported(arch))
    lengths, steps = (1, 11, 7), 4
    texts = [token_ids(n + steps, seed=n) for n in lengths]
    ids, mask = padded([text[0, :n] for n, text in zip(lengths, texts, strict=True)], side)
    cache = session.cache(3, max(lengths) + steps)
    got = [session.run(ids, mask, None, cache)[:, 0]]
    for step in range(steps - 1):
        rows = [text[0, n + step : n + step + 1].tolist() for n, text in zip(lengths, texts, strict=True)]
        session.append([rows[0], [], []], cache)
        got.append(session.append([[], *rows[1:]], cache))
        got[-1][0] = np.nan
    for i, (n, text) in enumerate(zip(lengths, texts, strict=True)):
        expected = torch_logits(model, text)[n - 1 : n - 1 + steps]
        count = 1 if i == 0 else steps
        np.testing.assert_allclose(np.stack(got)[:count, i], expected[:count], atol=TOLERANCE, rtol=0)
    last = session.append([texts[0][0, -1:].tolist(), [], []], cache)[0]
    np.testing.assert_allclose(last, torch_logits(model, texts[0])[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("arch", ["bamba", "qwen3_next"])
def test_decoder_in_torch_is_the_plain_model_chunk_by_chunk(arch: str, checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint(arch))
    expected = torch_logits(model, ids := token_ids(28))
    planned = pipeline.plan(checkpoint(arch), EXACT)
    supported.prepare_model(model)
    configs = EXACT.layers(planned.num_hidden_layers)
    given = {i: configs[i] for i in planned.by_index}
    decoder = SkvDecoder(model, given, all_logits=True, states=planned.states)
    past: list[list[torch.Tensor]] = [
        [
            torch.zeros((1, x.params.kv_num_heads, *x.layouts[which].shape(28)), dtype=torch.uint8)
            for x in planned.layers
        ]
        for which in (0, 1)
    ]
    got = []
    with torch.no_grad():
        for start in range(0, 28, 7):
            places = torch.arange(start, start + 7)[None]
            mask = torch.ones(1, start + 7, dtype=torch.int64)
            logits, *past = decoder(ids[:, start : start + 7], mask, places, *past)
            got.append(logits[0].numpy())
    np.testing.assert_allclose(np.concatenate(got), expected, atol=TOLERANCE, rtol=0)
    assert decoder.states == planned.states and decoder.layers == planned.layers
    # Outside the decoder, transformers' functions are its own again.
    np.testing.assert_allclose(torch_logits(load(checkpoint(arch)), ids), expected, atol=1e-6, rtol=0)


def test_half_precision_keeps_states_in_float32(exported: Export, checkpoint: Callable[[str], Path]) -> None:
    folder = exported("falcon_h1", EXACT.with_options(dtype="fp16"))
    session = Session(folder)
    expected = torch_logits(load(checkpoint("falcon_h1")), ids := token_ids(40))
    cache = session.cache(1, 40)
    session.run(ids[:, :30].numpy(), None, None, cache)
    got = session.run(ids[:, 30:].numpy(), None, None, cache)
    np.testing.assert_allclose(got[0, 0], expected[-1], atol=0.2, rtol=0)
    assert all(x.type == "tensor(float)" for x in session.onnx.get_inputs() if x.name.startswith("past_state"))


def test_verify_compares_states_too(exported: Export, checkpoint: Callable[[str], Path]) -> None:
    folder = exported("falcon_h1", SMALL)
    report = run.verify(
        folder, checkpoint=checkpoint("falcon_h1"), levels=["graph", "text", "quality"], windows=1, window_tokens=96
    )
    assert report.graph is not None and report.graph.failures == ()
    assert report.graph.exact.max_abs < TOLERANCE
    assert report.graph.quantized is not None and 0 < report.graph.quantized.states < 1e-3
    assert any("recurrent states differ by" in row for row in report.graph.rows())
    assert report.quality is not None and report.quality.top1_agreement > 0.5


# What is written.


def test_plan_and_config_count_the_states(exported: Export, checkpoint: Callable[[str], Path]) -> None:
    planned = pipeline.plan(checkpoint("qwen3_5_text"))
    assert planned.indices == (3,) and planned.num_hidden_layers == 4
    conv, matrix = (2 * 2 * 16 + 4 * 24) * 3 * 4, 4 * 16 * 24 * 4
    assert planned.state_bytes == 3 * (conv + matrix)
    without = dataclasses.replace(planned, states=())
    for size, rest in (
        (planned.cache_bytes, without.cache_bytes),
        (planned.half_cache_bytes, without.half_cache_bytes),
    ):
        assert size(100) == rest(100) + planned.state_bytes
    table = planned.table()
    assert "layer 3: K4V2" in table and "3 layers with a recurrent state: 23.6 KiB per sequence" in table
    folder = exported("qwen3_5_text")
    config = ModelConfig.load(folder)
    assert config.states == planned.states and list(config.by_index) == [3] and config.num_hidden_layers == 4
    assert config.states[0] == LayerState(0, "conv", (160, 3))
    names = [x.name for x in Session(folder).onnx.get_outputs()]
    assert names[1:3] == ["present.3.key", "present.3.value"]
    assert names[3:] == [f"present_state.{x.layer}.{x.name}" for x in config.states]
    values = json.loads((folder / "skv_config.json").read_text())
    assert [x["layer"] for x in values["layers"]] == [3]
    assert values["states"][1] == {"layer": 0, "name": "recurrent", "shape": [4, 16, 24]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["states"][0].update(layer=-1), "state: layer"),
        (lambda v: v["states"][0].update(name="other"), "state of layer 0"),
        (lambda v: v["states"][0].update(shape=[0, 3]), "shape"),
        (lambda v: v["layers"][0].update(layer=4), "layer is 4"),
        (lambda v: v.pop("states"), "1 layers listed, num_hidden_layers is 4"),
    ],
)
def test_damaged_states_are_refused(
    change: Callable[[Any], object], message: str, exported: Export, tmp_path: Path
) -> None:
    values = json.loads((exported("qwen3_5_text") / "skv_config.json").read_text())
    change(values)
    (tmp_path / "skv_config.json").write_text(json.dumps(values))
    with pytest.raises(SkvError, match=message):
        ModelConfig.load(tmp_path)


def test_a_graph_with_other_states_is_refused(exported: Export) -> None:
    folder = exported("lfm2")
    config = ModelConfig.load(folder)
    graph = (folder / "model.onnx").read_bytes()
    wrong = type(config)(**{**vars(config), "states": (LayerState(0, "conv", (64, 3)), *config.states[1:])})
    with pytest.raises(SkvError, match="do not belong together: layer 0, state conv"):
        Session(folder, model=graph, config=wrong)


def test_genai_runs_the_folder(exported: Export) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    folder = exported("falcon_h1", SMALL)
    session, ids = Session(folder), token_ids(60).numpy().astype(np.int32)
    cache = session.cache(1, 512)
    params = genai.GeneratorParams(model := genai.Model(str(folder)))
    params.set_search_options(max_length=512, do_sample=False)
    generator = genai.Generator(model, params)
    for start, end in ((0, 40), *((i, i + 1) for i in range(40, 60))):
        generator.append_tokens(ids[0, start:end])
        got = np.array(generator.get_logits()).reshape(-1)
        expected = session.run(ids[:, start:end], None, None, cache)[0, 0]
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)


def test_layers_with_attention_are_told_from_the_others() -> None:
    assert supported.attention_layers(tiny_config("nemotron_h")) == [2]
    assert supported.attention_layers(tiny_config("bamba")) == [1, 3]
    assert supported.attention_layers(tiny_config("falcon_h1")) == [0, 1]


def test_without_attention_there_is_nothing_to_export() -> None:
    with pytest.raises(SkvError, match="granitemoehybrid: can't be exported: a state-space model"):
        supported.check_config(tiny_config("granitemoehybrid", layer_types=["linear_attention"] * 2))


def test_what_needs_attention_in_every_layer_says_so(checkpoint: Callable[[str], Path]) -> None:
    source = Source("safetensors", checkpoint("lfm2"))
    with pytest.raises(SkvError, match=r"lfm2: a hybrid model; got layers without attention \(conv\).*quality"):
        analyze(source)
    with pytest.raises(SkvError, match="lfm2: measured layer by layer; got layers without attention"):
        LayerByLayer(source)


def test_a_layer_that_keeps_its_state_to_itself_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.lfm2 import modeling_lfm2

    def forward(self: Any, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> torch.Tensor:
        past_key_values.update_conv_state(hidden_states, self.layer_idx)
        return hidden_states

    monkeypatch.setattr(modeling_lfm2.Lfm2ShortConv, "forward", forward)
    with pytest.raises(SkvError, match="layer 4: its state conv is not computed by a function that the export repl"):
        pipeline.plan(checkpoint("lfm2"))


# What a running model can do with its states.


@pytest.fixture(scope="module")
def session(exported: Export) -> Session:
    """A hybrid model with both kinds of state and a quantized cache."""
    return Session(exported("falcon_h1", SMALL))


IDS = token_ids(120, seed=5)[0].tolist()


def follow(session: Session, cache: Any, ids: list[int]) -> Any:
    return session.run([ids], None, None, cache)[0, -1]


def test_copies_go_on_by_themselves(session: Session) -> None:
    cache = session.cache(1, 200)
    follow(session, cache, IDS[:60])
    pair = cache.fork(2)
    one, other = session.append([IDS[60:70], IDS[70:80]], pair)
    alone = follow(session, cache, IDS[60:70])
    np.testing.assert_array_equal(one, alone)
    assert np.abs(one - other).max() > 0.1
    pair.reorder([1, 0])
    again = session.append([IDS[80:81], IDS[80:81]], pair)
    np.testing.assert_array_equal(again[1], follow(session, cache, IDS[80:81]))


def test_a_saved_cache_goes_on_as_if_nothing_had_happened(session: Session, tmp_path: Path) -> None:
    cache = session.cache(1, 200)
    follow(session, cache, IDS[:60])
    cache.save(tmp_path / "cache")
    loaded = session.load_cache(tmp_path / "cache")
    np.testing.assert_array_equal(follow(session, loaded, IDS[60:70]), follow(session, cache, IDS[60:70]))
    raw = bytearray((tmp_path / "cache").read_bytes())
    raw[-3] ^= 0x40  # in the last state
    (tmp_path / "cache").write_bytes(raw)
    with pytest.raises(SkvError, match="damaged: SHA-256"):
        session.load_cache(tmp_path / "cache")


def test_tokens_are_taken_back_all_or_not_at_all(session: Session) -> None:
    cache = session.cache(2, 200)
    first = session.append([IDS[:30], IDS[30:60]], cache)
    with pytest.raises(SkvError, match=r"rewind of sequence 0.*got 29.*30 ... 30, or 0.*Cache.select"):
        cache.rewind([29, 30])
    assert cache.rewind_floor(0) == 30 and cache.draft_room(0) == 0
    assert cache.common(0, [*IDS[:30], 5]) == 30 and cache.common(0, [*IDS[:29], 5]) == 0
    cache.rewind([0, 30])
    again = session.append([IDS[:30], IDS[60:61]], cache)
    np.testing.assert_allclose(again[0], first[0], atol=1e-6, rtol=0)
    cache.reset()
    np.testing.assert_array_equal(session.append([IDS[:30], IDS[30:60]], cache), first)


def test_first_sequences_share_their_states(session: Session) -> None:
    cache = session.cache(3, 100)
    session.append([IDS[:10], IDS[10:20], IDS[20:30]], cache)
    twin = cache.select([0, 1, 2])
    part = cache.first(2)
    got = session.append([IDS[30:31], IDS[31:32]], part)
    whole = session.append([IDS[30:31], IDS[31:32], []], twin)
    np.testing.assert_array_equal(got, whole[:2])
    rest = session.append([[], [], IDS[32:33]], cache)[2]
    np.testing.assert_array_equal(rest, session.append([[], [], IDS[32:33]], twin)[2])


def test_a_batch_says_what_each_sequence_says_alone(session: Session) -> None:
    prompts = [IDS[:50], IDS[50:57], IDS[60:100]]
    batch = session.batch(2, max_length=120, prompt_chunk=16)
    numbers = [batch.add(prompt, max_new_tokens=8) for prompt in prompts]
    made: dict[int, list[int]] = {number: [] for number in numbers}
    while batch.running or batch.waiting:
        for token in batch.step():
            made[token.sequence].append(token.token)
    for number, prompt in zip(numbers, prompts, strict=True):
        cache, alone = session.cache(1, 120), []
        for start in range(0, len(prompt), 16):
            logits = follow(session, cache, prompt[start : start + 16])
        for _ in range(8):
            alone.append(int(logits.argmax()))
            if alone[-1] in session.config.eos_token_id:
                break
            logits = follow(session, cache, alone[-1:])
        assert made[number] == alone


def test_kept_beginnings_hold_their_states(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [session.generate([prompt], max_new_tokens=6) for prompt in (IDS[:90], [*IDS[:70], 9, 8, 7])]
    monkeypatch.setattr(session, "prefixes", PrefixStore(1 << 20))
    assert [session.generate([IDS[:90]], max_new_tokens=6) for _ in range(2)] == [plain[0], plain[0]]
    assert session.prefixes is not None and session.prefixes.reused_tokens == 90
    session.generate([[*IDS[:70], 9, 8, 7]], max_new_tokens=6)
    reused = session.prefixes.reused_tokens
    session.generate([[*IDS[:70], 1, 2, 3]], max_new_tokens=6)
    assert session.prefixes.reused_tokens == reused + 70


def test_what_needs_a_rewind_is_refused(session: Session, exported: Export) -> None:
    with pytest.raises(SkvError, match=r"speculative decoding.*recurrent layers"):
        Speculation(session, PromptLookup(3))
    with pytest.raises(SkvError, match=r"cuda_graph.*recurrent layers"):
        Session(exported("falcon_h1", SMALL), execution_provider="cuda", cuda_graph=True)
    model = SkvForCausalLM.from_session(session)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(torch.tensor([IDS[:20]]), prompt_lookup_num_tokens=3, max_new_tokens=4)
    assert not model.new_cache(1).is_croppable


def test_fewer_tokens_leave_the_states_alone(exported: Export) -> None:
    session = Session(exported("falcon_h1", SMALL), score_window=8)
    cache = session.cache(1, 200)
    follow(session, cache, IDS)
    before = cache.states.of(0)
    session.compact(cache, keep=80)
    assert cache.held[0] <= 80 and all(np.array_equal(x, before[key]) for key, x in cache.states.of(0).items())
    follow(session, cache, IDS[:4])
    assert cache.lengths[0] == 124


def test_transformers_generates_with_beams_as_pytorch_does(exported: Export, checkpoint: Callable[[str], Path]) -> None:
    model, plain = SkvForCausalLM.from_pretrained(exported("falcon_h1")), load(checkpoint("falcon_h1"))
    ids = torch.tensor([IDS[:12], IDS[12:24]])
    for options in ({"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = plain.generate(ids, max_new_tokens=10, **options)
        assert model.generate(ids, max_new_tokens=10, **options).equal(expected)
