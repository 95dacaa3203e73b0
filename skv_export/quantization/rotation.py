"""The residual stream in another basis, in which no channel is much larger than the others.

As QuaRot's first step (arXiv 2404.00456, section 4; SpinQuant's R1): the norms' weights move into the matrices that
read their outputs, and then an orthogonal matrix Q into everything that writes to the stream or reads from it. A norm
without weights divides by the length of a vector, which Q keeps; so the model computes the same, and any implementation
of the architecture runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from skv_export.checkpoints.block_weights import BlockMatrix
from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import Simulation
from skv_export.quantization.layer_by_layer import LayerByLayer, ReadWeights
from skv_export.quantization.scaling import offset, readers_of_norms

TOKENS = 64
"""Tokens on which the rotated model is held to the other, at most."""
TOLERANCE = 1e-3
"""Largest difference of their logits, as a share of the largest logit: sums in float32, in another order."""
_ROWS = 1024
"""That are turned at a time."""
_WIDTH = 64
"""Of the largest Hadamard matrix that is multiplied as it is."""


class Basis:
    """An orthogonal matrix Q: random signs, and behind them a Hadamard matrix for the powers of two in its size.

    What is left of the size, 9 in 576, gets a random orthogonal matrix; Q is their Kronecker product.

    Args:
        size: Channels.
        seed: Of what is random.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
        odd = size // (size & -size)
        self._factors = [torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))[0]]
        left = size & -size
        while left > 1:
            self._factors.append(_hadamard(min(left, _WIDTH)))
            left //= min(left, _WIDTH)

    def turn(self, rows: Tensor) -> Tensor:
        """Returns ``rows @ Q`` of ``[..., size]``, in float32; computed in float64."""
        parts = torch.split(rows.reshape(-1, rows.shape[-1]), _ROWS)  # in float64 a whole embedding is large
        return torch.cat([self._turned(part) for part in parts]).reshape(rows.shape)

    def _turned(self, rows: Tensor) -> Tensor:
        x = rows.double() * self._signs.to(rows.device)
        for factor in self._factors:  # each takes the first axis of a Kronecker product, and leaves it as the last
            x = (x.reshape(len(x), len(factor), -1).mT @ factor.to(x.device)).reshape(len(x), -1)
        return x.float()


def _hadamard(size: int) -> Tensor:
    """Sylvester's, orthonormal."""
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / size**0.5


@dataclass
class _Parts:
    """What of a model touches the residual stream, by the names of its tensors.

    Attributes:
        readers: Matrices that read a norm's output, with what the norm multiplies by, ``[hidden]``.
        writers: Matrices whose outputs are added to the stream, and their biases.
        norms: Norms, with what they add to their weights.
        embedding: The input embedding.
        unread: Norms whose outputs no linear layer reads.
    """

    readers: dict[str, Tensor] = field(default_factory=dict)
    writers: set[str] = field(default_factory=set)
    norms: dict[str, float] = field(default_factory=dict)
    embedding: str = ""
    unread: list[str] = field(default_factory=list)


class RotatedWeights:
    """A checkpoint's weights with the residual stream in another basis; input and output embedding are two matrices.

    Args:
        weights: The checkpoint's.
        parts: What touches the stream.
        basis: Of the stream.
    """

    def __init__(self, weights: ReadWeights, parts: _Parts, basis: Basis) -> None:
        self._weights, self._parts, self._basis = weights, parts, basis

    def __contains__(self, name: object) -> bool:
        """Whether the model has such a tensor."""
        return name in self._weights

    def canonical(self, name: str) -> str:
        """Returns the name itself: nothing is tied."""
        return name

    def tensor(self, name: str) -> Tensor:
        """Reads a weight; what touches the stream is new, in float32."""
        stored, parts = self._weights.tensor(name), self._parts
        if name in parts.norms:
            return torch.full(stored.shape, 1 - parts.norms[name])
        if name in parts.readers:
            return self._basis.turn(stored.double() * parts.readers[name])
        if name == parts.embedding or (name in parts.writers and stored.dim() == 1):
            return self._basis.turn(stored)
        return self._basis.turn(stored.T).T if name in parts.writers else stored

    def held(self) -> dict[str, BlockMatrix]:
        """As ``Weights.held``, before anything was turned."""
        return self._weights.held()

    def release(self) -> None:
        """As ``Weights.release``."""
        self._weights.release()


