"""The architectures that are tested against PyTorch: the one list that messages, the README and the tests share."""

from __future__ import annotations

from collections.abc import Mapping

TESTED: Mapping[str, str] = {
    "llama": "",
    "mistral": "sliding window",
    "qwen2": "biases",
    "qwen3": "QK norm",
    "gemma2": "softcap, alternating windows",
    "gemma3_text": "two sets of RoPE frequencies",
    "gemma3n_text": "layers that share keys and values",
    "gemma4_text": "layers that share keys and values",
    "phi3": "fused projections",
    "granite": "its own scales",
    "granitemoehybrid": "attention layers only",
    "olmo2": "norms after attention",
    "smollm3": "layers without RoPE",
    "gpt_oss": "sinks, experts",
    "llama4_text": "full attention only",
    "stablelm": "norms per head",
    "nemotron": "",
    "falcon": "with RoPE",
    "gpt2": "learned positions",
    "gpt_neo": "local layers",
    "gpt_neox": "",
    "gptj": "interleaved RoPE",
    "codegen": "interleaved RoPE",
}
"""transformers' ``model_type`` -> what is special about its attention. Others are exported if nothing about them is
refused; docs/tested.md has the verdict for each that transformers knows."""

HYBRID: Mapping[str, str] = {
    "lfm2": "short convolutions",
    "lfm2_moe": "short convolutions, experts",
    "bamba": "Mamba 2",
    "granitemoehybrid": "Mamba 2",
    "falcon_h1": "attention and Mamba 2 in each layer",
    "nemotron_h": "Mamba 2, layers of experts alone",
    "qwen3_next": "gated delta rule, experts",
    "qwen3_5_text": "gated delta rule",
}
"""The same of the models between whose attention layers stand others with a recurrent state. Only these are exported:
a layer that kept its state to itself would go unnoticed."""
