"""The op's CUDA side in ONNX Runtime against the reference; run by test_checks.py with its library in place."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from op_nodes import PROVIDERS, attributes_of, session_of
from tiny_graph import Tiny

from skv_export.cli.doctor import diagnose
from skv_export.errors import SkvError
from skv_export.model_folder.skv_config import LayerCache
from skv_export.native.library import load_library
from skv_export.runtime.cache import Cache
from skv_export.spec.conformance import Case, expected_of, make_inputs, not_a_number_cases, op_cases, output_error
from skv_export.spec.key_basis import INPUTS, MATRICES, KeyBasis
from skv_export.spec.layout import CacheLayout
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import append, load, quantized_kv_attention, rewind
from skv_export.verification.op_level import check_op

SMALL = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
NAMES = (
    "default",
    "ragged chunks",
    "one sequence idle",
    "head sink",
    "float16, chunk",
    "softcap",
    "byte channels, both",
    "token_channel, both",
    "token_channel, ragged batch",
    "calibrated, both",
    "calibrated, chunk over three tiles",
    *(PROMPTS := ("chunk over three tiles", "ragged prompts", "sliding window, prompt", "prompt in one call")),
)
GQA = "GroupQueryAttention of ONNX Runtime"


def arrays_of(case: Case) -> dict[str, np.ndarray]:
    inputs = make_inputs(case)
    arrays = {name: getattr(inputs, name) for name in ("query", "key", "value", "past_key", "past_value", "seqlens_k")}
    arrays["total_sequence_length"] = np.array([max(case.total_lengths)], np.int32)
    for name in ("head_sink", "query_seqlens"):
        if getattr(inputs, name) is not None:
            arrays[name] = getattr(inputs, name)
    if inputs.key_basis is not None:
        arrays |= {name: getattr(inputs.key_basis, field) for name, field in zip(INPUTS, MATRICES, strict=True)}
    typed = ("query", "key", "value", "head_sink")
    return {name: x.astype(case.dtype) if name in typed else x for name, x in arrays.items()}


def run(
    case: Case, arrays: dict[str, np.ndarray], **changes: object
) -> tuple[list[np.ndarray], tuple[np.ndarray, ...]]:
    params = dataclasses.replace(case.params, **changes)  # type: ignore[arg-type]
    outputs = session_of(arrays, attributes_of(params, case.layouts)).run(None, arrays)
    floats = {name: x.astype(np.float32) if x.dtype == np.float16 else x for name, x in arrays.items()}
    del floats["total_sequence_length"]
    if INPUTS[0] in floats:
        floats["key_basis"] = KeyBasis(*(floats.pop(name) for name in INPUTS))  # type: ignore[assignment]
    return outputs, quantized_kv_attention(params, case.layouts, **floats)  # type: ignore[arg-type]


def compare(case: Case, outputs: list[Any], expected: tuple[np.ndarray, ...]) -> None:
    assert np.array_equal(outputs[1], expected[1]) and np.array_equal(outputs[2], expected[2])
    if outputs[0] is None:
        return
    largest = np.abs(expected[0]).max()
    assert np.abs(outputs[0].astype(np.float32) - expected[0]).max() <= case.tolerance * largest


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_cases(name: str, dtype: str) -> None:
    cases = op_cases()
    case = dataclasses.replace(next(c for c in cases if c.name == name), dtype=dtype)
    compare(case, *run(case, arrays_of(case)))


@pytest.mark.parametrize("compute_capability", [8, 9])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_go_through_onnxruntimes_attention(
    name: str,
    packed: bool,
    compute_capability: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the CPU provider its results; the CUDA provider's kernels don't run here, but are seen to be launched: on
    Hopper, too, where cuDNN's attention would take what has no window.
    """
    on_gpu = PROVIDERS[0] == "CUDAExecutionProvider"
    monkeypatch.setenv("SKV_SHIM_SKIP", "1")
    monkeypatch.setenv("SKV_SHIM_MAJOR", str(compute_capability))
    case = dataclasses.replace(next(c for c in op_cases() if c.name == name), dtype="float16")
    arrays = arrays_of(case)
    if packed:
        parts = [arrays.pop(part) for part in ("query", "key", "value")]
        arrays = {"query": np.concatenate(parts, -1), **arrays}
    session = session_of(arrays, attributes_of(case.params, case.layouts), log_severity_level=1)
    outputs = session.run(None, arrays)
    said = capfd.readouterr().err
    assert GQA in said and "GroupQueryAttention says" not in said
    if on_gpu:
        # Its kernel's causal and local template arguments.
        found = re.search(r"flash_fwd\w*kernel\w*?EEEELb([01])ELb([01])", said)
        assert found, said
        causal, local = map(int, found.groups())
        assert local == (case.local_window_size > 0 or compute_capability == 9) and causal != local
        outputs[0] = None
    compare(case, outputs, run(case, arrays_of(case))[1])


