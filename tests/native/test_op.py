"""The op in ONNX Runtime against the reference: bytes, attention, every way of calling it, every message."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from op_nodes import Arrays, arrays_of, assert_same, attributes_of, expected_of, model_of, run, session_of

from skv_export.native.library import library_path
from skv_export.spec.conformance import Case, make_basis, not_a_number_cases, op_cases, output_error
from skv_export.spec.key_basis import INPUTS, MATRICES
from skv_export.spec.recipe import LayerConfig

SMALL = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)


@pytest.mark.parametrize("case", op_cases(), ids=lambda c: c.name)
def test_case_equals_the_reference(case: Case) -> None:
    arrays = arrays_of(case)
    got = run(arrays, attributes_of(case.params, case.layouts))
    assert got[0].dtype == case.dtype
    assert_same(got, expected_of(case.params, case.layouts, arrays), case.tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", not_a_number_cases(), ids=lambda c: c.name)
def test_what_is_not_a_number_stays_where_it_belongs(case: Case, dtype: str) -> None:
    arrays = arrays_of(dataclasses.replace(case, dtype=dtype))
    got, want = run(arrays, attributes_of(case.params, case.layouts)), expected_of(case.params, case.layouts, arrays)
    assert output_error(got[0], want[0]) <= dataclasses.replace(case, dtype=dtype).tolerance
    assert_same([np.zeros(1), *got[1:]], [np.zeros(1), *want[1:]], 0)


# The path taken.


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({}, "the op's kernel"),
        ({"new_tokens": 40}, "GroupQueryAttention"),
        ({"new_tokens": 40, "head_dim": 20}, "the op's kernel"),  # GroupQueryAttention wants a multiple of 8
        ({"new_tokens": 40, "dtype": "float16"}, "GroupQueryAttention"),
        # A past that would take more than 256 MiB when dequantized stays in its tiles.
        (
            {"new_tokens": 40, "past_lengths": (4200,), "num_heads": 32, "kv_num_heads": 32, "head_dim": 256},
            "the op's kernel",
        ),
        ({"new_tokens": 40, "past_lengths": (0, 90), "query_seqlens": (40, 1)}, "GroupQueryAttention"),
    ],
)
def test_many_tokens_go_through_group_query_attention(
    changes: dict[str, Any], path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    case = dataclasses.replace(Case("path", SMALL), **changes)
    arrays = arrays_of(case)
    got = run(arrays, attributes_of(case.params, case.layouts), log_severity_level=0)
    assert f"up to {case.new_tokens} new tokens: {path}" in capfd.readouterr().err
    assert_same(got, expected_of(case.params, case.layouts, arrays), case.tolerance)


def test_a_prompt_whose_scores_are_large_goes_in_chunks() -> None:
    config = dataclasses.replace(SMALL, k_bits=8, v_bits=8)
    case = Case("large", config, 32, num_heads=128, kv_num_heads=1, past_lengths=(1000,), new_tokens=70)
    arrays = arrays_of(case)
    got = run(arrays, attributes_of(case.params, case.layouts))
    assert_same(got, expected_of(case.params, case.layouts, arrays), case.tolerance)


# What the op does before attention.


def rotary_tables(half: int, positions: int = 512) -> Arrays:
    angles = np.arange(positions)[:, None] / 100.0 ** (np.arange(half) / half)
    return {"cos_cache": np.cos(angles).astype(np.float32), "sin_cache": np.sin(angles).astype(np.float32)}


@pytest.mark.parametrize("new_tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("work", ["none", "rotary", "interleaved", "partial", "positions", "norm", "norm, rotary"])
def test_packed_qkv_rope_and_qk_norm_equal_the_reference(work: str, packed: bool, dtype: str, new_tokens: int) -> None:
    config = dataclasses.replace(SMALL, k_rotation="hadamard", k_granularity="token")
    case = Case(work, config, past_lengths=(90, 3), new_tokens=new_tokens, head_sink=True, dtype=dtype)
    rng = np.random.default_rng(5)
    arrays = arrays_of(case)
    if packed:
        pack(arrays)
    if "norm" in work:
        arrays |= {f"{t}_norm_weight": rng.standard_normal(64).astype(dtype) for t in "qk"}
    rotary = work not in ("none", "norm")
    if rotary:
        arrays |= {k: v.astype(dtype) for k, v in rotary_tables(16 if work == "partial" else 32).items()}
    if work == "positions":
        arrays["position_ids"] = rng.integers(0, 512, arrays["query"].shape[:2])
    params = dataclasses.replace(
        case.params, do_rotary=rotary, rotary_interleaved=work == "interleaved", qk_norm_epsilon=1e-5
    )
    got = run(arrays, attributes_of(params, case.layouts))
    assert_same(got, expected_of(params, case.layouts, arrays), case.tolerance)


# Ways of calling it.


def aligned(array: np.ndarray, guard: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A copy on a 16-byte boundary between guards of 0xA5; returns the copy and the whole buffer."""
    buffer = np.full(array.nbytes + 2 * guard + 16, 0xA5, np.uint8)
    start = guard + -(buffer.ctypes.data + guard) % 16
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy, buffer


