"""What of benchmarks/gpu_bench.py can be tried without a GPU: all but its times."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gpu_bench
import pytest
import torch
from builds import ROOT, build_shim
from harness import HostMemory, Library


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


def test_all_but_the_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``make gpu-bench`` with the shim in the card's place, on tensors of the CPU."""
    kernels = Library(build_shim(ROOT / "build" / "cuda_shim"), HostMemory())
    calls = []

    def timed(call: Callable[[], object]) -> float:
        calls.append(call())
        return 2.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_bench, "DEVICE", "cpu")
        patch.setattr(gpu_bench, "KV_HEADS", 1)
        patch.setattr(gpu_bench, "SHAPES", [(4, 1, 400), (8, 2, 150)])
        patch.setattr(gpu_bench, "IN_GRAPH", [(2, 150)])
        patch.setattr(gpu_bench, "LAYERS", 2)
        patch.setattr(gpu_bench, "in_graph_us", lambda calls: max(map(timed, calls)))
        patch.setattr(gpu_bench.TorchAttention, "BACKENDS", (gpu_bench.SDPBackend.MATH,))
        patch.setattr(gpu_bench, "copy_bandwidth", lambda: 1e12)
        patch.setattr(gpu_bench, "median_us", timed)
        patch.setattr(gpu_bench, "has_onnxruntime", lambda: False)
        patch.setattr(gpu_bench.gpu, "require", lambda: "shim")
        patch.setattr(gpu_bench.gpu, "load", lambda: kernels)
        patch.setattr(gpu_bench.torch.cuda, "Stream", lambda: None)
        patch.setattr(gpu_bench.torch.cuda, "set_stream", lambda stream: None)
        patch.setattr(gpu_bench.torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))
        patch.setattr(sys, "argv", ["gpu_bench.py", "--json", str(tmp_path / "gpu.json")])
        gpu_bench.main()
    figures = json.loads((tmp_path / "gpu.json").read_text())
    rows = figures["rows"]
    assert len(rows) == 2 * 5 and len(calls) == 2 * 6 + 2 * 2
    assert {row["path"] for row in rows} == {
        f"decode_mma {bits} D128, keys channel, values token" for bits in ("K4V2", "K4V4", "K3V2", "K2V2", "K8V8")
    }
    assert figures["layers"] == [{"batch": 2, "tokens": 150, "us": 2.0, "fp16_us": 2.0, "speedup": 1.0}]
    printed = capsys.readouterr().out
    assert "| 4/1 | 1 | 400 | K4V2 | 2.0 |" in printed and "| 2 | 150 | 2.0 | 2.0 | 1.00 |" in printed
