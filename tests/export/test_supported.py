"""Which architectures can be exported, by their configuration alone."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config
from transformers import AutoConfig

from skv_export.errors import SkvError
from skv_export.export import supported

REFUSED = {
    "dots3_note_text": "multi-head latent attention",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "minimax": "linear attention",
    "mamba": "state-space",
    "bloom": "ALiBi",
    "gemma3n": "more than text",
    "llama4_text": "chunk",
    "mpt": "ALiBi",
    "granitemoehybrid": "state-space",
}


@pytest.mark.parametrize(("arch", "reason"), REFUSED.items())
def test_architectures_that_cannot_work_are_refused_by_name(arch: str, reason: str) -> None:
    with pytest.raises(SkvError, match=rf"^{arch}: can't be exported: .*{reason}"):
        supported.check_config(AutoConfig.for_model(arch))


def test_llama4_without_chunks_is_refused_while_queries_are_scaled_by_position() -> None:
    tuned = tiny_config("llama4_text", attn_temperature_tuning=True)
    with pytest.raises(SkvError, match="scaled by their positions"):
        supported.check_config(tuned)
    supported.check_config(tiny_config("llama4_text", attn_temperature_tuning=True, no_rope_layers=[1, 1]))


def test_falcon_with_alibi_is_refused() -> None:
    with pytest.raises(SkvError, match="ALiBi"):
        supported.check_config(tiny_config("falcon", alibi=True))
