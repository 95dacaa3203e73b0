"""The text tower of vision-language checkpoints: tokens or embeddings, images, positions of three axes, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from vision_models import CONFIGS, make_vision_model, with_image

from skv_export.analysis.pipeline import MeasureOptions, analyze
from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import load_model
from skv_export.errors import SkvError
from skv_export.export import pipeline, supported, vision_language
from skv_export.integrations.transformers_model import SkvForCausalLM
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.quantization.key_calibration import calibrate
from skv_export.quantization.pipeline import Options, quantize
from skv_export.runtime.session import Session
from skv_export.spec.recipe import Recipe
from skv_export.verification import graph_level
from skv_export.verification.run import verify

pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.filterwarnings("ignore:gemma3. Gemma 3's image tokens:RuntimeWarning"),
]
EXACT = Recipe().with_options(
    k_bits=16, v_bits=16, tile_tokens=32, recent_tokens=8, num_sink_tokens=2, recent_type="float"
)
TOLERANCE = 1e-3
BEFORE, AFTER = [11, 12, 13, 14], [40, 41, 42, 43, 44, 45]


class Exported(NamedTuple):
    checkpoint: Path
    folder: Path
    model: Any


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Callable[[str], Exported]:
    """A function: a tiny model of a kind, its checkpoint and its export, made once."""
    made: dict[str, Exported] = {}

    def get(kind: str) -> Exported:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = make_vision_model(folder / "checkpoint", kind)
            out = pipeline.export_model(
                folder / "checkpoint", out=folder / "out", recipe=EXACT, progress=lambda *_: None
            )
            made[kind] = Exported(folder / "checkpoint", out, model)
        return made[kind]

    return get


EVERY = [pytest.param(kind, marks=[] if kind == "qwen2_vl" else pytest.mark.slow) for kind in CONFIGS]


@pytest.mark.parametrize("kind", EVERY)
def test_tokens_their_embeddings_and_an_image_give_pytorchs_logits(
    kind: str, exported: Callable[[str], Exported]
) -> None:
    """With padding on either side too: tokens are packed, and their embeddings with them."""
    _, folder, model = exported(kind)
    session = Session(folder)
    ids = torch.randint(10, 320, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()
        embeds = model.get_input_embeddings()(ids).numpy()
    embeds = np.pad(embeds, [(0, 0), (0, 0), (0, session.config.inputs_embeds - embeds.shape[2])])
    cache, others = session.cache(2, 60), session.cache(2, 60)
    for start, stop in ((0, 50), (50, 59), (59, 60)):
        by_ids = session.run(ids[:, start:stop].numpy(), None, None, cache)
        by_embeds = session.run_embeds(embeds[:, start:stop], None, None, others)
        np.testing.assert_allclose(by_ids[:, 0], expected[:, stop - 1], atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(by_embeds, by_ids)

    padded, mask = np.zeros((2, 55, embeds.shape[2]), np.float32), np.zeros((2, 55), np.int64)
    padded[0, 5:], mask[0, 5:] = embeds[0, :50], 1
    padded[1, :40], mask[1, :40] = embeds[1, :40], 1
    got = session.run_embeds(padded, mask, None, session.cache(2, 60))[:, 0]
    np.testing.assert_allclose(got, [expected[0, 49], expected[1, 39]], atol=TOLERANCE, rtol=0)

    half = torch.from_numpy(embeds).bfloat16().requires_grad_()
    got = session.run_embeds(half, None, None, session.cache(2, 60))
    want = session.run_embeds(half.detach().float().numpy(), None, None, session.cache(2, 60))
    np.testing.assert_array_equal(got, want)

    merged, positions, logits = with_image(model, BEFORE, AFTER)
    assert not np.allclose(
        merged[0, 6, :64], model.get_input_embeddings()(torch.tensor([5]))[0].detach()
    )  # the image's
    if kind.startswith("qwen3_vl"):  # what is added to the outputs of the first layers counts
        assert merged.shape[2] == 3 * 64 and session.config.inputs_embeds == 3 * 64
        without = merged.clone()
        without[..., 64:] = 0
        got = session.run_embeds(without.numpy(), None, positions.numpy(), session.cache(1, 60))[:, 0]
        assert np.abs(got - logits[:, -1].numpy()).max() > 0.1
    if kind == "qwen2_vl":
        assert positions is not None and len(positions) == 3 and not torch.equal(positions[0], positions[2])
    given = None if positions is None else positions.numpy()
    got = session.run_embeds(merged.numpy(), None, given, session.cache(1, 60))[:, 0]
    np.testing.assert_allclose(got, logits[:, -1], atol=TOLERANCE, rtol=0)


def test_after_an_image_decoding_goes_on_with_pytorchs_tokens(exported: Callable[[str], Exported]) -> None:
    """Positions of multimodal RoPE are behind the image's largest, not behind its last token."""
    _, folder, model = exported("qwen2_vl")
    merged, positions, logits = with_image(model, BEFORE, AFTER)
    token, expected = int(logits[0, -1].argmax()), []
    for _ in range(8):
        expected.append(token)
        logits = with_image(model, BEFORE, [*AFTER, *expected])[2]
        token = int(logits[0, -1].argmax())
    ours = SkvForCausalLM.from_session(Session(folder))
    got = ours.generate(
        inputs_embeds=merged, position_ids=positions, max_new_tokens=8, do_sample=False, eos_token_id=-1
    )
    assert got[0].tolist() == expected
    assert int(positions.max()) + 1 < merged.shape[1]  # with the tokens' own positions it is another text
    plain = ours.generate(inputs_embeds=merged, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert plain[0].tolist() != expected


def test_folder_says_what_its_graph_takes_and_verify_holds_it_to_the_checkpoint(
    exported: Callable[[str], Exported],
) -> None:
    checkpoint, folder, _ = exported("qwen2_vl")
    config = ModelConfig.load(folder)
    assert (config.inputs_embeds, config.position_axes, config.model_type) == (64, 3, "qwen2_vl")
    session = Session(folder)
    assert "inputs_embeds" not in [x.name for x in session.onnx.get_inputs()]  # it may be left out
    model = load_model(Source("safetensors", checkpoint))
    count = sum(graph_level.step_counts(session.config))
    ids = torch.randint(10, 320, (count,), generator=torch.Generator().manual_seed(3)).tolist()
    assert not graph_level.check(model, folder, ids).failures


def test_what_came_as_an_embedding_is_no_token(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    session = Session(exported("qwen2_vl").folder, prefix_bytes=1 << 20)
    cache = session.cache(1, 100)
    session.run_embeds(np.ones((1, 20, 64), np.float32), None, None, cache)
    session.run([[7, 8]], None, None, cache)
    assert cache.tokens == [[-1] * 20 + [7, 8]]
    assert cache.common(0, [0] * 20 + [7, 8]) == 0
    assert len(list(session.stream([[9]], cache=cache, max_new_tokens=2, present=cache.tokens))) == 2
    cache.save(tmp_path / "cache.safetensors")
    assert session.load_cache(tmp_path / "cache.safetensors").tokens == cache.tokens


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (np.zeros((1, 4, 63)), r"inputs_embeds: shape; got \[1, 4, 63\]; expected \[1, at least 1, 64\]"),
        (np.zeros((2, 4, 64)), r"inputs_embeds: shape; got \[2, 4, 64\]"),
        (np.full((1, 4, 64), np.nan), "inputs_embeds; got infinite numbers or not-a-number"),
        ([["a"]], "inputs_embeds; .*expected numbers"),
        (np.zeros((1, 4, 64), np.complex64), "inputs_embeds; .*expected numbers"),
        (torch.zeros(1, 4, 64, dtype=torch.complex64), "inputs_embeds; .*expected numbers"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(embeds: Any, message: str, exported: Callable[[str], Exported]) -> None:
    session = Session(exported("qwen2_vl").folder)
    with pytest.raises(SkvError, match=message):
        session.run_embeds(embeds, None, None, session.cache(1, 50))


def test_a_text_model_takes_embeddings_if_asked_to(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("gemma2")  # its embeddings are scaled in transformers' model, not in the table
    folder = pipeline.export_model(
        checkpoint, out=tmp_path / "out", recipe=EXACT, inputs_embeds=True, progress=lambda *_: None
    )
    model, session = load_model(Source("safetensors", checkpoint)), Session(folder)
    ids = torch.randint(10, 320, (1, 50), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        expected = model(inputs_embeds=embeds).logits[0, -1].numpy()
    got = session.run_embeds(embeds.numpy(), None, None, session.cache(1, 60))[0, 0]
    np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)
    ours = SkvForCausalLM.from_session(session)
    with pytest.raises(SkvError, match="input_ids and inputs_embeds; got both; expected one of them"):
        ours.forward(ids, inputs_embeds=embeds)


def test_without_the_flag_a_text_model_takes_tokens_only(tiny_checkpoint: Callable[..., Path]) -> None:
    assert pipeline.plan(tiny_checkpoint("llama")).inputs_embeds == 0
    with pytest.raises(SkvError, match="hidden_size_per_layer_input"):
        pipeline.plan(tiny_checkpoint("gemma4_text"), inputs_embeds=True)


def test_bits_of_a_towers_layers_are_chosen_and_its_keys_calibrated(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    """By text; the weights are not fitted to it, for images are read as well."""
    source = Source("safetensors", exported("qwen2_vl").checkpoint)
    text = "".join(chr(33 + i * i % 61) for i in range(1200))
    (tmp_path / "text").write_text(text)
    found = analyze(source, measure=MeasureOptions(tmp_path / "text", 1, 200, confirm_windows=0))
    assert len(found.layers) == 2 and found.to_recipe().overrides
    calibrate(source, text, windows=2, window=200).save(tmp_path / "keys.safetensors")
    out = pipeline.export_model(
        source, out=tmp_path / "out", recipe=EXACT.with_options(k_bits=2), calibration=tmp_path / "keys.safetensors",
        progress=lambda *_: None,
    )  # fmt: skip
    report = verify(out, checkpoint=source.path, levels=["graph"])
    assert report.failures == (), report.table()
    with pytest.raises(SkvError, match=r"fitted to a text; got qwen2_vl, a vision-language checkpoint.*--weights int8"):
        quantize(source, text, tmp_path / "weights", Options(window=200))
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(("kind", "reason"), [("mllama", "cross attention"), ("paligemma", "both directions")])
def test_towers_that_need_more_than_embeddings_are_refused(kind: str, reason: str) -> None:
    with pytest.raises(SkvError, match=f"^{kind}: can't be exported: .*{reason}"):
        supported.check_config(AutoConfig.for_model(kind))


def test_every_tower_that_is_exported_is_tested() -> None:
    assert set(CONFIGS) == set(vision_language.TOWERS)
