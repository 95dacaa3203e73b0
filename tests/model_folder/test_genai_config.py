"""onnxruntime-genai: its builder's models are rewritten, and what is written runs there with the runtime's tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from skv_export.bench import model
from skv_export.export.pipeline import export_model
from skv_export.model_folder import genai_config
from skv_export.rewrite.pipeline import Rewrite, rewrite_model
from skv_export.runtime.session import Session
from skv_export.spec.recipe import LayerConfig, Recipe

og = pytest.importorskip(
    "onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install onnxruntime-genai"
)

pytestmark = pytest.mark.usefixtures("library")

SMALL = Recipe(LayerConfig(num_sink_tokens=2, recent_tokens=16, tile_tokens=32))
EXACT = SMALL.with_options(k_bits=16, v_bits=16, recent_type="float")
PROMPT = [int(t) for t in np.random.default_rng(5).integers(3, 128, 90)]
LENGTH = 512


@pytest.fixture(scope="module")
def build(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: ``build("int4", "llama")`` is a folder of genai's model builder, made once."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made: dict[tuple[str, str], Path] = {}

    def make(precision: str, arch: str = "llama") -> Path:
        if (precision, arch) not in made:
            checkpoint = tiny_checkpoint(arch, head_dim=64)
            tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t0"))
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(checkpoint)
            out, cache = tmp_path_factory.mktemp(precision), str(tmp_path_factory.mktemp("cache"))
            options = parse_extra_options("", str(checkpoint), str(out), precision, "cpu", cache, [])
            create_model("", str(checkpoint), str(out), precision, "cpu", cache, **options)
            made[precision, arch] = out
        return made[precision, arch]

    return make


def source_logits(folder: Path, tokens: list[int], chunks: list[int]) -> NDArray[np.float32]:
    """The builder's own graph with its float cache; windows by their mask, in caches that hold everything."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in [a for a in node.attribute if a.name == "sliding_window_cache"]:
            node.attribute.remove(attribute)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [x.name for x in session.get_outputs()]
    pasts = [x for x in session.get_inputs() if x.name.startswith("past")]
    caches = {x.name: np.zeros((1, x.shape[1], 0, 64), np.float32) for x in pasts}
    rows, start = [], 0
    for count in chunks:
        end = start + count
        feeds = {"input_ids": np.array([tokens[start:end]]), "attention_mask": np.ones((1, end), np.int64)}
        results = dict(zip(outputs, session.run(None, feeds | caches), strict=True))
        caches = {name: results[name.replace("past_key_values", "present")] for name in caches}
        rows.append(results["logits"][0])
        start = end
    return np.concatenate(rows)


def generate(folder: Path, prompts: list[list[int]], count: int, **search: Any) -> list[list[int]]:
    """Greedy tokens of onnxruntime-genai; prompts of one length."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(**({"max_length": LENGTH, "do_sample": False, "batch_size": len(prompts)} | search))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompts, np.int32))
    for _ in range(count):
        if not generator.is_done():
            generator.generate_next_token()
    return [[int(t) for t in generator.get_sequence(i)][len(prompts[0]) :] for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("precision", "arch"),
    [("fp32", "llama"), ("int4", "llama"), ("fp32", "qwen3"), ("fp32", "mistral"), ("fp32", "gemma2")],
)
def test_rewritten_model_computes_what_the_builder_wrote(
    precision: str, arch: str, build: Callable[..., Path], tmp_path: Path
) -> None:
    """Packed QKV and rotary inside; qwen3's norms; mistral's window; gemma2's softcap and alternating windows."""
    source, chunks = build(precision, arch), [40, *[1] * 20, 30]
    session = Session(rewrite_model(source, out=tmp_path / "out", recipe=EXACT))
    cache, start, rows = session.cache(1, LENGTH), 0, []
    for count in chunks:
        rows.append(session.run([PROMPT[start : start + count]], None, None, cache)[0])
        start += count
    difference = np.abs(np.concatenate(rows) - source_logits(source, PROMPT, chunks))
    # int4's kernel rounds activations to 8 bits: the last bit of one may become a whole step of 1/127.
    assert difference.max() <= (5e-4 if precision == "fp32" else 0.3) and np.median(difference) <= 1e-4


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (8, 8), (4, 2), (2, 4)])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_genai_gives_the_runtimes_tokens(
    bits: tuple[int, int], precision: str, build: Callable[..., Path], tmp_path: Path
) -> None:
    """Equal widths, and unequal ones through the open dimension: one folder for both."""
    recipe = SMALL.with_options(k_bits=bits[0], v_bits=bits[1])
    out = rewrite_model(build(precision), out=tmp_path / "out", recipe=recipe)
    (expected,) = Session(out).generate([PROMPT], max_new_tokens=60)
    # genai leaves out the token that ends a text.
    assert generate(out, [PROMPT], 60) == [expected[:-1] if expected[-1] == 2 else expected]


