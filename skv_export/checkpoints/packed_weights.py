"""Checkpoints that other tools quantized: GPTQ, AWQ, compressed-tensors, Olive, HQQ, FP8 and MXFP4.

Which tensors make up a matrix follows from their names, what their bits mean from ``quantization_config``. Each such
group becomes one entry under the matrix's own name: ``array`` dequantizes it, ``blocks`` gives its codes as a graph
holds them. Formats that are not here are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from skv_export.checkpoints.packed_entry import Entries, PackedEntry, PackedFormat
from skv_export.checkpoints.packed_floats import FP8, MXFP4
from skv_export.checkpoints.packed_integers import AWQ, GPTQ, HQQ, OLIVE, PACK_QUANTIZED
from skv_export.errors import SkvError

_OF_ACTIVATIONS = (".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".k_scale", ".v_scale")
"""Ends of names of what activations are rounded with, which an export does not do."""
_FORMATS: Mapping[str, PackedFormat] = {
    "gptq": GPTQ, "awq": AWQ, "pack-quantized": PACK_QUANTIZED, "olive": OLIVE, "hqq": HQQ, "fp8": FP8, "mxfp4": MXFP4
}  # fmt: skip
_READ = "gptq, awq, compressed-tensors, olive, hqq, fp8 or mxfp4"
CONV1D = ("gpt2",)
"""Architectures whose matrices are ``[K, N]`` in the model; quantizers store them as those of others."""
_CONV1D_MODULES = re.compile(r"\.(c_attn|c_proj|c_fc)$")
_MOST_REPETITIONS = 5
Scheme = tuple[str, Mapping[str, Any]]
"""The name of a format in ``_FORMATS``, and what it leaves open."""
Schemes = Callable[[str], Scheme]
"""The scheme of a matrix, by the name of its module."""


def unpack_checkpoint(config: Mapping[str, Any], entries: Entries, source: str) -> Entries:
    """Returns a checkpoint's tensors, with one entry for each quantized matrix in place of what it is made of.

    Args:
        config: The checkpoint's ``config.json``.
        entries: Its tensors.
        source: Its name, for messages.

    Raises:
        SkvError: A format that is not known, or tensors that make no matrix.
    """
    given = quantization(config)
    if not given:
        return entries
    kinds, scheme = _schemes(given, source)
    merged = {name: entry for name, entry in entries.items() if not name.endswith(_OF_ACTIVATIONS)}
    for kind in kinds:
        layout = _FORMATS[kind]
        for name in entries:
            if not name.endswith(layout.suffixes[0]) or name not in merged:
                continue
            stem = name.removesuffix(layout.suffixes[0])
            found = {suffix: stem + suffix for suffix in layout.suffixes if stem + suffix in merged}
            if kind == "fp8" and (len(found) == 1 or merged[name].dtype not in ("F8_E4M3", "F8_E5M2", "I8")):
                continue
            chosen, options = scheme(stem)
            if chosen != kind:
                got = f"{name}, but {chosen} by quantization_config"
                raise SkvError(f"{source}: a matrix of another format than it should have", got=got)
            parts = {suffix.lstrip("._"): merged.pop(part) for suffix, part in found.items()}
            across = config.get("model_type") in CONV1D and bool(_CONV1D_MODULES.search(stem))
            entry = PackedEntry.of(stem + layout.weight, kind, layout, parts, options, across)
            merged[entry.name] = entry
    if not any(isinstance(entry, PackedEntry) for entry in merged.values()):
        raise SkvError(
            f"{source}: quantization_config says that weights are quantized ({', '.join(kinds)}), but none is",
            got=", ".join(list(entries)[:3]),
            expected=f"names that end in {' or '.join(_FORMATS[kind].suffixes[0] for kind in kinds)}",
            fix="Remove quantization_config from config.json if the weights are plain.",
        )
    return merged


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a configuration's ``quantization_config``; empty if it has none."""
    inner = config.get("text_config")
    given = config.get("quantization_config") or (isinstance(inner, Mapping) and inner.get("quantization_config"))
    return given if isinstance(given, Mapping) else {}


def _schemes(given: Mapping[str, Any], source: str) -> tuple[Sequence[str], Schemes]:
    """Returns the formats that occur, and which of them a matrix has."""
    method = str(given.get("quant_method", "")).lower()
    if method == "compressed-tensors":
        return _compressed(given, source)
    if method == "olive":
        return ["olive"], _olive(given, source)
    scheme = _uniform(method, given, source)
    return [scheme[0]], lambda _: scheme


