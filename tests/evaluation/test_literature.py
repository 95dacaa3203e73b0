"""Caches of the literature: published figures and invariants, bits counted by hand, only what a decoder knows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import TEXT, Letters

from skv_export.checkpoints.checkpoint import resolve
from skv_export.errors import SkvError
from skv_export.evaluation import comparison
from skv_export.evaluation.baselines import LITERATURE, parse_baselines
from skv_export.evaluation.decode_simulation import FullCache, Simulation, TensorCache, simulated_logits
from skv_export.evaluation.literature import from_text as from_text_module
from skv_export.evaluation.literature import kvquant, oscar, rotatekv, rvq, svdq
from skv_export.evaluation.literature.decoquant import DecoquantCache
from skv_export.evaluation.literature.from_text import _SEEN, Activations, FromText, seen
from skv_export.evaluation.literature.kivi import KiviKeys, KiviValues
from skv_export.evaluation.literature.kvarn import KvarnCache, balance, imbalance
from skv_export.evaluation.literature.polarquant import PolarKeys
from skv_export.evaluation.literature.squat import SquatKeys
from skv_export.evaluation.literature.svdq import SvdqKeys
from skv_export.evaluation.literature.tiled import TiledCache, hadamard
from skv_export.evaluation.literature.turboquant import TurboQuantCache, lloyd_max, random_matrices, sphere_levels

HEADS, DIM = 2, 64


def rows(tokens: int, seed: int = 0) -> torch.Tensor:
    """Keys-like ``[H, S, D]``: channels of different means and spreads, correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(HEADS, tokens, DIM, generator=generator)
    mix = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99)) / 8
    return x @ mix * torch.linspace(0.2, 3, DIM) + torch.linspace(-2, 2, DIM)


def activations() -> dict[int, Activations]:
    """Of one layer without RoPE, on two windows of 256 tokens."""
    x, y = rows(512, 1), torch.randn(HEADS, 512, DIM, generator=torch.Generator().manual_seed(2))
    q = rows(512, 3)
    return {0: Activations(x, y, torch.ones_like(x), torch.ones_like(y), q.mT @ q / 512, 256, None)}


def from_text(fit: Any, which: int) -> Callable[[int], TensorCache]:
    return lambda bits: fit(bits, bits, activations(), {})(0, DIM, 0)[which]


def fitted(cache: Any) -> Callable[[int], TensorCache]:
    return lambda bits: cache(bits, DIM).fitted(rows(100, 4), rows(100, 5))


def decoquant_of_two_heads(bits: int) -> TensorCache:
    cache = DecoquantCache(bits, DIM)
    cache.read(rows(128))
    return cache


CACHES: dict[str, Callable[[int], TensorCache]] = {
    "kivi keys": lambda bits: KiviKeys(bits, DIM),
    "kivi values": lambda bits: KiviValues(bits, DIM),
    "kvarn keys": lambda bits: KvarnCache(bits, DIM),
    "kvarn values": lambda bits: KvarnCache(bits, DIM, is_value=True),
    "turboquant": lambda bits: TurboQuantCache(bits, DIM),
    "turboquant-prod": lambda bits: TurboQuantCache(bits, DIM, prod=True),
    "squat": fitted(SquatKeys),
    "svdq": fitted(SvdqKeys),
    "kvquant keys": from_text(kvquant.fit, 0),
    "kvquant values": from_text(kvquant.fit, 1),
    "oscar keys": from_text(oscar.fit, 0),
    "oscar values": from_text(oscar.fit, 1),
    "rotatekv keys": from_text(rotatekv.fit, 0),
    "rotatekv values": from_text(rotatekv.fit, 1),
    "polarquant": lambda bits: PolarKeys(bits, DIM),
    "decoquant": decoquant_of_two_heads,
}


