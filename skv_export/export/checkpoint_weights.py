"""The weights of a checkpoint, read one parameter at a time for a graph.

A checkpoint's tensors may be named and split differently from the model's parameters (experts one by one, fused
projections, GGUF's names and orders). The mapping is that of transformers' loader; ``Weights`` applies it to one
parameter at a time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from skv_export.checkpoints.block_weights import BlockMatrix
from skv_export.checkpoints.checkpoint import Checkpoint, Source
from skv_export.checkpoints.foreign_tensors import adapter_in, left_out, unfit_tensors
from skv_export.checkpoints.gguf_weights import GgufWeights
from skv_export.export.lazy_weights import to_torch

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


def separate_head(source: Source, config: PreTrainedConfig) -> None:
    """Unties a configuration whose checkpoint holds another output embedding than the input one, as transformers does.

    Two tensors are compared, up to where they differ, and only of a checkpoint that has both.
    """
    if not config.tie_word_embeddings or source.kind == "gguf":
        return
    checkpoint = Checkpoint(source)
    heads, embeddings = (
        [name for name in checkpoint.names() if name.endswith(names)] for names in (_HEADS, _EMBEDDINGS)
    )
    if len(heads) == len(embeddings) == 1 and not checkpoint.same(heads[0], embeddings[0]):
        config.tie_word_embeddings = False
        warnings.warn(
            f"{source}: config.json ties {heads[0]} to {embeddings[0]}, but the checkpoint holds both and they differ; "
            "both are exported, as transformers loads them",
            RuntimeWarning,
            stacklevel=2,
        )


@dataclass
class _Group:
    """Tensors of the checkpoint that become one or more parameters together.

    Attributes:
        transform: What makes parameters of them.
        target: The first parameter's name.
        members: Name in the checkpoint, and the pattern of ``transform`` that it matched.
    """

    transform: WeightConverter | WeightRenaming
    target: str
    members: list[tuple[str, str]]

    @property
    def is_one_tensor(self) -> bool:
        """Whether a tensor of the checkpoint is the parameter as it is."""
        return isinstance(self.transform, WeightRenaming) and len(self.members) == 1


def warn_of_rounding_again(source: Source, held: Collection[str]) -> None:
    """Says that matrices of a checkpoint which are quantized already are about to be quantized anew; none: nothing."""
    if held:
        warnings.warn(
            f"{source}: {len(held)} of its matrices are quantized already, and are rounded a second time, "
            "which costs quality; --weights as-is exports them as they are",
            RuntimeWarning,
            stacklevel=2,
        )


class Weights:
    """The parameters and saved buffers of a model, read from its checkpoint when they are asked for.

    Args:
        source: The checkpoint, on this disk.
        model: The model; its parameters say names and shapes, and need no memory.

    Raises:
        SkvError: A tensor is missing, or has another shape than the model's.
    """

    def __init__(self, source: Source, model: PreTrainedModel) -> None:
        self.source, self._model = source, model
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._tensors: _SafetensorsNames | GgufWeights = (
            GgufWeights(source, model) if source.kind == "gguf" else _SafetensorsNames(source)
        )
        self._last: tuple[_Group, dict[str, torch.Tensor]] | None = None
        self._members: list[str] = []
        stored = {self.canonical(name) for name in self._shapes}
        unfit = [name for name in stored if name not in self._groups or not self._fits(self._groups[name])]
        held = list(self._tensors.names())
        if unfit or adapter_in(held):
            raise unfit_tensors(source, unfit, held)
        self._say_what_is_left_out()

    def __contains__(self, name: object) -> bool:
        """Whether the checkpoint has to hold a tensor."""
        return name in self._shapes

    def canonical(self, name: str) -> str:
        """Returns the name under which a weight is read: tied ones have several, and one is in the checkpoint."""
        return self._canonical[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Reads a weight; it may be a view of the file, in the file's number format.

        Raises:
            SkvError: It has another shape than the model wants.
        """
        group = self._groups[self.canonical(name)]
        self._members = [member for member, _ in group.members]
        if self._last is None or self._last[0] is not group:
            self._last = None
            self._last = group, self._convert(group)
        made = self._last[1]
        tensor = made.get(name, made.get(self.canonical(name)))
        if tensor is None or tuple(tensor.shape) != self._shapes[name]:
            raise unfit_tensors(self.source, [name], list(self._tensors.names()))
        return tensor

    def row_blocks(self, name: str, nbytes: int) -> Iterator[torch.Tensor]:
        """Reads a weight in blocks of rows of about so many bytes, or of one row.

        Where one tensor of the file is the weight, only one block is in memory at a time.

        Raises:
            SkvError: As ``tensor`` does.
        """
        group = self._groups[self.canonical(name)]
        if isinstance(self._tensors, _SafetensorsNames) and group.is_one_tensor and len(self._shapes[name]) > 1:
            yield from self._tensors.row_blocks(group.members[0][0], nbytes)
            return
        tensor = self.tensor(name)
        yield from torch.split(tensor, max(1, nbytes // max(1, tensor[0].nbytes))) if tensor.dim() else [tensor]

    def quantized(self, name: str) -> BlockMatrix | None:
        """Returns a weight as the checkpoint holds it quantized; None where it does not, or not in a graph's terms."""
        group = self._groups.get(self.canonical(name))
        if group is None or not group.is_one_tensor:
            return None
        held = self._tensors.quantized(group.members[0][0])
        if held is not None and self._shapes[name] != (held.rows, held.inputs)[:: -1 if held.transposed else 1]:
            raise unfit_tensors(self.source, [name], list(self._tensors.names()))
        return held

    def held(self) -> dict[str, BlockMatrix]:
        """Returns the matrices that the checkpoint holds quantized and a graph can store so, by the parameters' names.

        Of names that share a matrix, the one is given under which it is read.
        """
        found = {name: self.quantized(name) for name in self._shapes if self.canonical(name) == name}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    def release(self) -> None:
        """Releases the memory of what was read last; tensors still referenced stay valid, and are read again."""
        self._tensors.release(self._members)
        self._last = None

    def _say_what_is_left_out(self) -> None:
        """Warns of tensors that the model's class has no place for; transformers leaves them out too."""
        used = {member for group in self._groups.values() for member, _ in group.members}
        ignored = self._model._keys_to_ignore_on_load_unexpected or ()
        if names := left_out(set(self._tensors.names()) - used, ignored):
            warnings.warn(
                f"{self.source}: {self._model.config.model_type} has no place for {len(names)} tensors of the "
                f"checkpoint, which are left out: {', '.join(names[:4])}",
                RuntimeWarning,
                stacklevel=3,
            )

    def _fits(self, group: _Group) -> bool:
        """Whether a tensor that is taken as it is has the right shape; of others, reading them tells."""
        shape = self._tensors.shape(group.members[0][0]) if isinstance(group.transform, WeightRenaming) else None
        return shape is None or shape == self._shapes[group.target]

    def _convert(self, group: _Group) -> dict[str, torch.Tensor]:
        transform = copy.deepcopy(group.transform)
        for name, pattern in group.members:
            read: Any = self._tensors.read(name)  # a Future where the loader reads ahead
            transform.add_tensor(group.target, name, pattern, read)
        made = transform.convert(group.target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    @cached_property
    def _canonical(self) -> dict[str, str]:
        found: dict[str, str] = {}
        first: dict[int, list[str]] = {}
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            first.setdefault(id(tensor), []).append(name)
        for names in first.values():
            stored = next((name for name in names if name in self._groups), names[0])
            found.update(dict.fromkeys(names, stored))
        return found

    @cached_property
    def _groups(self) -> dict[str, _Group]:
        """By each parameter that a group makes."""
        transforms = get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
        prefix, wanted = self._model.base_model_prefix, self._shapes
        groups: dict[str, _Group] = {}
        for name in sorted(self._tensors.names(), key=_natural):
            target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
            if target not in wanted and name in wanted:
                target, pattern = name, None
            if target not in wanted:
                continue  # of a part that a language model has no use for
            if pattern is None:
                groups[target] = _Group(WeightRenaming(name, target), target, [(name, name)])
                continue
            converter = by_pattern[pattern]
            group = groups.setdefault(target, _Group(converter, target, []))
            group.members.append((name, pattern))
            for other in converter.target_patterns[1:]:
                groups[target.replace(converter.target_patterns[0], other)] = group
        return groups


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``experts.10`` behind ``experts.9``: experts are stacked in this order."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


class _SafetensorsNames:
    """The tensors of safetensors files, as they are."""

    def __init__(self, source: Source) -> None:
        self._checkpoint = Checkpoint(source)

    def names(self) -> Iterable[str]:
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._checkpoint.shape(name)

    def read(self, name: str) -> torch.Tensor:
        return to_torch(self._checkpoint.tensor(name))

    def row_blocks(self, name: str, nbytes: int) -> Iterator[torch.Tensor]:
        return map(to_torch, self._checkpoint.entries[name].row_blocks(nbytes))

    def quantized(self, name: str) -> BlockMatrix | None:
        return self._checkpoint.entries[name].blocks()

    def release(self, names: Iterable[str]) -> None:
        self._checkpoint.release(names)
