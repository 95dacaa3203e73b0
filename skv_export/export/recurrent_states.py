"""Recurrent layers in torch: their states as a graph's inputs and outputs, and the two operators that read them.

transformers' recurrent layers (convolutions, state-space layers, gated delta rule) ask the cache for their states and
call functions of their modeling module. While a ``RecurrentStates`` runs, these functions are ours: each computes what
theirs does, from the state given and over real tokens alone, with an operator that ONNX Runtime has too
(com.microsoft::CausalConvWithState and com.microsoft::LinearAttention). theirs run at all other times.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from skv_export.errors import SkvError
from skv_export.spec.state import CONV, RECURRENT, LayerState

Key = tuple[int, str]
"""Names one state: layer, and ``LayerState.name``."""
_current: ContextVar[RecurrentStates | None] = ContextVar("current_states", default=None)

# The operators, as ONNX Runtime has them.

torch.library.define(
    "skv::causal_conv", "(Tensor input, Tensor weight, Tensor? bias, Tensor past, str activation) -> Tensor"
)
torch.library.define(
    "skv::linear_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor past, Tensor decay, Tensor? beta, *, int q_num_heads, "
    "int kv_num_heads, float scale, str update_rule) -> (Tensor, Tensor)",
)


def _causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, past: torch.Tensor, activation: str
) -> torch.Tensor:
    """``x [B, C, S]``, weight ``[C, 1, K]``, past ``[B, C, K - 1]``; returns ``[B, C, S]``; all float32."""
    y = F.conv1d(torch.cat([past, x], dim=2), weight, bias, groups=weight.shape[0])
    return F.silu(y) if activation == "silu" else y


def _linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None,
    *,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float,
    update_rule: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token after the other, as ONNX Runtime's documentation of LinearAttention defines it."""
    batch, tokens = query.shape[:2]
    query = query.view(batch, tokens, q_num_heads, -1).repeat_interleave(kv_num_heads // q_num_heads, dim=2)
    key, value = (x.view(batch, tokens, kv_num_heads, -1) for x in (key, value))
    state, outputs = past.clone(), []
    for t in range(tokens):
        state = state * decay[:, t].exp().view(batch, kv_num_heads, -1, 1)
        new = value[:, t]
        if update_rule == "gated_delta":
            assert beta is not None
            new = (new - torch.einsum("bhkv,bhk->bhv", state, key[:, t])) * beta[:, t, :, None]
        state = state + key[:, t, :, :, None] * new[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * scale)
    return torch.stack(outputs, dim=1).flatten(2), state


def _fake_linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(value), torch.empty_like(past)


torch.library.impl("skv::causal_conv", "CPU", _causal_conv)
torch.library.impl("skv::linear_attention", "CPU", _linear_attention)
torch.library.register_fake("skv::causal_conv", lambda x, *_: torch.empty_like(x))
torch.library.register_fake("skv::linear_attention", _fake_linear_attention)


class RecurrentStates:
    """The states of one forward pass, behind the part of transformers' cache interface that recurrent layers use.

    A layer asks for its state and calls its function right after that: it is told that there is none, so that it takes
    the form for many tokens whatever their number is, and the function gets the state from here.

    Args:
        past: Of each layer and name, ``[B, *LayerState.shape]``; None: zeros, of the shapes that the layers want.
        new_tokens: ``[B]``, the real tokens of each sequence, which stand first.
        width: Tokens of the call.

    Attributes:
        present_states: The states after the call.
    """

    def __init__(self, past: Mapping[Key, torch.Tensor] | None, new_tokens: torch.Tensor, width: int) -> None:
        self._past, self._count, self._width = past, new_tokens, width
        self._asked: dict[str, Key] = {}
        self.present_states: dict[Key, torch.Tensor] = {}

    @contextlib.contextmanager
    def computing_states(self) -> Iterator[None]:
        """While the block runs, the functions of recurrent layers work on these states."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def check_used(self) -> None:
        """Refuses a model whose layers took no notice of the states that they were given.

        Raises:
            SkvError: Names the first of them.
        """
        left = sorted({*self._asked.values(), *(self._past or {})} - self.present_states.keys())
        if left:
            layer, name = left[0]
            raise SkvError(
                f"layer {layer}: its state {name} is not computed by a function that the export replaces",
                expected=", ".join(sorted(_REPLACED)),
                fix="This architecture can't be exported.",
            )

    def states(self) -> tuple[LayerState, ...]:
        """Returns what the layers have for states, in the order of layers and names."""
        return tuple(
            LayerState(*key, tuple(int(size) for size in x.shape[1:])) for key, x in sorted(self.present_states.items())
        )

    # What recurrent layers ask of a cache.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Returns None; see the class."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Returns None; see the class."""
        self._asked[RECURRENT] = self._key(layer_idx, RECURRENT, state_idx)

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        """Returns True: a single token takes the way of many."""
        return True

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Returns the new inputs of a convolution ``[B, C, S]`` as they are; ``_conv`` puts the state before them."""
        self._asked[CONV] = self._key(layer_idx, CONV, state_idx)
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Keeps a layer's state after the call."""
        self.present_states[self._key(layer_idx, RECURRENT, state_idx)] = recurrent_states
        return recurrent_states

    # The functions that replace transformers'.

    def conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """A causal convolution of ``x [B, C, S]`` with ``weight [C, K]``; the last real inputs are the new state."""
        kept = weight.shape[1] - 1
        key = self._take(CONV)
        wide = x.float()
        past = self._state(key, (x.shape[0], x.shape[1], kept), wide)
        places = self._count.long()[:, None, None] + torch.arange(kept, device=x.device)
        # Nothing but this reads the past state: whoever binds one buffer as past and present overwrites it thereafter.
        inputs = torch.cat([past, wide], dim=2)
        self.present_states[key] = inputs.gather(2, places.expand(-1, x.shape[1], -1))
        fused = "silu" if activation in ("silu", "swish") else "none"
        y = torch.ops.skv.causal_conv(
            wide, weight.float().unsqueeze(1), None if bias is None else bias.float(), inputs[:, :, :kept], fused
        )
        if activation is not None and fused == "none":
            y = ACT2FN[activation](y)
        return y.to(x.dtype)

    def scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,  # noqa: N803 (transformers' names)
        B: torch.Tensor,  # noqa: N803
        C: torch.Tensor,  # noqa: N803
        chunk_size: int,
        D: torch.Tensor | None = None,  # noqa: N803
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **_: Any,
    ) -> Any:
        """Mamba 2's scan (arXiv 2405.21060): ``h = exp(dt A) h + dt B x``, ``y = C h + D x``, for each head.

        Args:
            x: ``[B, S, heads, P]``.
            dt: ``[B, S, heads]``.
            A: ``[heads]``.
            B: ``[B, S, groups, N]``.
            C: The same.
            chunk_size: Without a meaning here.
            D: ``[heads]``.
            dt_bias: ``[heads]``.
            dt_softplus: Whether softplus makes dt positive.
            dt_limit: Its least and its greatest value.
            return_final_states: Return the state, too.
        """
        heads, groups = x.shape[2], B.shape[2]
        key = self._take(RECURRENT)
        if dt_bias is not None:
            dt = dt + dt_bias.to(dt.dtype)
        dt = (F.softplus(dt) if dt_softplus else dt).float()
        if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
            dt = dt.clamp(*dt_limit)
        dt = dt * self._real
        wide = x.float()
        past = self._state(key, (x.shape[0], heads, B.shape[3], x.shape[3]), wide)
        y, present = torch.ops.skv.linear_attention(
            C.float().flatten(2),
            _repeated(B.float(), heads // groups).flatten(2),
            (wide * dt[..., None]).flatten(2),
            past,
            dt * A.float(),
            None,
            q_num_heads=groups,
            kv_num_heads=heads,
            scale=1.0,
            update_rule="gated",
        )
        y = y.unflatten(2, (heads, x.shape[3]))
        if D is not None:
            y = y + wide * D.float()[:, None]
        return (y, present) if return_final_states else y

    def delta_rule(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gated delta rule (arXiv 2412.06464), as ``_linear_attention`` computes it.

        Args:
            query: ``[B, S, heads of keys, D]``.
            key: The same.
            value: ``[B, S, heads, D_v]``.
            g: ``[B, S, heads]``, the logarithm of the decay.
            beta: ``[B, S, heads]``.
            use_qk_l2norm_in_kernel: Whether queries and keys get length 1.

        Returns:
            ``[B, S, heads, D_v]``, and the state.
        """
        heads, key_heads, width = value.shape[2], key.shape[2], key.shape[3]
        place = self._take(RECURRENT)
        past = self._state(place, (value.shape[0], heads, width, value.shape[3]), value.float())
        query, key = query.float(), key.float()
        if use_qk_l2norm_in_kernel:
            query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
        output, present = torch.ops.skv.linear_attention(
            query.flatten(2),
            _repeated(key, heads // key_heads).flatten(2),
            value.float().flatten(2),
            past,
            g.float() * self._real,
            beta.float() * self._real,
            q_num_heads=key_heads,
            kv_num_heads=heads,
            scale=width**-0.5,
            update_rule="gated_delta",
        )
        return output.unflatten(2, (heads, value.shape[3])).to(value.dtype), present

    @functools.cached_property
    def _real(self) -> torch.Tensor:
        """``[B, S, 1]``, 1 for real tokens, 0 for padding, which changes no state."""
        places = torch.arange(self._width, device=self._count.device)
        return (places[None] < self._count[:, None]).float()[..., None]

    @staticmethod
    def _key(layer: int, name: str, number: int) -> Key:
        if number:
            raise SkvError(f"layer {layer}: states of one kind", got=f"{number + 1} or more", expected="one")
        return layer, name

    def _take(self, kind: str) -> Key:
        """The state that the running layer asked for."""
        key = self._asked.pop(kind, None)
        if key is None or key in self.present_states:
            raise SkvError(f"a recurrent layer's {kind} state", got="used without asking for it", expected="asked for")
        return key

    def _state(self, key: Key, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        if self._past is None:
            return like.new_zeros(shape)
        return self._past[key]


def _repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """``x [B, S, heads, D]`` with each head ``times`` in a row."""
    if times == 1:
        return x
    batch, tokens, heads, width = x.shape
    return x[:, :, :, None].expand(batch, tokens, heads, times, width).flatten(2, 3)


_REPLACED: Mapping[str, Callable[..., Any]] = {
    "causal_conv1d_fn": RecurrentStates.conv,
    "mamba2_chunk_scan": RecurrentStates.scan,
    "torch_chunk_gated_delta_rule": RecurrentStates.delta_rule,
}
"""Functions of transformers' modeling modules, and what stands for them while states are computed."""


def replace_functions(model: PreTrainedModel) -> None:
    """Makes a model's modeling modules ask for a running ``RecurrentStates``; without one, they do what they did."""
    for name in {type(module).__module__ for module in model.modules()}:
        if not name.startswith("transformers.models."):
            continue
        namespace = vars(sys.modules[name])
        for function, ours in _REPLACED.items():
            theirs = namespace.get(function)
            if theirs is not None and not hasattr(theirs, "skv_original"):
                namespace[function] = _dispatching(theirs, ours)


def _dispatching(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def function(*arguments: Any, **options: Any) -> Any:
        states = _current.get()
        return theirs(*arguments, **options) if states is None else ours(states, *arguments, **options)

    function.skv_original = theirs  # type: ignore[attr-defined]
    return function