def _uniform(method: str, given: Mapping[str, Any], source: str) -> Scheme:
    """The scheme of formats that have one for all matrices."""
    bits, size = given.get("bits"), given.get("group_size", 128)
    if method == "gptq":
        version = str(given.get("checkpoint_format", "gptq"))
        if bits in (2, 4, 8) and version in ("gptq", "gptq_v2") and type(size) is int:
            return "gptq", {
                "bits": bits, "group_size": size, "sym": bool(given.get("sym", True)), "v1": version == "gptq",
                "reordered": bool(given.get("desc_act", False)),
            }  # fmt: skip
        raise _refusal(source, f"GPTQ with {bits} bits, format {version}", "2, 4 or 8 bits, gptq or gptq_v2")
    if method == "awq":
        version = str(given.get("version", "gemm")).lower()
        if bits == 4 and version == "gemm" and type(size) is int:
            return "awq", {"bits": 4, "group_size": size, "sym": False}
        raise _refusal(source, f"AWQ with {bits} bits, version {version}", "4 bits, version gemm")
    if method == "hqq":
        return "hqq", _hqq(given, source)
    if method in ("fp8", "mxfp4"):
        return method, {}
    if method == "bitsandbytes":
        reason = "its weights are entries of a table with steps of different sizes, which MatMulNBits does not have"
        raise _refusal(source, f"bitsandbytes: {reason}", _READ)
    raise _refusal(source, method or "no quant_method", _READ)


def _hqq(given: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """What HQQ's tensors do not say themselves: the bits, which say how they are packed."""
    stated = given.get("quant_config")
    inner = stated.get("weight_quant_params", stated) if isinstance(stated, Mapping) else {}
    # One scheme, or one for each kind of module.
    schemes = [inner] if "nbits" in inner else [s.get("weight_quant_params", s) for s in inner.values()]
    bits = {scheme.get("nbits") if isinstance(scheme, Mapping) else None for scheme in schemes}
    if len(bits) == 1 and bits <= {2, 4, 8}:
        return {"bits": bits.pop(), "sym": False}
    raise _refusal(source, f"HQQ with {sorted(map(str, bits)) or 'no'} bits", "2, 4 or 8 bits, the same for all")


def _olive(given: Mapping[str, Any], source: str) -> Schemes:
    """Olive's, which lists the modules that differ from the others."""
    overrides = given.get("overrides") or {}

    def scheme(module: str) -> Scheme:
        own = overrides.get(module) if isinstance(overrides, Mapping) else None
        values = {**given, **{k: v for k, v in (own if isinstance(own, Mapping) else {}).items() if v is not None}}
        bits, size = values.get("bits"), values.get("group_size")
        if bits not in (2, 4, 8) or type(size) is not int:
            got = f"Olive with {bits} bits in groups of {size}"
            raise _refusal(source, got, "2, 4 or 8 bits, and the groups' size")
        return "olive", {"bits": bits, "group_size": size, "sym": bool(values.get("symmetric", True))}

    scheme("")
    return scheme


def _compressed(given: Mapping[str, Any], source: str) -> tuple[Sequence[str], Schemes]:
    """compressed-tensors', whose groups of modules have targets: names, patterns of names (``re:``), or classes."""
    groups = given.get("config_groups")
    found: list[tuple[Sequence[str], Scheme]] = []
    for group in groups.values() if isinstance(groups, Mapping) else []:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            targets = group.get("targets")
            named = [str(target) for target in targets] if isinstance(targets, list) else []
            found.append((named, _compressed_scheme(str(group.get("format") or given.get("format")), weights, source)))
    if len(found) == 1:
        only = found[0][1]
        return [only[0]], lambda _: only
    if not found:
        raise _refusal(source, "compressed-tensors without groups of weights", "config_groups with weights")

    def scheme(module: str) -> Scheme:
        for targets, chosen in found:
            if any(_names(target, module) for target in targets):
                return chosen
        rest = [chosen for targets, chosen in found if any(re.fullmatch(r"\w+", target) for target in targets)]
        return rest[0] if rest else found[0][1]

    return list(dict.fromkeys(kind for _, (kind, _) in found)), scheme


def _names(target: str, module: str) -> bool:
    """Whether a target of compressed-tensors names a module."""
    if not target.startswith("re:"):
        return target == module
    pattern = target.removeprefix("re:")
    try:
        # A checkpoint's pattern must not run for ever: no repeated groups, and few repetitions.
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > _MOST_REPETITIONS:
            raise re.error("too many repetitions")
        return re.match(pattern, module) is not None
    except re.error as error:
        expected = "a regular expression without repeated groups"
        raise SkvError("quantization_config: targets", got=target[:200], expected=expected) from error


def _compressed_scheme(form: str, weights: Mapping[str, Any], source: str) -> Scheme:
    kind, bits, symmetric = weights.get("type"), weights.get("num_bits"), weights.get("symmetric", True)
    if form == "pack-quantized" and kind == "int" and bits in (2, 4, 8):
        return "pack-quantized", {"bits": bits, "sym": bool(symmetric)}
    if form in ("float-quantized", "naive-quantized", "int-quantized") and bits == 8 and symmetric is not False:
        return "fp8", {}
    got = f"compressed-tensors: {form} with {kind} of {bits} bits, {'' if symmetric else 'a'}symmetric"
    raise _refusal(source, got, "pack-quantized with 2, 4 or 8 bits, or float- or int-quantized with 8")


def _refusal(source: str, got: str, expected: str) -> SkvError:
    fix = "Use the full-precision checkpoint that it was made from."
    return SkvError(f"{source}: weights quantized in a way that can't be read", got=got, expected=expected, fix=fix)
