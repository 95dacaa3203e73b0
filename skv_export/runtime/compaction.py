"""Fewer tokens in a running cache: those that the last queries look at stay, in smaller buffers.

What is kept, and in which bytes, is ``spec/compaction.py``; here are the cache, its checks, and its buffers.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.model_folder.names import TENSORS
from skv_export.model_folder.skv_config import LayerCache
from skv_export.runtime.cache import Cache
from skv_export.runtime.cache_state import TensorState
from skv_export.spec import compaction
from skv_export.spec.layout import CacheLayout
from skv_export.spec.reference import prepare

if TYPE_CHECKING:
    from skv_export.runtime.session import Session

logger = logging.getLogger(__name__)


def layouts(layers: tuple[LayerCache, ...]) -> list[CacheLayout]:
    """The layouts of all layers' keys and values."""
    return [layout for layer in layers for layout in (layer.key, layer.value)]


def compact(session: Session, cache: Cache, keep: int, room: int | None) -> None:
    """See ``Session.compact``."""
    check(session, keep)
    session.check_cache(cache)
    if cache.shared:
        raise SkvError("compact: cache", got="one that shares its buffers", expected="one whose buffers are its own")
    start, before = time.perf_counter(), cache.nbytes
    drop = [compaction.tokens_to_drop(layouts(cache.layers), int(n), keep) for n in cache.held]
    if not any(drop):
        return
    left = int((session.config.context_length - cache.lengths).min())
    if room is None:
        room = min(int(cache.max_length - cache.held.max()), left)
    if not 0 <= room <= left:
        raise SkvError("compact: room", got=room, expected=f"0 ... {left}, what the model's context leaves")
    longest = max(cache.longest(b) - dropped for b, dropped in enumerate(drop))
    twin = session.cache(cache.batch, max(int((cache.held - drop).max()) + room, longest))
    for b, dropped in enumerate(drop):
        _compact_sequence(session, cache, twin, b, dropped)
    cache.become(twin)
    session.graph.captured.pop(cache, None)  # its buffers are gone
    logger.info("cache of %s tokens compacted to %s: %d bytes instead of %d, in %.2f s", cache.lengths.tolist(),
                cache.held.tolist(), cache.nbytes, before, time.perf_counter() - start)  # fmt: skip


def check(session: Session, keep: int) -> None:
    """Refuses what can't be kept, and sessions that can't compact.

    Raises:
        SkvError: ``keep`` is too small or no number, or the session was opened without ``score_window``.
    """
    if not session.graph.queries:
        raise SkvError(
            "compact: the queries of the last tokens",
            got="a session that does not keep them",
            expected="one that does",
            fix=f"Session(folder, score_window={WINDOW}).",
        )
    compaction.tokens_to_drop(layouts(session.config.layers), 0, keep)


WINDOW = 32
"""Last queries that say what is needed, as a rule."""


def token_scores(session: Session, cache: Cache, b: int, layer: int) -> NDArray[np.float32]:
    """The attention that the tokens in a cache get from the last queries, ``[N_kv, held]``.

    Args:
        session: With ``score_window``.
        cache: Just after the call whose queries count.
        b: The sequence.
        layer: The layer; one with full attention.

    Raises:
        SkvError: There are no queries of its last tokens.
    """
    queries = cache.queries.last(b, session.graph.score_window)
    if not queries:
        raise SkvError(
            f"compact: queries of the last tokens of sequence {b}",
            got="none",
            expected="those of the call before: of a cache that was not rewound or loaded since, and without padding",
        )
    output, keys = session.graph.queries[layer], cache.load(b, (layer, TENSORS[0]))
    layout = cache.layers[layer].key
    query = queries[layer].reshape(len(queries[layer]), -1, layout.head_dim).swapaxes(0, 1)
    return compaction.attention_received(
        prepare(layout, query), keys, scale=output.scale or layout.head_dim**-0.5, softcap=output.softcap
    )


def _compact_sequence(session: Session, cache: Cache, twin: Cache, b: int, dropped: int) -> None:
    """Writes sequence ``b`` into ``twin``, without ``dropped`` of its tokens."""
    left, front = int(cache.held[b]) - dropped, int(cache.chosen[b])
    for i, layer in enumerate(cache.layers):
        chosen = None
        if dropped and not layer.local_window_size:
            sinks, candidates, count = compaction.candidates(layer.key, int(cache.held[b]), dropped)
            scores = token_scores(session, cache, b, i)[:, sinks : sinks + candidates]
            chosen = compaction.choose(scores, count)
            front = max(front, sinks + count)
        for name, layout in zip(TENSORS, (layer.key, layer.value), strict=True):
            state = cache.tensor_state(b, (i, name))
            first, tiles = state.first, state.tiles
            if chosen is not None:
                basis = session.bases.get(i) if name == TENSORS[0] else None
                tiles = compaction.fewer_tiles(layout, tiles, chosen, dropped, basis)
            elif dropped:
                first -= dropped // layout.tile_tokens
                tiles = tiles[:, max(-first, 0) :]
            rows = compaction.shift_rows(layout, state.rows, dropped)
            twin.restore_tensor(b, (i, name), [TensorState(max(first, 0), tiles, rows)], left)
    longest = cache.longest(b) - dropped
    twin.note_restored(b, cache.tokens[b], longest, int(cache.dropped[b]) + dropped, front)
