"""Checkpoints that other tools quantized: GPTQ, AWQ, compressed-tensors, FP8 and MXFP4, as the matrices they stand for.

Which tensors make up a matrix follows from their names, what their bits mean from ``quantization_config``. Each such
group becomes one entry under the matrix's own name: ``array`` dequantizes it, ``blocks`` gives its codes as a graph
holds them. Formats that are not here are refused by name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skv_export.checkpoints.block_weights import OFFSETS, ZERO_POINTS, BlockFormat, BlockMatrix, check_numbers
from skv_export.checkpoints.tensor_files import TensorEntry
from skv_export.errors import SkvError

Entries = Mapping[str, TensorEntry]
_LARGEST_BLOCK, _SMALLEST_BLOCK = 128, 16
"""Inputs that share a scale in the graph: MatMulNBits takes powers of two; groups are cut into such blocks."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of each nibble of a word, lowest nibble first (AWQ's GEMM version)."""
_OF_ACTIVATIONS = (".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".k_scale", ".v_scale")
"""Ends of names of what activations are rounded with, which an export does not do."""
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The numbers of MXFP4's elements (OCP Microscaling Formats 1.0, E2M1)."""


@dataclass(frozen=True)
class PackedEntry(TensorEntry):
    """A matrix that several tensors of the file stand for; ``dtype`` says in which format.

    Attributes:
        parts: These tensors, by the last part of their names.
        options: What ``quantization_config`` says of them.
    """

    parts: Entries
    options: Mapping[str, Any]

    def array(self) -> NDArray[Any]:
        """Returns the matrix dequantized, as float32."""
        dequantized = _FORMATS[self.dtype].dequantize(self)
        check_numbers(self.name, "weights", dequantized)
        return dequantized

    def blocks(self) -> BlockMatrix | None:
        """Returns the matrix as a graph holds it; None where it can't be held but dequantized."""
        make = _FORMATS[self.dtype].matrix
        return None if make is None else make(self)

    def error(self, what: str, got: object, expected: object) -> SkvError:
        """Returns an error about this matrix."""
        fix = "The file is damaged, or config.json's quantization_config is another checkpoint's."
        return SkvError(f"tensor {self.name!r} ({self.dtype}): {what}", got=got, expected=expected, fix=fix)

    def expect(self, part: str, shape: tuple[int, ...]) -> TensorEntry:
        """Returns a tensor of the group; refuses one of another shape."""
        if part not in self.parts or self.parts[part].shape != shape:
            got = self.parts[part].shape if part in self.parts else "none"
            raise self.error(f"its {part}", got, shape)
        return self.parts[part]


@dataclass(frozen=True)
class _Format:
    """A format of matrices.

    Attributes:
        suffixes: Ends of the names of its tensors; the first one names a matrix.
        weight: What takes the first suffix' place in the matrix's name.
        shape: Shape of the model's parameter.
        dequantize: Its numbers.
        matrix: Its codes for a graph, if a graph can hold them.
    """

    suffixes: tuple[str, ...]
    weight: str
    shape: Callable[[PackedEntry], tuple[int, ...]]
    dequantize: Callable[[PackedEntry], NDArray[Any]]
    matrix: Callable[[PackedEntry], BlockMatrix] | None = None


def unpack_checkpoint(config: Mapping[str, Any], entries: Entries, source: str) -> Entries:
    """Returns a checkpoint's tensors, with one entry for each quantized matrix in place of what it is made of.

    Args:
        config: The checkpoint's ``config.json``.
        entries: Its tensors.
        source: Its name, for messages.

    Raises:
        SkvError: A format that is not known, or tensors that make no matrix.
    """
    given = quantization(config)
    if not given:
        return entries
    kind, options = _kind(given, source)
    layout = _FORMATS[kind]
    merged = {name: entry for name, entry in entries.items() if not name.endswith(_OF_ACTIVATIONS)}
    for name in entries:
        if not name.endswith(layout.suffixes[0]):
            continue
        stem = name.removesuffix(layout.suffixes[0])
        parts = {
            suffix.lstrip("._"): merged.pop(stem + suffix) for suffix in layout.suffixes if stem + suffix in merged
        }
        if kind == "fp8" and (len(parts) == 1 or parts["weight"].dtype not in ("F8_E4M3", "F8_E5M2", "I8")):
            merged |= {entry.name: entry for entry in parts.values()}
            continue
        first = next(iter(parts.values()))
        size = sum(entry.nbytes for entry in parts.values())
        entry = PackedEntry(stem + layout.weight, kind, (), first.file, first.start, first.start + size, parts, options)
        merged[entry.name] = replace(entry, shape=layout.shape(entry))
    if not any(isinstance(entry, PackedEntry) for entry in merged.values()):
        raise SkvError(
            f"{source}: quantization_config says that weights are quantized ({kind}), but none is",
            got=", ".join(list(entries)[:3]),
            expected=f"names that end in {layout.suffixes[0]}",
            fix="Remove quantization_config from config.json if the weights are plain.",
        )
    return merged


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a configuration's ``quantization_config``; empty if it has none."""
    inner = config.get("text_config")
    given = config.get("quantization_config") or (isinstance(inner, Mapping) and inner.get("quantization_config"))
    return given if isinstance(given, Mapping) else {}


def _kind(given: Mapping[str, Any], source: str) -> tuple[str, Mapping[str, Any]]:
    """Returns the format's name here, and what it leaves open."""
    method = str(given.get("quant_method", "")).lower()
    bits, size = given.get("bits"), given.get("group_size", 128)
    if method == "gptq":
        version = str(given.get("checkpoint_format", "gptq"))
        if bits in (2, 4, 8) and version in ("gptq", "gptq_v2") and type(size) is int:
            return "gptq", {
                "bits": bits, "group_size": size, "sym": bool(given.get("sym", True)), "v1": version == "gptq",
                "reordered": bool(given.get("desc_act", False)),
            }  # fmt: skip
        raise _refusal(source, f"GPTQ with {bits} bits, format {version}", "2, 4 or 8 bits, gptq or gptq_v2")
    if method == "awq":
        version = str(given.get("version", "gemm")).lower()
        if bits == 4 and version == "gemm" and type(size) is int:
            return "awq", {"bits": 4, "group_size": size, "sym": False}
        raise _refusal(source, f"AWQ with {bits} bits, version {version}", "4 bits, version gemm")
    if method == "compressed-tensors":
        return _compressed(given, source)
    if method == "fp8":
        return "fp8", {}
    if method == "mxfp4":
        return "mxfp4", {}
    if method == "bitsandbytes":
        reason = "its weights are entries of a table with steps of different sizes, which MatMulNBits does not have"
        raise _refusal(source, f"bitsandbytes: {reason}", _READ)
    raise _refusal(source, method or "no quant_method", _READ)


def _compressed(given: Mapping[str, Any], source: str) -> tuple[str, Mapping[str, Any]]:
    """The same of compressed-tensors, whose groups of layers must be of one format."""
    groups = given.get("config_groups")
    schemes = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    weights = [g["weights"] for g in schemes if isinstance(g.get("weights"), Mapping)]
    stated = {str(g.get("format") or given.get("format")) for g in schemes}
    what = {(w.get("type"), w.get("num_bits"), w.get("symmetric", True), w.get("group_size")) for w in weights}
    if len(stated) == len(what) == 1:
        ((kind, bits, symmetric, _),) = what
        (form,) = stated
        if form == "pack-quantized" and kind == "int" and bits in (2, 4, 8):
            return "pack-quantized", {"bits": bits, "sym": bool(symmetric)}
        if form in ("float-quantized", "naive-quantized", "int-quantized") and bits == 8 and symmetric is not False:
            return "fp8", {}
    got = f"compressed-tensors: {', '.join(sorted(stated))} with {sorted(map(str, what))}"
    raise _refusal(source, got, "one group of pack-quantized with 2, 4 or 8 bits, or float- or int-quantized with 8")


_READ = "gptq, awq, compressed-tensors, fp8 or mxfp4"


def _refusal(source: str, got: str, expected: str) -> SkvError:
    fix = "Use the full-precision checkpoint that it was made from."
    return SkvError(f"{source}: weights quantized in a way that can't be read", got=got, expected=expected, fix=fix)


# Integers in groups.


class _Grouped(BlockMatrix):
    """A matrix whose groups of inputs have a scale and a zero point; its codes are read as ``[N, K]``.

    Args:
        entry: The matrix.
        rows: N.
        inputs: K.
        groups: How many groups of inputs there are.
        group_size: Inputs in each, but maybe the last.
        index: The tensor that names the group of each input, if there is one.
    """

    zeros_are_codes = True
    """Whether every zero point is a number that a code can be."""

    def __init__(
        self, entry: PackedEntry, rows: int, inputs: int, groups: int, group_size: int, index: str = ""
    ) -> None:
        size = _LARGEST_BLOCK
        while size > _SMALLEST_BLOCK and group_size % size:
            size //= 2
        if group_size % size or (groups - 1) * group_size >= inputs or groups * group_size < inputs:
            raise entry.error("groups", f"{groups} of {group_size} for {inputs} inputs", "a multiple of 16 in each")
        self._entry, self._bits, self._index = entry, int(entry.options["bits"]), index
        self._group_size, self._groups = group_size, groups
        reordered = bool(entry.options.get("reordered", index in entry.parts))
        stored = 8 if self._bits == 8 else 4
        name = f"{entry.dtype} {self._bits}-bit"
        zero = "" if entry.options["sym"] else ZERO_POINTS if stored == 4 and self.zeros_are_codes else OFFSETS
        form = BlockFormat(name, stored, size, zero, wide=stored == 8, reordered=reordered)
        super().__init__(entry.name, form, rows, inputs)

    @abstractmethod
    def stored_codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Reads the file's codes of some rows, ``[stop - start, K]``."""

    @abstractmethod
    def group_scales(self, start: int, stop: int) -> NDArray[np.float32]:
        """Reads the scales of some rows, ``[stop - start, groups]``."""

    @abstractmethod
    def group_zeros(self, start: int, stop: int) -> NDArray[Any] | None:
        """Reads the zero points of some rows, ``[stop - start, groups]``; None where all are in the middle."""

    @property
    def _moved(self) -> np.uint8:
        """What codes are moved by, so that the middle of 2 bits becomes that of 4."""
        return np.uint8(6 if self._bits == 2 else 0)

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """The inputs group by group: as they are but for those that were quantized in another order."""
        if self._index not in self._entry.parts:
            return np.arange(self.inputs)
        index = self._entry.expect(self._index, (self.inputs,)).array().astype(np.int64)
        outside = int(((index < 0) | (index >= self._groups)).sum())
        if outside:
            raise self._entry.error(
                f"{self._index} names groups that do not exist",
                f"{outside} of {index.size}",
                f"0 ... {self._groups - 1}",
            )
        order = np.argsort(index, kind="stable")
        if not np.array_equal(index[order], np.arange(self.inputs) // self._group_size):
            got = np.bincount(index)[:4].tolist()
            raise self._entry.error(f"{self._index} makes groups of other sizes", got, self._group_size)
        if not self.format.reordered and not np.array_equal(order, np.arange(self.inputs)):
            raise self._entry.error(f"{self._index} reorders inputs", "desc_act false", "desc_act true")
        return order

    def codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """As ``BlockMatrix`` says; codes of 2 bits are moved to the middle of 4."""
        codes = self.stored_codes(start, stop) + self._moved
        order = self.order
        return codes[:, order] if self.format.reordered else codes

    def scales(self, start: int, stop: int) -> NDArray[np.float32]:
        """As ``BlockMatrix`` says."""
        if not self.format.zero:
            self._middle(start, stop)
        return self._of_blocks(self.group_scales(start, stop))

    def zeros(self, start: int, stop: int) -> NDArray[Any]:
        """As ``BlockMatrix`` says."""
        scales, zeros = self.group_scales(start, stop), self.group_zeros(start, stop)
        if self.format.zero == ZERO_POINTS and zeros is not None:
            return self._of_blocks(zeros.astype(np.uint8) + self._moved)
        if zeros is None:
            return np.zeros_like(self._of_blocks(scales))
        return self._of_blocks(scales * (np.float32(2 ** (self._bits - 1)) - zeros.astype(np.float32)))

    def columns(self) -> NDArray[np.int64]:
        """As ``BlockMatrix`` says."""
        return self.order

    def _middle(self, start: int, stop: int) -> None:
        """Refuses zero points elsewhere where the configuration says that all are in the middle."""
        zeros, middle = self.group_zeros(start, stop), 2 ** (self._bits - 1)
        if zeros is not None and (zeros != middle).any():
            got = sorted(set(zeros[zeros != middle].tolist()))[:4]
            raise self._entry.error("zero points of a symmetric format", got, middle)

    def _of_blocks(self, values: NDArray[Any]) -> NDArray[Any]:
        blocks = np.repeat(values, self._group_size // self.format.block_size, axis=1)
        return blocks[:, : -(-self.inputs // self.format.block_size)]


def _words(entry: TensorEntry) -> NDArray[np.uint32]:
    return entry.array().view(np.uint32)


def _fields(words: NDArray[np.uint32], bits: int, axis: int) -> NDArray[np.uint8]:
    """The fields of words, lowest first, along an axis of a matrix."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    if axis == 0:
        fields = words[:, None, :] >> shifts[:, None] & np.uint32(2**bits - 1)
        return fields.astype(np.uint8).reshape(-1, words.shape[1])
    fields = words[:, :, None] >> shifts & np.uint32(2**bits - 1)
    return fields.astype(np.uint8).reshape(len(words), -1)


class _Gptq(_Grouped):
    """``qweight`` int32 ``[K * bits / 32, N]``, ``qzeros`` ``[groups, N * bits / 32]``, ``scales`` ``[groups, N]``.

    Version 1 of the format holds zero points less one: of 4 bits, 16 is one.
    """

    @property
    def zeros_are_codes(self) -> bool:  # type: ignore[override]
        return not (self._entry.options["v1"] and self._bits == 4)

    def __init__(self, entry: PackedEntry) -> None:
        bits, size = int(entry.options["bits"]), int(entry.options["group_size"])
        words, rows = _two(entry, "qweight")
        inputs = words * 32 // bits
        groups = _two(entry, "scales")[0]
        super().__init__(entry, rows, inputs, groups, size if size > 0 else inputs, "g_idx")
        entry.expect("scales", (groups, rows))
        entry.expect("qzeros", (groups, rows * bits // 32))

    def stored_codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(_fields(_words(self._entry.parts["qweight"])[:, start:stop], self._bits, 0).T)

    def group_scales(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._entry.parts["scales"].array()[:, start:stop].T.astype(np.float32)

    def group_zeros(self, start: int, stop: int) -> NDArray[Any]:
        zeros = _fields(_words(self._entry.parts["qzeros"]), self._bits, 1)[:, start:stop].T.astype(np.int16)
        return zeros + 1 if self._entry.options["v1"] else zeros


class _Awq(_Grouped):
    """``qweight`` int32 ``[K, N / 8]``, ``qzeros`` ``[groups, N / 8]``, ``scales`` ``[groups, N]``."""

    def __init__(self, entry: PackedEntry) -> None:
        size = int(entry.options["group_size"])
        inputs, words = _two(entry, "qweight")
        groups = _two(entry, "scales")[0]
        super().__init__(entry, 8 * words, inputs, groups, size if size > 0 else inputs)
        entry.expect("scales", (groups, self.rows))
        entry.expect("qzeros", (groups, words))

    def stored_codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self._columns("qweight", start, stop).T)

    def group_scales(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._entry.parts["scales"].array()[:, start:stop].T.astype(np.float32)

    def group_zeros(self, start: int, stop: int) -> NDArray[Any]:
        return self._columns("qzeros", start, stop).T

    def _columns(self, part: str, start: int, stop: int) -> NDArray[np.uint8]:
        first = start // 8
        fields = _fields(_words(self._entry.parts[part])[:, first : -(-stop // 8)], 4, 1)
        nibbles = fields.reshape(len(fields), -1, 8)[:, :, np.argsort(_AWQ_ORDER)]
        return nibbles.reshape(len(fields), -1)[:, start - 8 * first : stop - 8 * first]


class _PackQuantized(_Grouped):
    """``weight_packed`` int32 ``[N, K * bits / 32]``, ``weight_scale`` ``[N, groups]``, zero points packed along N."""

    def __init__(self, entry: PackedEntry) -> None:
        bits = int(entry.options["bits"])
        rows, words = _two(entry, "weight_packed")
        inputs = words * 32 // bits
        scale = entry.parts["weight_scale"].shape if "weight_scale" in entry.parts else ()
        groups = scale[1] if len(scale) == 2 else 1
        super().__init__(entry, rows, inputs, groups, inputs // groups if groups else 0, "weight_g_idx")
        if scale not in ((rows, groups), (1,), (1, 1)):
            raise entry.error("its weight_scale", scale, (rows, groups))
        if not entry.options["sym"]:
            entry.expect("weight_zero_point", (-(-rows * bits // 32), groups))

    def stored_codes(self, start: int, stop: int) -> NDArray[np.uint8]:
        if (shape := self._entry.expect("weight_shape", (2,)).array().tolist()) != [self.rows, self.inputs]:
            raise self._entry.error("its weight_shape", shape, [self.rows, self.inputs])
        entry = self._entry.parts["weight_packed"]
        row = entry.nbytes // self.rows
        data = entry.file.read(entry.start + start * row, entry.start + stop * row)
        words = np.frombuffer(data, np.uint32).reshape(stop - start, -1)
        return _fields(words, self._bits, 1)

    def group_scales(self, start: int, stop: int) -> NDArray[np.float32]:
        scales = self._entry.parts["weight_scale"].array().astype(np.float32).reshape(-1, self._groups)
        return np.broadcast_to(scales, (self.rows, self._groups))[start:stop]

    def group_zeros(self, start: int, stop: int) -> NDArray[Any] | None:
        if self._entry.options["sym"]:
            return None
        return _fields(_words(self._entry.parts["weight_zero_point"]), self._bits, 0)[start:stop]


def _two(entry: PackedEntry, part: str) -> tuple[int, int]:
    """Returns the shape of a part that must be a matrix."""
    shape = entry.parts[part].shape if part in entry.parts else ()
    if len(shape) != 2:
        raise entry.error(f"its {part}", shape or "none", "two dimensions")
    return shape[0], shape[1]


def _grouped_shape(make: Callable[[PackedEntry], BlockMatrix]) -> Callable[[PackedEntry], tuple[int, ...]]:
    def shape(entry: PackedEntry) -> tuple[int, ...]:
        matrix = make(entry)
        return matrix.rows, matrix.inputs

    return shape


def _dequantized(make: Callable[[PackedEntry], BlockMatrix]) -> Callable[[PackedEntry], NDArray[Any]]:
    return lambda entry: make(entry).dequantized()


# Floats.


def _fp8_shape(entry: PackedEntry) -> tuple[int, ...]:
    return entry.parts["weight"].shape


def _fp8(entry: PackedEntry) -> NDArray[Any]:
    """8 bits times their scales: one, one for each row or group, or one for each block of rows and inputs."""
    weight = entry.parts["weight"].array().astype(np.float32)
    scale = next(part for name, part in entry.parts.items() if name != "weight").array().astype(np.float32)
    if scale.size == 1:
        return weight * scale.reshape(())
    if scale.ndim != weight.ndim or any(s == 0 or s > w for s, w in zip(scale.shape, weight.shape, strict=True)):
        raise entry.error("its scale", scale.shape, f"one, or one for each block of {weight.shape}")
    for axis, count in enumerate(scale.shape):
        scale = np.repeat(scale, -(-weight.shape[axis] // count), axis)
    return weight * scale[tuple(slice(n) for n in weight.shape)]


def _mxfp4_shape(entry: PackedEntry) -> tuple[int, ...]:
    """Experts are ``[E, K, N]``; in the file ``[E, N, K / 32, 16]``."""
    shape = entry.parts["blocks"].shape
    if len(shape) != 4 or shape[3] != 16:
        raise entry.error("its blocks", shape, "[experts, outputs, blocks, 16]")
    entry.expect("scales", shape[:3])
    return shape[0], 32 * shape[2], shape[1]


def _mxfp4(entry: PackedEntry) -> NDArray[Any]:
    blocks, scales = (entry.parts[part].array() for part in ("blocks", "scales"))
    if (scales == 255).any():
        raise entry.error("its scales", "255, which is not a number", "powers of two, 0 ... 254")
    numbers = np.stack([_E2M1[blocks & 15], _E2M1[blocks >> 4]], axis=-1).reshape(*blocks.shape[:3], 32)
    numbers *= np.exp2(scales.astype(np.float32) - 127)[..., None]
    return np.ascontiguousarray(numbers.reshape(*blocks.shape[:2], -1).swapaxes(1, 2))


_FORMATS: Mapping[str, _Format] = {
    "gptq": _Format(
        (".qweight", ".qzeros", ".scales", ".g_idx"), ".weight", _grouped_shape(_Gptq), _dequantized(_Gptq), _Gptq
    ),
    "awq": _Format((".qweight", ".qzeros", ".scales"), ".weight", _grouped_shape(_Awq), _dequantized(_Awq), _Awq),
    "pack-quantized": _Format(
        (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"), ".weight",
        _grouped_shape(_PackQuantized), _dequantized(_PackQuantized), _PackQuantized,
    ),
    "fp8": _Format((".weight", ".weight_scale", ".weight_scale_inv"), ".weight", _fp8_shape, _fp8),
    "mxfp4": _Format(("_blocks", "_scales"), "", _mxfp4_shape, _mxfp4),
}  # fmt: skip
