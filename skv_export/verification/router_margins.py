"""How near routers' choices of experts are: where two are nearer than rounding, either choice is right."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class RouterMargins(TorchFunctionMode):
    """While it is entered, notes how near the choices of experts are: routers choose by ``torch.topk``, in each row.

    Attributes:
        least: The smallest distance between the last expert chosen and the first that is not, over the former's score.
    """

    def __init__(self) -> None:
        super().__init__()
        self.least = math.inf

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            scores, count = args[0], int(args[1] if len(args) > 1 else given["k"])
            if scores.dim() == 2 and count < scores.shape[-1]:  # three: a score for each group of experts
                chosen, other = func(scores, count + 1, dim=-1).values[:, -2:].unbind(-1)
                margins = ((chosen - other) / chosen.abs().clamp_min(1e-30))[other.isfinite()]  # masked ones are none
                self.least = min(self.least, float(margins.min()) if len(margins) else math.inf)
        return func(*args, **given)
