"""Attention in torch: the custom op, the hook that replaces attention in a Hugging Face model, and the decoder to
trace.

The op ``skv::quantized_kv_attention`` has the reference as its real implementation, so a model that uses it computes in
PyTorch what the exported graph computes in ONNX Runtime. ``SkvDecoder`` is that model: the exporter traces it, and
``verify`` runs it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from skv_export.checkpoints.pretrained import replace_attention
from skv_export.checkpoints.shared_caches import cache_sources
from skv_export.errors import SkvError
from skv_export.export.complex_rope import PATCHES
from skv_export.export.latent_attention import absorb, expand, has_latents, keep_latents
from skv_export.export.recurrent_states import RecurrentStates, replace_functions
from skv_export.export.vision_language import first_layers
from skv_export.spec.key_basis import MATRICES, KeyBasis
from skv_export.spec.op import ATTRIBUTE_TYPES, AttentionParams, Attributes, LayerAttention
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import quantized_kv_attention
from skv_export.spec.state import LayerState

ATTENTION_NAME = "skv"
"""Name under which the hook is registered with transformers."""

_UNSUPPORTED = "This architecture can't be exported; the README lists those that can."

# The torch op.

_TENSORS = (
    "Tensor query, Tensor? key, Tensor? value, Tensor past_key, Tensor past_value, Tensor seqlens_k, "
    "SymInt total_sequence_length, Tensor? head_sink, Tensor? query_seqlens, "
    "Tensor? key_basis, Tensor? query_basis, Tensor? key_feedback"
)
_TYPES = {int: "int", float: "float", str: "str"}
_SCHEMA = (
    f"({_TENSORS}, *, {', '.join(f'{_TYPES[t]} {n}' for n, t in ATTRIBUTE_TYPES.items())}) -> (Tensor, Tensor, Tensor)"
)


def _head_dim(query: torch.Tensor, key: torch.Tensor | None, attributes: Attributes) -> int:
    heads = int(attributes["num_heads"])
    if key is None:
        heads += 2 * int(attributes["kv_num_heads"])
    return int(query.shape[-1]) // heads


def _run_reference(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    seqlens_k: torch.Tensor,
    total_sequence_length: int,
    head_sink: torch.Tensor | None,
    query_seqlens: torch.Tensor | None,
    *basis: torch.Tensor | None,
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layer = LayerAttention.from_attributes(attributes, _head_dim(query, key, attributes))

    def floats(x: torch.Tensor | None) -> Any:
        return None if x is None else x.detach().float().cpu().numpy()

    output, present_key, present_value = quantized_kv_attention(
        layer.params,
        layer.layouts,
        floats(query),
        floats(key),
        floats(value),
        past_key.numpy(),
        past_value.numpy(),
        seqlens_k.cpu().numpy(),
        head_sink=floats(head_sink),
        query_seqlens=None if query_seqlens is None else query_seqlens.cpu().numpy(),
        key_basis=None if basis[0] is None else KeyBasis(*map(floats, basis)),
    )
    return torch.from_numpy(output).to(query), torch.from_numpy(present_key), torch.from_numpy(present_value)


def _fake(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    *_: Any,
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = int(attributes["num_heads"]) * _head_dim(query, key, attributes)
    return query.new_empty(*query.shape[:-1], width), torch.empty_like(past_key), torch.empty_like(past_value)


torch.library.define("skv::quantized_kv_attention", _SCHEMA)
torch.library.impl("skv::quantized_kv_attention", "CPU", _run_reference)
torch.library.register_fake("skv::quantized_kv_attention", _fake)


# The Hugging Face hook.

_HARMLESS = {
    "position_ids",
    "position_embeddings",
    "cache_position",
    "use_cache",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}
"""What models hand to every attention function although it changes nothing; anything else that is set is refused."""
_current_call: ContextVar[AttentionCall | None] = ContextVar("current_call", default=None)
"""The forward pass that is running: not every model hands its keyword arguments on to the attention function."""


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls in place of its own attention, after RoPE and QK norm.

    Args:
        module: The attention module.
        query: ``[B, N, S, D]``.
        key: ``[B, N_kv, S, D]``, the new tokens only.
        value: The same.
        attention_mask: None: the op masks by lengths.
        scaling: Multiplies the scores; None = 1 / sqrt(D).
        sliding_window: Tokens a query sees, itself included.
        softcap: As the op's attribute.
        s_aux: ``[N]``, the head sinks.
        dropout: 0.
        **others: Anything else that a model passes; see ``_HARMLESS``.

    Returns:
        ``[B, S, N, D]``, and None for the weights.

    Raises:
        SkvError: The model asks for something that the op does not do; the message names the module and what it is.
    """
    name = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    call = _current_call.get()
    if call is None:
        raise SkvError(f"{name}: called outside SkvDecoder", fix="Run the model through SkvDecoder.")
    asked = {n: v for n, v in others.items() if v is not None and v is not False and n not in _HARMLESS}
    if attention_mask is not None:
        asked["attention_mask"] = attention_mask
    if others.get("is_causal", getattr(module, "is_causal", True)) is False:
        asked["is_causal"] = False
    if dropout:
        asked["dropout"] = dropout
    if scaling is not None and not (scaling and math.isfinite(scaling)):  # to the op, 0 is 1 / sqrt(D)
        asked[f"scaling={scaling}"] = scaling
    if softcap is not None and not 0 <= softcap < math.inf:
        asked[f"softcap={softcap}"] = softcap
    if asked:
        raise SkvError(f"{name} asks for what the op does not do", got=", ".join(sorted(asked)), fix=_UNSUPPORTED)
    latents = has_latents(module)
    if latents:
        query = absorb(module, query)
    if key.shape[-1] != query.shape[-1] or value.shape[-1] != key.shape[-1]:
        got = f"query {query.shape[-1]}, key {key.shape[-1]}, value {value.shape[-1]}"
        raise SkvError(f"{name}: head dims differ", got=got, expected="one head_dim", fix=_UNSUPPORTED)
    params = AttentionParams(
        num_heads=int(query.shape[1]),
        kv_num_heads=int(key.shape[1]),
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        softcap=float(softcap or 0.0),
        local_window_size=int(sliding_window or 0),
    )
    output = call.attend(int(module.layer_idx), params, query, key, value, s_aux)  # type: ignore[arg-type]
    output = output.view(*output.shape[:2], params.num_heads, -1)
    return expand(module, output) if latents else output, None


