"""A two-layer model written by hand as ONNX nodes, and its folder, so that tests of the runtime need no export."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tiny_models import write_tokenizer
from transformers import LlamaConfig

from skv_export.model_folder.skv_config import LayerCache, ModelConfig
from skv_export.runtime.cache import Cache
from skv_export.spec.layout import CacheLayout
from skv_export.spec.op import AttentionParams
from skv_export.spec.recipe import LayerConfig
from skv_export.spec.reference import quantized_kv_attention

VOCAB, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 96, 4, 2, 32, 512
WIDTH = HEADS * HEAD_DIM
SMALL = LayerConfig(num_sink_tokens=2, recent_tokens=16, tile_tokens=32)
EXACT = dataclasses.replace(SMALL, k_bits=16, v_bits=16, recent_type="float")


@dataclass(frozen=True)
class Tiny:
    """The model's weights and its layers' options; the same in numpy (``logits``) and in the folder (``write``)."""

    config: LayerConfig = SMALL
    windows: tuple[int, ...] = (0, 0)
    all_logits: bool = False

    @property
    def weights(self) -> dict[str, NDArray[np.float32]]:
        rng = np.random.default_rng(7)
        shapes = {"embedding": (VOCAB, WIDTH), "position": (CONTEXT, WIDTH), "head": (WIDTH, VOCAB)}
        for i in range(len(self.windows)):
            shapes |= {f"qkv.{i}": (WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM), f"out.{i}": (WIDTH, WIDTH)}
        gains = {"embedding": 1.0, "position": 0.3, "head": 2.0 * WIDTH**-0.5}
        return {n: (rng.standard_normal(s) * gains.get(n, WIDTH**-0.5)).astype(np.float32) for n, s in shapes.items()}

    def layouts(self, layer: int) -> tuple[CacheLayout, CacheLayout]:
        return CacheLayout.pair(self.config, HEAD_DIM, self.windows[layer])

    def logits(self, tokens: list[int], chunks: list[int] | None = None) -> NDArray[np.float32]:
        """The reference's logits ``[len(tokens), VOCAB]`` of one sequence, in calls of these many tokens (1)."""
        w, rows = self.weights, []
        caches = [
            [np.full((1, KV_HEADS, *layout.shape(CONTEXT)), 0xFF, np.uint8) for layout in self.layouts(i)]
            for i in range(len(self.windows))
        ]
        start = 0
        for count in chunks or [1] * len(tokens):
            end = start + count
            x = (w["embedding"][tokens[start:end]] + w["position"][start:end])[None]
            for i, window in enumerate(self.windows):
                params = AttentionParams(HEADS, KV_HEADS, scale=HEAD_DIM**-0.5, local_window_size=window)
                lengths = np.array([end - 1], np.int32)
                y, *caches[i] = quantized_kv_attention(
                    params, self.layouts(i), x @ w[f"qkv.{i}"], None, None, *caches[i], lengths
                )
                x = x + y @ w[f"out.{i}"]
            rows.append(x[0] @ w["head"])
            start = end
        return np.concatenate(rows)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """What greedy decoding gives: the prompt in one call, then token by token."""
        tokens = list(prompt)
        for _ in range(count):
            chunks = [len(prompt)] + [1] * (len(tokens) - len(prompt))
            tokens.append(int(self.logits(tokens, chunks)[-1].argmax()))
        return tokens[len(prompt) :]

    def write(self, folder: Path, **config: object) -> Path:
        """Writes model.onnx and skv_config.json; ``config`` replaces values of the latter."""
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(self.graph(), folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
        layers = tuple(LayerCache(HEADS, KV_HEADS, window, *self.layouts(i)) for i, window in enumerate(self.windows))
        source = {"kind": "test", "name": "tiny", "revision": None, "sha256": ""}
        described = ModelConfig("tiny", "fp32", VOCAB, CONTEXT, 1, (2,), 0, self.all_logits, source, layers)
        (folder / "skv_config.json").write_text(json.dumps(described.to_dict(WIDTH) | config))
        return folder

    def write_all(self, folder: Path, **config: object) -> Path:
        """``write``, and what transformers reads: a configuration and a tokenizer of printable characters."""
        self.write(folder, **config)
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=len(self.windows), num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        ).save_pretrained(folder)  # fmt: skip
        write_tokenizer(folder, VOCAB)
        return folder

    def graph(self) -> onnx.ModelProto:
        """The graph, with the inputs and outputs that the exporter gives its own."""
        nodes: list[onnx.NodeProto] = []

        def add(op: str, inputs: list[str], output: str, **attributes: object) -> str:
            nodes.append(helper.make_node(op, inputs, [output], **attributes))
            return output

        # Real tokens first: `place` says where each goes.
        add("Shape", ["input_ids"], "tokens", start=1, end=2)
        add("Neg", ["tokens"], "from_end")
        add("Slice", ["attention_mask", "from_end", "int_max", "one"], "new")
        add("ReduceSum", ["new", "one"], "count", keepdims=1)
        add("Sub", [add("CumSum", ["new", "one_scalar"], "rank"), "one"], "front")
        add("CumSum", [add("Sub", ["one", "new"], "padding"), "one_scalar"], "padding_rank")
        add("Sub", [add("Add", ["count", "padding_rank"], "behind"), "one"], "back")
        add("Where", [add("Greater", ["new", "zero"], "real"), "front", "back"], "place")
        for name in ("input_ids", "position_ids"):
            zeros = add("Mul", [name, "zero"], f"{name}.zeros")
            add("ScatterElements", [zeros, "place", name], f"{name}.packed", axis=1)
        # Lengths.
        sums = add("ReduceSum", ["attention_mask", "one"], "total", keepdims=0)
        add("Cast", [add("Sub", [sums, "one"], "total-1")], "seqlens_k", to=TensorProto.INT32)
        add("Cast", [add("Squeeze", ["count", "one"], "counts")], "query_seqlens", to=TensorProto.INT32)
        columns = add("Squeeze", [add("Shape", ["attention_mask"], "columns", start=1, end=2)], "columns.scalar")
        add("Cast", [columns], "total_sequence_length", to=TensorProto.INT32)
        # The model.
        add("Gather", ["embedding", "input_ids.packed"], "tokens.embedded")
        add("Gather", ["position", "position_ids.packed"], "positions.embedded")
        x = add("Add", ["tokens.embedded", "positions.embedded"], "x")
        for i in range(len(self.windows)):
            add("MatMul", [x, f"qkv.{i}"], f"packed_qkv.{i}")
            nodes.append(self._attention(i))
            x = add("Add", [x, add("MatMul", [f"attended.{i}", f"out.{i}"], f"mixed.{i}")], f"x.{i}")
        # Logits of all positions, unpacked, or of the last real one.
        last = add("Max", [add("Sub", ["count", "one"], "count-1"), "zero"], "last")
        index = add("Unsqueeze", ["place" if self.all_logits else last, "two"], "kept")
        shape = add("Concat", ["keep", "keep", "hidden_size"], "index_shape", axis=0)
        add("GatherElements", [x, add("Expand", [index, shape], "index")], "wanted", axis=1)
        add("MatMul", ["wanted", "head"], "logits")
        return self._model(nodes)

    def _attention(self, i: int) -> onnx.NodeProto:
        c = self.config
        return helper.make_node(
            "QuantizedKVAttention",
            [f"packed_qkv.{i}", "", "", f"past_key_values.{i}.key", f"past_key_values.{i}.value", "seqlens_k",
             "total_sequence_length", *[""] * 9, "query_seqlens"],
            [f"attended.{i}", f"present.{i}.key", f"present.{i}.value"],
            domain="skv", num_heads=HEADS, kv_num_heads=KV_HEADS, scale=HEAD_DIM**-0.5, softcap=0.0,
            local_window_size=self.windows[i], do_rotary=0, rotary_interleaved=0, qk_norm_epsilon=1e-6,
            layout_version=1,
            k_bits=c.k_bits, v_bits=c.v_bits, k_group_size=32, v_group_size=32, k_granularity=c.k_granularity,
            v_granularity=c.v_granularity, k_rotation=c.k_rotation, v_rotation=c.v_rotation,
            num_sink_tokens=c.num_sink_tokens, recent_tokens=c.recent_tokens, tile_tokens=c.tile_tokens,
            recent_type=c.recent_type,
        )  # fmt: skip

    def _model(self, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
        int64, uint8 = TensorProto.INT64, TensorProto.UINT8
        value = helper.make_tensor_value_info
        inputs = [
            value("input_ids", int64, ["batch", "sequence_length"]),
            value("attention_mask", int64, ["batch", "total_sequence_length"]),
            value("position_ids", int64, ["batch", "sequence_length"]),
        ]
        outputs = [value("logits", TensorProto.FLOAT, ["batch", "logits_length", VOCAB])]
        for i in range(len(self.windows)):
            for name, layout in zip(("key", "value"), self.layouts(i), strict=True):
                shape = ["batch", KV_HEADS, f"rows.{i}.{name}", layout.width]
                inputs.append(value(f"past_key_values.{i}.{name}", uint8, shape))
                outputs.append(value(f"present.{i}.{name}", uint8, shape))
        constants = {"one": [1], "one_scalar": 1, "zero": 0, "two": [2], "int_max": [2**62], "hidden_size": [WIDTH],
                     "keep": [1]}  # fmt: skip
        tensors = [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in constants.items()]
        tensors += [numpy_helper.from_array(v, n) for n, v in self.weights.items()]
        graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("skv", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def addresses(cache: Cache) -> tuple[int, ...]:
    """Where a cache's buffers are."""
    return tuple(buffer.data_ptr() for _, buffer in cache._tensors.values())
