"""What `skv-export quality --baselines` puts beside recipes: the literature's caches and transformers' own, by name."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, QuantizedCache

from skv_export.checkpoints.pretrained import input_device, own_attention
from skv_export.errors import SkvError, did_you_mean
from skv_export.evaluation.candidates import Candidate, Simulated
from skv_export.evaluation.decode_simulation import Simulation, TensorCache, attend
from skv_export.evaluation.literature import alignedkv, kvquant, oscar, rotatekv, rvq
from skv_export.evaluation.literature.decoquant import DecoquantCache
from skv_export.evaluation.literature.from_prompt import FromPrompt
from skv_export.evaluation.literature.from_text import FromText
from skv_export.evaluation.literature.kivi import KiviKeys, KiviValues
from skv_export.evaluation.literature.kvarn import KvarnCache
from skv_export.evaluation.literature.polarquant import PolarKeys
from skv_export.evaluation.literature.squat import SquatKeys
from skv_export.evaluation.literature.svdq import SCHEDULES, SvdqKeys
from skv_export.evaluation.literature.turboquant import TurboQuantCache

_PACKAGES = {"quanto": ("optimum.quanto", "optimum-quanto"), "hqq": ("hqq", "hqq")}
_CACHE_BITS = {"quanto": (4, 2), "hqq": (8, 4, 2)}
"""What works: hqq packs 3 bits into rows that it can't unpack to every length."""
_PROMPT = {"quanto": 1, "hqq": 64}
"""Tokens of the first call: hqq packs several groups into a row, and fails where they do not fill it."""
_RESIDUAL, _GROUP = 128, 64
"""Defaults of transformers' QuantizedCache: full-precision tokens, and numbers that share a scale and a zero point."""


# The literature: each method's candidate for bits of keys and values.


def _kivi(name: str, k_bits: int, v_bits: int) -> Candidate:
    return _tensor_by_tensor(name, "KIVI's published cache", KiviKeys, KiviValues, k_bits, v_bits)


def _kvarn(name: str, k_bits: int, v_bits: int) -> Candidate:
    values = functools.partial(KvarnCache, is_value=True)
    return _tensor_by_tensor(name, "KVarN: rotation, dual scaling", KvarnCache, values, k_bits, v_bits)


def _turboquant(name: str, k_bits: int, v_bits: int) -> Candidate:
    note = "TurboQuant: rotation, Lloyd-Max levels"
    return _tensor_by_tensor(name, note, TurboQuantCache, TurboQuantCache, k_bits, v_bits)


def _turboquant_prod(name: str, k_bits: int, v_bits: int) -> Candidate:
    note = "TurboQuant, keys with a bit for the residual's signs"
    keys = functools.partial(TurboQuantCache, prod=True)
    return _tensor_by_tensor(name, note, keys, TurboQuantCache, k_bits, v_bits)


def _squat(name: str, k_bits: int, v_bits: int) -> Candidate:
    return _from_prompt(name, "SQuat: errors of keys away from the prompt's queries", SquatKeys, k_bits, v_bits)


def _svdq(name: str, k_bits: int, v_bits: int) -> Candidate:
    return _from_prompt(name, "SVDq: keys in the prompt's singular vectors", SvdqKeys, k_bits, v_bits)


def _kvquant(name: str, k_bits: int, v_bits: int) -> Candidate:
    return FromText.of(name, "KVQuant: nuq and 1% outliers, of float16", functools.partial(kvquant.fit, k_bits, v_bits))


def _oscar(name: str, k_bits: int, v_bits: int) -> Candidate:
    return FromText.of(name, "OSCAR: attention-aware rotations", functools.partial(oscar.fit, k_bits, v_bits))


def _rotatekv(name: str, k_bits: int, v_bits: int) -> Candidate:
    return FromText.of(name, "RotateKV: heads rotated together", functools.partial(rotatekv.fit, k_bits, v_bits))


