"""The native library in Python: finds and loads it, and calls its C interface through ctypes.

The structures mirror ``native/kernels.h``. ONNX Runtime loads the same file as a custom-op library.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import platform
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import skv_export
from skv_export.errors import SkvError
from skv_export.spec.key_basis import INPUTS, MATRICES, KeyBasis
from skv_export.spec.layout import Bytes, CacheLayout, layout_fields
from skv_export.spec.recipe import GRANULARITIES, RECENT_TYPES, ROTATIONS

if TYPE_CHECKING:
    from skv_export.spec.op import AttentionParams

logger = logging.getLogger(__name__)
FILE_NAMES = {"linux": "libskv_ops.so", "darwin": "libskv_ops.dylib", "win32": "skv_ops.dll"}
"""By ``sys.platform``; several may lie side by side."""
FILE_NAME = FILE_NAMES.get(sys.platform, FILE_NAMES["linux"])
ENVIRONMENT = "SKV_OPS_LIBRARY"
INSTRUCTION_SETS = ("scalar", "avx2", "avxvnni", "avx512vnni", "neon")
"""Of the CPU kernels; SKV_CPU_ISA in the environment names one."""
ORIGINS = ("decode_simple", "built in", "kept", "to compile", "missing")
"""Of the kernels that decode on a GPU: none of decode_mma; in the library; in the cache folder; compiled when a session
is made; what compiles them was not found. ``SkvCudaOrigin`` of kernels_cuda.h numbers them in this order."""
_FIX = "Install the package with `pip install .`, or build with cmake and set SKV_OPS_LIBRARY to the library in build/."

# The enumerations of kv_layout.h number these names in this order.
_ENUMS = {"granularity": GRANULARITIES, "rotation": ROTATIONS, "recent_type": RECENT_TYPES}
_DEFAULT_STREAM = None
_TYPES = {np.dtype(np.float16): 0, np.dtype(np.float32): 1}
_DTYPES = {"fp16": 0, "fp32": 1, "bf16": 2}


class SkvLayout(ctypes.Structure):
    """``SkvLayout`` of kv_layout.h."""

    _fields_ = [(name, ctypes.c_int32) for name in layout_fields()]

    @classmethod
    def of(cls, layout: CacheLayout) -> SkvLayout:
        """Returns the structure of a layout."""
        values = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
        return cls(**{name: _ENUMS[name].index(v) if name in _ENUMS else int(v) for name, v in values.items()})


class SkvCache(ctypes.Structure):
    """``SkvCache`` of kernels.h: the blocks of a batch."""

    _fields_ = [
        ("layout", SkvLayout),
        ("data", ctypes.c_void_p),
        ("block_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in INPUTS),  # SkvKeyBasis
    ]

    @classmethod
    def of(cls, layout: CacheLayout, data: int | None, block_bytes: int, basis: KeyBasis | None = None) -> SkvCache:
        """Returns the structure; ``basis`` must outlive it."""
        matrices = () if basis is None else addresses_of(basis)
        return cls(SkvLayout.of(layout), data, block_bytes, *matrices)


class SkvTokens(ctypes.Structure):
    """``SkvTokens`` of kernels.h."""

    _fields_ = [("data", ctypes.c_void_p), ("token_stride", ctypes.c_int64)]


class SkvAttention(ctypes.Structure):
    """``SkvAttention`` of kernels.h: one call of the op."""

    _fields_ = [
        ("key_cache", SkvCache),
        ("value_cache", SkvCache),
        ("query", SkvTokens),
        ("key", SkvTokens),
        ("value", SkvTokens),
        ("output", ctypes.c_void_p),
        ("seqlens_k", ctypes.c_void_p),
        ("query_seqlens", ctypes.c_void_p),
        ("head_sink", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("kv_num_heads", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("not_finite", ctypes.c_void_p),
    ]


class SkvCudaContext(ctypes.Structure):
    """``SkvCudaContext`` of kernels_cuda.h: what a call on the device needs beside its tensors."""

    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
        ("max_length", ctypes.c_int64),
        ("path", ctypes.c_int32),
        ("output_type", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("rows_bytes", ctypes.c_int64),
        ("architecture", ctypes.c_int32),
    ]


class Library:
    """The C interface of one loaded library.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._c = ctypes.CDLL(str(path))
            for name in ("skv_version", "skv_last_error", "skv_cpu_isa", "skv_cuda_build"):
                getattr(self._c, name).restype = ctypes.c_char_p
            self._c.skv_rewind.argtypes = [
                ctypes.POINTER(SkvCache), ctypes.c_int32, ctypes.c_int32, *3 * [ctypes.c_int64]
            ]  # fmt: skip
            self._c.skv_attention.argtypes = [ctypes.POINTER(SkvAttention), ctypes.c_void_p]
            if self.cuda_build:
                self._c.skv_cuda_rewind.argtypes = [*self._c.skv_rewind.argtypes, ctypes.c_void_p]
                self._c.skv_cuda_synchronize.argtypes = [ctypes.c_void_p]
                self._c.skv_cuda_last_error.restype = self._c.skv_cuda_path.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise SkvError(
                f"native library {path}: can't be loaded",
                got=str(error),
                expected=f"a build of skv_export {skv_export.__version__} for {platform.system()} {platform.machine()}",
                fix=_FIX,
            ) from error
        logger.info("native library %s: CPU kernels %s, CUDA %s", path, self.cpu_isa, self.cuda_build or "not built")

    @property
    def version(self) -> str:
        """The library's version."""
        return self._text("skv_version")

    @property
    def cpu_isa(self) -> str:
        """The instruction set that was chosen, one of ``INSTRUCTION_SETS``."""
        return self._text("skv_cpu_isa")

    @property
    def cuda_build(self) -> str:
        """The CUDA version and architectures of the build; empty without CUDA."""
        return self._text("skv_cuda_build")

    def rewind(
        self,
        layout: CacheLayout,
        data: int,
        block_bytes: int,
        kv_num_heads: int,
        b: int,
        length: int,
        longest_length: int,
        new_length: int,
        *,
        basis: Sequence[int] = (),
        device: tuple[str, int] = ("cpu", 0),
    ) -> None:
        """Makes the blocks of sequence ``b`` a cache of ``new_length`` tokens (``reference.rewind``), in place.

        Args:
            layout: The tensor's layout.
            data: Address of the first block of the batch.
            block_bytes: Bytes of one block.
            kv_num_heads: Blocks per sequence.
            b: Index of the sequence in the batch.
            length: Tokens held.
            longest_length: Most tokens held since the sequence was empty.
            new_length: Tokens to hold.
            basis: Of calibrated keys: the addresses of ``KeyBasis``' matrices, in its order.
            device: Where both are, and which GPU: ``("cuda", 1)``; there it is done when ``synchronize`` returns.

        Raises:
            SkvError: Too far back, or an unusable block.
        """
        held = SkvCache(SkvLayout.of(layout), data, block_bytes, *basis)
        arguments = ctypes.byref(held), kv_num_heads, b, length, longest_length, new_length
        if device[0] == "cuda":
            self.use_device(device[1])
            self._check("rewind", self._c.skv_cuda_rewind(*arguments, _DEFAULT_STREAM), "skv_cuda_last_error")
        else:
            self._check("rewind", self._c.skv_rewind(*arguments))

    def use_device(self, device_id: int) -> None:
        """Makes a GPU the calling thread's: ``rewind`` and ``synchronize`` mean this one.

        Raises:
            SkvError: It is not there.
        """
        self._check("device", self._c.skv_cuda_use_device(device_id), "skv_cuda_last_error")

    def set_column(self, device_id: int, address: int, row_bytes: int, rows: int) -> None:
        """Sets the int64 at an address of a GPU, and that of each further row, from 0 to 1; it is done then.

        Raises:
            SkvError: It failed there.
        """
        self.use_device(device_id)
        arguments = ctypes.c_void_p(address), ctypes.c_int64(row_bytes), rows, _DEFAULT_STREAM
        self._check("set_column", self._c.skv_cuda_set_column(*arguments), "skv_cuda_last_error")
        self.synchronize()

    def synchronize(self) -> None:
        """Waits for what was started on the thread's GPU.

        Raises:
            SkvError: It failed there.
        """
        self._check("synchronize", self._c.skv_cuda_synchronize(_DEFAULT_STREAM), "skv_cuda_last_error")

    def cuda_architecture(self, device_id: int) -> int:
        """The architecture of a GPU, such as 90 for compute capability 9.0.

        Raises:
            SkvError: It is not there, or can't run the library's kernels.
        """
        self.use_device(device_id)
        multiprocessors, architecture = ctypes.c_int32(), ctypes.c_int32()
        status = self._c.skv_cuda_device(ctypes.byref(multiprocessors), ctypes.byref(architecture))
        self._check("device", status, "skv_cuda_last_error")
        return architecture.value

    def cuda_origin(self, layouts: tuple[CacheLayout, CacheLayout], architecture: int = 0) -> tuple[str, str]:
        """Where the kernel comes from that decodes on a GPU, in fp16 and bf16.

        Args:
            layouts: Of keys and values.
            architecture: The GPU's; 0 = any.

        Returns:
            One of ``ORIGINS``, and a line that names the kernel and its origin.
        """
        text = ctypes.c_char_p()
        structures = (ctypes.byref(SkvLayout.of(layout)) for layout in layouts)
        number = self._c.skv_cuda_origin(*structures, architecture, ctypes.byref(text))
        return ORIGINS[number], (text.value or b"").decode()

    def cuda_compile(self, layouts: tuple[CacheLayout, CacheLayout], architecture: int) -> None:
        """Compiles the kernels that are not built in, with or without a GPU, into the cache folder.

        Raises:
            SkvError: What compiles was not found or failed, or the folder can't be written.
        """
        structures = (ctypes.byref(SkvLayout.of(layout)) for layout in layouts)
        status = self._c.skv_cuda_compile(*structures, architecture)
        self._check("compiling", status, "skv_cuda_last_error")

    def cuda_path(
        self,
        layouts: tuple[CacheLayout, CacheLayout],
        num_heads: int,
        kv_num_heads: int,
        dtype: str,
        tokens: int = 1,
        architecture: int = 0,
    ) -> str:
        """The kernels that attention takes on a GPU, and why, such as ``decode_simple: 5-bit keys``.

        Args:
            layouts: Of keys and values.
            num_heads: N.
            kv_num_heads: N_kv.
            dtype: ``fp32``, ``fp16`` or ``bf16``.
            tokens: New tokens of a sequence.
            architecture: The GPU's, for kernels that a session has loaded; 0 = those that are built in.

        Raises:
            SkvError: No kernel on a GPU takes such a call.
        """
        nowhere = 256  # an address that is looked at, and never read
        blocks = [SkvCache(SkvLayout.of(x), nowhere, x.block_bytes(x.full_rows + x.tile_tokens)) for x in layouts]
        head_dim = layouts[0].head_dim
        widths = (heads * head_dim for heads in (num_heads, kv_num_heads, kv_num_heads))
        call = SkvAttention(
            *blocks, *(SkvTokens(nowhere, width) for width in widths), nowhere, nowhere, None, None,
            _DTYPES[dtype], 1, tokens, num_heads, kv_num_heads,
        )  # fmt: skip
        context = SkvCudaContext(max_length=1, output_type=-1, multiprocessors=1, architecture=architecture)
        path = self._c.skv_cuda_path(ctypes.byref(call), ctypes.byref(context))
        if path is None:
            raise SkvError("CUDA kernels: not for this model", got=self._text("skv_cuda_last_error"))
        return bytes(path).decode()

    def attention(
        self,
        params: AttentionParams,
        layouts: tuple[CacheLayout, CacheLayout],
        query: NDArray[Any],
        key: NDArray[Any],
        value: NDArray[Any],
        past_key: Bytes,
        past_value: Bytes,
        seqlens_k: NDArray[np.int32],
        *,
        head_sink: NDArray[Any] | None = None,
        query_seqlens: NDArray[np.int32] | None = None,
        key_basis: KeyBasis | None = None,
    ) -> tuple[NDArray[Any], Bytes, Bytes]:
        """The op on tokens that have had RoPE and QK norm; as ``reference.quantized_kv_attention``.

        Queries, keys, values and ``head_sink`` are of one type, float32 or float16.

        Raises:
            SkvError: The library refuses the call; nothing has been written.
        """
        batch, tokens = query.shape[:2]
        dtype = query.dtype
        query, key, value = (np.ascontiguousarray(x, dtype) for x in (query, key, value))
        sink = None if head_sink is None else np.ascontiguousarray(head_sink, dtype)
        lengths = np.ascontiguousarray(seqlens_k, np.int32)
        new = None if query_seqlens is None else np.ascontiguousarray(query_seqlens, np.int32)
        present = [np.array(past, np.uint8, order="C") for past in (past_key, past_value)]
        if key_basis is not None:
            key_basis.check(layouts[0], params.kv_num_heads)
        caches = [
            SkvCache.of(layout, _address(x), x.shape[2] * x.shape[3], basis)
            for layout, x, basis in zip(layouts, present, (key_basis, None), strict=True)
        ]
        output = np.zeros_like(query)
        call = SkvAttention(
            *caches,
            *(SkvTokens(_address(x), x.shape[-1]) for x in (query, key, value)),
            *(_address(x) for x in (output, lengths, new, sink)),
            _TYPES[dtype],
            batch,
            tokens,
            params.num_heads,
            params.kv_num_heads,
            params.scale,
            params.softcap,
        )
        self._check("attention", self._c.skv_attention(ctypes.byref(call), None))
        return output, present[0], present[1]

    def _text(self, name: str) -> str:
        return bytes(getattr(self._c, name)()).decode()

    def _check(self, what: str, status: int, reason: str = "skv_last_error") -> None:
        if status:
            raise SkvError(f"native library: {what} failed", got=self._text(reason) or f"status {status}")


def library_path() -> Path:
    """Returns the native library's file: SKV_OPS_LIBRARY, else that of the installed package in ``lib``.

    Raises:
        SkvError: There is none; the message lists where it was looked for.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        if Path(named).is_file():
            return Path(named).resolve()
        raise SkvError(f"{ENVIRONMENT}: no such file", got=named, expected=f"the path of {FILE_NAME}", fix=_FIX)
    # An editable install has two folders on the path: the sources, and the one that the build installs into.
    candidates = [Path(folder) / "lib" / FILE_NAME for folder in skv_export.__path__]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    looked = ", ".join(map(str, candidates))
    raise SkvError(f"native library {FILE_NAME}: not found", got=f"nothing at {looked}", fix=_FIX)


def load_library(path: Path | None = None) -> Library:
    """Returns the library at ``path``, or the one that ``library_path`` finds; each file is loaded once.

    Raises:
        SkvError: There is none, or it can't be loaded.
    """
    return _load(path or library_path())


@cache
def _load(path: Path) -> Library:
    return Library(path)


def addresses_of(basis: KeyBasis) -> tuple[int, ...]:
    """Addresses of a basis' matrices, which must be in C order."""
    return tuple(getattr(basis, name).ctypes.data for name in MATRICES)


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data
