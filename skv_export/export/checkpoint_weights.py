"""The weights of a checkpoint: read one parameter at a time for a graph, or all at once for PyTorch.

A checkpoint's tensors may be named and split differently from the model's parameters (experts one by one, fused
projections, GGUF's names and orders). The mapping is that of transformers' loader; ``Weights`` applies it to one
parameter at a time, from memory-mapped files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from skv_export.checkpoints.checkpoint import Checkpoint, Source, hub_endpoint
from skv_export.checkpoints.gguf_weights import GgufWeights, load_gguf_model
from skv_export.errors import SkvError
from skv_export.export.lazy_weights import to_torch
from skv_export.export.supported import prepare_model
from skv_export.model_folder.writer import pretrained_arguments

_DOWNLOADED = ("*.json", "*.jinja", "*.txt", "tokenizer.model")


def download(source: Source) -> Source:
    """Returns a source whose files are on this disk: a hub id's are fetched into huggingface_hub's cache.

    Raises:
        SkvError: The hub can't be reached, or stops answering.
    """
    if source.kind != "hub":
        return source
    if source.path is not None:
        return Source("safetensors", source.path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    patterns = [*_DOWNLOADED, *Checkpoint(source).shards()]
    try:
        folder = snapshot_download(
            str(source.repo_id), revision=source.revision, allow_patterns=patterns, endpoint=hub_endpoint()
        )
    except (OSError, ValueError, HTTPError) as error:
        raise SkvError(f"{source}: can't be downloaded", got=str(error)[:500], fix="Check the connection.") from error
    return Source("safetensors", Path(folder))


def load_model(source: Source, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Loads a whole checkpoint into PyTorch, ready for tracing; what is missing is an error, never a random number.

    Args:
        source: The checkpoint.
        config: Its configuration.
        dtype: Number format of the weights.

    Raises:
        SkvError: transformers can't load it, or tensors are missing or do not fit.
    """
    if source.kind == "gguf":
        model = load_gguf_model(source, config, dtype)
        prepare_model(model)
        return model
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.pretrained,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            use_safetensors=True,
            **pretrained_arguments(source),
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise SkvError(f"{source}: transformers can't load its weights", got=str(error)[:500]) from error
    model = loaded[0]
    wrong = [*loaded[1]["missing_keys"], *(key for key, *_ in loaded[1]["mismatched_keys"])]
    if wrong:
        raise _unfit(source, wrong)
    prepare_model(model)
    return model


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
        if unfit:
            raise _unfit(source, unfit)

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
            raise _unfit(self.source, [name])
        return tensor

    def release(self) -> None:
        """Lets go of the memory of what was read last; tensors that are still held stay valid, and are read again."""
        self._tensors.release(self._members)
        self._last = None

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


def _unfit(source: Source, names: Sequence[str]) -> SkvError:
    return SkvError(
        f"{source}: tensors are missing or have another shape",
        got=", ".join(sorted(names)[:4]),
        fix="Download the checkpoint again.",
    )


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

    def release(self, names: Iterable[str]) -> None:
        self._checkpoint.release(names)