def _rvq(name: str, k_bits: int, v_bits: int) -> Candidate:
    return FromText.of(name, "residual vector quantization", functools.partial(rvq.fit, k_bits, v_bits))


def _polarquant(name: str, k_bits: int, v_bits: int) -> Candidate:
    return _tensor_by_tensor(name, "PolarQuant: radius and angle of keys", PolarKeys, KiviValues, k_bits, v_bits)


def _decoquant(name: str, k_bits: int, v_bits: int) -> Candidate:
    note = "DecoQuant: blocks decomposed into two tensors"
    return _tensor_by_tensor(name, note, DecoquantCache, DecoquantCache, k_bits, v_bits)


def _alignedkv(name: str, k_bits: int, v_bits: int) -> Candidate:
    note, cache = "AlignedKV: bits read of a cache of 16", alignedkv.AlignedCache
    return _tensor_by_tensor(name, note, cache, cache, k_bits, v_bits, alignedkv.attend)


_MakeCache = Callable[..., TensorCache]
"""Bits, head_dim and sliding window to a cache of one tensor."""


def _tensor_by_tensor(
    name: str,
    note: str,
    keys: _MakeCache,
    values: _MakeCache,
    k_bits: int,
    v_bits: int,
    attend: Callable[..., torch.Tensor] = attend,
) -> Simulated:
    simulation = Simulation(lambda _, *shape: (keys(k_bits, *shape), values(v_bits, *shape)), attend=attend)
    return Simulated(name, f"{name} published", note, simulation)


def _from_prompt(name: str, note: str, keys: _MakeCache, k_bits: int, v_bits: int) -> FromPrompt:
    return FromPrompt.of(name, note, lambda _, *shape: (keys(k_bits, *shape), KiviValues(v_bits, *shape)))


@dataclass(frozen=True)
class _Method:
    """A method of the literature.

    Attributes:
        make: Its candidate, from name, bits of keys and bits of values.
        pairs: Bits that its name alone stands for.
        k_bits: What keys can have.
        v_bits: What values can have.
    """

    make: Callable[[str, int, int], Candidate]
    pairs: tuple[tuple[int, int], ...] = ((4, 4), (2, 2))
    k_bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)
    v_bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8)


LITERATURE = {
    "kivi": _Method(_kivi),
    "kvquant": _Method(_kvquant, ((4, 4), (3, 3), (2, 2))),
    "kvarn": _Method(_kvarn, ((4, 2), (2, 2))),
    "turboquant": _Method(_turboquant, ((4, 4), (3, 3), (2, 2))),
    "turboquant-prod": _Method(_turboquant_prod, ((4, 4), (3, 3)), k_bits=(2, 3, 4, 5, 6, 8)),
    "squat": _Method(_squat),
    "svdq": _Method(_svdq, ((4, 4), (2, 2)), k_bits=tuple(SCHEDULES)),
    "oscar": _Method(_oscar, ((2, 2),)),
    "rotatekv": _Method(_rotatekv, ((4, 4), (2, 2)), k_bits=(2, 3, 4), v_bits=(2, 3, 4)),
    "rvq": _Method(_rvq, ((3, 3), (2, 2)), k_bits=(1, 2, 3, 4), v_bits=(1, 2, 3, 4)),
    "polarquant": _Method(_polarquant, ((4, 4), (3, 3)), k_bits=(2, 3, 4)),
    "decoquant": _Method(_decoquant, k_bits=(2, 3, 4, 5, 6, 8), v_bits=(2, 3, 4, 5, 6, 8)),
    "alignedkv": _Method(_alignedkv, ((16, 16),), k_bits=(16,), v_bits=(16,)),
}
"""By name: ``kivi`` alone means its usual bits, ``kivi-k4v2`` names them."""
BASELINES = (*LITERATURE, "hf-quanto", "hf-hqq")
"""All names; ``hf-quanto-4`` names a width."""


