"""A model that runs layer after layer, each with its weights in memory only for as long as it runs.

So a model runs on a machine that does not hold it: in memory are one layer, the embedding, and the hidden states of the
text. What a layer takes beside its hidden states (positions, masks) is recorded in one pass through the model with
layers that do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from skv_export.checkpoints.block_weights import BlockMatrix
from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.model_config import load_config
from skv_export.checkpoints.pretrained import replace_attention
from skv_export.checkpoints.purpose import check_purpose
from skv_export.checkpoints.shared_caches import refuse_shared
from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import ATTENTION_NAME, Simulation
from skv_export.export import empty_model
from skv_export.export.checkpoint_weights import Weights, separate_head
from skv_export.export.latent_attention import LATENT
from skv_export.export.repeat_layers import find_stack
from skv_export.export.supported import attention_layers, check_config


class ReadWeights(Protocol):
    """What a layer is loaded from: a checkpoint's ``Weights``, or what is made of them."""

    def __contains__(self, name: object) -> bool:
        """Whether the model has such a tensor."""

    def canonical(self, name: str) -> str:
        """The name under which a weight is read, of tied ones."""

    def tensor(self, name: str) -> Tensor:
        """Reads a weight."""

    def held(self) -> dict[str, BlockMatrix]:
        """The matrices that the checkpoint holds quantized."""

    def release(self) -> None:
        """Releases the memory of what was read last."""


