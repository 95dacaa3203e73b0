"""Calibrated keys in the library: bytes, attention, what is read back, and refusals, against the reference."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path

import native
import numpy as np
import pytest

from skv_export.native.library import SkvCache
from skv_export.spec import reference
from skv_export.spec.conformance import Case, calibrated_cases, make_basis, make_inputs
from skv_export.spec.key_basis import INPUTS, KeyBasis
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig

pytestmark = pytest.mark.usefixtures("isa")
GOLDEN = Path(__file__).parent / "golden"
SMALL = LayerConfig(k_bits=3, num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
CASES = {case.name: case for case in calibrated_cases()}


def keys(count: int, head_dim: int, heads: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((heads, count, head_dim)) + 2 * rng.standard_normal(head_dim)).astype(np.float32)


def empty(layout: CacheLayout, tokens: int, heads: int = 2) -> np.ndarray:
    rows, width = layout.shape(tokens)
    return np.full((heads, rows * width), 0xFF, np.uint8)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_append_writes_the_bytes_of_the_reference(head_dim: int) -> None:
    for bits, tile, parameter_bits in ((1, 32, 16), (2, 64, 16), (3, 32, 8), (4, 128, 16), (5, 32, 16), (8, 64, 8)):
        config = dataclasses.replace(SMALL, k_bits=bits, tile_tokens=tile, k_parameter_bits=parameter_bits)
        layout = CacheLayout.pair(config, head_dim)[0]
        count = 2 * tile + layout.full_rows + 3
        basis = make_basis(2, head_dim, layout.padded_dim, seed=bits)
        native.assert_append_is_the_references(layout, keys(count, head_dim, seed=bits), [count - 5, 5], basis)


@pytest.mark.parametrize("scale", [1, 1e-20, 1e-38, 1e9, 1e36])
def test_any_numbers_give_the_bytes_of_the_reference(scale: float) -> None:
    """Float32 rows: tiny and huge numbers, sums beyond float32, constant channels, tokens of zeros."""
    for bits in (1, 2, 4, 8):
        layout = CacheLayout(96, bits, "channel", "none", 32, 1, 0, 32, "float", False)
        x = native.awkward_numbers(96, bits) * np.float32(scale)
        native.assert_append_is_the_references(layout, x, [80], make_basis(1, 96, 96, seed=bits))


def test_feedback_of_any_size_gives_the_bytes_of_the_reference() -> None:
    layout = CacheLayout.pair(dataclasses.replace(SMALL, k_bits=4), 64)[0]
    for factor in (1e-30, 30, 1e30):
        basis = make_basis(2, 64, 64)
        wild = dataclasses.replace(basis, feedback=basis.feedback * np.float32(factor))
        native.assert_append_is_the_references(layout, keys(150, 64), [150], wild)


@pytest.mark.parametrize("parameter_bits", [8, 16])
def test_golden_bytes(parameter_bits: int) -> None:
    """SKV_WRITE_GOLDEN=1 writes the files again, as in test_kernels.py: only when layout_version changes."""
    config = dataclasses.replace(SMALL, k_parameter_bits=parameter_bits)
    layout = CacheLayout.pair(config, 32)[0]
    i, j = np.mgrid[0:32, 0:32]
    signs = np.array([[(-1.0) ** (int(a) & int(b)).bit_count() for b in range(32)] for a in range(32)])
    # A Hadamard matrix, its channels stretched by powers of two, is exact; so are its inverse and the feedback.
    stretch = 2.0 ** (np.arange(32) % 5 - 2)
    feedback = np.tril((i * 7 + j * 3) % 17 - 8, -1) / 64
    matrices = (signs * stretch / 8, signs / stretch / 4, feedback)
    basis = KeyBasis(*(m[None].astype(np.float32) for m in matrices))
    assert np.array_equal(basis.key[0] @ basis.query[0].T, np.eye(32))
    index = np.arange(101 * 32).reshape(1, 101, 32)
    x = ((index * 7919 + 12345) % 1009 - 504).astype(np.float32) / 256
    from_reference, from_library = empty(layout, 101, 1), empty(layout, 101, 1)
    reference.append(layout, from_reference, 0, x, basis)
    native.append(layout, from_library, 0, x, [101], basis)
    file = GOLDEN / f"calibrated_{parameter_bits}_key.bin"
    if os.environ.get("SKV_WRITE_GOLDEN"):
        file.write_bytes(from_reference.tobytes())
    assert from_reference.tobytes() == from_library.tobytes() == file.read_bytes()


def test_dequantize_reads_the_models_basis_and_rewind_restores_it() -> None:
    layout, basis = CacheLayout.pair(SMALL, 80)[0], make_basis(2, 80, 96)
    block = empty(layout, 200)
    reference.append(layout, block, 0, keys(200, 80), basis)
    want = reference.load(layout, block, 200, basis)[0]
    blocks = np.stack([np.full_like(block, 0x7F), block])
    for head in range(2):
        got = native.dequantize(layout, blocks, 1, head, 200, stride=90, basis=basis)
        assert np.array_equal(got, want[head, :, :80])
    rewound = block.copy()
    reference.rewind(layout, block, 200, 171, basis=basis)
    native.rewind(layout, rewound, 200, 171, basis=basis)
    assert np.array_equal(rewound, block)


@pytest.mark.parametrize("name", CASES)
def test_attention_is_the_references(name: str) -> None:
    native.assert_attention_is_the_references(CASES[name])


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 96), (2, 32), (3, 64), (5, 160), (7, 256)])
def test_groups_of_any_size_and_heads_of_any_width(heads: int, head_dim: int) -> None:
    case = Case("x", SMALL, past_lengths=(150,), num_heads=heads, kv_num_heads=1, head_dim=head_dim, calibrated=True)
    native.assert_attention_is_the_references(case)


def test_threads_change_nothing() -> None:
    case = CASES["calibrated, ragged chunks"]
    inputs = make_inputs(case)
    alone, together = (native.Call(case, inputs).run(thread_count=count) for count in (1, 3))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_query_that_is_not_a_number_stays_one_row() -> None:
    case = Case("x", SMALL, past_lengths=(200,), not_numbers=(("query", 0, 0, 70),), calibrated=True)
    inputs = make_inputs(case)
    want = reference.quantized_kv_attention(
        case.params, case.layouts, inputs.query, inputs.key, inputs.value, inputs.past_key, inputs.past_value,
        inputs.seqlens_k, key_basis=inputs.key_basis,
    )[0]  # fmt: skip
    got = native.Call(case, inputs).run()[0]
    assert np.array_equal(np.isnan(got), np.isnan(want)) and np.isnan(want).sum() == 64
    assert np.allclose(got, want, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("missing", INPUTS)
def test_some_of_the_matrices_are_refused(missing: str) -> None:
    case = CASES["calibrated, both"]
    call = native.Call(case, make_inputs(case))
    setattr(call.call.key_cache, missing, None)
    with pytest.raises(native.NativeError, match="key cache: basis; got some matrices; expected all three or none"):
        call.run()
    call.check_guards()


@pytest.mark.parametrize("changes", [{"k_bits": 16}, {"k_granularity": "token"}, {"k_rotation": "hadamard"}])
def test_forms_that_have_none_are_refused(changes: dict[str, object]) -> None:
    config = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    case = Case("x", config, past_lengths=(10,))
    inputs = dataclasses.replace(make_inputs(case), key_basis=make_basis(2, 64, 64))
    with pytest.raises(native.NativeError, match=r"key cache: basis; got .* expected keys of fewer than 16 bits"):
        native.Call(case, inputs).run()


def test_values_have_none() -> None:
    layout = CacheLayout.pair(dataclasses.replace(SMALL, v_granularity="channel", v_rotation="none"), 64)[1]
    block = native.Guarded(empty(layout, 100))
    cache = SkvCache.of(layout, block.pointer, block.array.shape[1], make_basis(2, 64, 64))
    with pytest.raises(native.NativeError, match="value cache: basis"):
        native.check(native.library().skv_rewind(ctypes.byref(cache), 2, 0, 100, 100, 100))
