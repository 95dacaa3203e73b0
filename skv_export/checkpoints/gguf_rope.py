"""RoPE of a GGUF file as transformers' ``rope_parameters``: llama.cpp's frequencies in transformers' terms.

Frequency i of a head with ``n`` rotated channels is ``base ** (-2i / n)``, divided by the factor of a linear scaling,
corrected by YaRN, and divided by the file's tensor of factors (``rope_freqs``, or the short and long ones).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from skv_export.errors import SkvError

FACTOR_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are no weights but divisors of the frequencies."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1, 3.2 and 3.3 has beside its factor."""
_YARN_USUAL = {
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}
"""YaRN's own constants; llama.cpp has keys for others and does not use them for every architecture."""

Factors = npt.NDArray[np.float32]


def rope_parameters(
    get: Callable[..., Any], factors: Mapping[str, Factors], *, head_dim: int, context: int, partial: bool
) -> dict[str, Any]:
    """Returns the parameters for a model whose layers all turn their heads alike.

    Args:
        get: ``get(key, default)``: a metadata key of the architecture.
        factors: The file's tensors of ``FACTOR_TENSORS``.
        head_dim: Channels of a head.
        context: Longest context.
        partial: Whether the model's class can turn a part of each head, its first channels.

    Raises:
        SkvError: The file asks for frequencies that transformers' RoPE can't express.
    """
    theta = float(get("rope.freq_base", 10000.0))
    rotated = int(get("rope.dimension_count", head_dim))
    scaling = _scaling(get, context)
    if not 0 < rotated <= head_dim or rotated % 2:
        raise SkvError("rope.dimension_count", got=rotated, expected=f"an even number up to head_dim {head_dim}")
    part: dict[str, Any] = {}
    if rotated < head_dim:
        part = {"partial_rotary_factor": rotated / head_dim}
        if not partial:
            raise SkvError(
                "rope.dimension_count: a part of each head is turned, which transformers' model does not do",
                got=rotated,
                expected=f"head_dim {head_dim}",
            )
    if "rope_freqs.weight" in factors:
        return {**_divided(factors, scaling, theta, rotated, context), **part}
    if factors:
        return {**_longrope(get, factors, scaling, theta, rotated), **part}
    return {"rope_type": "default", "rope_theta": theta, **scaling, **part}


def _scaling(get: Callable[..., Any], context: int) -> dict[str, Any]:
    """Returns the scaling that the metadata names, or nothing if the frequencies are plain."""
    factor = float(get("rope.scaling.factor", get("rope.scale_linear", 0.0)) or 0.0)
    kind = str(get("rope.scaling.type", "linear"))
    original = int(get("rope.scaling.original_context_length", context))
    if kind in ("none", "longrope") or (kind == "linear" and factor in (0.0, 1.0)):
        return {}  # longrope's factors are tensors
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or factor <= 0:
        raise SkvError("rope.scaling", got=f"type {kind!r}, factor {factor}", expected="none, linear, yarn or longrope")
    for key, usual in _YARN_USUAL.items():
        if (value := float(get(key, usual))) != usual:
            raise SkvError(f"{key}: readers of this file do not agree on what it does", got=value, expected=usual)
    magnitude = float(get("rope.scaling.attn_factor", 1.0)) * float(get("rope.scaling.yarn_attn_factor", 1.0))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": magnitude * (1.0 + 0.1 * math.log(max(factor, 1.0))),
    }


def _divided(
    factors: Mapping[str, Factors], scaling: Mapping[str, Any], theta: float, rotated: int, context: int
) -> dict[str, Any]:
    """Returns the parameters of frequencies that ``rope_freqs`` divides: Llama 3's rule, or the very numbers."""
    if len(factors) > 1 or scaling.get("rope_type") == "yarn":
        raise SkvError("two scalings of RoPE at once", got=f"{', '.join(factors)} and {scaling or 'no other'}")
    values = _checked(factors, rotated)["rope_freqs.weight"] * scaling.get("factor", 1.0)
    plain = {"rope_type": "llama3", "rope_theta": theta, "factor": float(f"{values.max():.6g}"), **_LLAMA3}
    if np.allclose(_llama3_factors(plain, rotated), values, rtol=1e-5, atol=0):
        return plain
    return _factor_lists(theta, values, values) | {"original_max_position_embeddings": context, "attention_factor": 1.0}


def _longrope(
    get: Callable[..., Any], factors: Mapping[str, Factors], scaling: Mapping[str, Any], theta: float, rotated: int
) -> dict[str, Any]:
    original = int(get("rope.scaling.original_context_length", 0))
    if set(factors) != set(FACTOR_TENSORS[1:]) or scaling or original <= 0:
        raise SkvError(
            "longrope",
            got=f"{', '.join(factors)}, {scaling or 'no other scaling'}, original_context_length {original}",
            expected=f"{' and '.join(FACTOR_TENSORS[1:])}, no other scaling, and the original length",
        )
    long, short = (_checked(factors, rotated)[name] for name in FACTOR_TENSORS[1:])
    magnitude = float(get("rope.scaling.attn_factor", 1.0))
    return _factor_lists(theta, short, long) | {
        "original_max_position_embeddings": original,
        "attention_factor": magnitude,
    }


def _checked(factors: Mapping[str, Factors], rotated: int) -> dict[str, npt.NDArray[np.float64]]:
    for name, values in factors.items():
        if values.shape != (rotated // 2,) or not (np.isfinite(values).all() and (values > 0).all()):
            raise SkvError(name, got=f"shape {values.shape}", expected=f"{rotated // 2} positive numbers")
    return {name: values.astype(np.float64) for name, values in factors.items()}


def _factor_lists(theta: float, short: npt.NDArray[np.float64], long: npt.NDArray[np.float64]) -> dict[str, Any]:
    lists = {"short_factor": short, "long_factor": long}
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        **{name: [float(f"{value:.9g}") for value in values] for name, values in lists.items()},
    }


def _llama3_factors(parameters: Mapping[str, Any], rotated: int) -> npt.NDArray[np.float64]:
    """Divisors of the frequencies by Llama 3's rule: long waves by the factor, short ones by 1, blended between."""
    turns = parameters["original_max_position_embeddings"] / (
        2 * np.pi * parameters["rope_theta"] ** (np.arange(0, rotated, 2) / rotated)
    )
    low, high, factor = (parameters[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - blend) / factor + blend), np.float64)
