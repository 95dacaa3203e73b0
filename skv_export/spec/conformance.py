"""Named test cases of the op: shapes, seeds and tolerances, shared by the tests, ``verify --level op`` and benchmarks.

A case is one call of the op on a cache that already holds tokens. Its inputs come from its seed, so the same case is
the same numbers everywhere. Each case has the tolerance of its attention output, with the reason; bytes are exact.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from skv_export.spec.key_basis import MATRICES, Float, KeyBasis
from skv_export.spec.layout import Bytes, CacheLayout
from skv_export.spec.op import AttentionParams
from skv_export.spec.recipe import BITS, TILE_TOKENS, LayerConfig
from skv_export.spec.reference import Int32, append, quantized_kv_attention

Outcome = tuple[Float, Bytes, Bytes]
"""Of one call: output, present_key, present_value."""
FLOAT_TOLERANCE = 5e-4
"""Relative to the largest output: 16-bit queries and probabilities in integer kernels; float kernels stay far below."""
HALF_TOLERANCE = 4e-3
"""The same where inputs and outputs are float16: its rounding is 5e-4 of each product's operands."""


@dataclass(frozen=True)
class Case:
    """One call of the op.

    Attributes:
        name: Unique; says what is special.
        config: Bits, granularities, rotations, sinks, recent tokens, tile.
        head_dim: Channels per head.
        num_heads: N.
        kv_num_heads: N_kv.
        past_lengths: Tokens in the cache before the call, per sequence.
        new_tokens: S.
        query_seqlens: New tokens per sequence where ragged; None = all S.
        local_window_size: 0 = none.
        softcap: 0 = none.
        head_sink: Give a head sink.
        dtype: ``float32`` or ``float16``, of queries, keys, values and output.
        spare_tokens: Capacity beyond the total length; unwritten slots are filled with 0xFF.
        not_numbers: What is not a number: (``query``, ``key`` or ``value``; sequence; new token; column).
        calibrated: Tiles of keys have a basis of their own.
    """

    name: str
    config: LayerConfig
    head_dim: int = 64
    num_heads: int = 4
    kv_num_heads: int = 2
    past_lengths: tuple[int, ...] = (200,)
    new_tokens: int = 1
    query_seqlens: tuple[int, ...] | None = None
    local_window_size: int = 0
    softcap: float = 0.0
    head_sink: bool = False
    dtype: str = "float32"
    spare_tokens: int = 70
    not_numbers: tuple[tuple[str, int, int, int], ...] = ()
    calibrated: bool = False

    @property
    def tolerance(self) -> float:
        """Largest difference to the reference, relative to the largest output."""
        return HALF_TOLERANCE if self.dtype == "float16" else FLOAT_TOLERANCE

    @property
    def layouts(self) -> tuple[CacheLayout, CacheLayout]:
        """Layouts of keys and values."""
        return CacheLayout.pair(self.config, self.head_dim, self.local_window_size)

    @property
    def params(self) -> AttentionParams:
        """The op's attributes."""
        return AttentionParams(
            self.num_heads, self.kv_num_heads, softcap=self.softcap, local_window_size=self.local_window_size
        )

    @property
    def total_lengths(self) -> tuple[int, ...]:
        """Tokens in the cache after the call, per sequence."""
        new = self.query_seqlens or (self.new_tokens,) * len(self.past_lengths)
        return tuple(past + n for past, n in zip(self.past_lengths, new, strict=True))


@dataclass(frozen=True)
class Inputs:
    """A case's tensors, named and shaped as the op's inputs; caches hold 0xFF wherever nothing has been written."""

    query: Float
    key: Float
    value: Float
    past_key: Bytes
    past_value: Bytes
    seqlens_k: Int32
    query_seqlens: Int32 | None
    head_sink: Float | None
    key_basis: KeyBasis | None = None


def make_basis(heads: int, head_dim: int, padded_dim: int, seed: int = 0) -> KeyBasis:
    """A basis such as calibration gives, from random numbers: turned, stretched unevenly, and with feedback."""
    rng = np.random.default_rng(seed)
    matrices = np.zeros((len(MATRICES), heads, padded_dim, padded_dim))
    matrices[:2] = np.eye(padded_dim)
    used = slice(0, head_dim)
    for head in range(heads):
        turn, _ = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))
        stretch = np.exp(0.5 * rng.standard_normal(head_dim))
        shares = rng.standard_normal((head_dim, head_dim)) * 2 / np.sqrt(head_dim)
        matrices[:, head, used, used] = turn * stretch, turn / stretch, np.tril(shares, -1)
    return KeyBasis(*matrices.astype(np.float32))


