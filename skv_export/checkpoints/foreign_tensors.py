"""What a checkpoint is whose tensors are not the model's: quantized by another tool, an adapter, a classifier."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from skv_export.checkpoints.checkpoint import Source
from skv_export.errors import SkvError

_FULL_PRECISION = "Use the full-precision checkpoint that it was made from."
_UNSAID = "config.json must say how, in quantization_config; else use the full-precision checkpoint."
_MERGE = "Merge the adapter into its base model (peft: merge_and_unload), or keep it in a folder of its own: --adapter."
_KINDS: tuple[tuple[str, str, str], ...] = (
    (r"\.lora_[AB]\.|\.lora_embedding_[AB]|\.lora_magnitude", "tensors of a LoRA adapter", _MERGE),
    (r"\.g_idx$", "weights quantized by GPTQ", _UNSAID),
    (r"\.qweight$", "weights quantized by AWQ or GPTQ", _UNSAID),
    (r"\.(absmax|quant_map|quant_state\.[\w.]+|SCB)$", "weights quantized by bitsandbytes", _FULL_PRECISION),
    (
        r"\.(weight_packed|weight_scale|weight_scale_inv|weight_zero_point)$",
        "weights stored quantized",
        _UNSAID,
    ),
    (r"\.(W_q|scales|biases)$", "weights quantized by HQQ or MLX", _FULL_PRECISION),
)
"""Pattern of a tensor's name, what a checkpoint with such tensors is, and what to do."""
_NO_PLACE_NEEDED = re.compile(
    r"rotary_emb\.inv_freq|\.masked_bias$|\.attn\.bias$|\.attention\.bias$"  # buffers that older versions saved
    r"|vision|visual|audio|speech|image|multi_modal|connector|encoder\.|mtp\.|draft"  # of what is no language model
)
_HEADS = re.compile(r"(^|\.)(score|classifier|classification_head|v_head|reward_head|value_head)\.")


def unfit_tensors(source: Source, unfit: Sequence[str], held: Collection[str]) -> SkvError:
    """Returns the error for a checkpoint whose tensors are not the model's.

    Args:
        source: The checkpoint.
        unfit: Parameters of the model that are missing or have another shape.
        held: Names of the tensors that the checkpoint holds.
    """
    missing = ", ".join(sorted(unfit)[:4])
    for pattern, what, fix in _KINDS:
        if found := sorted(name for name in held if re.search(pattern, name)):
            return SkvError(f"{source}: {what}", got=", ".join(found[:3]), expected=missing or "plain weights", fix=fix)
    if found := sorted(name for name in held if _HEADS.search(name)):
        return SkvError(
            f"{source}: a head that is no language model's, and tensors are missing or have another shape: {missing}",
            got=", ".join(found[:3]),
            fix="Use the language model that it was made from.",
        )
    return SkvError(
        f"{source}: tensors are missing or have another shape: {missing}",
        got=f"{len(held)} tensors, such as {', '.join(sorted(held)[:3])}",
        fix="Check that config.json is this checkpoint's, and that it was saved whole.",
    )


def adapter_in(held: Collection[str]) -> bool:
    """Whether tensors are an adapter's, to be added to weights that may be all there."""
    return any(re.search(_KINDS[0][0], name) for name in held)


def left_out(names: Collection[str], ignored: Collection[str]) -> list[str]:
    """Returns the tensors whose absence from the model has to be said.

    Args:
        names: Tensors that the model has no place for.
        ignored: Patterns of names that its class says are no loss.
    """
    return sorted(
        name
        for name in names
        if not _NO_PLACE_NEEDED.search(name) and not any(re.search(pattern, name) for pattern in ignored)
    )