def run_in_place(session: ort.InferenceSession, arrays: Arrays, caches: Sequence[np.ndarray]) -> np.ndarray:
    binding = session.io_binding()
    binding.bind_output("output")
    for name, array in arrays.items():
        binding.bind_cpu_input(name, array)
    for name, cache in zip(("key", "value"), caches, strict=True):
        value = ort.OrtValue.ortvalue_from_numpy(cache)
        assert value.data_ptr() == cache.ctypes.data
        binding.bind_ortvalue_input(f"past_{name}", value)
        binding.bind_ortvalue_output(f"present_{name}", value)
    session.run_with_iobinding(binding)
    output: np.ndarray = binding.copy_outputs_to_cpu()[0]
    return output


@pytest.mark.parametrize("name", ["default", "chunk over three tiles", "sliding window, ring wrapped", "ragged chunks"])
def test_one_buffer_for_past_and_present_equals_two(name: str) -> None:
    case = next(c for c in op_cases() if c.name == name)
    arrays = arrays_of(case)
    session = session_of(arrays, attributes_of(case.params, case.layouts))
    apart = session.run(None, arrays)
    caches, buffers = zip(*(aligned(arrays[f"past_{t}"]) for t in ("key", "value")), strict=True)
    guards = [buffer.copy() for buffer in buffers]
    output = run_in_place(session, arrays, caches)
    assert np.array_equal(output, apart[0])
    for cache, present, buffer, before in zip(caches, apart[1:], buffers, guards, strict=True):
        assert np.array_equal(cache, present)
        assert np.array_equal(buffer[:64], before[:64]) and np.array_equal(buffer[-64:], before[-64:])


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("chunks", [[150], [1] * 150, [3, 90, 57], [67, 1, 8, 9, 65]], ids=["one", "single", "3", "5"])
def test_prefill_in_one_call_in_chunks_or_token_by_token(chunks: list[int], window: int) -> None:
    config = dataclasses.replace(SMALL, k_bits=16, v_bits=16, recent_type="float")  # so that every way is exact
    case = Case("prefill", config, past_lengths=(0,), new_tokens=150, local_window_size=window)
    arrays = arrays_of(case)
    expected = expected_of(case.params, case.layouts, arrays)
    session = session_of(arrays, attributes_of(case.params, case.layouts))
    caches = tuple(aligned(arrays[f"past_{t}"])[0] for t in ("key", "value"))
    outputs, done = [], 0
    for size in chunks:
        span = {name: arrays[name][:, done : done + size].copy() for name in ("query", "key", "value")}
        done += size
        lengths = {"seqlens_k": np.array([done - 1], np.int32), "total_sequence_length": np.array(done, np.int32)}
        outputs.append(run_in_place(session, span | lengths, caches))
    assert_same([np.concatenate(outputs, 1), *caches], expected, 1e-5)


@pytest.mark.parametrize("split", ["one row", "width 16", "twice as wide"])
def test_only_the_size_of_a_block_matters(split: str) -> None:
    case = Case("splits", SMALL, new_tokens=12)
    arrays = arrays_of(case)
    expected = expected_of(case.params, case.layouts, arrays)
    for name in ("past_key", "past_value"):
        batch, heads, rows, width = arrays[name].shape
        width = {"one row": rows * width, "width 16": 16, "twice as wide": 2 * width if rows % 2 == 0 else width}[split]
        arrays[name] = arrays[name].reshape(batch, heads, -1, width)
    got = run(arrays, attributes_of(case.params, case.layouts))
    for i, name in ((1, "past_key"), (2, "past_value")):
        assert got[i].shape == arrays[name].shape
        got[i] = got[i].reshape(expected[i].shape)
    assert_same(got, expected, case.tolerance)


