"""Small decoders as other exporters write them: GroupQueryAttention or standard Attention, float caches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

VOCAB, HEADS, KV_HEADS, DIM, CONTEXT = 64, 4, 2, 32, 512
WIDTH = HEADS * DIM
TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


@dataclass
class SourceGraph:
    """A decoder of two layers; attributes and inputs of its attention nodes are options.

    Attributes:
        op: ``gqa``, or ``attention`` (opset 23).
        attributes: Of every attention node, in place of the defaults.
        packed: One packed QKV input (gqa).
        rotary: Channels that are rotated, inside GroupQueryAttention; 0 = none.
        positions: The graph has ``position_ids`` and adds an embedding of them; else of past length + index.
        sinks: With a ``head_sink``.
        qk_norm: ``fused`` (inputs of the node), ``nodes`` (before it, for runtimes without the fused form) or None.
        mask: Of a standard Attention: None (is_causal), ``bool``, ``float``, or a window's length.
        heads_first: Queries, keys and values of a standard Attention are ``[B, heads, S, D]``.
        concat: The past is concatenated before a standard Attention, which has none: ``plain``, or ``repeated``, each
            head then once per query head, as torch.onnx writes it.
        dtype: Of weights and caches.
        extra: Further inputs of the attention node by index, as initializers.
    """

    op: str = "gqa"
    attributes: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    rotary: int = 0
    positions: bool = False
    sinks: bool = False
    qk_norm: str | None = None
    mask: str | int | None = None
    heads_first: bool = False
    concat: str | None = None
    dtype: type = np.float32
    extra: dict[int, NDArray[Any]] = field(default_factory=dict)
    layers: int = 2

    def write(self, folder: Path, *, external: bool = True, config: bool = True, name: str = "model.onnx") -> Path:
        """Writes the model, its weights in ``model.onnx.data``, and config.json; returns the .onnx file."""
        folder.mkdir(parents=True, exist_ok=True)
        model = self.model()
        options = {"save_as_external_data": True, "location": f"{name}.data", "size_threshold": 256} if external else {}
        onnx.save(model, folder / name, **options)
        if config:
            values = {
                "model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
                "num_attention_heads": HEADS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            }  # fmt: skip
            (folder / "config.json").write_text(json.dumps(values))
        return folder / name

    # The graph.

    def model(self) -> onnx.ModelProto:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray[Any]] = {}
        self._rng = np.random.default_rng(11)
        x = self._add("Gather", [self._weight("embedding", (VOCAB, WIDTH), 1.0), "input_ids"])
        if self.positions:
            table = self._weight("position", (CONTEXT, WIDTH), 0.3)
            x = self._add("Add", [x, self._add("Gather", [table, "position_ids"])])
        if self.op == "attention" and (self.mask is not None or not self.positions):
            self._range()
        if self.op == "attention" and not self.positions:
            x = self._add(
                "Add", [x, self._add("Gather", [self._weight("position", (CONTEXT, WIDTH), 0.3), "positions"])]
            )
        for i in range(self.layers):
            y = self._gqa(x, i) if self.op == "gqa" else self._attention(x, i)
            x = self._add("Add", [x, self._add("MatMul", [y, self._weight(f"out.{i}", (WIDTH, WIDTH))])])
        self._add("MatMul", [x, self._weight("head", (WIDTH, VOCAB), 2 * WIDTH**-0.5)], "logits")
        kind = TYPES[self.dtype]
        ids = [["batch_size", "sequence_length"], ["batch_size", "total_sequence_length"]]
        inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ids[0])]
        if self._reads("attention_mask"):
            inputs.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ids[1]))
        if self.positions:
            inputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ids[0]))
        outputs = [helper.make_tensor_value_info("logits", kind, [*ids[0], VOCAB])]
        for i in range(self.layers):
            for part in ("key", "value"):
                past = ["batch_size", KV_HEADS, "past_sequence_length", DIM]
                present = ["batch_size", KV_HEADS, "total_sequence_length", DIM]
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{part}", kind, past))
                outputs.append(helper.make_tensor_value_info(f"present.{i}.{part}", kind, present))
        weights = [numpy_helper.from_array(value, name) for name, value in self.weights.items()]
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _gqa(self, x: str, i: int) -> str:
        n, kv = HEADS * DIM, KV_HEADS * DIM
        inputs = [""] * 17
        if self.packed:
            inputs[0] = self._add("MatMul", [x, self._weight(f"qkv.{i}", (WIDTH, n + 2 * kv))])
        else:
            for j, (part, size) in enumerate((("q", n), ("k", kv), ("v", kv))):
                inputs[j] = self._add("MatMul", [x, self._weight(f"{part}.{i}", (WIDTH, size))])
        if self.qk_norm:
            gains = [self._constant(f"{p}_norm.{i}", 1 + self._rng.standard_normal(DIM) / 4) for p in "qk"]
            if self.qk_norm == "fused":
                inputs[14:16] = gains
            else:
                inputs[0], inputs[1] = (self._norm(v, g) for v, g in zip(inputs[:2], gains, strict=True))
        inputs[3:5] = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        inputs[5], inputs[6] = self._lengths()
        attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
        if self.rotary:
            angles = np.arange(CONTEXT)[:, None] / 100 ** (np.arange(self.rotary // 2) * 2 / self.rotary)
            inputs[7:9] = [self._constant("cos_cache", np.cos(angles)), self._constant("sin_cache", np.sin(angles))]
            attributes["do_rotary"] = 1
            if self.positions:
                inputs[9] = "position_ids"
        if self.sinks:
            inputs[11] = self._constant("sinks", self._rng.standard_normal(HEADS))
        for index, value in self.extra.items():
            inputs[index] = self._constant(f"extra.{index}", value, value.dtype.type)
        while not inputs[-1]:
            inputs.pop()
        return self._attend("GroupQueryAttention", inputs, i, attributes, "com.microsoft")

    def _attention(self, x: str, i: int) -> str:
        sizes = (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
        inputs = [self._add("MatMul", [x, self._weight(f"{part}.{i}", (WIDTH, heads * DIM))]) for part, heads in sizes]
        attributes: dict[str, Any] = {"is_causal": int(self.mask is None)}
        if self.heads_first:
            shapes = [self._constant(f"split.{heads}", [0, 0, heads, DIM], np.int64) for _, heads in sizes]
            inputs = [self._add("Reshape", [v, s]) for v, s in zip(inputs, shapes, strict=True)]
            inputs = [self._add("Transpose", [v], perm=[0, 2, 1, 3]) for v in inputs]
        else:
            attributes |= {"q_num_heads": HEADS, "kv_num_heads": KV_HEADS}
        if self.concat:
            inputs = [
                inputs[0],
                *(self._concat(x, f"{i}.{p}") for x, p in zip(inputs[1:], ("key", "value"), strict=True)),
            ]
            inputs += [self._attn_mask()]
        else:
            inputs += [self._attn_mask(), f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        y = self._attend("Attention", inputs, i, attributes, "")
        if self.heads_first:
            y = self._add("Transpose", [y], perm=[0, 2, 1, 3])
            y = self._add("Reshape", [y, self._constant("merge", [0, 0, WIDTH], np.int64)])
        return y

    def _concat(self, new: str, name: str) -> str:
        """The past in front of new keys or values; with ``repeated``, ``[B, heads, total, D]``."""
        held = self._add("Concat", [f"past_key_values.{name}", new], f"present.{name}", axis=-2)
        if self.concat == "plain":
            return held
        batch, total = self._add("Shape", ["input_ids"], start=0, end=1), "total_length"
        sizes = [self._constant(f"size.{n}", [n], np.int64) for n in (KV_HEADS, HEADS // KV_HEADS, DIM, HEADS)]
        groups = self._add("Unsqueeze", [held, self._constant("after_heads", [2], np.int64)])
        shape = self._add("Concat", [batch, sizes[0], sizes[1], total, sizes[2]], axis=0)
        groups = self._add("Expand", [groups, shape])
        return self._add("Reshape", [groups, self._add("Concat", [batch, sizes[3], total, sizes[2]], axis=0)])

    def _attend(self, op: str, inputs: list[str], i: int, attributes: dict[str, Any], domain: str) -> str:
        outputs = [f"attended.{i}", *([] if self.concat else [f"present.{i}.key", f"present.{i}.value"])]
        given = {k: v for k, v in (attributes | self.attributes).items() if v is not None}
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"/layers.{i}/attn", domain=domain, **given))
        return outputs[0]

    def _lengths(self) -> tuple[str, str]:
        if not self._reads("attention_mask"):
            one = self._constant("one", [1], np.int64)
            total = self._add("Sub", [self._add("ReduceSum", ["attention_mask", one], keepdims=0), one])
            self._add("Cast", [total], "seqlens_k", to=TensorProto.INT32)
            columns = self._add(
                "Gather", [self._add("Shape", ["attention_mask"]), self._constant("index", 1, np.int64)]
            )
            self._add("Cast", [columns], "total", to=TensorProto.INT32)
        return "seqlens_k", "total"

    def _range(self) -> str:
        """Positions of the new tokens ``[S]``, counted from the past's shape, as many exporters do."""
        scalar = self._constant("scalar", [], np.int64)
        past = self._add("Shape", ["past_key_values.0.key"], "past_length", start=2, end=3)
        total = self._add("Add", [past, self._add("Shape", ["input_ids"], start=1, end=2)], "total_length")
        ends = [self._add("Reshape", [v, scalar]) for v in (past, total)]
        return self._add("Range", [*ends, self._constant("step", 1, np.int64)], "positions")

    def _attn_mask(self) -> str:
        """``[B, 1, S, total]``: causal, and not padding; made once."""
        if self.mask is None or "attn_mask" in [o for n in self.nodes for o in n.output]:
            return "" if self.mask is None else "attn_mask"
        zero, one = self._constant("start", 0, np.int64), self._constant("step", 1, np.int64)
        total = self._add("Reshape", ["total_length", self._constant("scalar", [], np.int64)])
        keys = self._add("Range", [zero, total, one])
        queries = self._add("Unsqueeze", ["positions", self._constant("axis", [1], np.int64)])
        seen = self._add("LessOrEqual", [keys, queries])
        if isinstance(self.mask, int):
            far = self._add("Sub", [queries, self._constant("window", self.mask, np.int64)])
            seen = self._add("And", [seen, self._add("Greater", [keys, far])])
        real = self._add("Cast", ["attention_mask"], to=TensorProto.BOOL)
        real = self._add("Unsqueeze", [real, self._constant("axes", [1, 2], np.int64)])
        if self.mask != "float":
            return self._add("And", [seen, real], "attn_mask")
        bias = [self._constant("seen", 0.0), self._constant("hidden", float(np.finfo(self.dtype).min))]
        return self._add("Where", [self._add("And", [seen, real]), *bias], "attn_mask")

    def _norm(self, x: str, gain: str) -> str:
        heads = self._add("Reshape", [x, self._constant("per_head", [0, 0, -1, DIM], np.int64)])
        normed = self._add("RMSNormalization", [heads, gain], axis=-1, epsilon=1e-6)
        return self._add("Reshape", [normed, self._constant("flat", [0, 0, -1], np.int64)])

    # Parts.

    def _add(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        output = output or f"{op}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"node.{len(self.nodes)}", **attributes))
        return output

    def _weight(self, name: str, shape: tuple[int, ...], gain: float = WIDTH**-0.5) -> str:
        return self._constant(name, self._rng.standard_normal(shape) * gain)

    def _constant(self, name: str, value: Any, dtype: type | None = None) -> str:
        self.weights.setdefault(name, np.asarray(value, dtype or self.dtype))
        return name

    def _reads(self, name: str) -> bool:
        return any(name in node.input for node in self.nodes)


def run_source(path: Path, tokens: list[int], chunks: list[int], dtype: type = np.float32) -> NDArray[np.float32]:
    """Logits ``[len(tokens), VOCAB]`` of a source, with its own float cache, in calls of so many tokens."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {x.name for x in session.get_inputs()}
    caches = {name: np.zeros((1, KV_HEADS, 0, DIM), dtype) for name in names if name.startswith("past")}
    outputs = [x.name for x in session.get_outputs()]
    rows, start = [], 0
    for count in chunks:
        end = start + count
        feeds = {
            "input_ids": np.array([tokens[start:end]], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
        }
        results = dict(
            zip(outputs, session.run(None, {k: v for k, v in (feeds | caches).items() if k in names}), strict=True)
        )
        caches = {name: results[name.replace("past_key_values", "present")] for name in caches}
        rows.append(results["logits"][0].astype(np.float32))
        start = end
    return np.concatenate(rows)


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file's content and time of change: what must not change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}
