"""The op under ONNX Runtime's CUDA provider, over runtime_shim.cc: memory, order, graphs, where an export's nodes go.

Run by test_provider.py with its libraries in place. A device read or written by the host ends the process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from builds import PIECE
from op_nodes import PROVIDERS, arrays_of, attributes_of, model_of, session_of
from tiny_graph import addresses
from tiny_models import TINY

from skv_export.cli.doctor import diagnose
from skv_export.export.pipeline import export_model
from skv_export.model_folder.names import ATTENTION_MASK, MODEL_FILE
from skv_export.native.library import library_path, load_library
from skv_export.runtime.session import Session
from skv_export.spec.conformance import Case
from skv_export.spec.op import OP_NAME, OUTPUT_NAMES
from skv_export.spec.recipe import LayerConfig, Recipe
from skv_export.spec.reference import quantized_kv_attention

SMALL = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
STEPS = 40  # a tile and more
SHIM_ARCHITECTURE = 80
# What may run on the CPU: arithmetic on shapes, which are there.
SHAPE_OPS = {"Cast", "Concat", "Reshape", "Squeeze", "Sub"}


@pytest.fixture(scope="module")
def shim() -> Any:
    """The runtime's own counters."""
    library = ctypes.CDLL("libcudart.so.13")
    library.skv_shim_replays.restype = library.skv_shim_launches.restype = ctypes.c_int64
    return library


def on_device(array: np.ndarray) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0)


def decode(case: Case, provider_options: dict[str, str]) -> None:
    """Decodes with one buffer for past and present, from inputs that stand in place, against the reference."""
    arrays = arrays_of(case)
    layout = case.layouts[0]
    most = layout.capacity(int(np.prod(arrays["past_key"].shape[2:])))
    assert most is not None and most >= case.past_lengths[0] + STEPS
    arrays["total_sequence_length"] = np.array(most, np.int32)  # a bound: the sequence's own length is seqlens_k's
    shapes = {name: ["batch", "tokens", arrays[name].shape[2]] for name in ("query", "key", "value")}  # as exports do
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(
        model_of(arrays, attributes_of(case.params, case.layouts), shapes),
        options,
        providers=[(PROVIDERS[0], provider_options)],
    )
    past = {"past_key": arrays["past_key"], "past_value": arrays["past_value"]}
    held = {name: on_device(x) for name, x in arrays.items() if name != "total_sequence_length"}
    output = on_device(np.zeros_like(arrays["query"]))
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_cpu_input("total_sequence_length", arrays["total_sequence_length"])
    for name, value in zip(OUTPUT_NAMES, (output, held["past_key"], held["past_value"]), strict=True):
        binding.bind_ortvalue_output(name, value)

    rng = np.random.default_rng(0)
    for step in range(STEPS):
        new = {name: rng.standard_normal(arrays[name].shape).astype(case.dtype) for name in ("query", "key", "value")}
        new["seqlens_k"] = np.array([length + step for length in case.past_lengths], np.int32)
        for name, x in new.items():
            held[name].update_inplace(x)
        session.run_with_iobinding(binding)
        floats = {name: x.astype(np.float32) if x.dtype == np.float16 else x for name, x in new.items()}
        expected, *presents = quantized_kv_attention(case.params, case.layouts, **floats, **past)
        past = dict(zip(past, presents, strict=True))
        difference = np.abs(output.numpy().astype(np.float32) - expected).max()
        assert difference <= case.tolerance * np.abs(expected).max(), step
    for name, expected_bytes in past.items():
        assert np.array_equal(held[name].numpy(), expected_bytes)


