"""Calibrated keys: second moments of queries and keys, summed while a model reads text, and what follows from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from skv_export.calibration.file import Calibration, fingerprint
from skv_export.calibration.solve import key_basis
from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.model_config import check_window, load_config
from skv_export.checkpoints.pretrained import download, load_tokenizer
from skv_export.checkpoints.tensor_files import LocalFile, read_header, read_metadata
from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import AttentionOptions, Simulation
from skv_export.evaluation.text import cut_windows
from skv_export.model_folder.output import output_file
from skv_export.quantization.layer_by_layer import LayerByLayer
from skv_export.spec.key_basis import MATRICES, KeyBasis
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


def measure(
    model: LayerByLayer, states: Sequence[Tensor], tiles: LayerConfig | None = None, first: int = 0
) -> Iterator[tuple[int, Moments, list[Tensor]]]:
    """Runs windows of text through a model, layer by layer; nothing of a layer is kept but its sums and its output.

    Args:
        model: The model.
        states: What layer ``first`` reads of each window, ``[1, S, hidden]``.
        tiles: Sinks, and tokens of a tile; the defaults if not given.
        first: Where to begin.

    Yields:
        A layer's index, its moments, and its output for each window.

    Raises:
        SkvError: A window does not fill one tile.
    """
    tiles = tiles or LayerConfig()
    least = tiles.num_sink_tokens + tiles.tile_tokens
    if states[0].shape[1] < least:
        raise SkvError("calibration: window", got=f"{states[0].shape[1]} tokens", expected=f"at least {least}")
    for index in model.layers[first:]:
        found: list[Moments] = []

        def observe(
            _: int, tensors: tuple[Tensor, Tensor, Tensor], options: AttentionOptions, __: Tensor,
            found: list[Moments] = found,
        ) -> None:  # fmt: skip
            q, k, _v = tensors
            if not found:
                zeros = torch.zeros(k.shape[0], k.shape[-1], k.shape[-1], dtype=torch.float64)
                found.append(Moments(zeros, zeros.clone(), options["local_window_size"]))
            found[0].add(q, k, tiles)

        simulation = Simulation.full_precision()
        simulation.observer = observe
        with model.loaded(index):
            states = [model.run(index, hidden, simulation) for hidden in states]
        yield index, found[0], states


def calibrate(
    source: Source,
    text: str,
    *,
    windows: int = WINDOWS,
    window: int = WINDOW,
    device: str = "cpu",
    state: Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measures a checkpoint's layers on a text and solves for their constants; forward passes only.

    In memory are a layer in float32, the embedding, and the text's hidden states.

    Args:
        source: The checkpoint.
        text: What the model reads.
        windows: Windows of text; fewer if the text has no more.
        window: Tokens per window.
        device: Where layers run.
        state: File of finished layers; a run that finds it goes on from there.
        progress: Told of each step.

    Raises:
        SkvError: The checkpoint can't be read; the text or a window is too short; a layer's moments are not finite; or
            ``state`` is no state file, or one of another run.
    """
    tick = progress or (lambda *_: None)
    local = download(source)
    check_window(load_config(local), window)
    ids = torch.from_numpy(cut_windows(load_tokenizer(local), text, windows, window))
    model = LayerByLayer(local, device, instead="Export it without a calibration.")
    checkpoint = fingerprint(local)
    steps = _Finished(state, {"checkpoint": checkpoint, "tokens": hashlib.sha256(ids.numpy().tobytes()).hexdigest()})
    bases, states = steps.load()
    embedded = model.embed(ids if not states else ids[:1])  # notes what layers take beside their states
    for index, moments, after in measure(model, states or embedded, first=len(bases)):
        dim = moments.keys.shape[-1]
        padded = -(-dim // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
        try:
            bases[index] = key_basis(moments.queries.numpy(), moments.keys.numpy(), padded)
        except SkvError as error:
            raise SkvError(f"layer {index}: {error}") from error
        steps.save(bases, after)
        tick("calibrating layers", index + 1, len(model.layers))
    about = {
        "tokens": f"{len(ids)} windows of {ids.shape[1]}",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "layers": str(len(bases)),
    }
    return Calibration(bases, checkpoint, about)


class _Finished:
    """The layers that are done and what the next one reads, in a file that is whole after each layer.

    Args:
        path: The file; None = nothing is kept.
        run: What the run is of; a file of another one is refused.
    """

    _FORMAT = "skv-calibration-state"

    def __init__(self, path: Path | None, run: dict[str, str]) -> None:
        self._path, self._run = path, {"format": self._FORMAT, **run}

    def load(self) -> tuple[dict[int, KeyBasis], list[Tensor]]:
        """Returns the constants of the layers that are done, and the windows' states behind the last of them.

        Raises:
            SkvError: The file is damaged, or another run's.
        """
        if self._path is None or not self._path.exists():
            return {}, []
        file = LocalFile(self._path)
        entries, about = read_header(file), read_metadata(file)
        if about != self._run:
            fix = "Pass another --state, or remove it to begin again."
            raise SkvError(f"{self._path}: not the state of this run", got=about, expected=self._run, fix=fix)
        layers = sum(name.endswith(MATRICES[0]) for name in entries)
        bases = {
            index: KeyBasis(*(np.array(entries[f"{index}.{name}"].array()) for name in MATRICES))
            for index in range(layers)
        }
        states = [entries[f"state.{i}"].array() for i in range(len(entries) - layers * len(MATRICES))]
        return bases, [torch.from_numpy(np.array(state)) for state in states]

    def save(self, bases: dict[int, KeyBasis], states: list[Tensor]) -> None:
        """Writes the file anew."""
        if self._path is None:
            return
        tensors = {
            f"{index}.{name}": torch.from_numpy(np.ascontiguousarray(getattr(basis, name)))
            for index, basis in bases.items()
            for name in MATRICES
        }
        tensors |= {f"state.{i}": state.cpu().contiguous() for i, state in enumerate(states)}
        with output_file(self._path) as scratch:
            save_file(tensors, scratch, self._run)