@pytest.mark.skipif(PROVIDERS[0] == "CUDAExecutionProvider", reason="ONNX Runtime's own kernels don't run here")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", [c for c in not_a_number_cases() if c.new_tokens >= 64], ids=lambda c: c.name)
def test_what_is_not_a_number_in_a_prompt(case: Case, packed: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Through ONNX Runtime's attention, in pieces: into all outputs that see it, and no others."""
    case = dataclasses.replace(case, dtype="float16", new_tokens=150, query_seqlens=(150, 90))
    case = dataclasses.replace(case, not_numbers=(*case.not_numbers, ("key", 1, 80, 30), ("value", 0, 100, 3)))
    arrays = arrays_of(case)
    given = dict(arrays)
    if packed:
        parts = [given.pop(part) for part in ("query", "key", "value")]
        given = {"query": np.concatenate(parts, -1), **given}
    outputs = session_of(given, attributes_of(case.params, case.layouts), log_severity_level=1).run(None, given)
    assert GQA in capfd.readouterr().err
    want = expected_of(case, make_inputs(case))
    assert output_error(outputs[0].astype(np.float32), want[0]) <= case.tolerance
    assert all(map(np.array_equal, outputs[1:], want[1:]))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "tokens"), [("float32", 2), ("float16", 2), ("float16", 90)])