# transformers' own.


@dataclass(frozen=True)
class TransformersCache(Candidate):
    """transformers' own QuantizedCache, its code untouched.

    It quantizes the first call's tokens at once, then whenever 128 more have come, all of them anew. A first call and
    then calls of 128 leave what decoding token by token leaves: within a call every new token is exact. The first call
    has one token, with hqq 64, which then are a prompt.
    """

    backend: str
    bits: int

    def logits(self, model: PreTrainedModel, ids: torch.Tensor, prompt: int = 0) -> torch.Tensor:
        """Calls that end where the cache flushes."""
        axis = 0 if self.backend == "quanto" else 1
        cache = QuantizedCache(
            backend=self.backend,
            config=model.config,
            nbits=self.bits,
            axis_key=axis,
            axis_value=axis,
            q_group_size=_GROUP,
            residual_length=_RESIDUAL,
        )
        ids = ids.to(input_device(model))
        with own_attention(model):
            first = _PROMPT[self.backend]
            parts = [ids[:first], *torch.split(ids[first:], _RESIDUAL)]
            return torch.cat([model(p[None], past_key_values=cache, use_cache=True).logits[0].float() for p in parts])

    def effective_bits(self, context_length: int) -> float:
        """Codes, a float16 scale and zero point per group, and room for the exact tokens."""
        held = max(0, context_length - _RESIDUAL)
        return (held * (self.bits + 32 / _GROUP) + (context_length - held) * 16) / context_length


# By name.


def parse_baselines(text: str) -> list[Candidate]:
    """Reads ``--baselines``.

    Raises:
        SkvError: An unknown name, bits that it does not have, or a package that is not installed.
    """
    found: list[Candidate] = []
    for name in filter(None, (part.strip().lower() for part in text.split(","))):
        with_bits = re.fullmatch(r"(.+)-k(\d+)v(\d+)", name)
        method = LITERATURE.get(with_bits[1] if with_bits else name)
        cache = re.fullmatch(r"hf-(quanto|hqq)(?:-(\d))?", name)
        if method:
            pairs = [(int(with_bits[2]), int(with_bits[3]))] if with_bits else method.pairs
            for k_bits, v_bits in pairs:
                if k_bits not in method.k_bits or v_bits not in method.v_bits:
                    expected = f"bits of keys {method.k_bits}, of values {method.v_bits}"
                    raise SkvError(f"--baselines: {name}", got=f"K{k_bits}V{v_bits}", expected=expected)
                found.append(method.make(f"{with_bits[1] if with_bits else name}-k{k_bits}v{v_bits}", k_bits, v_bits))
        elif cache:
            _require(cache[1])
            widths = (int(cache[2]),) if cache[2] else (4, 2)
            if not set(widths) <= set(_CACHE_BITS[cache[1]]):
                raise SkvError(f"--baselines: {name}", expected=f"bits of {_CACHE_BITS[cache[1]]}")
            found += [_transformers(cache[1], bits) for bits in widths]
        else:
            expected = ", ".join(BASELINES) + ", or one with its bits: kivi-k4v2, hf-quanto-4, hf-hqq-8"
            near = did_you_mean(with_bits[1] if with_bits else name, BASELINES)
            raise SkvError(f"--baselines: {name}", expected=expected, fix=near)
    return found


def _transformers(backend: str, bits: int) -> TransformersCache:
    name = f"hf-{backend}-{bits}"
    return TransformersCache(name, name, f"transformers' QuantizedCache, {backend}", backend, bits)


def _require(backend: str) -> None:
    module, package = _PACKAGES[backend]
    root = module.partition(".")[0]
    if importlib.util.find_spec(root) is None or importlib.util.find_spec(module) is None:
        raise SkvError(
            f"--baselines: hf-{backend} needs the package {package}",
            got="not installed",
            fix=f"pip install {package}",
        )
