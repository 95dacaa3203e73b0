"""The reference implementation of the cache and the op: append, load, rewind and attend, in numpy float32. Kernels are
tested against it: their cache bytes must be equal, their attention within a tolerance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.spec.key_basis import Float, KeyBasis
from skv_export.spec.layout import Bytes, CacheLayout
from skv_export.spec.op import AttentionParams
from skv_export.spec.quantizer import decode_tile, encode_tile, rotate, to_half, tree_sum

Int32 = NDArray[np.int32]


# The cache.


def prepare(layout: CacheLayout, x: Float) -> Float:
    """New tokens ``[..., head_dim]`` as attention sees them: padded to D and rotated, in float32."""
    pad = layout.padded_dim - layout.head_dim
    x = np.concatenate([x, np.zeros((*x.shape[:-1], pad), np.float32)], axis=-1) if pad else x
    return rotate(x, layout.rotation_dim) if layout.rotation == "hadamard" else x.astype(np.float32)


def stored(layout: CacheLayout, x: Float) -> NDArray[np.generic]:
    """New tokens ``[..., head_dim]`` as the cache holds them: non-finite as 0, padded, rotated, in ``recent_type``."""
    return _to_recent(layout, prepare(layout, np.where(np.isfinite(x), x, np.float32(0))))


def append(layout: CacheLayout, block: Bytes, past_length: int, x: Float, basis: KeyBasis | None = None) -> None:
    """Appends tokens to the blocks of one sequence, in place.

    Args:
        layout: The tensor's layout.
        block: ``[N_kv, C]``.
        past_length: Tokens held so far.
        x: ``[N_kv, S, head_dim]``.
        basis: Of calibrated keys.

    Raises:
        SkvError: The total length is beyond the block's capacity; nothing is written.
    """
    length = past_length + x.shape[1]
    _check_capacity(layout, block.shape[-1], length)
    rows = _full_rows(layout, block)
    new = stored(layout, x)
    tiles, t, sinks = layout.tiles_in(block.shape[-1]), layout.tile_tokens, layout.num_sink_tokens
    first = layout.quantized_tokens(past_length) // t
    last = layout.quantized_tokens(length) // t
    for tile in range(max(first, last - tiles), last):
        positions = sinks + tile * t + np.arange(t)
        old = positions[positions < past_length]
        held = [rows[:, [layout.full_row(p) for p in old]]] if old.size else []
        content = np.concatenate([*held, new[:, positions[old.size :] - past_length]], axis=1)
        start = tile % tiles * layout.tile_bytes
        block[:, start : start + layout.tile_bytes] = encode_tile(layout, content, basis)
    for position in range(past_length, length):
        if position < sinks or position >= length - layout.ring_tokens:
            rows[:, layout.full_row(position)] = new[:, position - past_length]
    _write_rows(layout, block, rows)


def load(
    layout: CacheLayout, block: Bytes, length: int, basis: KeyBasis | None = None
) -> tuple[Float, NDArray[np.bool_]]:
    """Reads a cache back.

    Args:
        layout: The tensor's layout.
        block: ``[N_kv, C]``.
        length: Tokens held.
        basis: Of calibrated keys.

    Returns:
        ``[N_kv, length, D]`` in float32, in the basis of the full-precision rows, and which positions are held
        ``[length]``: a sliding window's ring forgets old tiles; there the values are 0.
    """
    _check_capacity(layout, block.shape[-1], length)
    t, sinks = layout.tile_tokens, layout.num_sink_tokens
    tiles, n_q = layout.tiles_in(block.shape[-1]), layout.quantized_tokens(length)
    x = np.zeros((block.shape[0], length, layout.padded_dim), np.float32)
    held = np.ones(length, np.bool_)
    rows = _full_rows(layout, block)
    exact = [p for p in range(length) if p < sinks or p >= sinks + n_q]
    x[:, exact] = rows[:, [layout.full_row(p) for p in exact]].astype(np.float32)
    for tile in range(n_q // t):
        span = slice(sinks + tile * t, sinks + (tile + 1) * t)
        if tile < n_q // t - tiles:
            held[span] = False
            continue
        start = tile % tiles * layout.tile_bytes
        x[:, span] = decode_tile(layout, block[:, start : start + layout.tile_bytes], basis)
    return x, held


def rewind(
    layout: CacheLayout,
    block: Bytes,
    length: int,
    new_length: int,
    longest_length: int | None = None,
    basis: KeyBasis | None = None,
) -> None:
    """Makes the blocks of ``length`` tokens blocks of ``new_length`` tokens, in place.

    Tokens that leave a tile and whose row in the ring has been overwritten are restored from their codes; every other
    token keeps its bytes. Rows and a sliding window's tiles are overwritten up to the longest length that the blocks
    have had, so a cache that is rewound repeatedly must say it. See ``rewind_floor`` for how far back is possible.

    Args:
        layout: The tensor's layout.
        block: ``[N_kv, C]``.
        length: Tokens held.
        new_length: Tokens to hold.
        longest_length: Most tokens held since the blocks were empty; None = ``length``, right for a first rewind.
        basis: Of calibrated keys.

    Raises:
        SkvError: ``new_length`` is above ``length``, or too far back; or ``longest_length`` is below ``length``.
    """
    longest = length if longest_length is None else longest_length
    if longest < length:
        raise SkvError("rewind: longest length", got=longest, expected=f"at least the length, {length}")
    floor = rewind_floor(layout, block.shape[-1], length, longest)
    if not floor <= new_length <= length:
        raise SkvError(
            f"rewind from {length} tokens",
            got=new_length,
            expected=f"{floor} ... {length} (recent_tokens = {layout.recent_tokens})",
            fix="Start the sequence again, or export with more recent tokens.",
        )
    t, sinks, tiles = layout.tile_tokens, layout.num_sink_tokens, layout.tiles_in(block.shape[-1])
    rows = _full_rows(layout, block)
    for tile in range(layout.quantized_tokens(new_length) // t, layout.quantized_tokens(length) // t):
        start = tile % tiles * layout.tile_bytes
        content = decode_tile(layout, block[:, start : start + layout.tile_bytes], basis)
        for i, position in enumerate(range(sinks + tile * t, sinks + (tile + 1) * t)):
            if position < longest - layout.ring_tokens:
                rows[:, layout.full_row(position)] = _to_recent(layout, content[:, i])
    _write_rows(layout, block, rows)


def rewind_floor(layout: CacheLayout, block_bytes: int, length: int, longest_length: int) -> int:
    """Smallest length to which blocks can be rewound.

    That is ``recent_tokens`` back, or 0 while nothing is quantized. A sliding window's ring of tiles has in addition
    forgotten what the longest length pushed out: the next query's window must begin after it. One rewind never meets
    this limit, and none does that stays within ``recent_tokens`` of the longest length.

    Args:
        layout: The tensor's layout.
        block_bytes: Bytes of one block.
        length: Tokens held.
        longest_length: Most tokens held since the blocks were empty.
    """
    if layout.quantized_tokens(length) == 0:
        return 0
    floor = length - layout.recent_tokens
    forgotten = layout.quantized_tokens(longest_length) // layout.tile_tokens - layout.tiles_in(block_bytes)
    if forgotten > 0:  # these tiles must be out of the window, and stay in tiles
        needed = max(layout.local_window_size - 1, layout.recent_tokens)
        floor = max(floor, layout.num_sink_tokens + forgotten * layout.tile_tokens + needed)
    return floor


def longest_after_rewind(layout: CacheLayout, longest_length: int, new_length: int) -> int:
    """The longest length to assume after a rewind to ``new_length``; never above the previous one.

    All rows that are in use are whole again then, as if the blocks had never been longer than those rows reach. Where
    a sliding window's ring of tiles has forgotten more than that length would, the old one stands.
    """
    quantized = layout.quantized_tokens(new_length)
    if layout.local_window_size and layout.quantized_tokens(longest_length) > quantized + layout.tile_tokens:
        return longest_length
    return min(longest_length, layout.num_sink_tokens + quantized + layout.ring_tokens)


def _to_recent(layout: CacheLayout, x: Float) -> NDArray[np.generic]:
    return to_half(x) if layout.recent_type == "float16" else x.astype(layout.recent_dtype)


def _full_rows(layout: CacheLayout, block: Bytes) -> NDArray[np.generic]:
    """A copy of the full-precision rows ``[N_kv, R, D]``."""
    tail = np.ascontiguousarray(block[:, block.shape[-1] - layout.full_rows * layout.row_bytes :])
    return tail.view(layout.recent_dtype).reshape(block.shape[0], layout.full_rows, layout.padded_dim)


def _write_rows(layout: CacheLayout, block: Bytes, rows: NDArray[np.generic]) -> None:
    block[:, block.shape[-1] - layout.full_rows * layout.row_bytes :] = rows.view(np.uint8).reshape(block.shape[0], -1)


def _check_capacity(layout: CacheLayout, block_bytes: int, length: int) -> None:
    capacity = layout.capacity(block_bytes)
    if capacity is not None and length > capacity:
        raise SkvError(
            f"{'value' if layout.is_value else 'key'} cache: total length",
            got=f"{length} tokens",
            expected=f"at most its capacity of {capacity}",
            fix="Allocate the cache for a larger max_length.",
        )


# The op.


def quantized_kv_attention(
    params: AttentionParams,
    layouts: tuple[CacheLayout, CacheLayout],
    query: Float,
    key: Float | None,
    value: Float | None,
    past_key: Bytes,
    past_value: Bytes,
    seqlens_k: Int32,
    *,
    cos_cache: Float | None = None,
    sin_cache: Float | None = None,
    position_ids: NDArray[np.int64] | None = None,
    head_sink: Float | None = None,
    q_norm_weight: Float | None = None,
    k_norm_weight: Float | None = None,
    query_seqlens: Int32 | None = None,
    key_basis: KeyBasis | None = None,
) -> tuple[Float, Bytes, Bytes]:
    """The op ``skv::QuantizedKVAttention`` (docs/spec.md, The op).

    Args:
        params: Attributes.
        layouts: Layouts of keys and values.
        query: ``[B, S, N*head_dim]``, or packed QKV ``[B, S, (N + 2*N_kv)*head_dim]``.
        key: ``[B, S, N_kv*head_dim]`` or None.
        value: The same.
        past_key: ``[B, N_kv, rows, W]``.
        past_value: The same.
        seqlens_k: ``[B]``, total length after this call minus 1.
        cos_cache: ``[max_position, rotary_dim/2]``.
        sin_cache: The same.
        position_ids: ``[B, S]``; else past length + index.
        head_sink: ``[N]``, a logit that takes part in the softmax and has no value.
        q_norm_weight: ``[head_dim]``.
        k_norm_weight: ``[head_dim]``.
        query_seqlens: ``[B]``, new tokens per sequence, at the front of its S; else min(S, total length).
        key_basis: The inputs ``key_basis``, ``query_basis`` and ``key_feedback``.

    Returns:
        output ``[B, S, N*head_dim]`` (zeros where a sequence has no token), present_key, present_value (copies).

    Raises:
        SkvError: A length is negative, shrinking, or beyond the capacity; or the keys can't have a basis.
    """
    if key_basis is not None:
        key_basis.check(layouts[0], params.kv_num_heads)
    batch, tokens = query.shape[:2]
    n, n_kv, d = params.num_heads, params.kv_num_heads, layouts[0].head_dim
    if key is None or value is None:
        query, key, value = np.split(query, [n * d, (n + n_kv) * d], axis=-1)
    q, k, v = (_heads(x, d) for x in (query, key, value))
    if q_norm_weight is not None:
        q = _rms_norm(q, q_norm_weight, params.qk_norm_epsilon)
    if k_norm_weight is not None:
        k = _rms_norm(k, k_norm_weight, params.qk_norm_epsilon)
    present_key, present_value = past_key.copy(), past_value.copy()
    output = np.zeros((batch, tokens, n * d), np.float32)
    for b in range(batch):
        total = int(seqlens_k[b]) + 1
        new = int(query_seqlens[b]) if query_seqlens is not None else min(tokens, total)
        if not 0 <= new <= min(tokens, total):
            raise SkvError(
                f"sequence {b}: lengths", got=f"{new} new tokens of {total}", expected=f"0 ... {min(tokens, total)}"
            )
        if new == 0:
            continue
        past = total - new
        qb, kb, vb = (x[b, :, :new] for x in (q, k, v))
        if params.do_rotary:
            if cos_cache is None or sin_cache is None:
                raise SkvError("do_rotary", got="no cos_cache, sin_cache", expected="both")
            positions = position_ids[b, :new] if position_ids is not None else np.arange(past, total)
            qb, kb = (_rope(x, cos_cache[positions], sin_cache[positions], params.rotary_interleaved) for x in (qb, kb))
        blocks = [p[b].reshape(n_kv, -1) for p in (present_key, present_value)]
        out = attend(params, layouts, qb, kb, vb, (blocks[0], blocks[1]), past, head_sink, key_basis)
        output[b, :new] = out.swapaxes(0, 1).reshape(new, n * d)
        for layout, block, x, basis in zip(layouts, blocks, (kb, vb), (key_basis, None), strict=True):
            append(layout, block, past, x, basis)
    return output, present_key, present_value


def attend(
    params: AttentionParams,
    layouts: tuple[CacheLayout, CacheLayout],
    query: Float,
    key: Float,
    value: Float,
    blocks: tuple[Bytes, Bytes],
    past_length: int,
    head_sink: Float | None = None,
    key_basis: KeyBasis | None = None,
) -> Float:
    """Attention of one sequence's new tokens to each other, exactly, and to the past through the cache; writes nothing.

    What is not a number stays so, and spreads to what depends on it alone: a query to its row, a key to the rows that
    see it, a value to its channel (with a rotation, its block of channels) of these rows.

    Args:
        params: Attributes.
        layouts: Layouts of keys and values.
        query: ``[N, S, head_dim]``.
        key: ``[N_kv, S, head_dim]``.
        value: The same.
        blocks: Key and value blocks ``[N_kv, C]``.
        past_length: Tokens in the cache.
        head_sink: ``[N]``.
        key_basis: Of calibrated keys.

    Returns:
        ``[N, S, head_dim]``.
    """
    k_layout, v_layout = layouts
    groups, tokens = params.num_heads // params.kv_num_heads, query.shape[1]
    past_k, held = load(k_layout, blocks[0], past_length, key_basis)
    past_v, _ = load(v_layout, blocks[1], past_length)
    k = np.repeat(np.concatenate([past_k, prepare(k_layout, key)], axis=1), groups, axis=0)
    v = np.repeat(np.concatenate([past_v, prepare(v_layout, value)], axis=1), groups, axis=0)
    scale = np.float32(params.scale or k_layout.head_dim**-0.5)
    scores = (prepare(k_layout, query) @ k.swapaxes(-1, -2)) * scale
    if params.softcap > 0:
        scores = np.float32(params.softcap) * np.tanh(scores / np.float32(params.softcap))
    distance = past_length + np.arange(tokens)[:, None] - np.arange(k.shape[1])[None, :]
    seen = distance >= 0
    if params.local_window_size > 0:
        seen &= distance < params.local_window_size
    seen[:, :past_length] &= held
    scores = np.where(seen, scores, np.float32(-np.inf))
    peak = scores.max(axis=-1, keepdims=True)
    if head_sink is not None:
        sink = head_sink.astype(np.float32)[:, None, None]
        peak = np.maximum(peak, sink)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    if head_sink is not None:
        total = total + np.exp(sink - peak)
    out = _weighted_sum(weights / total, v, seen)
    if v_layout.rotation == "hadamard":
        out = rotate(out, v_layout.rotation_dim)
    return out[..., : v_layout.head_dim]


def _weighted_sum(weights: Float, v: Float, seen: NDArray[np.bool_]) -> Float:
    """``weights`` ``[N, S, tokens]`` times ``v``, ``[N, S, D]``; a row takes nothing from what it does not see."""
    finite = np.isfinite(v)
    out = weights @ np.where(finite, v, np.float32(0))
    for token in np.flatnonzero(~finite.all(axis=(0, 2))):
        rest = np.where(finite[:, token], np.float32(0), v[:, token])
        out += np.where(seen[:, token, None], weights[:, :, token, None] * rest[:, None], np.float32(0))
    return out


def _heads(x: Float, head_dim: int) -> Float:
    """``[B, S, H*head_dim]`` to ``[B, H, S, head_dim]``."""
    return x.astype(np.float32).reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def _rms_norm(x: Float, weight: Float, epsilon: float) -> Float:
    mean_square = tree_sum(x * x)[..., None] / np.float32(x.shape[-1])
    return x / np.sqrt(mean_square + np.float32(epsilon)) * weight.astype(np.float32)


def _rope(x: Float, cos: Float, sin: Float, interleaved: bool) -> Float:
    """RoPE of ``[H, S, head_dim]`` with ``cos``, ``sin`` ``[S, rotary_dim/2]``; channels past rotary_dim stay."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos.astype(np.float32), sin.astype(np.float32)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return np.concatenate([turned, rest], axis=-1)