def make_inputs(case: Case) -> Inputs:
    """Builds a case's tensors; the past goes through the reference's ``append``."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    batch, d, dtype = len(case.past_lengths), case.head_dim, np.dtype(case.dtype)
    # A few loud channels and a loud first token, as real keys have.
    channels = np.exp(rng.standard_normal((case.kv_num_heads, 1, d)))

    def tokens(heads: int, count: int, gain: Any = 1.0) -> Float:
        x = rng.standard_normal((heads, count, d)) * gain
        return x.astype(dtype).astype(np.float32)

    max_length = max(case.total_lengths) + case.spare_tokens
    basis = make_basis(case.kv_num_heads, d, case.layouts[0].padded_dim) if case.calibrated else None
    caches = []
    for layout, gain, used in zip(case.layouts, (channels, 1.0), (basis, None), strict=True):
        rows, width = layout.shape(max_length)
        cache = np.full((batch, case.kv_num_heads, rows, width), 0xFF, np.uint8)
        for b, past in enumerate(case.past_lengths):
            block = cache[b].reshape(case.kv_num_heads, -1)
            append(layout, block, 0, tokens(case.kv_num_heads, past, gain), used)
        caches.append(cache)

    def flat(heads: int, gain: Any = 1.0) -> Float:
        rows = [tokens(heads, case.new_tokens, gain).swapaxes(0, 1).reshape(case.new_tokens, -1) for _ in range(batch)]
        return np.stack(rows)

    new = {
        "query": flat(case.num_heads),
        "key": flat(case.kv_num_heads, channels),
        "value": flat(case.kv_num_heads),
    }
    for tensor, *at in case.not_numbers:
        new[tensor][tuple(at)] = np.nan
    return Inputs(
        **new,
        past_key=caches[0],
        past_value=caches[1],
        seqlens_k=np.array(case.total_lengths, np.int32) - 1,
        query_seqlens=None if case.query_seqlens is None else np.array(case.query_seqlens, np.int32),
        head_sink=rng.standard_normal(case.num_heads).astype(np.float32) if case.head_sink else None,
        key_basis=basis,
    )


def expected_of(case: Case, inputs: Inputs) -> Outcome:
    """The reference's result for a case's inputs: output, present_key, present_value."""
    return quantized_kv_attention(
        case.params,
        case.layouts,
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.past_key,
        inputs.past_value,
        inputs.seqlens_k,
        head_sink=inputs.head_sink,
        query_seqlens=inputs.query_seqlens,
        key_basis=inputs.key_basis,
    )


def output_error(got: Float, want: Float) -> float:
    """Largest difference of two outputs, relative to the largest number; infinite where NaNs stand in other places."""
    number = ~np.isnan(want)
    if not np.array_equal(~np.isnan(got), number):
        return np.inf
    largest = float(np.abs(want[number]).max(initial=0.0)) or 1.0
    return float(np.abs(got[number].astype(np.float32) - want[number]).max(initial=0.0)) / largest


def layout_cases() -> Iterator[CacheLayout]:
    """Every bit width, granularity, rotation, group size, head_dim and tile, for keys and for values."""
    for head_dim, tile, bits, granularity, rotation in itertools.product(
        (64, 80, 96, 128, 256), TILE_TOKENS, BITS, ("channel", "token"), ("none", "hadamard")
    ):
        padded = -(-head_dim // 32) * 32
        groups = (32, 64, 128) if granularity == "token" and bits != 16 else (32,)
        for group in (g for g in groups if padded % g == 0):
            for is_value in (False, True):
                yield CacheLayout(head_dim, bits, granularity, rotation, group, 4, 32, tile, "float16", is_value)


def attention_cases() -> tuple[Case, ...]:
    """The cases of the whole op, from simple to unusual."""
    small = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
    default = LayerConfig()

    def config(**changes: object) -> LayerConfig:
        return dataclasses.replace(small, **changes)  # type: ignore[arg-type]

    cases = [
        Case("default", default, past_lengths=(300,)),
        Case("default, head_dim 128, gqa 4", default, head_dim=128, num_heads=8, past_lengths=(500,)),
        Case("default, head_dim 256", default, head_dim=256, num_heads=2, kv_num_heads=1, past_lengths=(300,)),
        Case("head_dim 80, padded", config(), head_dim=80),
        Case("head_dim 96", config(), head_dim=96),
        Case("gqa 16", config(), num_heads=16, kv_num_heads=1),
        Case("gqa 3", config(), num_heads=9, kv_num_heads=3),
        Case("no gqa", config(), num_heads=2, kv_num_heads=2),
        Case("empty cache, one token", config(), past_lengths=(0,)),
        Case("one token held", config(), past_lengths=(1,)),
        Case("sinks just filled", config(), past_lengths=(4,)),
        Case("recent just filled", config(), past_lengths=(36,)),
        Case("one before the first flush", config(), past_lengths=(66,)),
        Case("the call flushes the first tile", config(), past_lengths=(67,)),
        Case("just flushed", config(), past_lengths=(68,)),
        Case("one row of the ring overwritten", config(), past_lengths=(69,)),
        Case("last token of the capacity", config(), past_lengths=(194,), spare_tokens=0),
        Case("two query tokens", config(), new_tokens=2),
        Case("eight query tokens", config(), new_tokens=8),
        Case("eight query tokens flush", config(), new_tokens=8, past_lengths=(64,)),
        Case("chunk with a past", config(), new_tokens=48),
        Case("chunk over three tiles", config(), new_tokens=100, past_lengths=(130,)),
        Case("prompt in one call", config(), new_tokens=120, past_lengths=(0,)),
        Case("ragged batch", config(), past_lengths=(200, 3, 68)),
        Case("ragged chunks", config(), past_lengths=(150, 0, 67), new_tokens=8, query_seqlens=(8, 3, 1)),
        Case("ragged prompts", config(), past_lengths=(0, 0), new_tokens=90, query_seqlens=(90, 17)),
        Case("one sequence idle", config(), past_lengths=(90, 40), new_tokens=2, query_seqlens=(0, 2)),
        Case("sliding window, ring wrapped", config(), past_lengths=(500,), local_window_size=70),
        Case("sliding window, chunk", config(), past_lengths=(300,), new_tokens=40, local_window_size=50),
        Case("sliding window below a tile", config(), past_lengths=(300,), local_window_size=7),
        Case("sliding window not reached", config(), past_lengths=(60,), local_window_size=256),
        Case("sliding window, prompt", config(), past_lengths=(0,), new_tokens=150, local_window_size=40),
        Case("softcap", config(), softcap=20.0),
        Case("softcap, prompt", config(), softcap=20.0, past_lengths=(0,), new_tokens=40),
        Case("head sink", config(), head_sink=True),
        Case("head sink, chunk, window", config(), head_sink=True, new_tokens=40, local_window_size=64),
        Case("head sink, prompt", config(), head_sink=True, past_lengths=(0,), new_tokens=40),
        Case("no sinks", config(num_sink_tokens=0)),
        Case("no recent tokens", config(recent_tokens=0)),
        Case("neither", config(num_sink_tokens=0, recent_tokens=0), past_lengths=(33,)),
        Case("odd sinks and recent", config(num_sink_tokens=3, recent_tokens=17)),
        Case("tile 128", config(tile_tokens=128), past_lengths=(400,)),
        Case("keys per token, rotated", config(k_granularity="token", k_rotation="hadamard")),
        Case("keys per channel, rotated", config(k_rotation="hadamard")),
        Case("values per channel", config(v_granularity="channel", v_rotation="none")),
        Case("values per token, not rotated", config(v_rotation="none")),
        Case("groups of 32", config(k_granularity="token", k_group_size=32, v_group_size=32)),
        Case("groups of 128", config(v_group_size=128), head_dim=128),
        Case("recent in float32", config(recent_type="float")),
        Case("recent in bfloat16", config(recent_type="bfloat16")),
        Case("K16V16", config(k_bits=16, v_bits=16)),
        Case("K16V2", config(k_bits=16)),
        Case("K4V16, chunk", config(v_bits=16), new_tokens=40),
        Case("float16", config(), dtype="float16"),
        Case("float16, chunk", config(), dtype="float16", new_tokens=40),
        Case("float16, prompt", config(), dtype="float16", past_lengths=(0,), new_tokens=90),
        Case("float16, gqa 8, head_dim 128", config(), dtype="float16", head_dim=128, num_heads=8, kv_num_heads=1),
    ]
    pairs = itertools.product((1, 2, 3, 4, 5, 6, 8), (1, 2, 3, 4, 5, 6, 8))
    cases += [Case(f"K{k}V{v}", config(k_bits=k, v_bits=v), num_heads=2, kv_num_heads=1) for k, v in pairs]
    return tuple(cases)


def token_channel_layouts() -> Iterator[CacheLayout]:
    """The layouts of granularity ``token_channel``, as ``layout_cases``."""
    for head_dim, tile, bits, rotation in itertools.product(
        (64, 80, 96, 128, 256), TILE_TOKENS, BITS, ("none", "hadamard")
    ):
        padded = -(-head_dim // 32) * 32
        for group in (g for g in (32, 64, 128) if padded % g == 0):
            for is_value in (False, True):
                yield CacheLayout(head_dim, bits, "token_channel", rotation, group, 4, 32, tile, "float16", is_value)


def byte_channel_layouts() -> Iterator[CacheLayout]:
    """The layouts of granularity ``channel`` with parameters in 8 bits."""
    for head_dim, tile, bits, rotation, is_value in itertools.product(
        (64, 80, 96, 128, 256), TILE_TOKENS, BITS, ("none", "hadamard"), (False, True)
    ):
        yield CacheLayout(head_dim, bits, "channel", rotation, 32, 4, 32, tile, "float16", is_value, parameter_bits=8)


def byte_channel_cases() -> tuple[Case, ...]:
    """Cases of the whole op with granularity ``channel`` and parameters in 8 bits."""
    keys = LayerConfig(k_parameter_bits=8, num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
    both = dataclasses.replace(keys, v_granularity="channel", v_rotation="none", v_parameter_bits=8)
    values = dataclasses.replace(both, k_parameter_bits=16)
    return (
        Case("byte channels, keys", keys),
        Case("byte channels, the default form", LayerConfig(k_parameter_bits=8), past_lengths=(300,)),
        Case("byte channels, values alone", values, num_heads=9, kv_num_heads=3),
        Case("byte channels, keys rotated", dataclasses.replace(both, k_rotation="hadamard")),
        Case("byte channels, keys around the mean", dataclasses.replace(both, k_granularity="token_channel")),
        *_cases_of("byte channels", both),
    )


def token_channel_cases() -> tuple[Case, ...]:
    """Cases of the whole op with granularity ``token_channel``."""
    keys = LayerConfig(
        k_granularity="token_channel", k_rotation="hadamard", num_sink_tokens=4, recent_tokens=32, tile_tokens=32
    )
    both = dataclasses.replace(keys, v_granularity="token_channel")
    plain = dataclasses.replace(both, k_rotation="none", v_rotation="none")
    return (
        Case("token_channel, keys", keys),
        Case("token_channel, values", LayerConfig(v_granularity="token_channel"), past_lengths=(300,)),
        Case("token_channel, not rotated", plain, num_heads=9, kv_num_heads=3),
        Case("token_channel, one group", dataclasses.replace(both, k_group_size=128), head_dim=128),
        Case("token_channel, groups of 32", dataclasses.replace(both, k_group_size=32, v_group_size=32)),
        *_cases_of("token_channel", both),
    )


def calibrated_cases() -> tuple[Case, ...]:
    """Cases of the whole op with calibrated keys."""
    small = LayerConfig(k_bits=2, num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
    cases = [
        *_cases_of("calibrated", small),
        Case("calibrated, the default form", LayerConfig(), past_lengths=(300,)),
        Case("calibrated, gqa 16", small, num_heads=16, kv_num_heads=1),
        Case("calibrated, byte channels", dataclasses.replace(small, k_parameter_bits=8)),
        Case("calibrated, recent in bfloat16", dataclasses.replace(small, recent_type="bfloat16")),
        Case("calibrated, values not rotated", dataclasses.replace(small, v_rotation="none")),
        Case("calibrated, empty cache", small, past_lengths=(0,)),
        Case("calibrated, nothing in tiles", small, past_lengths=(60,)),
        Case("calibrated, the call flushes the first tile", small, past_lengths=(67,)),
        Case("calibrated, eight query tokens flush", small, new_tokens=8, past_lengths=(64,)),
        Case("calibrated, ragged chunks", small, past_lengths=(150, 0, 67), new_tokens=8, query_seqlens=(8, 3, 1)),
        Case("calibrated, head sink, chunk, window", small, head_sink=True, new_tokens=40, local_window_size=64),
        Case("calibrated, float16, chunk", small, dtype="float16", new_tokens=40),
    ]
    return tuple(dataclasses.replace(case, calibrated=True) for case in cases if case.config.k_bits != 16)


def not_a_number_cases() -> tuple[Case, ...]:
    """Calls with NaN inputs: NaN must appear in the outputs that depend on them, and nowhere else."""
    rotated = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
    plain = dataclasses.replace(rotated, v_rotation="none")
    exact = dataclasses.replace(plain, k_bits=16, v_bits=16)
    past, fresh = (200, 90), (0, 0)
    query, key, value = ("query", 0, 0, 70), ("key", 1, 0, 3), ("value", 0, 0, 64)
    late_key, late_value = ("key", 0, 3, 5), ("value", 1, 5, 66)
    everything = (("query", 0, 11, 200), ("key", 0, 30, 64), ("value", 1, 40, 10), ("value", 1, 41, 127))

    def case(name: str, config: LayerConfig, not_numbers: tuple[tuple[str, int, int, int], ...], **rest: Any) -> Case:
        return Case(f"not a number, {name}", config, not_numbers=not_numbers, **{"past_lengths": past, **rest})

    return (
        case("query", rotated, (query,)),
        case("key", rotated, (key,)),
        case("value", plain, (value,)),
        case("value, rotated", rotated, (value,)),
        case("first token of all", plain, (key, value), past_lengths=fresh),
        case("softcap", plain, (key, value), softcap=20.0),
        case("window and sink", plain, (key, value), local_window_size=40, head_sink=True),
        case("keys per token", dataclasses.replace(plain, k_granularity="token"), (query, key)),
        case("values per channel", dataclasses.replace(plain, v_granularity="channel"), (value, key)),
        case("nothing rounded", exact, (key, value)),
        case("eight tokens", plain, (late_key, late_value), new_tokens=8),
        case("eight tokens, rotated", rotated, (("query", 1, 2, 0), late_key, late_value), new_tokens=8),
        case("window of three", plain, (late_key, late_value), new_tokens=8, local_window_size=3),
        case("ragged", plain, (late_key, late_value), new_tokens=8, query_seqlens=(4, 7)),
        case("chunk", plain, everything, new_tokens=48),
        case("chunk, window", plain, everything, new_tokens=48, local_window_size=6),
        case("prompt of one of two", rotated, (("value", 1, 20, 10),), new_tokens=40, past_lengths=fresh),
        case("prompt", rotated, everything, new_tokens=90, past_lengths=fresh),
        case("prompt, softcap", plain, everything, new_tokens=70, past_lengths=fresh, softcap=20.0),
        case("prompt, sink", plain, everything, new_tokens=70, past_lengths=fresh, head_sink=True),
    )


def all_layouts() -> Iterator[CacheLayout]:
    """Every layout: those of ``layout_cases`` and of the forms beside them."""
    return itertools.chain(layout_cases(), token_channel_layouts(), byte_channel_layouts())


def op_cases() -> tuple[Case, ...]:
    """Every case of the whole op."""
    return (*attention_cases(), *token_channel_cases(), *byte_channel_cases(), *calibrated_cases())


def _cases_of(name: str, config: LayerConfig) -> Iterator[Case]:
    """Every shape of call, and pairs of bits, for keys and values of one form."""
    yield Case(f"{name}, both", config)
    yield Case(f"{name}, head_dim 80, padded", config, head_dim=80)
    yield Case(f"{name}, head_dim 96", config, head_dim=96)
    yield Case(f"{name}, head_dim 128", config, head_dim=128)
    yield Case(f"{name}, head_dim 256", config, head_dim=256, num_heads=2, kv_num_heads=1)
    yield Case(f"{name}, tile 128", dataclasses.replace(config, tile_tokens=128), past_lengths=(500,))
    yield Case(f"{name}, ragged batch", config, past_lengths=(200, 3, 68))
    yield Case(f"{name}, chunk over three tiles", config, new_tokens=100, past_lengths=(130,))
    yield Case(f"{name}, sliding window, ring wrapped", config, past_lengths=(500,), local_window_size=70)
    yield Case(f"{name}, softcap", config, softcap=20.0)
    yield Case(f"{name}, float16", config, dtype="float16")
    for k, v in ((1, 1), (2, 2), (3, 3), (5, 4), (6, 8), (8, 5), (16, 2), (2, 16)):
        yield Case(f"{name} K{k}V{v}", dataclasses.replace(config, k_bits=k, v_bits=v))