def test_bench_takes_turns_with_a_build_of_any_precision(build: Callable[..., Path], tmp_path: Path) -> None:
    """int4 weights on both sides: what is compared is the cache."""
    source = build("int4")
    out = rewrite_model(source, out=tmp_path / "out", recipe=SMALL)
    ours, theirs = model.bench_model(out, against=source, context=(40,), threads=1, rounds=1, steps=3)
    assert (ours.name, theirs.name) == ("skv", "genai")
    assert ours.speedup == {"genai": pytest.approx(theirs.ms_median / ours.ms_median)} and ours.prefill_seconds > 0


@pytest.mark.parametrize("bits", [(4, 4), (4, 2)])
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_exported_folder_runs_unchanged(
    bits: tuple[int, int], arch: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = SMALL.with_options(k_bits=bits[0], v_bits=bits[1])
    out = export_model(tiny_checkpoint(arch), out=tmp_path / "out", recipe=recipe, progress=lambda *_: None)
    (expected,) = Session(out).generate([PROMPT], max_new_tokens=60)
    assert generate(out, [PROMPT], 60) == [expected[:-1] if expected[-1] == 2 else expected]


def test_genai_batches_and_later_turns(build: Callable[..., Path], tmp_path: Path) -> None:
    out = rewrite_model(build("fp32"), out=tmp_path / "out", recipe=SMALL.with_options(k_bits=4, v_bits=4))
    session, prompts = Session(out), [PROMPT[:50], PROMPT[40:]]
    expected = [session.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]
    count = min(map(len, expected))
    assert generate(out, prompts, count) == [tokens[:count] for tokens in expected]

    model = og.Model(str(out))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=LENGTH, do_sample=False)
    generator, cache = og.Generator(model, params), session.cache(1, LENGTH)
    generator.append_tokens(np.array(PROMPT[:50], np.int32))
    generator.append_tokens(np.array(PROMPT[50:], np.int32))
    session.run([PROMPT[:50]], None, None, cache)
    session.run([PROMPT[50:]], None, None, cache)
    # A sequence's next token depends on the whole past: of both turns, in the cache.
    generator.generate_next_token()
    twin = Session(out)
    both = twin.cache(1, LENGTH)
    twin.run([PROMPT[:50]], None, None, both)
    logits = twin.run([PROMPT[50:]], None, None, both)
    assert int(generator.get_sequence(0)[-1]) == int(logits[0, -1].argmax())


def test_genai_config_of_a_built_model(build: Callable[..., Path], tmp_path: Path) -> None:
    source = build("int4")
    before = json.loads((source / "genai_config.json").read_text())
    out = rewrite_model(source, out=tmp_path / "out", recipe=SMALL.with_options(k_bits=2, v_bits=4))
    after = json.loads((out / "genai_config.json").read_text())
    layer = Session(out).config.layers[0]
    assert after["model"]["decoder"]["head_size"] == layer.value.width > layer.key.width
    assert after["model"]["decoder"]["session_options"].pop("custom_ops_library") == "libskv_ops.so"
    after["model"]["decoder"]["head_size"] = before["model"]["decoder"]["head_size"]
    before["search"]["num_beams"] = 1
    assert after == before


def test_genai_says_when_a_cache_is_too_short(build: Callable[..., Path], tmp_path: Path) -> None:
    """Rows of a short cache are taken by the exact tokens: the length from which on it holds what it is asked for."""
    recipe = Recipe()
    out = rewrite_model(build("fp32"), out=tmp_path / "out", recipe=recipe.with_options(k_bits=4, v_bits=4))
    layers = [layer.op.layouts for layer in Rewrite.read(build("fp32"), recipe).layers]
    least = genai_config.least_length(layers, 8192)
    assert least is not None and genai_config.capacity(layers, 400) == 195
    with pytest.raises(RuntimeError, match="expected at most its capacity of 195"):
        generate(out, [PROMPT * 3], 1, max_length=400)
