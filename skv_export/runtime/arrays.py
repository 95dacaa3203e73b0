"""Arrays as callers give them: token ids, positions and masks, checked before numpy makes something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skv_export.arguments import shown
from skv_export.errors import SkvError

NO_TOKEN = -1
"""Stands in a cache's list of tokens for what came as an embedding: it is no token, so no prompt begins like it."""


def integers(name: str, value: ArrayLike) -> NDArray[np.int64]:
    """Returns whole numbers as an array; an empty one may have any type.

    Args:
        name: What the message calls them.
        value: Nested sequences, or an array of numpy's or torch's.

    Raises:
        SkvError: Rows of several lengths, or other than whole numbers of 64 bits: fractions are never cut off.
    """
    found = _array(name, value, "whole numbers")
    if found.dtype == np.uint64 and found.max(initial=0) > np.iinfo(np.int64).max:
        raise SkvError(name, got=found.max(), expected="whole numbers of 64 bits")
    if found.size and found.dtype.kind not in "iu":
        raise SkvError(name, got=shown(value), expected="whole numbers, in rows of one length")
    return np.ascontiguousarray(found.astype(np.int64)).reshape(found.shape)


def mask(name: str, value: ArrayLike) -> NDArray[np.bool_]:
    """Returns where an attention mask has tokens.

    Args:
        name: What the message calls it.
        value: 0 or False = padding, any other number a token.

    Raises:
        SkvError: Rows of several lengths, or other than numbers; not-a-number is none.
    """
    found = _array(name, value, "a mask of 0 and 1")
    if found.dtype.kind not in "biuf" or np.isnan(found).any():
        raise SkvError(name, got=shown(value), expected="a mask of 0 and 1, in rows of one length")
    return found != 0


def _array(name: str, value: ArrayLike, expected: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # ragged, or an object with ideas of its own
        raise SkvError(name, got=shown(value), expected=f"{expected}, in rows of one length") from error


def positions(value: ArrayLike | None, axes: int, new: NDArray[np.bool_], context: int) -> NDArray[np.int64] | None:
    """Returns the positions of new tokens, checked; None where none are given.

    Args:
        value: ``[B, S]``, or what broadcasts to it; with several axes ``[axes, B, S]``, too.
        axes: Positions of a token.
        new: ``[B, S]``, which columns hold tokens.
        context: The model's: positions are below it.

    Raises:
        SkvError: Another shape, or a token's position outside the context.
    """
    if value is None:
        return None
    found = integers("position_ids", value)
    shape = (axes, *new.shape) if axes > 1 and found.ndim == 3 else new.shape
    try:
        found = np.broadcast_to(found, shape)
    except ValueError as error:
        raise SkvError("position_ids: shape", got=list(found.shape), expected=list(shape)) from error
    outside = found[np.broadcast_to(new, shape) & ((found < 0) | (found >= context))]
    if outside.size:
        raise SkvError("position_ids", got=outside[:4].tolist(), expected=f"0 ... {context - 1}, the model's context")
    return found


def new_columns(attention_mask: ArrayLike, columns: int, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns which of the new columns hold tokens, ``[B, columns]``.

    Args:
        attention_mask: ``[B, past columns + columns]``.
        columns: New ones.
        lengths: ``[B]``, tokens that the cache holds.

    Raises:
        SkvError: The mask does not fit the cache.
    """
    found = mask("attention_mask", attention_mask)
    if found.ndim != 2 or found.shape[0] != len(lengths) or found.shape[1] < columns:
        raise SkvError(
            "attention_mask: shape", got=list(found.shape), expected=f"[{len(lengths)}, past columns + {columns}]"
        )
    past = found[:, :-columns].sum(axis=1)
    if not np.array_equal(past, lengths):
        raise SkvError(
            "attention_mask: its columns before the new tokens do not count what the cache holds",
            got=past.tolist(),
            expected=lengths.tolist(),
            fix="Pass the mask of all tokens so far, or none.",
        )
    return found[:, -columns:]


def check_ids(ids: NDArray[np.int64], batch: int | None, vocab_size: int) -> None:
    """Checks tokens ``[B, S]``; ``batch`` is B, None = any number.

    Raises:
        SkvError: The shape is another one, or a token is outside the vocabulary.
    """
    if ids.ndim != 2 or ids.shape[0] != (batch or ids.shape[0]) or ids.size == 0:
        wanted = "at least 1" if batch is None else batch
        raise SkvError("input_ids: shape", got=list(ids.shape), expected=f"[{wanted}, at least 1]")
    if ids.min() < 0 or ids.max() >= vocab_size:
        outside = sorted({int(i) for i in ids.flat if not 0 <= i < vocab_size})
        raise SkvError("input_ids: no such token", got=outside[:4], expected=f"0 ... {vocab_size - 1}")


def check_unpadded(folder: object, new: NDArray[np.bool_]) -> None:
    """Refuses padding where a graph returns the last columns' logits only; ``new`` says what is none, ``[B, S]``.

    Raises:
        SkvError: A sequence has fewer new tokens than there are columns, and some.
    """
    tokens = new.sum(axis=1)
    if ((tokens > 0) & (tokens < new.shape[1])).any():
        raise SkvError(
            f"{folder}: it returns the logits of the last columns only, so its batches can't be padded",
            got=f"{tokens.tolist()} new tokens",
            expected="as many for each sequence",
            fix="Run the sequences one by one, or rewrite a model that returns all logits.",
        )


def last_logits(logits: NDArray[np.float32], new: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The logits of each sequence's last new token, ``[B, vocab_size]``.

    Args:
        logits: What ``Session.run`` returned: of the last token alone, or of all columns.
        new: ``[B, S]``, which columns hold tokens.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    new = new[:, -logits.shape[1] :]
    ends = np.where(new, np.arange(new.shape[1]), -1).max(axis=1)
    return logits[np.arange(len(logits)), ends]


def padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns rows of tokens side by side, padded on the right, and where they are: ``[B, S]`` each.

    Args:
        rows: The tokens of each sequence.
        pad_token_id: Fills what is behind them.

    Raises:
        SkvError: Other than whole numbers of 64 bits.
    """
    width = max(map(len, rows), default=0)
    found = np.arange(width)[None, :] < np.array([len(row) for row in rows], np.int64)[:, None]
    ids = np.full(found.shape, pad_token_id, np.int64)
    ids[found] = integers("input_ids", [token for row in rows for token in row])
    return ids, found