@pytest.mark.parametrize("name", CACHES)
def test_more_bits_lose_less_and_what_is_not_quantized_is_as_it_was(name: str) -> None:
    x = rows(600)
    losses = []
    for bits in (2, 3, 4):
        cache = CACHES[name](bits)
        read, sinks = cache.quantized(x), cache.num_sink_tokens
        held = slice(sinks, sinks + cache.quantized_tokens(600))
        losses.append(float((read - x)[:, held].pow(2).mean() / x[:, held].var()))
        assert torch.equal(cache.quantized(x), read), "the same again"
        assert torch.equal(read[:, :sinks], x[:, :sinks])
        assert torch.equal(cache.exact(x), x.half().float())
        # Rows that have not left for the quantized part are what others of the same length have: nothing looks ahead.
        changed = torch.cat([x[:, : held.stop], rows(600, 9)[:, held.stop :]], 1)
        assert torch.allclose(cache.quantized(changed)[:, held], read[:, held], atol=1e-5)
    assert losses[0] > 1.5 * losses[1] > 2 * losses[2]
    assert losses[2] < (0.3 if name == "turboquant-prod" else 0.06)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("kivi keys", {127: 0, 128: 128, 255: 128}),
        ("kivi values", {128: 0, 129: 1, 300: 172}),
        ("kvarn keys", {255: 0, 256: 128, 383: 128, 384: 256}),
        ("turboquant", {0: 0, 1: 1, 100: 100}),
        ("squat", {99: 0, 100: 0, 128: 128}),
        ("svdq", {128: 128, 300: 256}),
        ("kvquant keys", {1: 0, 2: 1, 100: 99}),
        ("oscar values", {320: 0, 321: 1, 400: 80}),
        ("rotatekv keys", {20: 0, 21: 1, 100: 80}),
        ("polarquant", {127: 0, 128: 128, 255: 128}),
        ("decoquant", {127: 0, 128: 128, 255: 128}),
    ],
)
def test_tokens_leave_the_exact_part_as_published(name: str, counts: dict[int, int]) -> None:
    cache = CACHES[name](2)
    assert {n: cache.quantized_tokens(n) for n in counts} == counts


def test_keys_fitted_to_a_prompt_are_exact_until_it_has_run() -> None:
    late = SvdqKeys(2, DIM).fitted(rows(300), rows(300))
    assert [late.quantized_tokens(n) for n in (299, 300, 384)] == [0, 256, 384]


@pytest.mark.parametrize(
    ("name", "stored", "exact", "fixed"),
    [
        ("kivi keys", 2 + 1, 128, 0),
        ("kvarn keys", 2 + 32 / 128 + 16 / 64, 256, 0),
        ("kvarn values", 2 + 32 / 64 + 16 / 128, 256, 0),
        ("turboquant", 2 + 16 / 64, 0, 0),
        ("turboquant-prod", 2 + 32 / 64, 0, 0),
        ("squat", 2 + 1, 128, 0),
        ("svdq", 2 + 5 / 8 * 32 / 128, 128, 16 * (64 * 5 / 8 + 1)),
        ("kvquant keys", 2 + 0.32 + 32 / 128, 1, 0),
        ("kvquant values", 2 + 0.32 + 64 / 128, 1, 0),
        ("oscar keys", 2 + 32 / 64, 320, 0),
        ("rotatekv keys", 2 + 32 / 128, 20, 0),
        ("rotatekv values", 2 + 32 / 64, 20, 0),
        ("polarquant", 2 + 64 / (2 * 128), 128, 0),
        ("decoquant", 2 + 16 / 128 + 16 * 16 * 16 / (128 * 128), 128, 0),
    ],
)
def test_every_stored_bit_counts(name: str, stored: float, exact: int, fixed: float) -> None:
    cache = CACHES[name](2)
    assert cache.effective_bits(8192) == pytest.approx(((8192 - exact) * stored + exact * 16 + fixed) / 8192)
    narrow = dataclasses.replace(cache, local_window_size=512)  # type: ignore[type-var]
    assert narrow.effective_bits(8192) == pytest.approx(((512 - exact) * stored + exact * 16 + fixed) / 512)


# What the papers say of their methods.


