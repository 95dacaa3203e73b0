"""Calls with embeddings in the place of tokens: what a vision tower makes of an image, merged into a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skv_export.arguments import shown
from skv_export.errors import SkvError
from skv_export.runtime import arrays

if TYPE_CHECKING:
    from skv_export.runtime.cache import Cache
    from skv_export.runtime.session import Session


def run(
    session: Session,
    inputs_embeds: ArrayLike,
    attention_mask: ArrayLike | None,
    position_ids: ArrayLike | None,
    cache: Cache,
) -> NDArray[np.float32]:
    """``Session.run`` with embeddings; its arguments and results.

    Raises:
        SkvError: The graph takes none, or see ``Session.run``.
    """
    embeds = checked(session, inputs_embeds, cache.batch)
    shape = embeds.shape[:2]
    new = np.ones(shape, np.bool_)
    if attention_mask is not None:
        new = arrays.new_columns(attention_mask, shape[1], cache.lengths)
    places = arrays.positions(position_ids, session.config.position_axes, new, session.config.context_length)
    ids = np.full(shape, session.pad_token_id, np.int64)
    return session.run_columns(ids, new, places, cache, embeds)


def checked(session: Session, inputs_embeds: ArrayLike, batch: int) -> NDArray[np.float32]:
    """Returns embeddings ``[B, S, hidden]`` as the graph takes them.

    Raises:
        SkvError: The graph takes none; another shape, other than numbers, or one that is not finite.
    """
    hidden = session.config.inputs_embeds
    if not hidden:
        raise SkvError(
            f"{session.folder}: inputs_embeds",
            got="a graph that takes tokens only",
            fix="Export the checkpoint with --inputs-embeds.",
        )
    given: Any = inputs_embeds
    try:
        if "complex" in str(getattr(given, "dtype", "")):
            raise TypeError("complex numbers")
        if hasattr(given, "detach"):  # torch's, which numpy takes neither in bfloat16 nor with a gradient
            given = given.detach().cpu().float()
        found = np.asarray(given, np.float32)
    except (ValueError, TypeError, RuntimeError) as error:
        raise SkvError("inputs_embeds", got=shown(inputs_embeds), expected="numbers, [B, S, hidden]") from error
    if found.ndim != 3 or found.shape[0] != batch or found.shape[1] < 1 or found.shape[2] != hidden:
        expected = f"[{batch}, at least 1, {hidden}]"
        raise SkvError("inputs_embeds: shape", got=list(found.shape), expected=expected)
    if not np.isfinite(found).all():
        raise SkvError("inputs_embeds", got="infinite numbers or not-a-number", expected="finite numbers")
    return np.ascontiguousarray(found)