CASES = [
    Case("two sequences", SMALL, past_lengths=(70, 3), dtype="float16"),
    Case("K8V8, per token", dataclasses.replace(SMALL, k_bits=8, v_bits=8, k_granularity="token"), dtype="float16"),
    Case("K2V4, sixteen columns", dataclasses.replace(SMALL, k_bits=2, v_bits=4), 64, 12, 1, (70,), dtype="float16"),
    Case("a flush in the first step, which a capture runs three times", SMALL, past_lengths=(67,), dtype="float16"),
    Case("decode_simple", dataclasses.replace(SMALL, k_bits=5), past_lengths=(66,)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decoding_in_place(case: Case, shim: Any) -> None:
    before = shim.skv_shim_launches()
    decode(case, {})
    assert shim.skv_shim_launches() - before == 2 * STEPS, "the CPU's kernel ran, or a launch more"
    heads = case.num_heads, case.kv_num_heads
    path = load_library().cuda_path(case.layouts, *heads, "fp16", architecture=SHIM_ARCHITECTURE)
    if os.environ.get("SKV_NVRTC") or (case.config.k_bits, case.config.v_bits) == (4, 2):  # those are built in
        assert path.startswith("decode_simple" if case.config.k_bits == 5 else "decode_mma")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decoding_as_a_cuda_graph(case: Case, shim: Any) -> None:
    """Captured once; every later step is the same launches, with what stands in the bound buffers then."""
    before = shim.skv_shim_replays()
    decode(case, {"enable_cuda_graph": "1"})
    assert shim.skv_shim_replays() - before >= STEPS - 2


def test_doctor_says_where_kernels_come_from(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an architecture it compiles into the cache folder first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = Recipe(dataclasses.replace(SMALL, k_bits=8, v_bits=4), dtype="fp16")
    out = export_model(tiny_checkpoint("qwen3"), out=tmp_path / "model", recipe=recipe, progress=lambda *_: None)

    def said(*architectures: int) -> list[str]:
        return [x.found for x in diagnose(out, architectures).checks if x.name == "decoding on a GPU"]

    (found,) = said()
    assert found.startswith("decode_mma K8V4 D64, keys channel, values token: ")
    if os.environ.get("SKV_NVRTC"):
        assert "compiled when a session is made, by NVRTC" in found
        (found,) = said(SHIM_ARCHITECTURE)
        assert f"from {tmp_path}" in found and "K8V4-D64-channel-token-sm_80-" in found
        assert said() == [found]  # the device's


@pytest.mark.parametrize(
    ("arch", "dtype"), [*((arch, "bf16") for arch in TINY), ("llama", "fp16"), ("gpt_oss", "fp16"), ("llama", "fp32")]
)
def test_all_but_shapes_run_on_the_gpu(
    arch: str, dtype: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """No node falls back to the CPU, where every layer would wait for copies."""
    out = export_model(
        tiny_checkpoint(arch), out=tmp_path / "model", recipe=Recipe(dtype=dtype), progress=lambda *_: None
    )
    assigned: dict[str, Counter[str]] = {}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(str(out / MODEL_FILE), options, providers=[*PROVIDERS, "CPUExecutionProvider"])
    nodes = onnx.load(out / MODEL_FILE, load_external_data=False).graph.node
    shapes = {node.output[0] for node in nodes if node.op_type == "Shape"}
    sizes = {node.name for node in nodes if node.op_type == "Gather" and node.input[0] in shapes}
    for part in session.get_provider_graph_assignment_info():
        counted = (node.op_type for node in part.get_nodes() if node.name not in sizes)
        assigned.setdefault(part.ep_name, Counter()).update(counted)
    assert set(assigned["CPUExecutionProvider"]) <= SHAPE_OPS
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = Session(out, execution_provider="cuda").config
    assert assigned[PROVIDERS[0]][OP_NAME] == sum(node.op_type == OP_NAME for node in nodes)
    slow = [str(warning.message) for warning in said if warning.category is RuntimeWarning]
    head_dim = config.layers[0].key.head_dim
    if dtype == "fp32" or head_dim % 64:
        assert len(slow) == 1 and "takes decode_simple: " in slow[0]
    else:
        assert not slow


def test_a_device_without_code_is_an_error_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = arrays_of(CASES[0])
    session_of(arrays, attributes_of(CASES[0].params, CASES[0].layouts))
    monkeypatch.setenv("SKV_SHIM_NO_CODE", "1")
    with pytest.raises(Exception, match=r"got compute capability 8\.0; expected one that this build has code for"):
        session_of(arrays, attributes_of(CASES[0].params, CASES[0].layouts))


def memory(shim: Any, device: int) -> tuple[int, int]:
    """Most bytes of a device that were taken at once since the last call, and those taken now."""
    both = (ctypes.c_int64 * 2)()
    shim.skv_shim_memory(device, both)
    return both[0], both[1]


@pytest.mark.parametrize(("cuda_graph", "device"), [(False, 1), (True, 0), (True, 1)])
def test_a_whole_model_on_a_gpu(
    cuda_graph: bool,
    device: int,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    shim: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompt, decoding, rewind and reorder with caches on the device; only the op computes: logits say nothing."""
    other = memory(shim, 1 - device)[1]
    monkeypatch.setenv("SKV_SHIM_SKIP", "1")
    recipe = Recipe(dtype="fp16")
    out = export_model(tiny_checkpoint("qwen3"), out=tmp_path / "model", recipe=recipe, progress=lambda *_: None)
    session = Session(out, execution_provider=f"cuda:{device}", cuda_graph=cuda_graph)
    cache = session.cache(2, 300)
    launches, replays, pointers = shim.skv_shim_launches(), shim.skv_shim_replays(), addresses(cache)
    session.run(np.ones((2, 100), np.int64), None, None, cache)
    columns: list[int] = []
    real = session.library.set_column
    monkeypatch.setattr(session.library, "set_column", lambda *given: [columns.append(1), real(*given)])
    for _ in range(STEPS):
        session.run(np.ones((2, 1), np.int64), None, None, cache)
    if cuda_graph:
        assert shim.skv_shim_replays() - replays == STEPS
        mask = session.graph.captured[cache]._inputs[ATTENTION_MASK]
        assert len(columns) == STEPS - 1, "the mask is made and copied whole"
        assert mask.numpy().sum(axis=1).tolist() == [140, 140] and set(np.unique(mask.numpy())) == {0, 1}
        session.append([[1], []], cache)
        assert mask.numpy().sum(axis=1).tolist() == [141, 140] and mask.numpy()[:, -1].tolist() == [1, 0]
        session.run(np.ones((2, 1), np.int64), None, None, cache)
        session.run(np.ones((2, 1), np.int64), None, None, cache)
        assert mask.numpy().sum(axis=1).tolist() == [143, 142] and mask.numpy()[:, -1].tolist() == [1, 1]
        assert len(columns) == STEPS
        cache.rewind([140, 140])
    else:
        assert shim.skv_shim_launches() - launches >= 2 * STEPS * len(session.config.layers)
    assert cache.lengths.tolist() == [140, 140] and addresses(cache) == pointers
    cache.rewind([139, 120])
    cache.reorder([1, 1])
    assert cache.lengths.tolist() == [120, 120]
    assert np.array_equal(*cache.data(0, "key"))
    assert memory(shim, device)[0] > cache.nbytes and memory(shim, 1 - device) == (other, other)


@pytest.mark.parametrize("prepared", [False, True])
def test_the_memory_of_a_prompt(prepared: bool, shim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/gpu.md's formula: the rows of one sequence, and what a piece takes; nothing that grows with the batch."""
    monkeypatch.setenv("SKV_SHIM_SKIP", "1")
    batch, tokens, heads, kv_heads, head_dim = 3, 1000, 4, 2, 64
    case = Case("memory", SMALL, head_dim, heads, kv_heads, (0,) * batch, tokens, dtype="float16", spare_tokens=200)
    arrays = arrays_of(case)
    params = dataclasses.replace(case.params, do_rotary=prepared)
    if prepared:
        arrays["cos_cache"] = arrays["sin_cache"] = np.ones((2000, head_dim // 2), np.float16)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(
        model_of(arrays, attributes_of(params, case.layouts)),
        options,
        providers=[(PROVIDERS[0], {"arena_extend_strategy": "kSameAsRequested"})],
    )
    binding = session.io_binding()
    held = {name: on_device(x) for name, x in arrays.items() if name != "total_sequence_length"}
    output = on_device(np.zeros_like(arrays["query"]))
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_cpu_input("total_sequence_length", arrays["total_sequence_length"])
    for name, value in zip(OUTPUT_NAMES, (output, held["past_key"], held["past_value"]), strict=True):
        binding.bind_ortvalue_output(name, value)
    before = memory(shim, 0)[1]
    session.run_with_iobinding(binding)
    peak = memory(shim, 0)[0] - before
    row = (heads + 2 * kv_heads) * head_dim
    expected = 4 * kv_heads * head_dim * (tokens + PIECE) + (6 if prepared else 2) * PIECE * row
    # Beside it: lengths, masks of what is not a number, and what GroupQueryAttention takes for a piece.
    own = batch * (tokens * (heads + 2 * kv_heads) // 8 + 12 * (tokens // PIECE + 1))
    assert expected < peak < expected + own + 16 * PIECE * heads * head_dim + 40_000, (peak, expected)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_compacted_cache_on_the_gpu(
    cuda_graph: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path, shim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries come from the device, smaller buffers stand there, and steps are captured anew; the op alone computes."""
    monkeypatch.setenv("SKV_SHIM_SKIP", "1")
    recipe = Recipe(dtype="fp16")
    out = export_model(tiny_checkpoint("qwen3"), out=tmp_path / "model", recipe=recipe, progress=lambda *_: None)
    session = Session(out, execution_provider="cuda", cuda_graph=cuda_graph, score_window=32)
    cache = session.cache(1, 450)
    session.run(np.ones((1, 400), np.int64), None, None, cache)
    session.run(np.ones((1, 1), np.int64), None, None, cache)
    assert [x.shape for x in cache.queries.last(0, 32)] == [(32, session.graph.queries[0].width)] * len(cache.layers)
    before, pointers, size = cache.load(0, (1, "value")), addresses(cache), cache.nbytes
    session.compact(cache, keep=250)
    assert (cache.held.tolist(), cache.dropped.tolist()) == ([209], [192])
    assert cache.nbytes < size and addresses(cache) != pointers
    after = cache.load(0, (1, "value"))
    same = functools.partial(np.array_equal, equal_nan=True)  # what the kernels that do nothing have left
    assert same(after[:, :4], before[:, :4]) and same(after[:, -141:], before[:, -141:])
    replays, pointers = shim.skv_shim_replays(), addresses(cache)
    for _ in range(STEPS):
        session.run(np.ones((1, 1), np.int64), None, None, cache)
    assert shim.skv_shim_replays() - replays == (STEPS if cuda_graph else 0)
    assert cache.lengths.tolist() == [401 + STEPS] and addresses(cache) == pointers
