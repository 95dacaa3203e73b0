"""Second moments of each layer's queries and keys, summed while a model reads text, and the constants that follow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from skv_export.calibration.file import Calibration, fingerprint
from skv_export.calibration.solve import key_basis
from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import Placement, download
from skv_export.errors import SkvError
from skv_export.evaluation import comparison
from skv_export.evaluation.decode_simulation import AttentionOptions, Simulation, simulated_logits
from skv_export.evaluation.text import cut_windows
from skv_export.spec.layout import CHANNEL_MULTIPLE
from skv_export.spec.recipe import LayerConfig

WINDOWS, WINDOW = 16, 1024
"""Windows of text, and tokens of each, unless others are asked for."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


@dataclass
class Moments:
    """Sums over the text so far, of one layer.

    Attributes:
        queries: ``[N_kv, D, D]``, float64: of ``q q^T``, after RoPE and QK norm, over the heads of the group.
        keys: ``[N_kv, D, D]``, float64: of ``k k^T`` around the mean of each tile.
        window: Sliding window; 0 = none.
    """

    queries: Tensor
    keys: Tensor
    window: int

    def add(self, q: Tensor, k: Tensor, tiles: LayerConfig) -> None:
        """Adds a sequence's queries ``[N, S, D]`` and keys ``[N_kv, S, D]``; keys as a cache would cut them."""
        heads, tokens, dim = k.shape
        grouped = q.reshape(heads, -1, dim).double()
        self.queries += (grouped.mT @ grouped).cpu()
        count = max(0, (tokens - tiles.num_sink_tokens) // tiles.tile_tokens)
        content = k[:, tiles.num_sink_tokens :][:, : count * tiles.tile_tokens].double()
        content = content.reshape(heads, count, tiles.tile_tokens, dim)
        around = (content - content.mean(2, keepdim=True)).reshape(heads, -1, dim)
        self.keys += (around.mT @ around).cpu()


@torch.no_grad()
def measure(
    model: PreTrainedModel, windows: Tensor, tiles: LayerConfig | None = None, progress: Progress | None = None
) -> dict[int, Moments]:
    """Runs windows of text through a model with simulated attention; nothing of a layer is kept but its sums.

    Args:
        model: Its attention is ``decode_simulation``'s hook.
        windows: ``[windows, S]``, token ids.
        tiles: Sinks, and tokens of a tile; the defaults if not given.
        progress: Called after each window.

    Returns:
        Moments by layer.

    Raises:
        SkvError: A window does not fill one tile.
    """
    tiles = tiles or LayerConfig()
    least = tiles.num_sink_tokens + tiles.tile_tokens
    if windows.shape[1] < least:
        raise SkvError("calibration: window", got=f"{windows.shape[1]} tokens", expected=f"at least {least}")
    found: dict[int, Moments] = {}

    def observe(layer: int, tensors: tuple[Tensor, Tensor, Tensor], options: AttentionOptions, _: Tensor) -> None:
        q, k, _ = tensors
        if layer not in found:
            zeros = torch.zeros(k.shape[0], k.shape[-1], k.shape[-1], dtype=torch.float64)
            found[layer] = Moments(zeros, zeros.clone(), options["local_window_size"])
        found[layer].add(q, k, tiles)

    simulation = Simulation.full_precision()
    simulation.observer = observe
    for i, ids in enumerate(windows):
        simulated_logits(model, ids, simulation)
        if progress:
            progress("reading text", i + 1, len(windows))
    return found


def calibrate(
    source: Source,
    text: str,
    *,
    windows: int = WINDOWS,
    window: int = WINDOW,
    placement: Placement | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measures a checkpoint's layers on a text and solves for their constants; forward passes only.

    Args:
        source: The checkpoint.
        text: What the model reads.
        windows: Windows of text; fewer if the text has no more.
        window: Tokens per window.
        placement: Device and number format of the model; float32 on the CPU if not given.
        progress: Told of each step.

    Raises:
        SkvError: The model can't be loaded or its attention not be replaced; the text or a window is too short; or a
            layer's moments are not finite.
    """
    tick = progress or (lambda *_: None)
    local = download(source)
    tick("loading the model", 0, 1)
    model, tokenizer = comparison.load(local, placement)
    cut = torch.from_numpy(cut_windows(tokenizer, text, windows, window))
    found = measure(model, cut, progress=progress)
    bases = {}
    for done, (layer, moments) in enumerate(sorted(found.items())):
        dim = moments.keys.shape[-1]
        padded = -(-dim // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
        try:
            bases[layer] = key_basis(moments.queries.numpy(), moments.keys.numpy(), padded)
        except SkvError as error:
            raise SkvError(f"layer {layer}: {error}") from error
        tick("solving for the constants", done + 1, len(found))
    about = {
        "tokens": f"{len(cut)} windows of {cut.shape[1]}",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "layers": str(len(bases)),
    }
    return Calibration(bases, fingerprint(local), about)
