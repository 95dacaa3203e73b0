"""Bugs to plant in the CUDA kernels, to check that the tests find them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One bug.

    Attributes:
        name: What is wrong then.
        file: In ``native/cuda``.
        old: Text that stands there exactly once.
        new: What replaces it.
        found_by: ``results`` (a difference, or the shim's own checks), ``address`` or ``thread`` (the sanitizers).
    """

    name: str
    file: str
    old: str
    new: str
    found_by: str = "results"


MUTATIONS = (
    Mutation(
        "no barrier before the warps are merged",
        "decode_mma.cuh",
        "  __syncthreads();\n  const int lane = threadIdx.x % 32;\n  for (int i = w;",
        "  const int lane = threadIdx.x % 32;\n  for (int i = w;",
    ),
    Mutation(
        "shared memory four bytes short",
        "mma_form.h",
        "(f.dim + 2) * 4)) {}",
        "(f.dim + 2) * 4) - 4) {}",
        "address",
    ),
    Mutation(
        "shuffle in a divergent branch",
        "decode_mma.cuh",
        "for (int lanes = 4; lanes < 32; lanes *= 2) sum +=",
        "if (warp.r < 4) for (int lanes = 4; lanes < 32; lanes *= 2) sum +=",
    ),
    Mutation(
        "operand's registers in the wrong order",
        "mma_warp.cuh",
        "K::raw(words[e % 2], low[e % 2], i + e / 2, i + e / 2, half_1024)",
        "K::raw(words[e / 2], low[e / 2], i + e % 2, i + e % 2, half_1024)",
    ),
    Mutation("rows later than the query not masked", "mma_warp.cuh", "return row > at || (", "return ("),
    Mutation(
        "more means copied than there are",
        "decode_mma.cuh",
        "copy_pieces<S::kMeans>(parameters + S::kScales, values + (piece + a.value.means))",
        "copy_pieces<S::kMeans + 16>(parameters + S::kScales, values + (piece + a.value.means))",
        "address",
    ),
    Mutation(
        "copy not aligned",
        "codes.cuh",
        "async_copy16(to + row * 128, from + row * 4 * tile_tokens)",
        "async_copy16(to + row * 128, from + row * 4 * tile_tokens + 4)",
    ),
    Mutation(
        "shared memory read that nobody wrote",
        "decode_mma.cuh",
        "if (warp.r == 0) {",
        "if (warp.r == 0 && w + 1 < S::kWarpCount) {",
    ),
    Mutation(
        "copies used before they have arrived",
        "decode_mma.cuh",
        "async_wait<S::kStages - 2>();",
        "async_wait<S::kStages - 1>();",
    ),
    Mutation(
        "slabs overwritten while other lanes read them",
        "decode_mma.cuh",
        "    __syncwarp();  // the slab is there",
        "    // the slab is there",
    ),
    Mutation(
        "window one token too wide",
        "mma_warp.cuh",
        "return position + token <= at - a.window",
        "return position + token < at - a.window",
    ),
    Mutation(
        "stored scale not the unbiased one", "quantizer.cuh", "stored = divide(energy, xq)", "stored = scale + 0 * xq"
    ),
    Mutation(
        "codes around the means as they were before their rounding",
        "append.cu",
        "means[e] = __fmul_rn(code, __half2float(grid.unit));",
        "",
    ),
    Mutation(
        "means of the values times the weights of half the tokens",
        "mma_warp.cuh",
        "multiplied(added(added(p[0][n][0], p[0][n][1]), added(p[1][n][0], p[1][n][1])), step)",
        "multiplied(added(p[0][n][0], p[0][n][1]), step)",
    ),
    Mutation(
        "means of the scores not kept for the rest of the tile",
        "mma_warp.cuh",
        "return scores[4 * n + c];",
        "return scores[4 * n + c + (r != 0)];",
    ),
    Mutation(
        "offsets in 8 bits read with the unit of the scales",
        "channels.cuh",
        "offset = unit_times(unit + D / 16, 128)",
        "offset = unit_times(unit, 128)",
    ),
    Mutation(
        "rows overwritten while a tile is read from them",
        "append.cu",
        "parts, true, tokens == 1}",
        "parts, true, tokens <= 8}",
        "thread",
    ),
    Mutation(
        "the merge forgets the last split",
        "combine.cuh",
        "used = peak.y != 0 ? i + 1 : used;",
        "used = peak.y != 0 ? i : used;",
    ),
    Mutation(
        "blocks that append count from the first that merges",
        "append.cu",
        "int(blockIdx.x) - a.combined - (is_value",
        "int(blockIdx.x) - (is_value",
    ),
    Mutation(
        "a block quantizes the tokens of another",
        "append.cu",
        "for (int quad = target.part; quad",
        "for (int quad = target.part + 1; quad",
    ),
    Mutation(
        "splits that overlap",
        "prefill.cu",
        "end = from + share < all ? from + share : all;",
        "end = from + share < all ? from + share + 1 : all;",
    ),
    Mutation(
        "a split's peak in another base",
        "prefill.cu",
        "make_float2(peak[y] * unit * kLn2, sum[y])",
        "make_float2(peak[y] * unit, sum[y])",
    ),
    Mutation(
        "keys overwritten while other warps read them",
        "prefill.cu",
        "      p.add_values(x);\n      __syncthreads();",
        "      p.add_values(x);",
        "thread",
    ),
    Mutation(
        "exact rows read with the queries of the tiles",
        "decode_mma.cuh",
        "prepare_queries<S>(a, a.query, b, head, queries);",
        "",
    ),
    Mutation(
        "calibrated tiles read with plain queries",
        "decode_simple.cu",
        "load_queries(in_tiles ? a.tile_query : a.query)",
        "load_queries(a.query)",
    ),
    Mutation(
        "errors not shared with the channels of other registers",
        "append.cu",
        "if (i < e || lane < l) shift[i]",
        "if (i == e && lane < l) shift[i]",
    ),
    Mutation(
        "queries overwritten while other warps read them",
        "decode_mma.cuh",
        "    __syncthreads();\n    prepare_queries<S>(a, a.query",
        "    prepare_queries<S>(a, a.query",
        "thread",
    ),
)
