"""The yardstick of a rewritten folder: the source graph in ONNX Runtime, with its own attention and float caches.

The source holds the very weights that were carried over, in the formats they have, so nothing but the attention and its
cache differs; a model in PyTorch is not needed, and need not exist.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skv_export.errors import SkvError
from skv_export.model_folder.names import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.paths import is_onnx
from skv_export.rewrite.pipeline import Rewrite
from skv_export.rewrite.source import find_onnx
from skv_export.runtime.graph import session_options
from skv_export.runtime.providers import brief, load_error, ort_errors
from skv_export.verification.graph_variants import read_with_exact_products


def find_source(config: ModelConfig, checkpoint: str | Path | None) -> Path | None:
    """Returns the graph that a folder was rewritten from; None = ``checkpoint`` is a model for PyTorch.

    Args:
        config: The folder's; its source is of kind ``onnx``.
        checkpoint: A ``.onnx`` file or the folder of one; the recorded path if not given.

    Raises:
        SkvError: It is not there, or another graph than the one that was rewritten.
    """
    if checkpoint is not None and not is_onnx(checkpoint):
        return None
    name = str(config.source.get("name"))
    if checkpoint is None and not Path(name).is_file():
        raise SkvError(
            "verify: checkpoint",
            got=f"none; the folder was rewritten from {name}, which is not there",
            fix="Pass the path of that graph: --checkpoint SOURCE.onnx.",
        )
    path = find_onnx(checkpoint if checkpoint is not None else name)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != config.source.get("sha256"):
        raise SkvError(
            f"{path}: not what the folder was rewritten from",
            got=f"SHA-256 {found}",
            expected=config.source.get("sha256"),
            fix="Pass the source's path, --checkpoint SOURCE.onnx, or rewrite the model again.",
        )
    return path


class SourceGraph:
    """A source graph, running on the CPU: calls with new tokens, without padding, after what came before.

    Args:
        path: The ``.onnx`` file; its weights are beside it.
        exact_products: Activations are not rounded before products with quantized weights.

    Attributes:
        path: As given.
        max_batch: Sequences of a call: ONNX Runtime's GroupQueryAttention takes chunks after a past of one only.

    Raises:
        SkvError: The file is damaged, or ONNX Runtime can't run the graph.
    """

    max_batch = 1

    def __init__(self, path: Path, *, exact_products: bool = False) -> None:
        import onnxruntime as ort

        read = Rewrite.read(path)
        self.path = path
        options = session_options(path.parent, num_threads=0, spinning=False)
        model = read_with_exact_products(path).SerializeToString() if exact_products else str(path)
        try:
            self._onnx = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except ort_errors() as error:
            raise load_error(path, error) from error
        nodes = [layer.attention for layer in read.layers]
        self._dtype = int(nodes[0].dtype)
        self._past = [str(value.name) for node in nodes for value in node.past]
        self._outputs = [LOGITS, *(str(value.name) for node in nodes for value in node.present)]
        self._heads = [
            (layer.num_key_value_heads, layout.head_dim)
            for layer in read.config.layers
            for layout in (layer.key, layer.value)
        ]
        self._inputs = {x.name for x in self._onnx.get_inputs()}
        self.restart()

    def restart(self) -> None:
        """Forgets all tokens."""
        self.length = 0
        self._caches: list[object] = []

    def run(self, ids: ArrayLike) -> NDArray[np.float32]:
        """Runs new tokens.

        Args:
            ids: ``[B, S]``; as many sequences as before.

        Returns:
            ``[B, S, vocab_size]``, or ``[B, 1, vocab_size]`` where the graph returns the last token's logits alone.

        Raises:
            SkvError: ONNX Runtime fails.
        """
        import onnxruntime as ort

        tokens = np.ascontiguousarray(ids, np.int64)
        batch, total = len(tokens), self.length + tokens.shape[1]
        positions = np.broadcast_to(np.arange(self.length, total), tokens.shape)
        given = {
            INPUT_IDS: tokens,
            ATTENTION_MASK: np.ones((batch, total), np.int64),
            POSITION_IDS: np.ascontiguousarray(positions),
        }
        try:
            self._caches = self._caches or [
                ort.OrtValue.ortvalue_from_shape_and_type([batch, heads, 0, channels], self._dtype)
                for heads, channels in self._heads
            ]
            feeds = {name: ort.OrtValue.ortvalue_from_numpy(v) for name, v in given.items() if name in self._inputs}
            feeds |= dict(zip(self._past, self._caches, strict=True))
            logits, *self._caches = self._onnx.run_with_ort_values(self._outputs, feeds)
        except ort_errors() as error:
            raise SkvError(f"{self.path}: ONNX Runtime can't run it", got=brief(error)) from error
        self.length = total
        return logits.numpy().astype(np.float32, copy=False)
