"""Fewer tokens in a cache: which of them attention needs, and tiles that hold only these; in numpy, normative.

The tokens are scored by the attention of a prompt's last queries, as in SnapKV (arXiv 2404.14469), each KV head by
itself. Sinks, full-precision rows and the last tile stay as they are; of the tiles before it only the chosen tokens
stay, moved together. What is kept is a cache again: its tokens have their positions in them, and whole tiles are all
that goes, so that every kept row stays in the tile or row that the new length gives it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.spec.key_basis import Float, KeyBasis
from skv_export.spec.layout import Bytes, CacheLayout
from skv_export.spec.quantizer import decode_tile, encode_tile

POOLED = 7
"""Neighbouring positions that share the largest score among them: words are several tokens."""
_MOVED_BY_CODE = ("token",)
"""Granularities whose codes and scales are a token's own: they move without being rounded again."""


def least_kept(layouts: Iterable[CacheLayout]) -> int:
    """Fewest tokens that a sequence can be asked to keep, for the layouts of all layers.

    Sinks, full-precision rows and a tile to round to; layers with a sliding window need the whole of it.
    """
    return max(
        layout.full_rows
        + layout.tile_tokens
        + max(0, layout.local_window_size - layout.recent_tokens - layout.tile_tokens)
        for layout in layouts
    )


def tokens_to_drop(layouts: Iterable[CacheLayout], length: int, keep: int) -> int:
    """Tokens that go so that at most ``keep`` of ``length`` stay: whole tiles' worth, the same in every layer.

    Args:
        layouts: Of all layers.
        length: Tokens held.
        keep: Most tokens to hold.

    Raises:
        SkvError: ``keep`` is less than the layouts allow.
    """
    layouts = tuple(layouts)
    least = least_kept(layouts)
    if keep < least:
        raise SkvError(
            "tokens to keep",
            got=keep,
            expected=f"at least {least}: sinks, full-precision tokens, a tile; and a sliding window, if there is one",
        )
    step = math.lcm(*(layout.tile_tokens for layout in layouts))
    return max(0, -(-(length - keep) // step) * step)


def attention_received(query: Float, key: Float, *, scale: float, softcap: float = 0.0) -> NDArray[np.float32]:
    """The attention that tokens get from the last queries of a sequence; full attention, without ``head_sink``.

    Args:
        query: ``[N, S, D]``, of the last S tokens, after RoPE and QK norm.
        key: ``[N_kv, length, D]``, as the cache holds them, those of the queries' own tokens included; in the basis of
            the queries (``reference.prepare``).
        scale: Multiplies the scores.
        softcap: As the op's attribute.

    Returns:
        ``[N_kv, length]``: summed over the queries, the largest of ``POOLED`` neighbours, the mean over the query heads
        that share a KV head.
    """
    heads, length = key.shape[:2]
    tokens = query.shape[1]
    grouped = query.reshape(heads, -1, query.shape[-1])
    after = np.arange(length)[None, :] > (length - tokens + np.arange(tokens))[:, None]
    found = np.empty((heads, length), np.float32)
    for h in range(heads):  # one at a time: a long prompt's scores are many
        scores = grouped[h] @ key[h].T * np.float32(scale)
        if softcap > 0:
            scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
        scores = np.where(after, np.float32(-np.inf), scores.reshape(-1, tokens, length))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        received = (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=1)
        edge = POOLED // 2
        padded = np.pad(received, ((0, 0), (edge, edge)))
        pooled = np.lib.stride_tricks.sliding_window_view(padded, POOLED, axis=-1).max(axis=-1)
        found[h] = pooled.mean(axis=0)
    return found


def candidates(layout: CacheLayout, length: int, dropped: int) -> tuple[int, int, int]:
    """Which tokens may go from a layer with full attention: those in tiles, but for the last tile.

    Args:
        layout: Of keys or values.
        length: Tokens held.
        dropped: Of ``tokens_to_drop``, above 0.

    Returns:
        The position of the first, how many there are, and how many of them stay.
    """
    tokens = layout.quantized_tokens(length) - layout.tile_tokens
    return layout.num_sink_tokens, tokens, max(tokens - dropped, 0)


def choose(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Returns the places of the ``count`` highest scores ``[N_kv, tokens]``, ascending; of equals the earlier ones."""
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :count]
    return np.sort(order, axis=-1)


def move_tokens(layout: CacheLayout, tiles: Bytes, chosen: NDArray[np.int64], basis: KeyBasis | None = None) -> Bytes:
    """Puts the chosen tokens of tiles together in fewer tiles.

    With granularity ``token``, and with 16 bits, they keep their bytes; otherwise they are read back, rounded to
    ``recent_type``, and quantized again with the tokens that are their neighbours now.

    Args:
        layout: The tensor's layout.
        tiles: ``[N_kv, tiles, tile_bytes]``.
        chosen: ``[N_kv, count]``, places of tokens in these tiles, a multiple of the tile's tokens of them.
        basis: Of calibrated keys.

    Returns:
        ``[N_kv, count / T, tile_bytes]``.
    """
    heads, t, d = len(tiles), layout.tile_tokens, layout.padded_dim
    count = chosen.shape[1] // t

    def gathered(x: NDArray[np.generic], dim: int) -> NDArray[np.generic]:
        """``[N_kv, tiles, T, dim]`` to the chosen tokens' ``[N_kv, count, T, dim]``."""
        rows = x.reshape(heads, -1, dim)
        return np.take_along_axis(rows, chosen[:, :, None], axis=1).reshape(heads, count, t, dim)

    if not count:
        return tiles[:, :0]
    if layout.granularity in _MOVED_BY_CODE and layout.bits != 16:
        codes, scale, _ = layout.unpack_tile(tiles)
        groups = gathered(scale.swapaxes(-1, -2), layout.num_groups).swapaxes(-1, -2)
        return layout.pack_tile(gathered(codes, d).astype(np.uint8), groups.astype(np.float16), None)
    content = gathered(decode_tile(layout, tiles, basis), d)
    return encode_tile(layout, content.astype(layout.recent_dtype), basis)


def fewer_tiles(
    layout: CacheLayout, tiles: Bytes, chosen: NDArray[np.int64], dropped: int, basis: KeyBasis | None = None
) -> Bytes:
    """Tiles ``[N_kv, tiles, tile_bytes]`` of a layer with full attention without what was not chosen.

    Args:
        layout: The tensor's layout.
        tiles: All tiles.
        chosen: ``[N_kv, count]``, of ``candidates``.
        dropped: Of ``tokens_to_drop``, above 0.
        basis: Of calibrated keys.

    Returns:
        ``[N_kv, tiles - dropped / T, tile_bytes]``: the chosen tokens' tiles, and the last one; if only full-precision
        rows are left, none.
    """
    last = tiles[:, -1:] if tiles.shape[1] > dropped // layout.tile_tokens else tiles[:, :0]
    return np.concatenate([move_tokens(layout, tiles[:, :-1], chosen, basis), last], axis=1)


def shift_rows(layout: CacheLayout, rows: Bytes, dropped: int) -> Bytes:
    """Full-precision rows ``[N_kv, R * row_bytes]`` after ``dropped`` tokens before them have gone.

    Each recent token's row is where its new position puts it; sinks stay.
    """
    found = rows.reshape(len(rows), layout.full_rows, layout.row_bytes).copy()
    sinks = layout.num_sink_tokens
    found[:, sinks:] = np.roll(found[:, sinks:], -(dropped % layout.ring_tokens), axis=1)
    return found.reshape(rows.shape)