def test_turboquant_reaches_its_published_distortion() -> None:
    """Section 1.3: 0.36, 0.117, 0.03, 0.009 for unit vectors; of inner products unbiased, 0.56/D and 0.18/D."""
    x = torch.nn.functional.normalize(torch.randn(1, 1500, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    for bits, expected in {1: 0.36, 2: 0.117, 3: 0.034, 4: 0.0095}.items():
        loss = float((TurboQuantCache(bits, 256).read(x) - x).pow(2).sum(-1).mean())
        assert loss == pytest.approx(expected, rel=0.03)
    y = x.roll(1, 1)
    for bits, expected in {2: 0.56, 3: 0.18}.items():
        error = ((TurboQuantCache(bits, 256, prod=True).read(x) - x) * y).sum(-1)
        assert float(error.pow(2).mean()) * 256 == pytest.approx(expected, rel=0.1)
    whole = TurboQuantCache(2, 256, prod=True).read(x), TurboQuantCache(2, 256).read(x)
    lengths = [float((read * x).sum(-1).mean()) for read in whole]
    assert lengths[0] == pytest.approx(1, abs=0.01) and lengths[1] < 0.9  # the second is shrunk, the first is not


def test_levels_of_a_sphere_are_those_of_a_normal_distribution_in_many_dimensions() -> None:
    assert torch.allclose(sphere_levels(4096, 2) * 64, torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=3e-3)
    rotation, _ = random_matrices(64)
    assert torch.allclose(rotation @ rotation.T, torch.eye(64), atol=1e-5)


def test_kvarn_evens_out_the_variances_of_both_axes() -> None:
    x = torch.randn(3, 128, DIM, generator=torch.Generator().manual_seed(0))
    token, channel = torch.linspace(1, 20, 128)[:, None], torch.linspace(1, 9, DIM)[None]
    for channels_first in (False, True):
        tiles = x * token * channel
        found = balance(tiles, channels_first)
        even = tiles / found[0] / found[1]
        # Not to 2: the published bound of the scales' logarithms stops it.
        assert imbalance(tiles).min() > 25 and imbalance(even).max() < 5
    assert (balance(x)[0] * balance(x)[1]).shape == x.shape
    # A token twenty times as large does not spoil the others, as it does a channel's range.
    spiked = rows(256)
    spiked[:, 200] *= 20
    loss = [(c.read(spiked[:, 128:]) - spiked[:, 128:]).pow(2).mean(-1) for c in (KvarnCache(2, DIM), KiviKeys(2, DIM))]
    others = [i for i in range(128) if i != 72]
    assert loss[0][:, others].mean() < 0.5 * loss[1][:, others].mean()


def test_squat_keeps_errors_of_keys_away_from_the_queries() -> None:
    keys, generator = rows(256), torch.Generator().manual_seed(5)
    queries = (torch.randn(4, 256, 5, generator=generator) @ torch.randn(5, DIM, generator=generator)) * 20
    cache = SquatKeys(2, DIM).fitted(queries, keys)
    with_it, without = cache.read(keys) - keys, KiviKeys(2, DIM).read(keys) - keys
    scores = [(queries.reshape(2, -1, DIM) @ e.mT).pow(2).mean() for e in (with_it, without)]
    assert scores[0] < 0.9 * scores[1]
    # Of what is left after the first block, nothing could be better: the cost has no slope along its channels.
    block, rest = keys[..., :32], keys[..., 32:]
    error = KiviKeys(2, DIM).read(block) - block
    moved = cache.read(keys)[..., 32:] - rest
    wanted = -torch.linalg.solve(cache.cost[:, 32:, 32:], cache.cost[:, 32:, :32]) @ error.mT
    rounding = KiviKeys(2, DIM).read(rest + wanted.mT) - (rest + wanted.mT)
    assert torch.allclose(moved, wanted.mT + rounding, atol=1e-4)
    slope = cache.cost @ torch.cat([error, wanted.mT], -1).mT
    assert slope[:, 32:].abs().max() < 1e-3 * slope[:, :32].abs().max()


def test_svdq_gives_bits_by_singular_value_and_drops_the_rest() -> None:
    assert {bits: sum(schedule) / 8 for bits, schedule in svdq.SCHEDULES.items()} == {b: b for b in svdq.SCHEDULES}
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
    latent = torch.randn(1, 256, DIM, generator=generator) * torch.logspace(1, -3, DIM)
    keys = latent @ basis.T + 3
    cache = SvdqKeys(2, DIM).fitted(keys, keys)
    assert torch.allclose(cache.basis @ cache.basis.mT, torch.eye(DIM), atol=1e-5)
    losses = [(c.read(keys) - keys).pow(2).mean() for c in (cache, KiviKeys(2, DIM))]
    assert losses[0] < 0.2 * losses[1]
    read = (cache.read(keys) - cache.mean) @ cache.basis
    assert read[..., 40:].abs().max() < 1e-4  # three parts of eight have no bits


def test_oscar_makes_every_channel_matter_alike() -> None:
    q = rows(512)
    moment = (q.mT @ q / 512).mean(0)
    rotation = oscar.rotation(moment)
    assert torch.allclose(rotation @ rotation.T, torch.eye(DIM), atol=1e-5)
    shares = (rotation.T @ moment @ rotation).diagonal()
    assert torch.allclose(shares, torch.full((DIM,), float(moment.trace() / DIM)), rtol=1e-3)
    # The permutation alone is undone by the order of eigenvalues: bit-reversed places of eight channels.
    diagonal = torch.diag(torch.arange(8.0, 0, -1))
    mixed = oscar.rotation(diagonal).abs()
    assert torch.allclose(mixed, torch.full((8, 8), 1 / math.sqrt(8)), atol=1e-5)


def test_kvquant_keeps_one_number_in_a_hundred_apart() -> None:
    keys, values = kvquant.fit(2, 2, activations(), {})(0, DIM, 0)
    x = rows(600, 7).half().float()
    read = keys.quantized(x)
    outside = ((x < keys.low) | (x > keys.high))[:, 1:]
    assert torch.equal(read[:, 1:][outside], x[:, 1:][outside])
    assert keys.outliers.share == pytest.approx(float(outside.float().mean())) and 0.004 < keys.outliers.share < 0.03
    assert keys.effective_bits(1 << 20) == pytest.approx(2 + 32 * keys.outliers.share + 32 / 128, abs=1e-4)
    values.quantized(x)
    assert values.outliers.share == pytest.approx(2 / (HEADS * DIM), rel=0.01)  # the least and the largest of a token


def test_kvquant_puts_levels_where_numbers_matter() -> None:
    x = torch.linspace(-1.5, 1.5, 3001)
    even = kvquant.nuq_levels(x, torch.ones_like(x), 3)
    assert torch.allclose(even, torch.linspace(-7 / 8, 7 / 8, 8), atol=0.01)
    right = kvquant.nuq_levels(x, (x > 0).float() + 1e-3, 3)
    assert (right > 0).sum() >= 7 and right.abs().max() <= 1
    two = kvquant.nuq_levels(x, torch.ones_like(x), 2)
    inside = x[x.abs() <= 1]
    rounded = two[torch.bucketize(inside, torch.tensor([-0.5, 0, 0.5]))]
    assert float(rounded.std()) == pytest.approx(float(inside.std()), rel=0.01)  # Q-Norm


def test_levels_have_the_least_squared_error() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort().values
    levels = lloyd_max(x, torch.ones_like(x), 2)
    assert torch.allclose(levels, torch.tensor([-1.51, -0.453, 0.453, 1.51]).double(), atol=0.04)


def test_heads_of_any_dimension_are_rotated() -> None:
    for dim in (80, 96, 128):
        assert torch.allclose(hadamard(dim) @ hadamard(dim), torch.eye(dim), atol=1e-5)
        assert TiledCache.quantized_tokens(KvarnCache(2, dim), 300) == 128


# On models.


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Callable[..., Path]) -> tuple[Any, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "load_tokenizer", lambda _: Letters())
        return comparison.load(resolve(tiny_checkpoint("qwen3")))


def test_all_run_on_a_model_and_see_what_a_decoder_would(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rvq, "ENTRIES", 256)  # in an eighth of the time
    model, tokenizer = loaded
    wants = [p.requires_grad for p in model.parameters()]
    wanted = parse_baselines(",".join(f"{name}-k3v3" for name, method in LITERATURE.items() if 3 in method.k_bits))
    assert len(wanted) == len(LITERATURE) - 1, "alignedkv has 16 bits"
    ids = torch.arange(420) * 37 % 300
    other = torch.cat([ids[:400], (ids[400:] + 1) % 300])
    with torch.no_grad():
        exact = simulated_logits(model, ids, Simulation.full_precision())
        for candidate in wanted:
            candidate.prepare(tokenizer)
            got = candidate.logits(model, ids, 200)
            assert torch.equal(got, candidate.logits(model, ids, 200)), candidate.name
            ahead = candidate.logits(model, other, 200)[:400]
            assert torch.allclose(ahead, got[:400], atol=1e-3), f"{candidate.name} knows what is to come"
            assert (got - exact)[399:].abs().max() > 1e-3, candidate.name
            assert 3 < candidate.effective_bits(8192) < 6
    assert [p.requires_grad for p in model.parameters()] == wants
    assert all(p.grad is None for p in model.parameters())


def test_sensitivity_is_the_gradient_of_the_loss(loaded: tuple[Any, Any]) -> None:
    """A layer's values, moved a little against their gradient, lower the loss by as much as the gradient says."""
    model, _ = loaded
    ids = torch.arange(96) * 37 % 300
    _SEEN.pop(model, None)
    layer = seen(model, ids[None])[1]
    _SEEN.pop(model)
    move = layer.value_gradients * 1e-2 / layer.value_gradients.norm()

    @dataclasses.dataclass(frozen=True)
    class Moved(FullCache):
        """Values as they come, moved."""

        by: Any = 0.0

        def exact(self, x: torch.Tensor) -> torch.Tensor:
            return x - self.by

    losses = []
    for by in (-move, move):
        # A token sees its own value as it comes, so only the others' share of the gradient can be seen here.
        simulation = Simulation(lambda index, *_, by=by: (FullCache(), Moved(by=by if index == 1 else 0.0)))
        logits = simulated_logits(model, ids, simulation)
        losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:])))
    expected = 2e-2 * float(layer.value_gradients.norm())
    assert losses[0] - losses[1] == pytest.approx(expected, rel=0.3)


