"""The simulation of decoding: one pass over a text equals the op called token by token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from skv_export.evaluation.decode_simulation import FullCache, LayoutCache, Simulation, attend
from skv_export.evaluation.literature.kivi import KiviKeys, KiviValues
from skv_export.spec.conformance import Case, make_inputs
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import quantized_kv_attention

SMALL = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
CASES = [
    Case("default", SMALL),
    Case("two bits", dataclasses.replace(SMALL, k_bits=2)),
    Case("longer than a block, gqa", SMALL, num_heads=6, kv_num_heads=2, spare_tokens=130),
    Case("larger tiles, no recent tokens", LayerConfig(recent_tokens=0, tile_tokens=64)),
    Case("nothing exact", LayerConfig(num_sink_tokens=0, recent_tokens=0, tile_tokens=32)),
    Case("rotated keys, padded", dataclasses.replace(SMALL, k_granularity="token", k_rotation="hadamard"), head_dim=80),
    Case("not quantized", dataclasses.replace(SMALL, k_bits=16, v_bits=16)),
    Case("window", SMALL, local_window_size=50),
    Case("softcap", SMALL, softcap=5.0),
    Case("head sink, window", SMALL, head_sink=True, local_window_size=70),
]


def token_by_token(case: Case, tensors: tuple[np.ndarray, ...], head_sink: np.ndarray | None) -> np.ndarray:
    """The reference op, one call per token, on ``[1, S, H*D]`` tensors."""
    tokens = tensors[0].shape[1]
    caches = [np.full((1, case.kv_num_heads, *layout.shape(tokens)), 0xFF, np.uint8) for layout in case.layouts]
    rows = []
    for i in range(tokens):
        output, *caches = quantized_kv_attention(
            case.params,
            case.layouts,
            *(x[:, i : i + 1] for x in tensors),
            *caches,
            np.array([i], np.int32),
            head_sink=head_sink,
        )
        rows.append(output)
    return np.concatenate(rows, 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_pass_equals_the_op_called_token_by_token(case: Case) -> None:
    tokens = 110 + case.spare_tokens
    made = make_inputs(dataclasses.replace(case, past_lengths=(0,), new_tokens=tokens))
    tensors = (made.query, made.key, made.value)
    expected = token_by_token(case, tensors, made.head_sink)
    query, key, value = (torch.from_numpy(x[0]).unflatten(1, (-1, case.head_dim)).transpose(0, 1) for x in tensors)
    output = attend(
        query,
        key,
        value,
        (LayoutCache(case.layouts[0]), LayoutCache(case.layouts[1])),
        scale=case.head_dim**-0.5,
        softcap=case.softcap,
        local_window_size=case.local_window_size,
        head_sink=None if made.head_sink is None else torch.from_numpy(made.head_sink),
    )
    got = output.transpose(0, 1).flatten(1).numpy()
    assert np.abs(got - expected[0]).max() < 2e-6 * np.abs(expected).max() + 2e-6


def test_the_simulated_cache_is_not_trivially_exact() -> None:
    """What the equality above is worth: with these inputs two bits change the output by far more than its tolerance."""
    made = make_inputs(Case("x", SMALL, past_lengths=(0,), new_tokens=180))
    query, key, value = (
        torch.from_numpy(x[0]).unflatten(1, (-1, 64)).transpose(0, 1) for x in (made.query, made.key, made.value)
    )
    caches = tuple(LayoutCache(layout) for layout in CacheLayout.pair(SMALL, 64))
    change = attend(query, key, value, caches, scale=0.125) - attend(  # type: ignore[arg-type]
        query, key, value, (FullCache(), FullCache()), scale=0.125
    )
    quiet, loud = change[:, :68].abs().max(), change[:, 68:].abs().max()
    assert quiet < 2e-3 and loud > 0.05  # the first tile is flushed when 68 tokens are held; before, only fp16 rounding


def test_full_precision_is_plain_attention() -> None:
    query, key, value = torch.randn(4, 300, 32), torch.randn(2, 300, 32), torch.randn(2, 300, 32)
    plain = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], is_causal=True, enable_gqa=True
    )[0]
    assert torch.allclose(attend(query, key, value, (FullCache(), FullCache()), scale=32**-0.5), plain, atol=2e-6)


def test_effective_bits_of_a_window_are_those_of_the_tokens_it_sees() -> None:
    wide, narrow = (CacheLayout.pair(SMALL, 64, window)[0] for window in (0, 256))
    assert LayoutCache(wide).effective_bits(8192) == wide.effective_bits(8192)
    bits = 8 * narrow.block_bytes(8192) / (256 * 64)
    assert LayoutCache(narrow).effective_bits(8192) == bits > 4.5

    def make(index: int, head_dim: int, window: int) -> tuple[LayoutCache, LayoutCache]:
        return (LayoutCache(narrow if window else wide),) * 2

    both = Simulation(make)
    for index, window in enumerate((0, 256)):
        both.layer(index, 2, 64, window)
    total = 8192 * wide.effective_bits(8192) + 256 * bits
    assert both.effective_bits(8192) == pytest.approx(total / (8192 + 256))


def test_effective_bits_of_kivi_are_those_of_the_tokens_a_window_sees() -> None:
    """128 of the tokens are exact: of 512 that weighs far more than of 8,192."""
    assert KiviKeys(2, 64).effective_bits(8192) == (8064 * 3 + 128 * 16) / 8192
    assert KiviValues(2, 64, local_window_size=512).effective_bits(8192) == (384 * 3 + 128 * 16) / 512
    simulation = Simulation(lambda _, *shape: (KiviKeys(4, *shape), KiviValues(2, *shape)))
    for index, window in enumerate((0, 512)):
        simulation.layer(index, 1, 64, window)
    wide, narrow = (8064 * (5 + 3) + 128 * 32) / 2, (384 * (5 + 3) + 128 * 32) / 2
    assert simulation.effective_bits(8192) == pytest.approx((wide + narrow) / (8192 + 512))


def test_kivi_quantizes_in_its_own_groups() -> None:
    x = torch.randn(2, 300, 64)
    keys, values = KiviKeys(2, 64), KiviValues(2, 64)
    assert [keys.quantized_tokens(n) for n in (0, 127, 128, 255, 256)] == [0, 0, 128, 128, 256]
    assert [values.quantized_tokens(n) for n in (0, 128, 129, 300)] == [0, 0, 1, 172]
    groups = keys.quantized(x)[0, 32:64, 5]  # 32 tokens of one channel: at most 4 levels, its ends among them
    assert len(groups.unique()) <= 4
    assert abs(groups.min() - x[0, 32:64, 5].min()) < 1e-3
    row = values.quantized(x)[1, 7, 32:]
    assert len(row.unique()) <= 4 and abs(row.max() - x[1, 7, 32:].max()) < 4e-3
    assert torch.equal(keys.quantized(x)[:, 256:], x[:, 256:])  # not yet 128 tokens
