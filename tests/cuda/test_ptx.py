"""nvcc's PTX of the kernels, executed without a GPU: results, counts of what it does, and bugs planted in it."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from builds import ROOT, build_shim
from check import LONG, ROWS, cases
from harness import AUTO, MMA, SIMPLE, Library, check_dense, difference
from ptx_library import ALL_SOURCES, PtxLibrary, compile_ptx, keyed, ptx_of
from ptx_memory import TrapError
from ptx_operations import FRAGMENT_A, FRAGMENT_B, FRAGMENT_C, multiply_matrices
from ptx_program import Kernel

from skv_export.spec.conformance import Case
from skv_export.spec.recipe import LayerConfig

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")]

OUT = ROOT / "build" / "ptx"
SHIM = ROOT / "build" / "cuda_shim"
NAMES = (
    "default",
    "gqa 16",
    "the call flushes the first tile",
    "eight query tokens flush",
    "chunk with a past",
    "ragged batch",
    "sliding window, ring wrapped",
    "softcap",
    "head sink",
    "keys per token, rotated",
    "values per channel",
    "byte channels, both",
    "token_channel, both",
    "calibrated, the default form",
)
DECODE = "decode_mma_kernelINS0_8MmaShapeILi64ELi4ELi2ELb0ELb0ELi1EEE"
# Instructions of a warp, as counted (481, 1,544 and 81) and a little: K4V2, head_dim 64.
MOST_PER_SLAB, MOST_PER_FLUSH, MOST_PER_ROW = 490, 1600, 85


@pytest.fixture(scope="module")
def compiled() -> dict[str, Kernel]:
    return compile_ptx(OUT, ALL_SOURCES)


@pytest.fixture
def kernels(compiled: dict[str, Kernel]) -> Iterator[PtxLibrary]:
    with PtxLibrary(build_shim(SHIM, few=True), compiled, multiprocessors=1) as library:
        yield library


@pytest.mark.parametrize("case", [*cases(NAMES), ROWS], ids=lambda c: c.name)
def test_results_equal_the_reference(case: Case, kernels: PtxLibrary) -> None:
    error, _ = difference(case, kernels, AUTO)
    assert error <= case.tolerance


def test_decode_simple(kernels: PtxLibrary) -> None:
    (case,) = cases(("default",))
    error, taken = difference(case, kernels, SIMPLE)
    assert error <= case.tolerance and taken.startswith("decode_simple")


def test_what_attention_of_somebody_elses_takes_and_leaves(kernels: PtxLibrary) -> None:
    check_dense(kernels)


def long_case(tiles: int, tokens: int = 1, more: int = 0) -> Case:
    """One head over so many tiles of 64 tokens, the recent tokens just filled, or some more."""
    config = LayerConfig(num_sink_tokens=4, recent_tokens=32, tile_tokens=64)
    past = (4 + 32 + 64 * tiles + more,)
    return dataclasses.replace(LONG, name=f"{tiles} tiles", config=config, past_lengths=past, new_tokens=tokens)


def test_decode_fetches_the_tiles_and_nothing_else(kernels: PtxLibrary) -> None:
    """Per slab and warp: the bytes of the tiles, no bank waited for, and no more instructions than are known of."""
    counts = []
    for tiles in (8, 16):
        kernels.reset()
        case = long_case(tiles)
        difference(case, kernels, MMA)
        counters = kernels.counters[DECODE]
        copies = [i for i in counters.asked if kernels.code(DECODE)[i].operation[0] == "cp"]
        asked, sectors = (sum(count[i] for i in copies) for count in (counters.asked, counters.sectors))
        assert asked == tiles * sum(layout.tile_bytes for layout in case.layouts) == 32 * sectors
        counts.append((counters.instructions.total(), counters.conflicts.total()))
    (less, waits), (more, more_waits) = counts
    assert waits == more_waits
    assert (more - less) / (8 * 64 / 32) <= MOST_PER_SLAB


def test_a_flush_is_shared_by_many_blocks(kernels: PtxLibrary) -> None:
    """All layers flush in the same step: what counts is the block that takes longest."""
    difference(long_case(2, more=63), kernels)
    assert kernels.counters["append_kernelILi2EE"].longest <= MOST_PER_FLUSH


def test_dequantizing_takes_few_instructions_per_token(kernels: PtxLibrary) -> None:
    counts = []
    for tiles in (4, 12):
        kernels.reset()
        difference(long_case(tiles, 12), kernels)
        counts.append(kernels.counters["dequantize_kernelILi2ELb0EE"].instructions.total())
    assert (counts[1] - counts[0]) / (2 * 8 * 64) <= MOST_PER_ROW  # a row of keys and one of values for each token


# What is planted in decode_mma's PTX: an instruction there, and what stands there instead.
PLANTED = {
    "another table of lop3": (r"(lop3\.b32 .*), 0xEA;", r"\1, 0xE8;"),
    "weights not transposed": (r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16", "mov.b32"),
    "copies not waited for": (r"cp\.async\.wait_group 0", "cp.async.wait_group 1"),
    "copies never closed": (r"cp\.async\.commit_group;", ""),
    "an operand's registers in another order": (r"(mma\.sync\S+ \{[^}]*\},)\{(%r\d+),(%r\d+),", r"\1{\3,\2,"),
    "a copy that is not aligned": (r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+)\]", r"\1+8]"),
    "a lane that leaves before a shuffle": (r"(shfl\.sync\.bfly\.b32 )", r"@%p1 ret;\n\1"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_bugs_are_found(planted: str, compiled: dict[str, Kernel]) -> None:
    (source,) = (x for x in ALL_SOURCES if x.stem == "decode_mma_64")
    text, count = re.subn(*PLANTED[planted], ptx_of(OUT, source).read_text())
    assert count > 0, "nothing to plant it in: update PLANTED"
    with PtxLibrary(build_shim(SHIM, few=True), compiled | keyed(text), multiprocessors=1) as kernels:
        assert is_wrong(kernels)


def test_too_little_shared_memory_is_found(kernels: PtxLibrary) -> None:
    assert not is_wrong(kernels)
    kernels.shared_less = 4096
    assert is_wrong(kernels)


def is_wrong(kernels: Library) -> bool:
    """Whether a step over some tiles is not the reference's."""
    try:
        error, _ = difference(long_case(6), kernels, MMA)
    except (TrapError, AssertionError):
        return True
    return not error <= LONG.tolerance


def test_fragments_are_those_of_a_matrix_product() -> None:
    """Every element of A, B and C is held once, and what the lanes' fragments give is A times B."""
    for fragment, shape in ((FRAGMENT_A, (16, 16)), (FRAGMENT_B, (16, 8)), (FRAGMENT_C, (16, 8))):
        held = np.zeros(shape, np.int64)
        for rows, columns in fragment:
            np.add.at(held, (rows, columns), 1)
        assert (held == 1).all()
    rng = np.random.default_rng(0)
    a, b = rng.integers(-4, 5, (16, 16)).astype(np.float16), rng.integers(-4, 5, (16, 8)).astype(np.float16)
    held_a, held_b = (
        np.stack([x[rows, columns] for rows, columns in f], 1)[None] for x, f in ((a, FRAGMENT_A), (b, FRAGMENT_B))
    )
    product = multiply_matrices(held_a, held_b, np.zeros((1, 32, 4), np.float32))[0]
    want = a.astype(np.float32) @ b.astype(np.float32)
    for i, (rows, columns) in enumerate(FRAGMENT_C):
        assert np.array_equal(product[:, i], want[rows, columns])
