"""Whether this machine can run a model to measure it, and what that takes, said before it starts."""

from __future__ import annotations

import importlib.util
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from skv_export.checkpoints.attention_weights import AttentionConfig
from skv_export.checkpoints.checkpoint import Checkpoint

if TYPE_CHECKING:
    from skv_export.analysis.pipeline import MeasureOptions

PATIENCE_SECONDS = 1800.0
"""A measurement that is expected to take longer starts only when it is asked for."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_OVERHEAD = 4.0
"""Measured time over that of the matrix products alone at the speed of a large one."""


@dataclass(frozen=True)
class Effort:
    """What a measurement takes.

    Attributes:
        seconds: About.
        bytes: Of memory, about.
        obstacle: Why it can't be done here; empty if it can.
    """

    seconds: float = 0.0
    bytes: int = 0
    obstacle: str = ""

    @property
    def line(self) -> str:
        """Returns one sentence for the terminal."""
        if self.obstacle:
            return f"not measured: {self.obstacle}"
        minutes = self.seconds / 60
        time_text = f"{minutes:.0f} minutes" if minutes >= 2 else f"{self.seconds:.0f} seconds"
        return f"measuring: about {time_text} and {self.bytes / 2**30:.1f} GiB of memory (--no-measure: weights only)"


def estimate(opened: Checkpoint, options: MeasureOptions) -> Effort:
    """Estimates a measurement of a checkpoint, without loading it.

    A timed matrix product gives the machine's speed.
    """
    obstacle = _obstacle(opened)
    if obstacle:
        return Effort(obstacle=obstacle)
    weights = sum(math.prod(opened.shape(name)) for name in opened.names())
    vocabulary = int((opened.config.get("text_config") or opened.config).get("vocab_size") or 1 << 17)
    need = 4 * weights + 16 * options.window * vocabulary
    free = _available_bytes()
    if need > free:
        text = f"{need / 2**30:.1f} GiB of memory needed, {free / 2**30:.1f} GiB are free"
        return Effort(0.0, need, text)
    return Effort(_OVERHEAD * _operations(opened, weights, options) / _speed(), need)


def _obstacle(opened: Checkpoint) -> str:
    source = opened.source
    if source.path is None:
        return "the weights are not on this machine (only the attention's projections are read from the hub)"
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if source.kind != "gguf" and not any((source.path / name).is_file() for name in _TOKENIZER_FILES):
        return "the checkpoint has no tokenizer"
    return ""


def _operations(opened: Checkpoint, weights: int, options: MeasureOptions) -> float:
    """Floating-point operations: calibration runs forward and backward, and attention once per width."""
    config = AttentionConfig.from_config(opened.config)
    tokens = options.window
    forward = 2.0 * weights * tokens
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * tokens**2 * config.head_dim
    calibration = 2 * forward + 20 * attention
    confirmation = 5 * (forward + 2 * attention)  # full precision, the allocation, and three uniform pairs at most
    return options.windows * calibration + options.confirm_windows * confirmation


def _speed() -> float:
    """Operations per second of a float32 matrix product: of the fastest of several, as others are often disturbed."""
    import torch

    a = torch.ones(768, 768)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * 768**3 / min(seconds)


def _available_bytes() -> float:
    """Memory that can be had without swapping; endless where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return float(found[0]) if found else math.inf
