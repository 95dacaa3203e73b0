"""What of benchmarks/gpu_bench.py can be tried without a GPU: ONNX Runtime's op as it is bound there, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_bench


@pytest.mark.parametrize("bits", [32, 8])
def test_group_query_attention_is_the_attention_that_is_timed(bits: int) -> None:
    """One token of each sequence over the whole cache and itself, in place."""
    torch.manual_seed(0)
    batch, heads, kv_heads, length, d = 2, 4, 2, 50, gpu_bench.D
    call = gpu_bench.GroupQueryAttention(batch, heads, kv_heads, length, bits, device="cpu")
    call()
    tensors = call.tensors
    held = [tensors[name].float() * (0.02 if bits == 8 else 1) for name in ("past_key", "past_value")]
    new = [tensors[name].view(batch, kv_heads, d) for name in ("key", "value")]
    for cache, token in zip(held, new, strict=True):
        token = token.clamp(-2.56, 2.54) if bits == 8 else token  # what 8 bits reach
        assert torch.allclose(cache[:, :, length], token, atol=0.0101 if bits == 8 else 0)
    query = tensors["query"].view(batch, heads, 1, d)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *held, enable_gqa=True)
    assert torch.allclose(tensors["output"].view(batch, heads, d), expected[:, :, 0], atol=1e-2 if bits == 8 else 1e-4)
    assert call.bytes == 2 * batch * kv_heads * length * d * bits // 8