def test_what_was_fitted_belongs_to_its_windows(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Others(Letters):
        """The same letters under other numbers."""

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [i if i == 1 else 300 - i for i in super().encode(text, add_special_tokens)]

    monkeypatch.setattr(from_text_module, "WINDOWS", 1)
    model, tokenizer = loaded
    ids = torch.arange(400) * 37 % 300
    first, second = (parse_baselines("oscar-k2v2")[0] for _ in range(2))
    with torch.no_grad():
        first.prepare(tokenizer)
        before = first.logits(model, ids, 0)
        second.prepare(Others())
        expected = second.logits(model, ids, 0)
        first.prepare(Others())
        assert torch.equal(first.logits(model, ids, 0), expected) and not torch.equal(before, expected)
        first.prepare(tokenizer)
        assert torch.equal(first.logits(model, ids, 0), before)


def test_a_window_that_ends_with_the_prompt_quantizes_no_keys(loaded: tuple[Any, Any]) -> None:
    ids = torch.arange(400) * 37 % 300
    with torch.no_grad():
        for candidate in parse_baselines("squat-k2v2,svdq-k2v2"):
            for tokens, prompt, expected in ((200, 0, False), (256, 0, False), (257, 0, True), (120, 100, False)):
                candidate.logits(loaded[0], ids[:tokens], prompt)
                assert candidate.quantizes(tokens) == expected, (candidate.name, tokens)


def test_a_whole_run(loaded: tuple[Any, Any]) -> None:
    wanted = parse_baselines("kvarn,oscar,svdq-k2v2")
    source = type("Source", (), {"__str__": lambda _: "tiny"})()
    result = comparison.run(source, wanted, TEXT, windows=1, window=480, prompt=200, loaded=loaded)  # type: ignore[arg-type]
    assert [row.name for row in result.rows] == ["kvarn-k4v2", "kvarn-k2v2", "oscar-k2v2", "svdq-k2v2"]
    assert all(math.isfinite(row.kld_mean) and row.kld_mean > 0 for row in result.rows)
    assert result.rows[0].kld_mean < result.rows[1].kld_mean


def test_a_method_fitted_to_a_text_needs_one(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(SkvError, match="kvquant-k3v3 has no calibration text"):
        parse_baselines("kvquant-k3v3")[0].logits(loaded[0], torch.arange(10), 0)
    assert isinstance(parse_baselines("oscar")[0], FromText)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kvqant", "--baselines: kvqant; expected kivi, kvquant, .*did you mean kvquant?"),
        ("turboqant-k3v3", "turboqant: did you mean turboquant?"),
        ("svdq-k5v2", r"--baselines: svdq-k5v2; got K5V2; expected bits of keys \(1, 2, 3, 4\)"),
        ("turboquant-prod-k1v1", "expected bits of keys"),
        ("kivi-k7v2", "got K7V2"),
        ("alignedkv-k3v3", r"expected bits of keys \(16,\)"),
    ],
)
def test_names_and_bits_that_are_not_there_are_refused(name: str, message: str) -> None:
    with pytest.raises(SkvError, match=message):
        parse_baselines(name)
