"""Analyze: norms against LAPACK, allocations against brute force, the score's invariances, budgets, and measurement."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from skv_export.analysis import measurement, pipeline
from skv_export.analysis.allocation import allocate_bits, allocate_bits_optimal, allocate_options
from skv_export.analysis.budget import CacheBudget
from skv_export.analysis.geometry import MIDRISE_ERROR, RANGE_SQUARE, geometry, grid_error
from skv_export.analysis.norms import SPECTRUM, lanczos, norms
from skv_export.analysis.pipeline import Target
from skv_export.checkpoints.attention_weights import AttentionConfig, AttentionReader, AttentionWeights
from skv_export.checkpoints.checkpoint import Checkpoint
from skv_export.cli.analyze import analyze_command
from skv_export.errors import SkvError
from skv_export.spec import quantizer, reference
from skv_export.spec.layout import CacheLayout
from skv_export.spec.quantizer import dequantize, quantize
from skv_export.spec.recipe import LayerConfig, Recipe

# Norms.


def matrix(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    w = np.random.default_rng(seed).standard_normal(shape)
    if kind == "decaying":
        w *= np.exp(-np.arange(shape[1]) / 40)
    if kind == "one direction":
        w = 0.01 * w + np.outer(w[:, 0], w[0])
    if kind == "twins":
        w[:, 1] = w[:, 0] = 0
        w[0, 0] = w[1, 1] = 200.0
    return w.astype(np.float32)


@pytest.mark.parametrize("kind", ["random", "decaying", "one direction", "twins"])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (1344, 320), (320, 1344)])
def test_norms_are_those_of_lapack(kind: str, shape: tuple[int, int]) -> None:
    w = matrix(kind, shape)
    found = norms(w, 4, "w")
    exact = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    assert found.spectral == pytest.approx(exact[0], rel=1e-5)
    assert found.frobenius == pytest.approx(np.linalg.norm(w.astype(np.float64)), rel=1e-5)
    assert found.stable_rank == pytest.approx((exact**2).sum() / exact[0] ** 2, rel=1e-4)
    assert len(found.spectrum) <= SPECTRUM and found.spectrum[0] == found.spectral
    assert list(found.spectrum) == sorted(found.spectrum, reverse=True)
    for i, head in enumerate(np.split(w.astype(np.float64), 4)):
        assert found.head_spectral[i] == pytest.approx(np.linalg.norm(head, 2), rel=1e-5)
        assert found.head_frobenius[i] == pytest.approx(np.linalg.norm(head), rel=1e-5)


def test_lanczos_of_a_matrix_of_rank_one_and_of_zeros() -> None:
    w = np.outer(np.arange(1, 9), np.ones(5)).astype(np.float32)
    assert lanczos(lambda x: w @ (x @ w), len(w))[0] == pytest.approx(np.linalg.norm(w) ** 2, rel=1e-5)
    zero = norms(np.zeros((64, 32), np.float32), 4, "w")
    assert zero.spectral == 0 and zero.stable_rank == 0 and zero.head_stable_rank == (0.0,) * 4


@pytest.mark.parametrize("rows", [64, 1344])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_name_the_tensor(rows: int, value: float) -> None:
    w = matrix("random", (rows, 64))
    w[3, 5] = value
    with pytest.raises(SkvError, match=r"layer 7: key.*1 of"):
        norms(w, 4, "layer 7: key projection")


# Allocation.

SENSITIVITIES = st.lists(st.floats(0.01, 100), min_size=2, max_size=6)


def objective(c: list[float], bits: list[int]) -> float:
    return sum(x * x * 4.0**-b for x, b in zip(c, bits, strict=True))


def test_the_paper_s_rule_step_by_step() -> None:
    # From 1 bit each, drops per bit are 0.1875 c^2, then 0.046875 c^2: K0 (c=4), K0 again, V0 (c=1), ...
    assert allocate_bits([4.0, 1.0], 2, (1, 2, 3)) == [1, 1]
    assert allocate_bits([4.0, 1.0], 3, (1, 2, 3)) == [2, 1]
    assert allocate_bits([4.0, 1.0], 4, (1, 2, 3)) == [3, 1]
    assert allocate_bits([4.0, 1.0], 5, (1, 2, 3)) == [3, 2]
    assert allocate_bits([4.0, 1.0], 99, (1, 2, 3)) == [3, 3]


def test_the_first_of_equals_wins_and_a_later_one_only_by_more_than_the_tie() -> None:
    assert allocate_bits([1.0, 1.0, 1.0], 4, (1, 2)) == [2, 1, 1]
    barely = math.sqrt(1 + 4e-6)  # its drop is larger by 0.75e-6
    assert allocate_bits([1.0, barely], 3, (1, 2)) == [2, 1]
    clearly = math.sqrt(1 + 8e-6)
    assert allocate_bits([1.0, clearly], 3, (1, 2)) == [1, 2]


def test_a_step_that_does_not_fit_gives_way_to_one_that_does() -> None:
    # From 4 the next choice is 8, four bits more; only the other tensor's step from 2 to 4 still fits.
    assert allocate_bits([100.0, 1.0], 8, (2, 4, 8)) == [4, 4]


@settings(max_examples=60, deadline=None)
@given(SENSITIVITIES, st.integers(0, 20), st.sampled_from([(1, 2, 3), (2, 4, 8), (1, 2, 3, 4, 6, 8)]))
def test_allocations_fit_and_the_optimum_is_the_optimum(c: list[float], extra: int, choices: tuple[int, ...]) -> None:
    total = choices[0] * len(c) + extra
    greedy, best = allocate_bits(c, total, choices), allocate_bits_optimal(c, total, choices)
    brute = min(objective(c, list(b)) for b in itertools.product(choices, repeat=len(c)) if sum(b) <= total)
    for bits in (greedy, best):
        assert sum(bits) <= total and set(bits) <= set(choices)
    assert objective(c, best) == pytest.approx(brute, rel=1e-9)
    assert objective(c, greedy) >= brute * (1 - 1e-9)


def test_pairs_restrict_a_layer() -> None:
    c, pairs = [9.0, 1.0, 1.0, 9.0], [(2, 2), (4, 2), (4, 4), (8, 4)]
    bits = allocate_bits_optimal(c, 14, pairs=pairs)
    layers = list(zip(bits[::2], bits[1::2], strict=True))
    assert set(layers) <= set(pairs) and sum(bits) <= 14
    brute = min(objective(c, [*a, *b]) for a, b in itertools.product(pairs, repeat=2) if sum(a) + sum(b) <= 14)
    assert objective(c, bits) == pytest.approx(brute)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 9)), min_size=3, max_size=3), min_size=1, max_size=5),
    st.integers(5, 40),
)
def test_options_are_the_optimum_for_any_costs(layers: list[list[tuple[float, int]]], budget: int) -> None:
    errors = [[e for e, _ in layer] for layer in layers]
    costs = [[c for _, c in layer] for layer in layers]
    combos = [
        p
        for p in itertools.product(range(3), repeat=len(layers))
        if sum(costs[i][o] for i, o in enumerate(p)) <= budget
    ]
    if not combos:
        with pytest.raises(SkvError, match="too small"):
            allocate_options(errors, costs, budget)
        return
    picks = allocate_options(errors, costs, budget)
    total = sum(errors[i][o] for i, o in enumerate(picks))
    assert sum(costs[i][o] for i, o in enumerate(picks)) <= budget
    assert total == pytest.approx(min(sum(errors[i][o] for i, o in enumerate(p)) for p in combos))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: allocate_bits([1.0, 1.0], 1), "too small"),
        (lambda: allocate_bits([], 1), "no tensors"),
        (lambda: allocate_bits([math.nan], 9), "sensitivity of K0"),
        (lambda: allocate_bits([1.0, -1.0], 9), "sensitivity of V0"),
        (lambda: allocate_bits([1.0], 9, ()), "bit choices"),
        (lambda: allocate_bits_optimal([1.0], 9, pairs=[(4, 2)]), "a key and a value"),
        (lambda: allocate_options([[math.nan]], [[1.0]], 2), "not finite"),
        (lambda: allocate_options([], [], 2), "no layers"),
    ],
)
def test_bad_allocations(call: Callable[[], object], said: str) -> None:
    with pytest.raises(SkvError, match=said):
        call()


# The score.

CONFIG = AttentionConfig("llama", 1, 4, 2, 32, 32**-0.5, 0.0, 32, 1e4, (0,), 4096)


def weights(seed: int = 0, **changes: Any) -> AttentionWeights:
    rng = np.random.default_rng(seed)
    w = {x: rng.standard_normal((h * 32, 64)).astype(np.float32) / 8 for x, h in (("q", 4), ("k", 2), ("v", 2))}
    norm = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    empty = dict.fromkeys(("q_bias", "k_bias", "v_bias", "norm_bias", "q_norm", "k_norm"))
    return AttentionWeights(**{"index": 0, **w, **empty, "norm": norm, "names": (), **changes})


@pytest.mark.parametrize("cache", [LayerConfig(), LayerConfig(k_granularity="token", k_rotation="hadamard")])
@pytest.mark.parametrize("bias", [False, True])
def test_scale_trades_do_not_change_the_geometry(cache: LayerConfig, bias: bool) -> None:
    w = weights()
    if bias:
        w = dataclasses.replace(w, q_bias=w.q[:, 0], k_bias=w.k[:, 0], v_bias=w.v[:, 0])
    traded = dataclasses.replace(
        w, q=w.q * 8, k=w.k / 8, v=w.v * 4,
        **({"q_bias": w.q_bias * 8, "k_bias": w.k_bias / 8, "v_bias": w.v_bias * 4} if bias else {}),
    )  # fmt: skip
    a, b = geometry(w, CONFIG, cache), geometry(traded, CONFIG, cache)
    assert b.k_error == pytest.approx(a.k_error, rel=1e-4) and b.v_error == pytest.approx(a.v_error, rel=1e-4)
    assert b.balance == pytest.approx(a.balance, abs=1e-3)


def test_qk_norm_makes_the_projections_scale_irrelevant() -> None:
    ones = np.ones(32, np.float32)
    w = weights(q_norm=ones, k_norm=ones)
    a = geometry(w, CONFIG, LayerConfig())
    b = geometry(dataclasses.replace(w, k=w.k * 100), CONFIG, LayerConfig())
    assert b.balance == pytest.approx(a.balance, abs=1e-3) and a.k_norm and a.q_norm
    louder = geometry(dataclasses.replace(w, k_norm=2 * ones), CONFIG, LayerConfig())
    assert louder.k_error[8] > 2 * a.k_error[8]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_logits_variance_is_that_of_the_product_of_queries_and_keys(normalized: bool, bias: bool) -> None:
    rng = np.random.default_rng(1)
    w = weights(**({"q_norm": rng.uniform(1, 2, 32).astype(np.float32), "k_norm": np.full(32, 0.7, np.float32)}
                   if normalized else {}))  # fmt: skip
    if bias:
        w = dataclasses.replace(w, q_bias=w.q[:, 0], k_bias=w.k[:, 0])

    def affine(matrix: Any, constant: Any, gain: Any, head: int) -> tuple[Any, Any]:
        rows = slice(32 * head, 32 * head + 32)
        linear = (matrix[rows] * w.norm).astype(np.float64)
        constant = np.zeros(32) if constant is None else constant[rows].astype(np.float64)
        factor = np.ones(32) if gain is None else gain / np.sqrt(np.mean((linear**2).sum(1) + constant**2))
        return linear * factor[:, None], constant * factor

    tokens = rng.standard_normal((2, 20_000, 64))  # a query's and a key's, independent of each other
    found = []
    for head in range(4):
        (q, q0), (k, _) = affine(w.q, w.q_bias, w.q_norm, head), affine(w.k, w.k_bias, w.k_norm, head // 2)
        queries, keys = tokens[0] @ q.T + q0, tokens[1] @ k.T
        found.append(np.mean((queries * keys).sum(1) ** 2))
    expected = CONFIG.scale**2 * np.mean(found)
    assert geometry(w, CONFIG, LayerConfig()).logit_variance == pytest.approx(expected, rel=0.03)


def test_large_qk_norm_weights_do_not_saturate_the_softmax() -> None:
    """Isotropic inputs would give logits of a variance in the hundreds, and keys whose errors move nothing."""
    loud = weights(q_norm=np.full(32, 5, np.float32), k_norm=np.full(32, 5, np.float32))
    found = geometry(loud, CONFIG, LayerConfig())
    assert found.logit_variance > 100 and found.spread > 0.02
    assert found.balance > 0


def test_a_constant_bias_costs_rotated_keys_more_than_channels() -> None:
    slow = dataclasses.replace(CONFIG, rope_theta=1e9)
    bias = np.zeros(64, np.float32)
    bias[[15, 31, 47, 63]] = 50.0  # the slowest pair of each KV head: hardly turns within a tile
    token = LayerConfig(k_granularity="token", k_rotation="hadamard")
    plain = {c: geometry(weights(), slow, c).k_error[8] for c in (LayerConfig(), token)}
    biased = {c: geometry(weights(k_bias=bias), slow, c).k_error[8] for c in (LayerConfig(), token)}
    assert biased[LayerConfig()] < 1.5 * plain[LayerConfig()]
    assert biased[token] > 20 * plain[token]


def test_errors_fall_with_bits_and_a_softcap_helps() -> None:
    found = geometry(weights(), CONFIG, LayerConfig())
    for errors in (found.k_error, found.v_error):
        values = [errors[b] for b in sorted(errors)]
        assert values == sorted(values, reverse=True) and values[-1] == 0
    capped = geometry(weights(), dataclasses.replace(CONFIG, softcap=0.5), LayerConfig())
    assert capped.k_error[8] < 0.9 * found.k_error[8]


def test_constants_are_the_reference_quantizer_s() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 64, 64)).astype(np.float32)
    for bits, error in MIDRISE_ERROR.items():
        if bits == 16:
            continue
        layout = CacheLayout.pair(LayerConfig(v_bits=bits), 64)[1]
        y = dequantize(layout, *quantize(layout, x))
        assert ((y - x) ** 2).sum() / (x**2).sum() == pytest.approx(error, rel=0.02)
    for tokens, square in RANGE_SQUARE.items():
        sample = rng.standard_normal((20000, tokens))
        assert (np.ptp(sample, axis=1) ** 2).mean() == pytest.approx(square, rel=0.01)
    for bits in (1, 2, 3, 4, 8):
        layout = CacheLayout.pair(LayerConfig(k_bits=bits), 64)[0]
        error = ((dequantize(layout, *quantize(layout, x)) - x) ** 2).mean()
        assert error / (np.ptp(x, axis=1) ** 2).mean() == pytest.approx(grid_error(bits, 64), rel=0.03)


# Budgets.


def cache_budget(**options: Any) -> CacheBudget:
    config = dataclasses.replace(CONFIG, num_hidden_layers=3, windows=(0, 128, 0))
    return CacheBudget.of(config, LayerConfig(), context=4096, **options)


def test_costs_are_the_layout_s() -> None:
    cache = cache_budget()
    bits = [(4, 2), (8, 3), (3, 1)]
    layouts = [
        CacheLayout.pair(LayerConfig(k_bits=k, v_bits=v), 32, w) for (k, v), w in zip(bits, (0, 128, 0), strict=True)
    ]
    assert cache.bytes(bits) == 2 * sum(x.block_bytes(4096) for pair in layouts for x in pair)
    one = CacheBudget.of(dataclasses.replace(CONFIG, windows=(0,)), LayerConfig(), context=4096)
    key, value = CacheLayout.pair(LayerConfig(), 32)
    assert one.effective_bits([(4, 2)]) == pytest.approx((key.effective_bits(4096) + value.effective_bits(4096)) / 2)


@pytest.mark.parametrize("budget", [3.0, 3.6, 5.0])
def test_the_best_fits(budget: float) -> None:
    cache = cache_budget().limited(budget, None)
    losses = np.array([[i * 4.0**-k + 4.0**-v for k, v in cache.pairs] for i in (1, 10, 100)])
    bits = cache.best(losses)
    assert cache.effective_bits(bits) <= budget and cache.fits(bits)
    assert bits[2][0] >= bits[0][0]


def test_memory_is_for_the_whole_batch() -> None:
    cache = cache_budget(batch=8)
    bits = [(4, 2)] * 3
    limited = cache.limited(None, 8 * cache.bytes(bits))
    assert limited.fits(bits) and not limited.fits([(5, 2)] * 3)
    assert cache.memory(bits) >= 8 * cache.bytes(bits)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cache_budget().limited(1.0, None).best(np.zeros((3, 49))), r"too small.*expected at least \d"),
        (lambda: cache_budget().limited(3.0, 1000), "got both"),
        (lambda: cache_budget().limited(math.nan, None), "--budget"),
        (lambda: cache_budget().limited(None, -5), "--memory"),
        (lambda: cache_budget(choices=(7,)), "bit choices"),
        (lambda: cache_budget(batch=0), "--batch"),
        (lambda: CacheBudget.of(CONFIG, LayerConfig(), context=0), "--context"),
    ],
)
def test_bad_budgets(call: Callable[[], object], said: str) -> None:
    with pytest.raises(SkvError, match=said):
        call()


# The whole command.

JSON_KEYS = {"model", "bytes_read", "tensor_bytes", "layers", "flags", "recommendation"}
LAYER_KEYS = {"index", "k_frobenius", "v_frobenius", "k_spectral", "v_spectral", "scores"}


@pytest.mark.parametrize(
    "arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2"]
)
def test_every_output_of_every_architecture(arch: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint(arch)
    found = pipeline.analyze(folder, target=Target(context=4096))
    (tmp_path / "a.toml").write_text(found.to_preset("skv-export analyze"))
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert f"# revision: sha256 {digest} of model.safetensors\n" in (tmp_path / "a.toml").read_text()
    data = json.loads(json.dumps(found.to_json()))
    assert data.keys() >= JSON_KEYS and all(layer.keys() >= LAYER_KEYS for layer in data["layers"])
    assert data["bytes_read"] == data["tensor_bytes"] > 0
    assert found.budget.fits(found.recommendation.allocation.bits)
    assert set(data["layers"][0]["scores"]) == {"frobenius", "spectral", "geometry"}
    recipe = Recipe.load(tmp_path / "a.toml")
    bits = [(c.k_bits, c.v_bits) for c in recipe.layers(len(found.layers))]
    assert bits == list(found.recommendation.allocation.bits)
    assert bits == list(zip(data["recommendation"]["k_bits"], data["recommendation"]["v_bits"], strict=True))
    layer = AttentionReader(Checkpoint.open(folder)).layer(1)
    assert data["layers"][1]["k_spectral"] == pytest.approx(np.linalg.norm(layer.k.astype(np.float64), 2), rel=1e-5)
    assert data["layers"][1]["v_frobenius"] == pytest.approx(np.linalg.norm(layer.v), rel=1e-5)


def test_k_norm_is_said_and_takes_the_norms_out(tiny_checkpoint: Callable[..., Path]) -> None:
    found = pipeline.analyze(tiny_checkpoint("qwen3"), target=Target(budget=6.0, context=4096))
    assert found.flags[0]["flag"] == "k_norm"
    assert "k_norm present: the weight norm of K says nothing" in found.recommendation.reasons
    assert all(b is None for b in found.scores[0].balance) and "k_norm" in found.scores[0].note


def test_a_large_key_bias_is_flagged(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen2", num_hidden_layers=4)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.bias"] *= 40
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    found = pipeline.analyze(tmp_path, target=Target(budget=6.0, context=4096))
    flagged = [f for f in found.flags if f["flag"] == "k_bias"]
    assert [f["layer"] for f in flagged] == [2] and "key biases" in flagged[0]["text"]
    assert any("key biases" in reason and "bits for its keys" in reason for reason in found.recommendation.reasons)


def test_nan_weights_stop_the_analysis(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(SkvError, match="layer 1: value projection"):
        pipeline.analyze(tmp_path)


def test_pairs_and_optimal(tiny_checkpoint: Callable[..., Path]) -> None:
    pairs = [(4, 2), (8, 4)]
    found = pipeline.analyze(tiny_checkpoint("llama"), target=Target(budget=6.5, context=32768, pairs=pairs))
    assert all(set(score.bits) <= set(pairs) for score in found.scores)
    best = pipeline.analyze(tiny_checkpoint("llama"), target=Target(budget=6.5, context=32768), optimal=True)
    assert best.scores[0].name == "frobenius" and best.budget.fits(best.scores[0].bits)


def test_the_command_prints_and_writes(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "r.toml"
    done = CliRunner().invoke(
        analyze_command,
        [str(tiny_checkpoint("gemma2")), "--memory", "2MiB", "--context", "4k", "--batch", "2", "--save", str(out)],
    )
    assert done.exit_code == 0, done.output
    assert "recommended" in done.output and "2 x 4096 tokens" in done.output and out.is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--memory", "2 apples"],
        ["--choices", "2,x"],
        ["--pairs", "4x2"],
        ["--batch", "many"],
        ["--max-loss", "little"],
    ],
)
def test_flags_that_make_no_sense(arguments: list[str]) -> None:
    done = CliRunner().invoke(analyze_command, ["nothing", *arguments])
    assert done.exit_code == 2 and "Invalid value" in done.output


@pytest.mark.parametrize("granularity", ["channel", "token", "token_channel"])
def test_expected_error_of_keys_is_the_quantizers(granularity: str) -> None:
    """By arithmetic, and by quantizing: keys with a mean per channel, as real ones have."""
    config = LayerConfig(k_bits=3, k_granularity=granularity, k_rotation="hadamard")
    layout, _ = CacheLayout.pair(config, 64)
    x = np.random.default_rng(0).standard_normal((2, 4 + 64 * 6, 64)) + 3 * np.random.default_rng(1).standard_normal(64)
    x = x.astype(np.float32)
    content = reference.prepare(layout, x)[:, 4:].reshape(2, 6, 64, 64)
    measured = np.square(quantizer.decode_tile(layout, quantizer.encode_tile(layout, content)) - content).mean()
    expected = float(measurement.expected_error(layout, torch.from_numpy(x))[:, 4:].mean())
    assert 0.8 < expected / measured < 1.25
