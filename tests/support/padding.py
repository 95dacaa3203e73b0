"""Prompts of several lengths as one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def padded(prompts: Sequence[torch.Tensor], side: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns token ids and mask ``[B, S]`` of prompts ``[length]``, with padding on the left or the right."""
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int64)
    for i, prompt in enumerate(prompts):
        columns = slice(width - len(prompt), width) if side == "left" else slice(len(prompt))
        ids[i, columns], mask[i, columns] = prompt, 1
    return ids, mask