def test_sessions_run_at_once() -> None:
    cases = [Case("a", SMALL, new_tokens=1), Case("b", SMALL, new_tokens=60, past_lengths=(100,))]
    jobs = []
    for case in cases:
        arrays = arrays_of(case)
        session = session_of(arrays, attributes_of(case.params, case.layouts))
        jobs.append((session, arrays, session.run(None, arrays)))
    with ThreadPoolExecutor(6) as pool:  # two threads in each session, two sessions
        futures = [(pool.submit(jobs[i % 2][0].run, None, jobs[i % 2][1]), jobs[i % 2][2]) for i in range(60)]
        for future, expected in futures:
            assert all(np.array_equal(a, b) for a, b in zip(future.result(), expected, strict=True))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 1), (1, 0), (2, 0)])
def test_nothing_to_do(batch: int, tokens: int) -> None:
    case = Case("nothing", SMALL, past_lengths=(70,) * max(batch, 1), new_tokens=max(tokens, 1))
    arrays = arrays_of(case)
    for name, array in arrays.items():
        if array.ndim:
            arrays[name] = array[:batch, :tokens] if name in ("query", "key", "value") else array[:batch]
    got = run(arrays, attributes_of(case.params, case.layouts))
    assert got[0].shape == (batch, tokens, 256)
    assert np.array_equal(got[1], arrays["past_key"]) and np.array_equal(got[2], arrays["past_value"])


def test_numbers_that_are_not_finite_are_reported_once_per_session(capfd: pytest.CaptureFixture[str]) -> None:
    case = Case("poison", SMALL)
    arrays = arrays_of(case)
    arrays["key"][0, 0, 3] = np.nan
    session = session_of(arrays, attributes_of(case.params, case.layouts), log_severity_level=2)
    text = "not finite were stored as 0"
    assert text not in capfd.readouterr().err
    got = session.run(None, arrays)
    assert "'attention': keys or values that are " + text in capfd.readouterr().err
    assert_same([np.zeros(1), *got[1:]], [np.zeros(1), *expected_of(case.params, case.layouts, arrays)[1:]], 0)
    session.run(None, arrays)
    assert text not in capfd.readouterr().err
    run(arrays, attributes_of(case.params, case.layouts), log_severity_level=2)
    assert text in capfd.readouterr().err


# Messages.


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    def apply(arrays: Arrays) -> None:
        arrays[name] = change(arrays[name])

    return apply


def pack(arrays: Arrays) -> None:
    arrays["query"] = np.concatenate([arrays["query"], arrays.pop("key"), arrays.pop("value")], -1)


def drop(*names: str) -> Callable[[Arrays], None]:
    def apply(arrays: Arrays) -> None:
        for name in names:
            del arrays[name]

    return apply


def add(name: str, array: np.ndarray) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: array})


def constants(*names: str, heads: int = 2, dim: int = 64) -> Callable[[Arrays], None]:
    basis = make_basis(heads, dim, dim)
    matrices = {name: getattr(basis, field) for name, field in zip(INPUTS, MATRICES, strict=True)}
    return lambda arrays: arrays.update({name: matrices[name] for name in names})


