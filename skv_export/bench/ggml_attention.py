"""llama.cpp's flash attention alone, called in the libraries that llama-cpp-python brings (ggml.h of ggml 0.9 to 0.25).

The functions are those of the header; the tensor types' numbers are GGUF's.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from skv_export.errors import SkvError

if TYPE_CHECKING:
    from skv_export.bench.attention_candidates import AttentionShape

_ROOM = 64 << 20
"""Bytes for the graph and the kernels' buffers, beside the caches."""


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_new_tensor_4d": (c_void_p, (c_void_p, c_int, c_int64, c_int64, c_int64, c_int64)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "ggml_flash_attn_ext": (c_void_p, (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_float, c_float, c_float)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_cpu_init": (None, ()),
    "ggml_graph_compute_with_ctx": (c_int, (c_void_p, c_void_p, c_int)),
}


def flash_attention(shape: AttentionShape, cache_type: str, threads: int) -> Callable[[], NDArray[np.float32]]:
    """Returns a function that attends with one query token per sequence to random keys and values.

    Args:
        shape: What is computed.
        cache_type: ``f16``, ``q8_0`` or ``q4_0``.
        threads: 0 = one.

    Returns:
        A call gives the outputs ``[batch, num_heads, head_dim]``, a view that the next call overwrites.

    Raises:
        SkvError: llama-cpp-python is missing, or it brings other libraries.
    """
    kind = int(GGMLQuantizationType[cache_type.upper()])
    q, k, v = tokens(shape)
    base, cpu = _libraries()
    context = base.ggml_init(_InitParams(2 * (q.nbytes + k.nbytes + v.nbytes) + _ROOM, None, False))
    sizes = shape.head_dim, shape.context, shape.kv_num_heads, shape.batch
    query = base.ggml_new_tensor_4d(context, 0, shape.head_dim, 1, shape.num_heads, shape.batch)
    _view(base, query, q.shape)[:] = q
    held = []
    for rows in (k, v):
        tensor = base.ggml_new_tensor_4d(context, kind, *sizes)
        count = rows.size // shape.head_dim
        base.ggml_quantize_chunk(kind, rows.ctypes.data, base.ggml_get_data(tensor), 0, count, shape.head_dim, None)
        held.append(tensor)
    output = base.ggml_flash_attn_ext(context, query, *held, None, shape.head_dim**-0.5, 0.0, 0.0)
    graph = base.ggml_new_graph(context)
    base.ggml_build_forward_expand(graph, output)
    result = _view(base, output, (shape.batch, shape.num_heads, shape.head_dim))

    def step() -> NDArray[np.float32]:
        if cpu.ggml_graph_compute_with_ctx(context, graph, threads or 1):
            raise SkvError("bench: llama.cpp's attention failed", got="a status that is not 0")
        return result

    step()
    return step


def tokens(shape: AttentionShape) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """The random query, keys and values: ``[batch, heads, 1 or context, head_dim]``."""
    rng = np.random.default_rng(0)
    heads = (shape.num_heads, 1), (shape.kv_num_heads, shape.context), (shape.kv_num_heads, shape.context)
    q, k, v = (rng.standard_normal((shape.batch, *each, shape.head_dim), np.float32) for each in heads)
    return q, k, v


def _view(base: ctypes.CDLL, tensor: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    numbers = (c_float * int(np.prod(shape))).from_address(base.ggml_get_data(tensor))
    return np.ctypeslib.as_array(numbers).reshape(shape)


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    package = importlib.util.find_spec("llama_cpp")
    if package is None or package.origin is None:
        raise SkvError(
            "bench: llama.cpp is not installed", got="no module llama_cpp", fix="pip install llama-cpp-python"
        )
    folder = Path(package.origin).parent / "lib"
    try:
        libraries = [ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu")]
        for name, (result, arguments) in _SIGNATURES.items():
            owner = next(each for each in libraries if hasattr(each, name))
            function = getattr(owner, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, StopIteration) as error:
        raise SkvError(
            "bench: llama.cpp's libraries can't be used",
            got=str(error) or "a function is missing",
            expected="libggml-base.so and libggml-cpu.so of llama-cpp-python 0.3",
        ) from None
    libraries[1].ggml_cpu_init()
    return libraries[0], libraries[1]
