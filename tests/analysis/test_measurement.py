"""Measure: tables against token-by-token decoding, the theory where its assumptions hold, resuming, and bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from skv_export.analysis import pipeline
from skv_export.calibration.file import Calibration, fingerprint
from skv_export.checkpoints.checkpoint import resolve
from skv_export.errors import SkvError
from skv_export.spec.conformance import make_basis
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig


@pytest.fixture(scope="module")
def activations() -> Any:
    import torch

    from skv_export.analysis.attention_capture import LayerActivations

    torch.manual_seed(0)
    q, k, v = torch.randn(4, 300, 64), torch.randn(2, 300, 64), torch.randn(2, 300, 64)
    return LayerActivations(q, k, v, 64**-0.5, 0.0, 0, None, torch.randn(4, 300, 64))


SMALL = LayerConfig(recent_tokens=32, tile_tokens=32)


@pytest.mark.parametrize("change", [{}, {"softcap": 3.0}, {"window": 100}, {"sink": True}])
def test_one_pass_is_token_by_token_decoding(activations: Any, change: dict[str, Any]) -> None:
    import torch

    from skv_export.spec.op import AttentionParams
    from skv_export.spec.reference import append, attend

    sink = torch.tensor([0.5, -1.0, 2.0, 0.0]) if change.pop("sink", False) else None
    live = dataclasses.replace(activations, sink=sink, **change)
    layouts = CacheLayout.pair(dataclasses.replace(SMALL, recent_type="float"), 64, live.window)
    found = live.output(dataclasses.replace(SMALL, recent_type="float")).numpy()
    params = AttentionParams(4, 2, softcap=live.softcap, local_window_size=live.window)
    blocks = [np.zeros((2, math.prod(layout.shape(300))), np.uint8) for layout in layouts]
    q, k, v = (x.numpy() for x in (live.q, live.k, live.v))
    for t in range(300):
        at = slice(t, t + 1)
        out = attend(
            params,
            layouts,
            q[:, at],
            k[:, at],
            v[:, at],
            (blocks[0], blocks[1]),
            t,
            None if sink is None else sink.numpy(),
        )
        np.testing.assert_allclose(found[:, at], out, atol=3e-5)
        for layout, block, x in zip(layouts, blocks, (k, v), strict=True):
            append(layout, block, t, x[:, at])


def test_tables_are_the_errors_of_the_attention_output(activations: Any) -> None:
    from skv_export.analysis.measurement import layer_tables, options

    tables = layer_tables(activations, SMALL, (2, 4))
    widths, first = options((2, 4)), 4 + 32 + 32
    exact = activations.output()
    for (i, k), (j, v) in itertools.product(enumerate(widths), repeat=2):
        delta = (activations.output(dataclasses.replace(SMALL, k_bits=k, v_bits=v)) - exact)[:, first:]
        error = delta.double().pow(2).sum().item()
        nats = (delta * activations.gradient[:, first:]).sum(-1).double().pow(2).sum(0) / 2  # by query
        fisher = (1 - (-nats).exp()).sum().item()
        # The table leaves out the product of both errors; where one is exact there is none.
        tolerance = {"rel": 1e-3} if 16 in (k, v) else {"rel": 0.25}
        assert tables.output[i][j] == pytest.approx(error, abs=1e-5, **tolerance)
        assert tables.fisher[i][j] == pytest.approx(fisher, abs=1e-5, **tolerance)


def test_tables_of_calibrated_keys(activations: Any) -> None:
    from skv_export.analysis.attention_capture import layer_caches
    from skv_export.analysis.measurement import layer_tables
    from skv_export.evaluation.decode_simulation import attend

    basis, first = make_basis(2, 64, 64), 4 + 32 + 32
    plain, calibrated = (layer_tables(activations, SMALL, (2, 4), b) for b in (None, basis))
    exact = activations.output()
    for i, bits in enumerate((2, 4)):
        caches = layer_caches(dataclasses.replace(SMALL, k_bits=bits, v_bits=16), 64, 0, basis)
        out = attend(activations.q, activations.k, activations.v, caches, scale=activations.scale)
        error = (out - exact)[:, first:].double().pow(2).sum().item()
        assert calibrated.output[i][2] == pytest.approx(error, rel=1e-3)
        assert abs(plain.output[i][2] / error - 1) > 1e-2
    assert calibrated.output[2] == plain.output[2]  # values alone


def test_one_query_whose_gradient_explodes_counts_a_nat_and_no_more(activations: Any) -> None:
    """Far from full precision a second-order form says nothing: divergences of single tokens stay at a few nats."""
    from skv_export.analysis.measurement import layer_tables

    calm = dataclasses.replace(activations, gradient=1e-3 * activations.gradient)
    wild = dataclasses.replace(calm, gradient=calm.gradient.clone())
    wild.gradient[:, -1] *= 1e9
    quiet, loud = (np.array(layer_tables(seen, SMALL, (2, 4)).fisher) for seen in (calm, wild))
    assert (quiet[:-1, :-1] < 0.5).all() and (quiet[:-1, :-1] > 0).all()
    np.testing.assert_allclose((loud - quiet)[:-1, :-1], 1, atol=0.02)


def test_theory_predicts_the_errors_of_random_activations(activations: Any) -> None:
    """Equation 3 of docs/theory.md within 20% where its assumptions hold: independent tokens, small errors."""
    from skv_export.analysis.measurement import layer_tables

    for base in (
        SMALL,
        dataclasses.replace(SMALL, k_granularity="token", k_rotation="hadamard", v_granularity="channel"),
    ):
        tables = layer_tables(activations, base, (4, 6, 8))
        for i in range(3):
            assert tables.first_order_k[i] == pytest.approx(tables.output[i][3], rel=0.2)
            assert tables.first_order_v[i] == pytest.approx(tables.output[3][i], rel=0.2)


class Tokens:
    """A tokenizer for the tiny models: one token per character, and one before a text."""

    start = 1

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.start] * add_special_tokens + [ord(c) % 128 for c in text]


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skv_export.analysis.attention_capture.load_tokenizer", lambda _: Tokens())


TEXT = "".join(chr(33 + (i * i + 7 * i) % 90) for i in range(700))
TARGET = pipeline.Target(budget=6.0, context=4096, choices=(2, 4, 8))
RUN: dict[str, Any] = {"windows": 2, "window": 256, "confirm_windows": 0}


def analyzed(
    checkpoint: Path, text: Path, target: pipeline.Target = TARGET, progress: Any = None, **options: Any
) -> pipeline.Analysis:
    """The analysis of a tiny model, measured on a text."""
    measure = pipeline.MeasureOptions(text=text, **{**RUN, **options})
    return pipeline.analyze(checkpoint, target=target, base=SMALL, measure=measure, progress=progress)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_measure(arch: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, tokens: None) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    found = analyzed(tiny_checkpoint(arch), text)
    assert [s.name for s in found.scores] == ["frobenius", "spectral", "geometry", "geometry_activations", "measure"]
    m = found.measurement
    assert m is not None and m.tokens == 512 and m.widths == (2, 4, 8, 16)
    assert (m.loss[:, -1, -1] < 1e-9).all() and (m.loss[:, 0, 0] >= m.loss[:, 2, 2]).all()
    assert (m.loss[:, 0, 0] > m.loss[:, 2, 2]).any()  # a short sliding window sees exact tokens only
    assert found.recommendation.score == "measure"
    json.dumps(found.to_json(), allow_nan=False)  # nor does a layer that loses nothing get a balance
    assert found.recommendation.allocation.loss <= found.recommendation.uniform.loss or not found.budget.fits(
        found.recommendation.uniform.bits
    )


def test_every_window_starts_as_the_tokenizer_starts_a_text(tiny_checkpoint: Callable[..., Path], tokens: None) -> None:
    """A model that was trained with a first token loses its mind without it, and its losses by layer mean nothing."""
    from skv_export.analysis.attention_capture import DecodeModel
    from skv_export.checkpoints.checkpoint import resolve

    decoder = DecodeModel(resolve(tiny_checkpoint("llama")))
    windows = decoder.windows(TEXT, 256, 2)
    assert [ids[0].item() for ids in windows] == [Tokens.start] * 2
    assert windows[0][1:].tolist() == Tokens().encode(TEXT, False)[:255]
    assert windows[1][1:].tolist() == Tokens().encode(TEXT, False)[-255:]


def test_measurement_goes_on_where_it_stopped(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, tokens: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skv_export.analysis import measurement

    text, state = tmp_path / "text", tmp_path / "state.json"
    text.write_text(TEXT)
    steps = 0

    def stop(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:  # two layers read, two measured in the first window, one in the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyzed(tiny_checkpoint("llama"), text, state=state, progress=stop)
    assert [json.loads(line)["step"] for line in state.read_text().splitlines()] == ["windows", "window 0"]
    ran = []
    real = measurement.layer_tables
    monkeypatch.setattr(measurement, "layer_tables", lambda *a: ran.append(1) or real(*a))
    resumed = analyzed(tiny_checkpoint("llama"), text, state=state)
    assert len(ran) == 2
    with monkeypatch.context() as patch:  # what is complete needs no model
        patch.setattr(measurement, "DecodeModel", lambda source: pytest.fail("the model was loaded again"))
        again = analyzed(tiny_checkpoint("llama"), text, state=state)
    assert again.recommendation == resumed.recommendation
    whole = analyzed(tiny_checkpoint("llama"), text)
    np.testing.assert_allclose(resumed.measurement.loss, whole.measurement.loss, rtol=1e-4)
    with pytest.raises(SkvError, match="belongs to another run"):
        analyzed(tiny_checkpoint("llama"), text, state=state, windows=1)


def test_two_models_at_once_keep_to_themselves(tiny_checkpoint: Callable[..., Path], tokens: None) -> None:
    import torch

    from skv_export.analysis.attention_capture import DecodeModel
    from skv_export.checkpoints.checkpoint import resolve

    ids = torch.arange(3, 120)
    first = DecodeModel(resolve(tiny_checkpoint("llama")))
    exact = first.log_probs(ids)
    DecodeModel(resolve(tiny_checkpoint("qwen2")))
    first.bits = {0: dataclasses.replace(SMALL, k_bits=1, v_bits=1)}
    assert (first.log_probs(ids) - exact).abs().max() > 1e-3


def test_direct_kl(tiny_checkpoint: Callable[..., Path], tmp_path: Path, tokens: None) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    target = dataclasses.replace(TARGET, choices=(2, 8))
    found = analyzed(tiny_checkpoint("llama"), text, target, kl=True, windows=1)
    loss = found.measurement.loss
    assert found.measurement.direct and loss.shape == (2, 3, 3)
    assert (loss[:, 0, 0] > loss[:, 1, 1]).all() and (loss[:, 2, 2] == 0).all()
    assert "measured layer by layer" in " ".join(found.recommendation.reasons)


def test_bits_for_calibrated_keys(tiny_checkpoint: Callable[..., Path], tmp_path: Path, tokens: None) -> None:
    checkpoint, text, state = tiny_checkpoint("llama"), tmp_path / "text", tmp_path / "state.json"
    text.write_text(TEXT)
    config = AutoConfig.from_pretrained(checkpoint)
    padded = CacheLayout.pair(SMALL, config.head_dim)[0].padded_dim
    bases = {layer: make_basis(config.num_key_value_heads, config.head_dim, padded, layer) for layer in (0, 1)}
    calibration = Calibration(bases, fingerprint(resolve(checkpoint)), {})
    measure = pipeline.MeasureOptions(text=text, state=state, **RUN)
    options: dict[str, Any] = {"target": TARGET, "base": SMALL, "measure": measure}
    plain = analyzed(checkpoint, text)
    found = pipeline.analyze(checkpoint, calibration=calibration, **options)
    assert (np.abs(found.measurement.loss / plain.measurement.loss - 1)[:, 0, -1] > 1e-3).all()
    np.testing.assert_allclose(found.measurement.loss[:, -1, 0], plain.measurement.loss[:, -1, 0], rtol=1e-4)
    assert "with calibrated keys" in " ".join(found.recommendation.reasons)
    assert found.to_recipe().description.endswith("for calibrated keys") and found.to_json()["calibrated"]
    for given, pair in (
        (None, (4, 2)),
        (calibration, (3, 3)),
    ):  # a rule knows no losses: the pairs' own tell them apart
        target = pipeline.Target(choices=(2, 3, 4), context=4096)
        ruled = pipeline.analyze(checkpoint, target=target, base=SMALL, score="frobenius", calibration=given)
        assert ruled.recommendation.uniform.bits[0] == pair
        assert "calibrated" not in " ".join(ruled.recommendation.reasons)
    with pytest.raises(SkvError, match="belongs to another run"):
        pipeline.analyze(checkpoint, **options)
    with pytest.raises(SkvError, match="another checkpoint"):
        pipeline.analyze(tiny_checkpoint("qwen2"), calibration=calibration, **options)
    with pytest.raises(SkvError, match="granularity token, rotation none; expected granularity channel"):
        pipeline.analyze(checkpoint, calibration=calibration, base=dataclasses.replace(SMALL, k_granularity="token"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": "/no/such/file"}, "no such file"),
        ({"letters": 100}, "too short"),
        ({"window": 64}, "nothing would be quantized"),
    ],
)
def test_bad_measurements(
    options: dict[str, Any], said: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path, tokens: None
) -> None:
    (tmp_path / "text").write_text(TEXT[: options.pop("letters", None)])
    with pytest.raises(SkvError, match=said):
        analyzed(tiny_checkpoint("llama"), options.pop("text", tmp_path / "text"), **options)
