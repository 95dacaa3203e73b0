"""ggml's blocks as codes, scales and offsets: the weights that the package gguf decodes, for any bytes of a block."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf_files import HALVES, random_blocks

from skv_export.checkpoints.block_weights import CODES, OFFSETS, SCALES, BlockMatrix, pack
from skv_export.checkpoints.gguf import read_gguf
from skv_export.checkpoints.gguf_blocks import FORMATS, GgufMatrix
from skv_export.errors import SkvError

ROWS, INPUTS = 7, 512


def opened(path: Path, kind: str, blocks: np.ndarray, order: np.ndarray | None = None) -> GgufMatrix:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufMatrix(read_gguf(path)[1]["w"], order, transposed=False)


def weights(matrix: BlockMatrix, start: int, stop: int) -> np.ndarray:
    """What MatMulNBits multiplies with, by ONNX Runtime's documentation, and the offsets."""
    form = matrix.format
    codes = matrix.codes(start, stop).reshape(stop - start, -1, form.block_size).astype(np.float32)
    made = (codes - 2 ** (form.bits - 1)) * matrix.part(SCALES, start, stop)[..., None]
    if form.zero:
        made = made + matrix.part(OFFSETS, start, stop)[..., None]
    return made.reshape(stop - start, -1)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_parts_are_the_weights_that_gguf_decodes(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    blocks = random_blocks(kind, (ROWS, INPUTS), rng)
    expected = quants.dequantize(blocks, GGMLQuantizationType[kind])
    matrix = opened(tmp_path / "model.gguf", kind, blocks)
    np.testing.assert_allclose(weights(matrix, 0, ROWS), expected, atol=1e-6 * np.abs(expected).max(), rtol=0)
    np.testing.assert_array_equal(weights(matrix, 2, 5), weights(matrix, 0, ROWS)[2:5])
    assert int(matrix.codes(0, ROWS).max()) < 2**matrix.format.bits
    order = rng.permutation(ROWS)
    reordered = opened(tmp_path / "reordered.gguf", kind, blocks, order)
    np.testing.assert_array_equal(weights(reordered, 1, 4), weights(matrix, 0, ROWS)[order[1:4]])


def test_a_graph_holds_so_many_bits_per_weight() -> None:
    bits = {name: (form.weight_bits(32), form.weight_bits(16)) for name, form in FORMATS.items()}
    assert bits["Q4_0"] == (5, 4.5) and bits["Q4_1"] == bits["Q4_K"] == (6, 5)
    assert bits["Q5_0"] == bits["Q8_0"] == (9, 8.5) and bits["Q5_K"] == (10, 9) and bits["Q6_K"] == (10, 9)
    assert bits["Q2_K"] == (8, 6) and bits["Q3_K"] == (6, 5)


def test_codes_are_packed_lowest_first() -> None:
    codes = np.array([[1, 2, 3], [15, 0, 9]], np.uint8)
    np.testing.assert_array_equal(pack(codes, 4), [[0x21, 0x03], [0x0F, 0x09]])
    np.testing.assert_array_equal(pack(codes, 8), codes)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q6_K", "MXFP4"])
def test_a_scale_that_is_no_number_is_refused(kind: str, tmp_path: Path) -> None:
    blocks = random_blocks(kind, (ROWS, INPUTS), np.random.default_rng(1))
    at = HALVES.get(kind, (0,))[-1]
    blocks[3, at : at + 2] = [255] if kind == "MXFP4" else np.array([np.nan], np.float16).view(np.uint8)
    if kind == "MXFP4":
        blocks[3, 0] = 255
    matrix = opened(tmp_path / "model.gguf", kind, blocks)
    matrix.part(CODES, 0, ROWS)
    part = matrix.format.parts[-1]
    with pytest.raises(SkvError, match=rf"tensor .w.: {part}.*infinite or not a number"):
        matrix.part(part, 0, ROWS)
