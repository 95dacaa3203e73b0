"""Sequences that pass from longrope's first set of frequencies to the second, or back: all of their keys are others
then, so the tokens run anew, in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.runtime import arrays
from skv_export.runtime.prefixes import PrefixStore

if TYPE_CHECKING:
    from skv_export.runtime.cache import Cache
    from skv_export.runtime.session import Session


def prefix_store(nbytes: int, config: ModelConfig) -> PrefixStore | None:
    """Returns the store of beginnings of sequences; None for 0 bytes.

    Raises:
        SkvError: The model has two sets of frequencies: what a sequence began with is other keys once it is long.
    """
    if nbytes and config.rope_switch:
        raise SkvError(
            "prefix_bytes",
            got=f"a model whose RoPE frequencies change beyond {config.rope_switch} tokens (longrope)",
            expected="a model with one set of frequencies",
            fix="Leave it out.",
        )
    return PrefixStore(nbytes) if nbytes else None


def passes(cache: Cache, count: NDArray[np.int64], switch: int) -> bool:
    """Whether a sequence with a past would have keys of the other set after ``count`` new tokens ``[B]``.

    Args:
        cache: Before the call; which of its sequences have keys of the second set is noted for after it.
        count: New tokens of each sequence.
        switch: The longest sequence of the first set; 0 = there is one set.
    """
    if not switch:
        return False
    second = (cache.lengths + count) > switch
    other = (cache.lengths > 0) & (count > 0) & (second != cache.second_rope)
    cache.second_rope[:] = np.where(count > 0, second, cache.second_rope)
    return bool(other.any())


def run_anew(session: Session, ids: NDArray[np.int64], new: NDArray[np.bool_], cache: Cache) -> NDArray[np.float32]:
    """``Session.run_columns`` of all tokens so far and the new ones, in the emptied cache.

    Raises:
        SkvError: Tokens are not known any more: some came as embeddings, or were left out by ``compact``.
    """
    if cache.dropped.any() or any(arrays.NO_TOKEN in row for row in cache.tokens):
        raise SkvError(
            f"a sequence passes {session.config.rope_switch} tokens, where the model's RoPE frequencies change",
            got="tokens that were left out, or came as embeddings",
            expected="all tokens, to run them anew",
            fix="Run the whole prompt in one call, or stay on one side of this length.",
        )
    rows = [[*held, *row[columns].tolist()] for held, row, columns in zip(cache.tokens, ids, new, strict=True)]
    cache.reset()
    whole, mask = arrays.padded(rows, session.pad_token_id)
    logits = session.run_columns(whole, mask, None, cache)
    if logits.shape[1] == 1:
        return logits
    # Of every sequence the new tokens' logits, where these stand among the new columns.
    made = np.zeros((*new.shape, logits.shape[2]), np.float32)
    for out, row, columns, tokens in zip(made, logits, new, rows, strict=True):
        if columns.any():
            out[columns] = row[: len(tokens)][-int(columns.sum()) :]
    return made[:, -logits.shape[1] :]