def test_rotary_and_norms(
    dtype: str, tokens: int, packed: bool, interleaved: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"rotary {packed} {interleaved}"
    case = Case(name, SMALL, past_lengths=(67, 3), new_tokens=tokens, dtype=dtype, spare_tokens=100)
    arrays = arrays_of(case)
    rng = np.random.default_rng(0)
    angles = np.arange(200)[:, None] / 100 ** (np.arange(24) / 24)
    arrays["cos_cache"], arrays["sin_cache"] = (f(angles).astype(dtype) for f in (np.cos, np.sin))
    arrays["q_norm_weight"], arrays["k_norm_weight"] = rng.standard_normal((2, 64)).astype(dtype)
    if packed:
        parts = [arrays.pop(name) for name in ("query", "key", "value")]
        arrays = {"query": np.concatenate(parts, -1), **arrays}
        floats = {**arrays, "key": None, "value": None}
    else:
        floats = arrays
    params = dataclasses.replace(case.params, do_rotary=True, rotary_interleaved=interleaved)
    outputs = session_of(arrays, attributes_of(params, case.layouts), log_severity_level=1).run(None, arrays)
    said = capfd.readouterr().err
    assert (GQA in said or "GroupQueryAttention says" in said) == (tokens == 90)
    del floats["total_sequence_length"]
    floats = {
        name: x.astype(np.float32) if x is not None and x.dtype == np.float16 else x for name, x in floats.items()
    }
    compare(case, outputs, quantized_kv_attention(params, case.layouts, **floats))  # type: ignore[arg-type]


def test_a_length_beyond_the_capacity_is_an_error() -> None:
    case = Case("beyond", SMALL)
    arrays = arrays_of(case)
    arrays["total_sequence_length"] = np.array([10**6], np.int32)
    with pytest.raises(Exception, match="capacity of"):
        session_of(arrays, attributes_of(case.params, case.layouts)).run(None, arrays)


@pytest.mark.parametrize(
    ("dtype", "k_bits", "tokens", "expected"),
    [
        ("fp16", 4, 1, "decode_mma K4V2 D64, keys channel, values token"),
        ("bf16", 4, 1, "decode_mma K4V2 D64, keys channel, values token"),
        ("bf16", 4, 40, "prefill D64"),
        ("fp16", 5, 1, "decode_simple: bits are not 2, 3, 4 or 8"),
        ("fp32", 4, 1, "decode_simple: float32 inputs"),
    ],
)
def test_kernels_that_a_model_takes(dtype: str, k_bits: int, tokens: int, expected: str) -> None:
    layouts = CacheLayout.pair(dataclasses.replace(SMALL, k_bits=k_bits), 64)
    assert load_library().cuda_path(layouts, 4, 2, dtype, tokens) == expected


def test_doctor_names_the_kernels_of_a_model(tmp_path: Path) -> None:
    found = diagnose(Tiny(dataclasses.replace(SMALL, k_bits=5)).write(tmp_path)).table()
    assert re.search(r"decoding on a GPU +decode_simple: float32 inputs: 2 of 2 layers\n +Without tensor cores", found)


def test_a_model_without_kernels_is_an_error() -> None:
    with pytest.raises(SkvError, match="CUDA kernels: not for this model; got key cache: head_dim; got 512"):
        load_library().cuda_path(CacheLayout.pair(SMALL, 512), 4, 2, "fp16")


@pytest.mark.skipif(PROVIDERS[0] == "CPUExecutionProvider", reason="verify asks for the CUDA provider")
def test_verify_of_the_op_on_a_gpu() -> None:
    chosen = [case for case in op_cases() if case.name in NAMES]
    result = check_op(chosen, execution_provider="cuda")
    assert result.failures == () and result.cases > len(chosen)
    assert result.rows()[0].endswith("cases, by ONNX Runtime on cuda: bytes equal")


def test_rewind_of_a_cache_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache.rewind by addresses of the device; without a CUDA provider they are the host's."""
    if PROVIDERS[0] == "CPUExecutionProvider":
        on_host = ort.OrtValue.ortvalue_from_shape_and_type
        monkeypatch.setattr(
            ort.OrtValue, "ortvalue_from_shape_and_type", lambda shape, dtype, *_: on_host(shape, dtype)
        )
    unbound = SimpleNamespace(bind_input=lambda *_: None, bind_output=lambda *_: None)
    both = dataclasses.replace(SMALL, k_granularity="token_channel", v_granularity="token_channel")
    layers = [LayerCache(4, 2, 0, *CacheLayout.pair(config, 64)) for config in (SMALL, both)]
    library = load_library()
    monkeypatch.setattr(library._c, "skv_rewind", None)  # it must not be asked
    session = SimpleNamespace(io_binding=lambda: unbound)
    cache = Cache(session, layers, 3, 300, "cuda", library)
    held = 210, 100, 150
    cache.advance([[0] * length for length in held])
    expected = {}
    rng = np.random.default_rng(0)
    for (name, (layout, buffer)), seed in zip(cache._tensors.items(), range(4), strict=True):
        array = np.full(buffer.shape(), 0xFF, np.uint8)
        for b, length in enumerate(held):
            append(layout, array[b].reshape(2, -1), 0, rng.standard_normal((2, length, 64)).astype(np.float32) + seed)
        buffer.update_inplace(array)
        rewind(layout, array[0].reshape(2, -1), 210, 180)
        rewind(layout, array[2].reshape(2, -1), 150, 149)
        expected[name] = array
    with pytest.raises(SkvError, match="rewind of sequence 1"):
        cache.rewind([180, 10, 149])
    cache.rewind([180, 100, 149])
    for name, array in expected.items():
        assert np.array_equal(cache.data(*name), array)
    assert cache.lengths.tolist() == [180, 100, 149]
    cache.restore(1, [cache.state(0)])
    assert cache.lengths.tolist() == [180, 180, 149]
    for layout, buffer in cache._tensors.values():
        blocks = buffer.numpy().reshape(3, 2, -1)
        assert np.array_equal(*(load(layout, block, 180)[0] for block in blocks[:2]))