FLOATS, INT32 = np.float32, np.int32
ROTARY = {"do_rotary": 1}
BAD_CALLS: dict[str, tuple[Callable[[Arrays], None], dict[str, Any], str]] = {
    "query rank": (changed("query", lambda x: x[0]), {}, "query: shape; got .1, 256.; expected .batch, tokens, 4"),
    "query width": (changed("query", lambda x: x[..., :-1]), {}, "query: shape; got .2, 1, 255.; expected"),
    "key width": (changed("key", lambda x: x[..., :-64]), {}, "key: shape; got .2, 1, 64.; expected .2, 1, 128."),
    "key alone": (drop("value"), {}, "key and value; got a key alone; expected both"),
    "value tokens": (changed("value", lambda x: np.repeat(x, 2, 1)), {}, "value: shape; got .2, 2, 128."),
    "packed width": (drop("key", "value"), {"num_heads": 6}, "query: shape; got .2, 1, 256.; .* \\(packed QKV\\)"),
    "past heads": (changed("past_key", lambda x: x[:, :1]), {}, "past_key: shape; got .2, 1, .*; expected .2, 2"),
    "past batch": (changed("past_value", lambda x: x[:1]), {}, "past_value: shape; got .1, 2, "),
    "past rank": (changed("past_key", lambda x: x[0]), {}, "past_key: shape; got"),
    "block size": (changed("past_key", lambda x: x[:, :, :-1, :-1]), {}, "key cache: block_bytes; got .* multiple"),
    "block too small": (changed("past_value", lambda x: x[:, :, :9]), {}, "value cache: block_bytes; got 288; exp"),
    "seqlens": (changed("seqlens_k", lambda x: x[:1]), {}, "seqlens_k: shape; got .1.; expected .2."),
    "negative": (changed("seqlens_k", lambda x: x - 999), {}, "sequence 0: seqlens_k; got -799; expected -1 or more"),
    "capacity": (changed("seqlens_k", lambda x: x + 999), {}, "key cache: total length of sequence 0; got 1200 tok"),
    "total": (add("total_sequence_length", np.array(200, INT32)), {}, "total_sequence_length; got 200; .* at least"),
    "total shape": (add("total_sequence_length", np.zeros(2, INT32)), {}, "total_sequence_length: shape; got .2.;"),
    "new tokens": (add("query_seqlens", np.array([1, 2], INT32)), {}, "sequence 1: lengths; got 2 new tokens of 51"),
    "new negative": (add("query_seqlens", np.array([-1, 1], INT32)), {}, "sequence 0: lengths; got -1 new tokens"),
    "new shape": (add("query_seqlens", np.array([1], INT32)), {}, "query_seqlens: shape; got .1.; expected .2."),
    "bias": (add("attention_bias", np.zeros((1, 1, 1, 201), FLOATS)), {}, "attention_bias; got a tensor; expected"),
    "sink": (add("head_sink", np.zeros(3, FLOATS)), {}, "head_sink: shape; got .3.; expected .4."),
    "norm": (add("q_norm_weight", np.zeros(32, FLOATS)), {}, "q_norm_weight: shape; got .32.; expected .64."),
    "no tables": (lambda arrays: None, ROTARY, "cos_cache; got nothing; expected a tensor"),
    "tables": (lambda arrays: arrays.update(rotary_tables(33)), ROTARY, "cos_cache: shape; .* head_dim / 2 = 32"),
    "position": (lambda arrays: arrays.update(rotary_tables(32, 200)), ROTARY,
                 "position of token 0 of sequence 0; got 200; expected 0 ... 199"),
    "position_ids": (lambda arrays: arrays.update(rotary_tables(32) | {"position_ids": np.full((2, 1), -1)}), ROTARY,
                     "position of token 0 of sequence 0; got -1; expected 0 ... 511"),
    "one constant": (constants("key_basis"), {}, "query_basis and key_feedback; got 1 of them; expected all"),
    "no feedback": (constants(*INPUTS[:2]), {}, "key_basis, query_basis and key_feedback; got 2 of them"),
    "constants": (constants(*INPUTS, dim=96), {}, "key_basis: shape; got .2, 96, 96.; expected .2, 64, 64."),
    "constants, heads": (constants(*INPUTS, heads=4), {}, "key_basis: shape; got .4, 64, 64.; expected .2, 64, 64."),
    "constants, tokens": (constants(*INPUTS), {"k_granularity": "token"},
                          "key_basis; got a tensor; expected nothing, or keys of fewer than 16 bits"),
    "constants, rotated": (constants(*INPUTS), {"k_rotation": "hadamard"}, "key_basis; got a tensor; expected noth"),
    "group size": (pack, {"v_group_size": 48}, "v_group_size; got 48; expected a divisor of 64 .head_dim 64, padded"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_and_writes_nothing(name: str) -> None:
    change, attributes, message = BAD_CALLS[name]
    case = Case("bad", SMALL, past_lengths=(200, 50))
    arrays = arrays_of(case)
    change(arrays)
    session = session_of(arrays, attributes_of(case.params, case.layouts) | attributes, log_severity_level=4)
    caches = tuple(aligned(arrays[f"past_{t}"])[0] for t in ("key", "value"))
    fed = {k: v for k, v in arrays.items() if not k.startswith("past")}
    with pytest.raises(Exception, match=message):
        run_in_place(session, fed, caches)
    assert all(np.array_equal(a, arrays[n]) for a, n in zip(caches, ("past_key", "past_value"), strict=True))


def test_a_misaligned_cache_is_refused() -> None:
    case = Case("misaligned", SMALL)
    arrays = arrays_of(case)
    session = session_of(arrays, attributes_of(case.params, case.layouts), log_severity_level=4)
    key, _ = aligned(np.zeros(arrays["past_key"].nbytes + 16, np.uint8))
    shifted = key[8 : 8 + arrays["past_key"].nbytes].reshape(arrays["past_key"].shape)
    fed = {k: v for k, v in arrays.items() if not k.startswith("past")}
    with pytest.raises(Exception, match=r"key cache: data; got .*; expected a multiple of 16"):
        run_in_place(session, fed, (shifted, aligned(arrays["past_value"])[0]))


NODE = "node 'attention': attribute "
BAD_ATTRIBUTES: list[tuple[dict[str, Any], str]] = [
    ({"layout_version": 2}, NODE + "layout_version; got 2; expected 1"),
    ({"layout_version": None}, NODE + "layout_version; got nothing; expected 1"),
    ({"k_bits": 7}, NODE + "k_bits; got 7; expected 1 or 2 or 3 or 4 or 5 or 6 or 8 or 16"),
    ({"v_bits": None}, NODE + "v_bits; got nothing; expected 1 or 2"),
    ({"k_bits": 4.0}, NODE + "k_bits; got a float; expected an integer"),
    ({"v_group_size": [64]}, NODE + "v_group_size; got a list; expected an integer"),
    ({"num_sink_tokens": "4"}, NODE + "num_sink_tokens; got a string; expected an integer"),
    ({"k_granularity": "group"}, NODE + "k_granularity; got 'group'; expected channel or token or token_channel"),
    ({"v_granularity": 1}, NODE + "v_granularity; got an integer; expected a string"),
    ({"k_parameter_bits": 12}, NODE + "k_parameter_bits; got 12; expected 16, or 8 with granularity channel"),
    ({"k_granularity": "token", "k_parameter_bits": 8}, NODE + "k_parameter_bits; got 8; expected 16, or 8 with"),
    ({"v_parameter_bits": 4}, NODE + "v_parameter_bits; got 4; expected 16, or 8 with granularity channel"),
    ({"v_rotation": "dct"}, NODE + "v_rotation; got 'dct'; expected none or hadamard"),
    ({"recent_type": "float8"}, NODE + "recent_type; got 'float8'; expected float16 or float or bfloat16"),
    ({"tile_tokens": 48}, NODE + "tile_tokens; got 48; expected 32 or 64 or 128"),
    ({"num_sink_tokens": -1}, NODE + "num_sink_tokens; got -1; expected 0 ... 4096"),
    ({"recent_tokens": 5000}, NODE + "recent_tokens; got 5000; expected 0 ... 4096"),
    ({"local_window_size": -2}, NODE + "local_window_size; got -2; expected -1 ... "),
    ({"do_rotary": 2}, NODE + "do_rotary; got 2; expected 0 ... 1"),
    ({"num_heads": 0}, NODE + "num_heads; got 0; expected 1 ... 65536"),
    ({"num_heads": 3}, NODE + "num_heads; got 3; expected a multiple of kv_num_heads, 2"),
    ({"kv_num_heads": None}, NODE + "kv_num_heads; got nothing; expected a number of heads"),
    ({"scale": float("nan")}, NODE + "scale; got nan; expected 0 or more, finite"),
    ({"softcap": -1.0}, NODE + "softcap; got -1.0+; expected 0 or more, finite"),
    ({"scale": 1}, NODE + "scale; got an integer; expected a float"),
    ({"k_group_size": 48}, "node 'attention': k_group_size; got 48; expected a divisor of 64 .head_dim 64, padded"),
    (
        {"num_heads": 2},
        "node 'attention': last dimensions of query and key; got 256 and 128; expected num_heads",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ATTRIBUTES, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_bad_attribute_fails_when_the_session_is_made(changes: dict[str, Any], message: str) -> None:
    case = Case("attributes", SMALL)
    arrays = arrays_of(case)
    attributes = attributes_of(case.params, case.layouts) | changes
    attributes = {name: value for name, value in attributes.items() if value is not None}
    shapes = {name: list(arrays[name].shape) for name in ("query", "key")}
    with pytest.raises(Exception, match=message):
        session_of(arrays, attributes, shapes, log_severity_level=4)


def test_attributes_left_out_are_the_defaults() -> None:
    case = Case("defaults", LayerConfig(), head_dim=80, past_lengths=(300,))
    arrays = arrays_of(case)
    attributes = {"num_heads": 4, "kv_num_heads": 2, "layout_version": 1, "k_bits": 4, "v_bits": 2}
    assert_same(run(arrays, attributes), expected_of(case.params, case.layouts, arrays), case.tolerance)


# A cache that another node appends to.


@pytest.mark.parametrize("outputs", [["output"], ["output", "", ""]], ids=["one output", "empty names"])
@pytest.mark.parametrize("new_tokens", [1, 5, 40])
def test_a_node_without_presents_attends_and_appends_nothing(new_tokens: int, outputs: list[str]) -> None:
    case = Case("reads", SMALL, past_lengths=(200, 50), new_tokens=new_tokens, query_seqlens=(new_tokens, 1))
    arrays = arrays_of(case)
    session = session_without_presents(case, arrays, outputs)
    key, value = (aligned(arrays[f"past_{t}"])[0] for t in ("key", "value"))
    (got,) = session.run(None, arrays | {"past_key": key, "past_value": value})
    expected = expected_of(case.params, case.layouts, arrays)
    assert np.abs(got - expected[0]).max() <= case.tolerance * np.abs(expected[0]).max()
    assert np.array_equal(key, arrays["past_key"]) and np.array_equal(value, arrays["past_value"])


def test_one_of_the_presents_alone_is_refused() -> None:
    case = Case("one present", SMALL)
    arrays = arrays_of(case)
    session = session_without_presents(case, arrays, ["output", "present_key"])
    with pytest.raises(
        Exception, match=r"present_key and present_value; got the key's alone; expected both, or neither"
    ):
        session.run(None, arrays)


def session_without_presents(case: Case, arrays: Arrays, outputs: list[str]) -> ort.InferenceSession:
    model = onnx.load_model_from_string(model_of(arrays, attributes_of(case.params, case.layouts)))
    del model.graph.node[0].output[:]
    model.graph.node[0].output.extend(outputs)
    kept = [output for output in model.graph.output if output.name in outputs]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# What ONNX Runtime is told.


@pytest.mark.parametrize("packed", [False, True])
def test_shapes_are_inferred(packed: bool) -> None:
    case = Case("shapes", SMALL)
    arrays = arrays_of(case)
    if packed:
        pack(arrays)
    attributes = attributes_of(case.params, case.layouts)
    width = arrays["query"].shape[-1]
    caches: dict[str, list[Any]] = {"past_key": ["batch", 2, "rows", 48], "past_value": ["batch", 2, 9, 32]}
    shapes = {"query": ["batch", "tokens", width]} | caches
    outputs = session_of(arrays, attributes, shapes).get_outputs()
    assert [o.shape for o in outputs] == [["batch", "tokens", 256], *caches.values()]
    unknown = session_of(arrays, attributes, {"query": [None, None, width], "past_key": [None] * 4}).get_outputs()
    assert [o.shape for o in unknown[:2]] == [[], []]  # nothing is claimed of what is not known


def test_our_view_of_the_abi_equals_the_official_headers(tmp_path: Path) -> None:
    folders = [os.environ.get("SKV_ORT_HEADERS"), "/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    found = [f for f in folders if f and (Path(f) / "onnxruntime_c_api.h").is_file()]
    if not found:
        pytest.skip("no ONNX Runtime headers: set SKV_ORT_HEADERS to the folder of onnxruntime_c_api.h")
    source = Path(__file__).parents[2] / "skv_export" / "native" / "ort" / "abi_check.cc"

    def compiles(folder: Path, root: Path) -> str:
        command = ["c++", "-std=c++17", "-fsyntax-only", "-w", f"-I{found[0]}", f"-I{root}", str(folder / source.name)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    assert compiles(source.parent, source.parents[1]) == ""
    header = (source.parent / "abi.h").read_text()
    (tmp_path / source.name).write_text(source.read_text())
    (tmp_path / "ort").mkdir()
    (tmp_path / "ort" / "abi.h").write_text(header.replace("X(214, InvokeOp", "X(213, InvokeOp"))
    assert "InvokeOp: position" in compiles(tmp_path, tmp_path)  # the check can fail
