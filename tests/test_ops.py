"""The op in ONNX Runtime against the reference: bytes, attention, every way of calling it, every message."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from skv_export.cases import Case, attention_cases, make_inputs
from skv_export.layout import CacheLayout
from skv_export.library import library_path
from skv_export.recipe import LayerConfig
from skv_export.reference import AttentionParams, quantized_kv_attention

SMALL = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=32)
# The op's inputs in order; a gap is an input that must be absent.
INPUTS = (
    "query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache",
    "position_ids", "attention_bias", "head_sink", "", "", "q_norm_weight", "k_norm_weight", "query_seqlens",
)  # fmt: skip
OUTPUTS = ("output", "present_key", "present_value")
Arrays = dict[str, np.ndarray]


def attributes_of(params: AttentionParams, layouts: tuple[CacheLayout, CacheLayout]) -> dict[str, Any]:
    key, value = layouts
    return {
        "num_heads": params.num_heads,
        "kv_num_heads": params.kv_num_heads,
        "scale": params.scale,
        "softcap": params.softcap,
        "local_window_size": params.local_window_size or -1,
        "do_rotary": int(params.do_rotary),
        "rotary_interleaved": int(params.rotary_interleaved),
        "qk_norm_epsilon": params.qk_norm_epsilon,
        "layout_version": 1,
        **{f"{t}_{name}": getattr(layout, name)
           for t, layout in (("k", key), ("v", value))
           for name in ("bits", "group_size", "granularity", "rotation")},
        **{name: getattr(key, name) for name in ("num_sink_tokens", "recent_tokens", "tile_tokens", "recent_type")},
    }  # fmt: skip


def model_of(arrays: Arrays, attributes: Mapping[str, Any]) -> bytes:
    """A model of one node whose inputs are the arrays, with every dimension dynamic but the last."""
    infos = []
    for name, array in arrays.items():
        shape: list[int | str] = [f"{name}_{i}" for i in range(array.ndim)]
        if name in ("query", "key", "value"):
            shape[-1] = array.shape[-1]
        infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
    names = [name if name in arrays else "" for name in INPUTS]
    while not names[-1]:
        names.pop()
    node = helper.make_node("QuantizedKVAttention", names, OUTPUTS, "attention", domain="skv", **attributes)
    dtype = helper.np_dtype_to_tensor_dtype(arrays["query"].dtype)
    types = (dtype, TensorProto.UINT8, TensorProto.UINT8)
    outputs = [helper.make_tensor_value_info(name, t, None) for name, t in zip(OUTPUTS, types, strict=True)]
    graph = helper.make_graph([node], "one_node", infos, outputs)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("skv", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return model


def session_of(arrays: Arrays, attributes: Mapping[str, Any], **options: Any) -> ort.InferenceSession:
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = 2
    session_options.log_severity_level = 3
    for name, value in options.items():
        setattr(session_options, name, value)
    session_options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model_of(arrays, attributes), session_options, providers=["CPUExecutionProvider"])


def run(arrays: Arrays, attributes: Mapping[str, Any], **options: Any) -> list[np.ndarray]:
    outputs: list[np.ndarray] = session_of(arrays, attributes, **options).run(None, arrays)
    return outputs


def arrays_of(case: Case) -> Arrays:
    inputs = make_inputs(case)
    arrays = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    floats = ("query", "key", "value", "head_sink")
    arrays = {k: v.astype(case.dtype) if k in floats else v for k, v in arrays.items() if v is not None}
    return arrays | {"total_sequence_length": np.array(max(case.total_lengths), np.int32)}


def expected_of(params: AttentionParams, layouts: tuple[CacheLayout, CacheLayout], arrays: Arrays) -> list[np.ndarray]:
    floats = {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in arrays.items()}
    del floats["total_sequence_length"]
    return list(quantized_kv_attention(params, layouts, **({"key": None, "value": None} | floats)))


def assert_same(got: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    assert np.abs(got[0].astype(np.float32) - expected[0]).max() <= tolerance * np.abs(expected[0]).max()
    for name, cache, reference in zip(OUTPUTS[1:], got[1:], expected[1:], strict=True):
        assert np.array_equal(cache, reference), f"{name}: {np.count_nonzero(cache != reference)} bytes differ"


@pytest.mark.parametrize("case", attention_cases(), ids=lambda c: c.name)
def test_case_equals_the_reference(case: Case) -> None:
    arrays = arrays_of(case)
    got = run(arrays, attributes_of(case.params, case.layouts))
    assert got[0].dtype == case.dtype
    assert_same(got, expected_of(case.params, case.layouts, arrays), case.tolerance)