@dataclass
class _Arguments:
    """What a layer takes beside its hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class _AllNotedError(Exception):
    """Ends a pass whose layers were all reached."""


class LayerByLayer:
    """A checkpoint's model, run one layer at a time in float32.

    Args:
        source: The checkpoint, on this disk.
        device: Where layers run.
        instead: What can be done with a model that can't be run so; ends the messages.

    Raises:
        SkvError: The architecture can't be exported, or is no stack of layers; tensors are missing or don't fit.
    """

    def __init__(self, source: Source, device: str = "cpu", *, instead: str = "") -> None:
        self.config = load_config(source)
        check_config(self.config)
        refuse_shared(self.config.to_dict(), str(source), instead)
        check_purpose(self.config.model_type, self.config.architectures)
        text = self.config.get_text_config()
        recurrent = len(attention_layers(text)) < int(text.num_hidden_layers)
        if recurrent or text.model_type in LATENT:
            raise SkvError(
                f"{self.config.model_type}: measured layer by layer",
                got="layers without attention" if recurrent else "multi-head latent attention",
                expected="attention over keys and values in every layer",
                fix=instead,
            )
        separate_head(source, self.config)
        self.model = empty_model.build(self.config, torch.float32).model
        self.weights: ReadWeights = Weights(source, self.model)
        self.device = torch.device(device)
        found = find_stack(self.model, int(text.num_hidden_layers))
        if found is None:
            raise SkvError(
                f"{self.config.model_type}: its layers",
                got="no single list of them",
                expected="one, to run them one by one",
                fix=instead,
            )
        self.path, self._stack = found
        replace_attention(self.model, ATTENTION_NAME)
        self._arguments: list[_Arguments] = []
        self._gives_tuples = False

    @property
    def layers(self) -> range:
        """Indices of the layers."""
        return range(len(self._stack))

    def name(self, index: int, inner: str) -> str:
        """The model's name of a module or tensor of a layer."""
        return f"{self.path}.{index}.{inner}"

    @torch.no_grad()
    def embed(self, windows: Tensor) -> list[Tensor]:
        """What the first layer reads of each window of tokens ``[windows, S]``: ``[1, S, hidden]`` each."""
        inner = [module for name, module in self.model.named_modules() if not name.startswith(f"{self.path}.")]
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        states: list[Tensor] = []
        with contextlib.ExitStack() as loaded:
            for module in inner:
                if module is not head:
                    loaded.enter_context(self._with_weights(module, recurse=False))
            for ids in windows:
                self._record(ids, states)
        return states

    def _record(self, ids: Tensor, states: list[Tensor]) -> None:
        """One pass with layers that only note what they were given."""
        noted: dict[int, _Arguments] = {}
        forwards = [layer.forward for layer in self._stack]

        def idle(index: int, hidden: Tensor, *positional: Any, **named: Any) -> Tensor:
            if index == 0:
                states.append(hidden)
            noted[index] = _Arguments(positional, named)
            if len(noted) == len(self._stack):
                raise _AllNotedError
            return hidden

        try:
            for index, layer in enumerate(self._stack):
                layer.forward = lambda *a, i=index, **k: idle(i, *a, **k)
            self.model(ids[None].to(self.device), use_cache=False)
        except _AllNotedError:
            pass  # what comes behind the layers is not asked for
        finally:
            for layer, forward in zip(self._stack, forwards, strict=True):
                layer.forward = forward
        self._arguments = [noted[i] for i in self.layers]

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[torch.nn.Module]:
        """Context manager: a layer with its weights, in float32; changes to them end with the block."""
        with self._with_weights(self._stack[index]):
            yield self._stack[index]
        self.weights.release()

    def run(self, index: int, hidden: Tensor, simulation: Simulation) -> Tensor:
        """A loaded layer's output for one window ``[1, S, hidden]``, with the caches of a simulation.

        Gradients are kept only for parameters that ask for them; loaded ones do not.
        """
        arguments = self._arguments[index]
        with simulation.active():
            out = self._stack[index](hidden, *arguments.positional, **arguments.named)
        self._gives_tuples = isinstance(out, tuple)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What the model makes of the last layer's output for a window: float32 ``[S, vocabulary]``.

        Args:
            hidden: ``[1, S, hidden]``.
            ids: The window's tokens, ``[S]``.
        """
        forwards = [layer.forward for layer in self._stack]
        given = (hidden,) if self._gives_tuples else hidden
        inner = [module for name, module in self.model.named_modules() if not name.startswith(f"{self.path}.")]
        with contextlib.ExitStack() as loaded:
            for module in inner:
                loaded.enter_context(self._with_weights(module, recurse=False))
            try:
                for layer in self._stack:
                    layer.forward = lambda *_, **__: given
                out = self.model(ids[None].to(self.device), use_cache=False).logits[0]
            finally:
                for layer, forward in zip(self._stack, forwards, strict=True):
                    layer.forward = forward
        return out.float()

    @contextlib.contextmanager
    def _with_weights(self, top: torch.nn.Module, recurse: bool = True) -> Iterator[None]:
        names = {id(module): name for name, module in self.model.named_modules()}
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        try:
            for module in top.modules() if recurse else [top]:
                stored = module.state_dict(keep_vars=True)
                places: list[dict[str, Any]] = [module._parameters, module._buffers]
                for held in places:
                    for name in [name for name in held if name in stored]:
                        tensor = self.weights.tensor(f"{names[id(module)]}.{name}").to(self.device)
                        before.append((held, name, stored[name]))
                        copy = tensor.to(stored[name].dtype, copy=True)  # not a view of the file
                        held[name] = copy if held is module._buffers else torch.nn.Parameter(copy, requires_grad=False)
            yield
        finally:
            for held, name, tensor in before:
                held[name] = tensor


class _AllReadError(Exception):
    """Ends a run in which everything that is asked for was read."""


@contextlib.contextmanager
def reading(modules: Mapping[str, torch.nn.Module], stop: bool = False) -> Iterator[list[tuple[str, Tensor]]]:
    """Context manager: the list fills with what modules read, in the order in which they do.

    Args:
        modules: By name.
        stop: The last of them to read ends the block.
    """
    read: list[tuple[str, Tensor]] = []

    def hook(name: str, inputs: tuple[Tensor, ...]) -> None:
        read.append((name, inputs[0]))
        if stop and {name for name, _ in read} == set(modules):
            raise _AllReadError

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs))
        for name, module in modules.items()
    ]
    try:
        with contextlib.suppress(_AllReadError):
            yield read
    finally:
        for handle in handles:
            handle.remove()


class SharedInputs:
    """Modules that read the same tensor: the first of them stands for all, so that sums over it are made once.

    Attributes:
        source: The module that stands for each.
    """

    def __init__(self) -> None:
        self.source: dict[str, str] = {}

    def distinct(self, read: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yields of one run's ``reading`` each tensor once, as rows ``[tokens, K]``."""
        first: dict[int, str] = {}
        for name, x in read:
            if self.source.setdefault(name, first.setdefault(id(x), name)) == name:
                yield name, x.reshape(-1, x.shape[-1])

    def of_each(self, sums: Mapping[str, Tensor], modules: Mapping[str, torch.nn.Linear]) -> dict[str, Tensor]:
        """Returns the sum of ``x x^T`` for each module; an expert that no token went to counts all inputs alike."""
        return {
            name: sums[self.source[name]]
            if name in self.source
            else torch.eye(module.in_features, device=module.weight.device)
            for name, module in modules.items()
        }
