"""Layers that read the keys and values of another layer instead of their own (Gemma 3n, Gemma 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skv_export.errors import SkvError


def cache_sources(config: Any) -> Mapping[int, int]:
    """Returns the layers without a cache of their own: layer -> the layer whose keys and values it reads.

    The last ``num_kv_shared_layers`` layers read those of the last layer of their kind before them.

    Args:
        config: transformers' configuration of a decoder.

    Raises:
        SkvError: There is no such layer, or the configuration does not say which.
    """
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if not shared:
        return {}
    kinds = list(getattr(config, "layer_types", None) or ())
    first = int(config.num_hidden_layers) - int(shared)
    if len(kinds) != config.num_hidden_layers or first < 1:
        raise SkvError(
            f"{config.model_type}: num_kv_shared_layers",
            got=f"{shared} of {config.num_hidden_layers} layers, {len(kinds)} layer_types",
            expected="fewer than the layers, and a type for each of them",
        )
    last = {kind: i for i, kind in enumerate(kinds[:first])}
    missing = sorted(set(kinds[first:]) - set(last))
    if missing:
        raise SkvError(
            f"{config.model_type}: num_kv_shared_layers: no layer has the keys and values to share",
            got=f"{', '.join(missing)} among the last {shared} layers alone",
            expected="each of their layer_types among the layers before them",
        )
    return {i: last[kinds[i]] for i in range(first, len(kinds))}


def count_caches(config: Any) -> int:
    """Returns how many layers have a cache of their own: the first ones."""
    return int(config.num_hidden_layers) - len(cache_sources(config))


def refuse_shared(config: Mapping[str, Any], what: str, instead: str) -> None:
    """Refuses a checkpoint whose layers share keys and values, for ``what`` looks at layers one by one.

    Args:
        config: The content of its ``config.json``.
        what: What can't be done.
        instead: What can be.

    Raises:
        SkvError: They do.
    """
    text = config.get("text_config")
    for values in (config, text if isinstance(text, Mapping) else {}):
        if shared := values.get("num_kv_shared_layers"):
            raise SkvError(
                f"{what}: layer by layer",
                got=f"{shared} layers that read the keys and values of an earlier one (num_kv_shared_layers)",
                expected="layers with keys and values of their own",
                fix=instead,
            )