AttentionInterface.register(ATTENTION_NAME, _attend)


@dataclass(frozen=True)
class Lengths:
    """The lengths of one call, computed once for all layers.

    Attributes:
        seqlens_k: int32 ``[B]``, total length after the call minus 1.
        query_seqlens: int32 ``[B]``, new tokens.
        total_sequence_length: Upper bound of the total lengths: the columns of the attention mask.
    """

    seqlens_k: torch.Tensor
    query_seqlens: torch.Tensor
    total_sequence_length: int


class AttentionCall(RecurrentStates):
    """One forward pass: transformers takes it as its cache, the hook finds the caches in it while it is ``running``.

    Args:
        configs: The recipe's options, by layer.
        lengths: Of this call.
        past_keys: uint8 ``[B, N_kv, rows, W]``, in the order of ``configs``.
        past_values: The same.
        bases: Of calibrated keys, by layer.
        sources: Layers that read the cache of another one, and of which.
        past_states: Of recurrent layers; None = zeros, see ``RecurrentStates``.
        width: Columns of new tokens.
    """

    is_compileable = False

    def __init__(
        self,
        configs: Mapping[int, LayerConfig],
        lengths: Lengths,
        past_keys: Sequence[torch.Tensor],
        past_values: Sequence[torch.Tensor],
        bases: Mapping[int, KeyBasis] | None = None,
        sources: Mapping[int, int] | None = None,
        past_states: Mapping[tuple[int, str], torch.Tensor] | None = None,
        width: int = 0,
    ) -> None:
        super().__init__(past_states, lengths.query_seqlens, width)
        self.configs, self.lengths, self.bases, self.sources = configs, lengths, bases or {}, sources or {}
        self.past = dict(zip(configs, zip(past_keys, past_values, strict=True), strict=True))
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.layers: dict[int, LayerAttention] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs, the hook works on this call."""
        token = _current_call.set(self)
        try:
            with self.computing_states():
                yield
        finally:
            _current_call.reset(token)

    def attend(
        self,
        index: int,
        params: AttentionParams,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        head_sink: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs the op for layer ``index`` and keeps what it returns; tensors as the hook gets them.

        A layer that reads the cache of another gets that one's new keys and values from the model. Each of them returns
        the same presents: in the exported graph the last one alone appends, after all others have read the past.
        """
        owner = self.sources.get(index, index)
        if index in self.layers or owner not in self.configs:
            raise SkvError(
                f"layer {index}: attention runs twice, or in a layer that num_hidden_layers does not count",
                expected=f"once in each of {len(self.configs) + len(self.sources)} layers",
                fix=_UNSUPPORTED,
            )
        layer = LayerAttention.build(self.configs[owner], int(query.shape[-1]), params)
        self.layers[index] = layer
        shared = self.layers.get(owner, layer)
        if (shared.layouts, shared.params.kv_num_heads) != (layer.layouts, layer.params.kv_num_heads):
            raise SkvError(
                f"layer {index}: can't read the cache of layer {owner}",
                got=f"{params.kv_num_heads} heads of {query.shape[-1]}, window {params.local_window_size}",
                expected=f"{shared.params.kv_num_heads} heads of {shared.layouts[0].head_dim}, "
                f"window {shared.params.local_window_size}",
                fix=_UNSUPPORTED,
            )
        output, *present = torch.ops.skv.quantized_kv_attention(
            *(x.transpose(1, 2).flatten(2) for x in (query, key, value)),
            *self.past[owner],
            self.lengths.seqlens_k,
            self.lengths.total_sequence_length,
            head_sink,
            self.lengths.query_seqlens,
            *_matrices(self.bases.get(owner)),
            **layer.attributes(),
        )
        self.present[owner] = (present[0], present[1])
        return output

    # What transformers asks of a cache. The new tokens are all that it sees: the past stays inside the op.

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the new keys and values as they are."""
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns 0; positions come from ``position_ids``."""
        return 0


