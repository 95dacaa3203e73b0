"""The gates of experts that ONNX Runtime's operators have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gate:
    """``g * sigmoid(alpha * g) * (u + beta)``, of ``g`` up to ``limit`` and ``u`` within it; 0 = no limit."""

    alpha: float = 1.0
    beta: float = 0.0
    limit: float = 0.0


def gate_of(module: Any) -> Gate | None:
    """The gate of a layer's experts; None where the operators have no such gate."""
    if not getattr(module, "has_gate", False) or getattr(module, "has_post_expert_norm", False):
        return None
    gate = type(module)._apply_gate.__name__, type(getattr(module, "act_fn", None)).__name__
    if gate in (("_default_apply_gate", "SiLU"), ("_default_apply_gate", "SiLUActivation")):
        return Gate()
    if type(module).__name__ == "GptOssExperts":
        return Gate(float(module.alpha), 1.0, float(module.limit))
    return None