def rotate(model: LayerByLayer, ids: Tensor) -> None:
    """Turns a model's residual stream; input and output embedding are no longer tied then.

    Args:
        model: The model; its weights are replaced.
        ids: A window of tokens ``[S]``, on which it is shown that the model computes the same.

    Raises:
        SkvError: Something but linear layers behind norms without means reads the stream, or writes to it; or the
            model's logits are not finite.
    """
    ids = ids[:TOKENS]
    parts, weights = _Parts(), model.weights
    before = _logits(model, ids, parts)
    if not before.isfinite().all():
        raise SkvError(f"{model.config.model_type}: its logits are not finite", fix="Check it with `quality`.")
    model.weights = RotatedWeights(weights, parts, Basis(len(next(iter(parts.readers.values())))))
    model.config.tie_word_embeddings = False
    after = _logits(model, ids)
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= TOLERANCE:
        raise _refused(model, f"logits that differ by {difference:.1e} of the largest one", parts)


def _logits(model: LayerByLayer, ids: Tensor, parts: _Parts | None = None) -> Tensor:
    """The logits of a window; what touches the stream on the way to them is added to ``parts``."""
    (hidden,) = model.embed(ids[None])
    kinds: dict[type, float] = {}
    for index in model.layers:
        with model.loaded(index) as layer:
            if parts is not None:
                kinds |= _find(model, index, layer, hidden, parts)
            hidden = model.run(index, hidden, Simulation.full_precision())
    if parts is not None:
        _find_outside(model, kinds, parts)
    return model.logits(hidden, ids)


def _find(model: LayerByLayer, index: int, layer: torch.nn.Module, hidden: Tensor, parts: _Parts) -> dict[type, float]:
    """Adds a loaded layer's parts; returns what each class of its norms adds to their weights."""
    size = hidden.shape[-1]
    matrices = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    found = readers_of_norms(model, index, layer, matrices, hidden)
    kinds: dict[type, float] = {}
    for name, norm in layer.named_modules():
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != (size,):
            continue
        if isinstance(norm, torch.nn.LayerNorm):
            raise _refused(model, f"a norm that subtracts means, {model.name(index, name)}", parts)
        if name not in found:  # of heads as wide as the stream, or in the stream's way
            parts.unread.append(model.name(index, name))
            continue
        kinds[type(norm)] = parts.norms[model.name(index, f"{name}.weight")] = more = offset(norm)
        parts.readers |= dict.fromkeys((model.name(index, f"{reader}.weight") for reader in found[name]), weight + more)
    reading = {reader for readers in found.values() for reader in readers}
    parts.writers |= {
        model.name(index, f"{name}.{tensor}")
        for name, module in matrices.items()
        if name not in reading and module.out_features == size
        for tensor in dict(module.named_parameters())
    }
    return kinds


def _find_outside(model: LayerByLayer, kinds: dict[type, float], parts: _Parts) -> None:
    """Adds the embeddings and the norm before the head."""
    names = {module: name for name, module in model.model.named_modules() if not name.startswith(f"{model.path}.")}
    inner, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    norms = [module for module in names if type(module) in kinds]
    if len(norms) != 1:
        raise _refused(model, f"{len(norms)} norms of the layers' kind before the output embedding", parts)
    weight = f"{names[norms[0]]}.weight"
    more = kinds[type(norms[0])]
    parts.norms[weight] = more
    parts.readers[f"{names[head]}.weight"] = model.weights.tensor(weight).float() + more
    parts.embedding = f"{names[inner]}.weight"


def _refused(model: LayerByLayer, got: str, parts: _Parts) -> SkvError:
    if parts.unread:
        got += f", and a norm whose output no linear layer reads, {parts.unread[0]}"
    return SkvError(
        f"{model.config.model_type}: can't be rotated",
        got=got,
        expected="linear layers behind norms that divide by a vector's length, and nothing else that reads the "
        "residual stream",
        fix="Quantize it without --rotate.",
    )