def _matrices(basis: KeyBasis | None) -> list[torch.Tensor | None]:
    """The op's last three inputs."""
    if basis is None:
        return [None] * len(MATRICES)
    return [torch.from_numpy(np.array(getattr(basis, name))) for name in MATRICES]


class _Seen:
    """What the last pass showed of the layers; an object, because torch.export puts a module's own attributes back."""

    layers: Mapping[int, LayerAttention] = MappingProxyType({})
    states: tuple[LayerState, ...] = ()


class SkvDecoder(torch.nn.Module):
    """A Hugging Face decoder whose attention is the op: the graph's inputs and outputs, in torch.

    Args:
        model: A causal language model; its attention implementation is set to the hook.
        configs: The recipe's options, by layer that has a cache; by index for a model that holds a few of its layers
            only, or of which only these have attention.
        all_logits: Return the logits of every token instead of the last real one of each sequence.
        bases: Of calibrated keys, by layer.
        states: Of recurrent layers, in the order of ``past_states``.

    Raises:
        SkvError: The model's attention can't be replaced.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        configs: Sequence[LayerConfig] | Mapping[int, LayerConfig],
        *,
        all_logits: bool = False,
        bases: Mapping[int, KeyBasis] | None = None,
        states: Sequence[LayerState] = (),
    ) -> None:
        super().__init__()
        self.model, self.all_logits, self.bases, self._states = model, all_logits, bases, tuple(states)
        self.configs = dict(configs) if isinstance(configs, Mapping) else dict(enumerate(configs))
        self.sources = cache_sources(model.config.get_text_config())
        self._seen = _Seen()
        self._keep: torch.Tensor | None = None
        self._features: list[torch.Tensor] = []
        for index, layer in enumerate(first_layers(model)):
            layer.register_forward_hook(functools.partial(self._add_features, index))
        head: torch.nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is None:
            raise SkvError(
                f"{model.config.model_type}: not a language model: it has no output embedding", fix=_UNSUPPORTED
            )
        head.register_forward_pre_hook(self._select)
        replace_attention(model, ATTENTION_NAME, PATCHES)
        keep_latents(model, ATTENTION_NAME)
        replace_functions(model)

    @property
    def layers(self) -> tuple[LayerAttention, ...]:
        """Attention of each layer that has a cache, as the last pass showed it."""
        return tuple(self._seen.layers[i] for i in self.configs if i in self._seen.layers)

    @property
    def windows(self) -> list[int]:
        """Tokens that each layer's queries see, those without a cache included; 0 = all."""
        return [layer.params.local_window_size for _, layer in sorted(self._seen.layers.items())]

    @property
    def states(self) -> tuple[LayerState, ...]:
        """States of recurrent layers, as the last pass showed them."""
        return self._seen.states

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_keys: Sequence[torch.Tensor],
        past_values: Sequence[torch.Tensor],
        past_states: Sequence[torch.Tensor] | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> (
        tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]
        | tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]
    ):
        """Runs the model on new tokens.

        Padding may stand anywhere in the new columns of the mask: real tokens are packed to the front before the model
        sees them, and padding takes no place in the cache.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: int64 ``[B, past + S]``; 0 = padding.
            position_ids: int64 ``[B, S]``, or ``[3, B, S]`` with multimodal RoPE.
            past_keys: uint8 ``[B, N_kv, rows, W]``, layer by layer.
            past_values: The same.
            past_states: ``[B, *LayerState.shape]`` of recurrent layers, in the order of ``states``; None = at the
                beginning of a sequence.
            inputs_embeds: float32 ``[B, S, channels]`` in the place of the tokens' embeddings, or of length 0; the
                channels are the model's, then those to add to the output of each of the ``first_layers``.

        Returns:
            logits float32 ``[B, 1, vocab]`` (``[B, S, vocab]`` with ``all_logits``), present keys, present values, and,
            of a model that has such layers, present states.
        """
        tokens, columns = input_ids.shape[1], attention_mask.shape[1]
        # An index, not a slice: a slice's strides would tie the traced lengths to each other.
        mask = attention_mask.index_select(1, torch.arange(columns - tokens, columns))
        count = mask.sum(1, keepdim=True)
        # A stable partition: where each token goes, real ones first.
        place = torch.where(mask > 0, mask.cumsum(1) - 1, count + (mask == 0).long().cumsum(1) - 1)
        where = place if position_ids.dim() == 2 else place[None].expand(position_ids.shape[0], -1, -1)
        packed_positions = torch.zeros_like(position_ids).scatter(-1, where, position_ids)
        if inputs_embeds is None:
            given = {"input_ids": torch.zeros_like(input_ids).scatter(1, place, input_ids)}
        else:
            size = int(self.model.config.get_text_config().hidden_size)
            embeds, *self._features = torch.split(self._embed(input_ids, inputs_embeds, place), size, -1)
            given = {"inputs_embeds": embeds}
        self._keep = place if self.all_logits else (count - 1).clamp(min=0)
        lengths = Lengths((attention_mask.sum(1) - 1).to(torch.int32), count.squeeze(1).to(torch.int32), columns)
        states = None
        if past_states is not None:
            states = {(x.layer, x.name): past for x, past in zip(self._states, past_states, strict=True)}
        call = AttentionCall(self.configs, lengths, past_keys, past_values, self.bases, self.sources, states, tokens)
        with call.running():
            logits = self.model(position_ids=packed_positions, past_key_values=call, use_cache=True, **given).logits
        self._keep, self._features = None, []
        self._seen.layers, self._seen.states = self._check(call), call.states()
        present = [call.present[i] for i in self.configs]
        keys_values = [p[0] for p in present], [p[1] for p in present]
        if not call.present_states:
            return logits.float(), *keys_values
        return logits.float(), *keys_values, [call.present_states[x.layer, x.name] for x in self._seen.states]

    def _embed(self, ids: torch.Tensor, given: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Returns what the model reads, packed ``[B, S, channels]``: the given embeddings, or the tokens' without any.

        Behind a token's embedding stands what is added to the first layers' outputs (DeepStack): nothing for tokens.
        Both stand in one list of rows, of which the wanted ones are taken: no branch, and no cost without embeddings
        beyond a copy of the rows.
        """
        batch, tokens = ids.shape
        own = self.model.get_input_embeddings()(ids)
        own = torch.nn.functional.pad(own, (0, given.shape[-1] - own.shape[-1]))
        extra = given.to(own.dtype).flatten(0, 1)
        rows = torch.cat([own.flatten(0, 1), extra])
        come_from = torch.zeros_like(ids).scatter(1, place, torch.arange(tokens).expand(batch, -1))
        index = come_from + torch.arange(batch)[:, None] * tokens + extra.shape[0]
        return rows.index_select(0, index.flatten()).view(batch, tokens, -1)

    def _add_features(self, index: int, _layer: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        """Adds to the output of one of the first layers what belongs to it."""
        return output + self._features[index] if self._features else output

    def _select(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Leaves the output embedding only the hidden states whose logits are wanted, unpacked."""
        if self._keep is None:
            return None
        hidden = args[0]
        return (hidden.gather(1, self._keep[..., None].expand(-1, -1, hidden.shape[-1])), *args[1:])

    def _check(self, call: AttentionCall) -> Mapping[int, LayerAttention]:
        call.check_used()
        wanted = {*self.configs, *self.sources}
        missing = sorted(wanted - set(call.layers))
        if missing:
            raise SkvError(
                f"{self.model.config.model_type}: layers without attention that the op replaces",
                got=f"layers {missing}",
                expected=f"attention in each of {len(wanted)} layers",
                fix=_UNSUPPORTED,
            )
        return call.layers
