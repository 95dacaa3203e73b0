"""Models of one node, the op's inputs as arrays, and their comparison with the reference."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from skv_export.native.library import library_path
from skv_export.spec.conformance import Case, make_inputs
from skv_export.spec.key_basis import INPUTS, MATRICES, KeyBasis
from skv_export.spec.layout import CacheLayout
from skv_export.spec.op import OUTPUT_NAMES, AttentionParams, attention_node, one_node_model
from skv_export.spec.reference import quantized_kv_attention

PROVIDERS = [os.environ.get("SKV_TEST_PROVIDER", "CPUExecutionProvider")]
Arrays = dict[str, Any]  # numpy arrays by input


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
           for name in ("bits", "group_size", "granularity", "rotation", "parameter_bits")},
        **{name: getattr(key, name) for name in ("num_sink_tokens", "recent_tokens", "tile_tokens", "recent_type")},
    }  # fmt: skip


def model_of(arrays: Arrays, attributes: Mapping[str, Any], shapes: Mapping[str, list[Any]] | None = None) -> bytes:
    """A model of one node whose inputs are the arrays; dimensions are dynamic where ``shapes`` does not say more."""
    specs = {}
    for name, array in arrays.items():
        specs[name] = array.dtype, (shapes or {}).get(name, [f"{name}_{i}" for i in range(array.ndim)])
    return one_node_model(attention_node(list(arrays), attributes), specs)


def session_of(
    arrays: Arrays, attributes: Mapping[str, Any], shapes: Mapping[str, list[Any]] | None = None, **options: Any
) -> ort.InferenceSession:
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = 2
    session_options.log_severity_level = 3
    for name, value in options.items():
        setattr(session_options, name, value)
    session_options.register_custom_ops_library(str(library_path()))
    model = model_of(arrays, attributes, shapes)
    return ort.InferenceSession(model, session_options, providers=PROVIDERS)


def run(arrays: Arrays, attributes: Mapping[str, Any], **options: Any) -> list[np.ndarray]:
    outputs: list[np.ndarray] = session_of(arrays, attributes, **options).run(None, arrays)
    return outputs


def arrays_of(case: Case) -> Arrays:
    inputs = make_inputs(case)
    arrays = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    basis = arrays.pop("key_basis")
    if basis is not None:
        arrays |= {name: getattr(basis, field) for name, field in zip(INPUTS, MATRICES, strict=True)}
    floats = ("query", "key", "value", "head_sink")
    arrays = {k: v.astype(case.dtype) if k in floats else v for k, v in arrays.items() if v is not None}
    return arrays | {"total_sequence_length": np.array(max(case.total_lengths), np.int32)}


def expected_of(params: AttentionParams, layouts: tuple[CacheLayout, CacheLayout], arrays: Arrays) -> list[np.ndarray]:
    floats = {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in arrays.items()}
    del floats["total_sequence_length"]
    matrices = [floats.pop(name) for name in INPUTS if name in floats]
    floats["key_basis"] = KeyBasis(*matrices) if matrices else None
    return list(quantized_kv_attention(params, layouts, **({"key": None, "value": None} | floats)))


def assert_same(got: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    assert np.abs(got[0].astype(np.float32) - expected[0]).max() <= tolerance * np.abs(expected[0]).max()
    for name, cache, reference in zip(OUTPUT_NAMES[1:], got[1:], expected[1:], strict=True):
        assert np.array_equal(cache, reference), f"{name}: {np.count_nonzero(cache != reference)} bytes differ"
