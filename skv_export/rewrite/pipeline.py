"""The rewrite pipeline: from another exporter's ONNX model to an exported folder, with its attention nodes replaced.

Weights are neither read nor copied: files of external data are cloned or hard-linked into the new folder where the
file system can. Padding is the source's: GroupQueryAttention takes lengths from the mask's sums, so tokens stand first
and padding behind them; a graph that counts positions by the past's shape counts the mask's columns.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from skv_export.arguments import checked
from skv_export.checkpoints.checkpoint import Source
from skv_export.errors import SkvError
from skv_export.model_folder.card import licence_of
from skv_export.model_folder.labels import label_attention, label_model
from skv_export.model_folder.names import (
    CHAT_TEMPLATES_FOLDER,
    GENAI_CONFIG_FILE,
    INPUT_IDS,
    LIBRARY_FILE,
    LOGITS,
    MODEL_FILE,
    RECIPE_FILE,
    SKV_CONFIG_FILE,
    TOKEN_INPUTS,
)
from skv_export.model_folder.output import check_target, output_folder
from skv_export.model_folder.plan import Plan
from skv_export.model_folder.skv_config import LayerCache, ModelConfig
from skv_export.model_folder.writer import write_configs
from skv_export.native.library import library_path
from skv_export.paths import to_path
from skv_export.rewrite.attention_nodes import AttentionNode, Refusal, is_attention, read_node
from skv_export.rewrite.mask_probe import MaskProbe
from skv_export.rewrite.source import OnnxSource
from skv_export.rewrite.surgery import Layer, rewrite_graph
from skv_export.spec.op import LayerAttention
from skv_export.spec.recipe import Recipe, as_recipe

if sys.platform != "win32":
    import fcntl

DTYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_FICLONE = 0x40049409  # linux/fs.h
_WRITTEN = {MODEL_FILE, RECIPE_FILE, SKV_CONFIG_FILE, GENAI_CONFIG_FILE, LIBRARY_FILE}


@dataclass(frozen=True)
class Rewrite:
    """A source, read completely, and what its nodes become.

    Attributes:
        source: The model on disk.
        layers: In the order of the model.
        config: What ``skv_config.json`` will say.
        hidden_size: Channels of the hidden state.
        recipe: With the source's number format.
    """

    source: OnnxSource
    layers: tuple[Layer, ...]
    config: ModelConfig
    hidden_size: int
    recipe: Recipe

    @classmethod
    def read(cls, source: Path | str, recipe: Recipe | None = None) -> Rewrite:
        """Reads a source and adapts the recipe to it; changes and writes nothing.

        Args:
            source: A ``.onnx`` file, or a folder with one.
            recipe: What the caches become; the defaults if not given.

        Raises:
            SkvError: Not a usable model, or nodes that can't be rewritten: the message names each, with its reason.
        """
        opened, chosen = OnnxSource.open(source), as_recipe(recipe)
        _check_names(opened)
        config, hidden_size = _model_config(opened)
        nodes = _attention_nodes(opened, config.context_length)
        layers = tuple(
            Layer(node, LayerAttention.build(options, node.head_dim, node.params))
            for node, options in zip(nodes, chosen.layers(len(nodes)), strict=True)
        )
        dtype = DTYPES[nodes[0].dtype]
        config = dataclasses.replace(config, dtype=dtype, layers=tuple(LayerCache.of(layer.op) for layer in layers))
        return cls(opened, layers, config, hidden_size, dataclasses.replace(chosen, dtype=dtype))

    @property
    def plan(self) -> Plan:
        """What would be written."""
        return Plan(
            source=Source("onnx", self.source.path),
            recipe=self.recipe,
            model_type=self.config.model_type,
            layers=tuple(layer.op for layer in self.layers),
            weight_bytes=self.source.weight_bytes or self.source.path.stat().st_size,
            context_length=self.config.context_length,
        )

    @checked
    def write(self, out: Path | str, *, force: bool = False, copy_weights: bool = False) -> Path:
        """Writes what was planned, once: the graph in memory becomes the rewritten one.

        Args:
            out: Folder to write; it appears complete or not at all.
            force: Replace ``out`` if it exists.
            copy_weights: Copy files of weights that could be shared. Python's ``onnx.load`` reads no external data from
                a file with several hard links, the source's then included; ONNX Runtime does.

        Returns:
            ``out``.

        Raises:
            SkvError: ``out`` can't be used.
        """
        target = to_path(out, "out")
        check_target(target, force=force)
        library_path()  # it goes into the folder: better none is written than one without it
        source = self.source
        if target.resolve() == source.path.parent.resolve():
            raise SkvError(f"{target}: the source's own folder", fix="Pass another --out: the source is never changed.")
        with output_folder(target, _bytes_to_write(self, target, copy_weights), force=force) as folder:
            rewrite_graph(source.graph, self.layers)
            label_attention(source.graph.graph)
            label_model(source.graph, self.config, self.recipe)
            onnx.save(ir.to_proto(source.graph), folder / MODEL_FILE)
            for location, file in source.weights.items():
                _share(file, folder / location, copy=copy_weights)
            for file in source.companions:
                place = folder / CHAT_TEMPLATES_FOLDER if file.parent.name == CHAT_TEMPLATES_FOLDER else folder
                place.mkdir(exist_ok=True)
                shutil.copyfile(file, place / file.name)
            inputs = [str(value.name) for value in source.graph.graph.inputs]
            licence = licence_of(source.path.parent)
            write_configs(
                folder, self.recipe, self.config, self.hidden_size, inputs, source.genai_config, licence=licence
            )
        return target


@checked
def plan(source: Path | str, recipe: Recipe | None = None) -> Plan:
    """Plans a rewrite: what ``rewrite_model`` would write.

    Raises:
        SkvError: See ``Rewrite.read``.
    """
    return Rewrite.read(source, recipe).plan


@checked
def rewrite_model(
    source: Path | str,
    *,
    out: Path | str,
    recipe: Recipe | None = None,
    force: bool = False,
    copy_weights: bool = False,
) -> Path:
    """Rewrites an ONNX model into a folder that the runtime and onnxruntime-genai run; the source is only read.

    Args:
        source: A ``.onnx`` file, or a folder with one: GroupQueryAttention nodes (onnxruntime-genai's model builder,
            ONNX Runtime's optimizer, the hub's community models), or standard Attention with a past, held by the node
            or concatenated before it (torch.onnx.export).
        out: Folder to write; it appears complete or not at all.
        recipe: What the caches become; the defaults if not given. Its ``dtype`` becomes the source's.
        force: Replace ``out`` if it exists.
        copy_weights: Copy files of weights that could be shared; see ``Rewrite.write``.

    Returns:
        ``out``.

    Raises:
        SkvError: The source can't be rewritten (the message names each node and its reason), or ``out`` can't be used.
    """
    check_target(to_path(out, "out"), force=force)
    return Rewrite.read(source, recipe).write(out, force=force, copy_weights=copy_weights)


# What the configuration beside the graph says.


def _model_config(source: OnnxSource) -> tuple[ModelConfig, int]:
    """The model without its layers, and its hidden size: from genai_config.json, else config.json, else the graph."""
    runs = _table(source.genai_config.get("model"))
    config = {**source.config, **_table(source.config.get("text_config"))}
    if not runs and not config:
        raise SkvError(
            f"{source.path}: no configuration beside the graph",
            expected=f"{GENAI_CONFIG_FILE} or config.json in its folder",
            fix="Copy it there: it says where a text ends, and how long the context is.",
        )
    logits = next((x for x in source.graph.graph.outputs if x.name == LOGITS), None)
    if logits is None or logits.shape is None or len(logits.shape) != 3:
        got = ", ".join(str(x.name) for x in source.graph.graph.outputs[:3])
        raise SkvError(f"{source.path}: outputs", got=got, expected="logits [batch, tokens, vocab_size]")

    def number(name: str, *values: object) -> int:
        found = next((v for v in values if isinstance(v, int) and v > 0), None)
        if found is None:
            raise SkvError(f"{source.path}: {name} is unknown", fix=f"Add {name} to config.json beside the graph.")
        return found

    ends = runs.get("eos_token_id", config.get("eos_token_id"))
    tokens = ends if isinstance(ends, list) else [ends]
    model = ModelConfig(
        model_type=str(config.get("model_type") or runs.get("type") or "decoder"),
        dtype="",
        vocab_size=number("vocab_size", logits.shape[2], runs.get("vocab_size"), config.get("vocab_size")),
        context_length=number(
            "max_position_embeddings", runs.get("context_length"), config.get("max_position_embeddings")
        ),
        bos_token_id=_token(runs.get("bos_token_id", config.get("bos_token_id"))),
        eos_token_id=tuple(token for token in map(_token, tokens) if token is not None),
        pad_token_id=_token(runs.get("pad_token_id", config.get("pad_token_id"))),
        all_logits=logits.shape[1] != 1,
        right_padded=True,
        source={
            "kind": "onnx",
            "name": str(source.path),
            "revision": None,
            "sha256": hashlib.sha256(source.path.read_bytes()).hexdigest(),
        },
        layers=(),
    )
    hidden_size = number("hidden_size", _table(runs.get("decoder")).get("hidden_size"), config.get("hidden_size"))
    return model, hidden_size


def _configured_head_dim(source: OnnxSource) -> int | None:
    config = {**source.config, **_table(source.config.get("text_config"))}
    decoder = _table(_table(source.genai_config.get("model")).get("decoder"))
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    size = decoder.get("head_size") or config.get("head_dim")
    if size is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        size = hidden // heads
    return size if isinstance(size, int) and size > 0 else None


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _token(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# What the graph says.


def _check_names(source: OnnxSource) -> None:
    """Checks that the inputs are those of a token loop, and that no weights are in files that are written here."""
    unknown = [
        str(x.name) for x in source.graph.graph.inputs if x.name not in TOKEN_INPUTS and len(x.shape or "past") != 4
    ]
    if unknown or not any(x.name == INPUT_IDS for x in source.graph.graph.inputs):
        raise SkvError(
            f"{source.path}: inputs that are not those of a token loop",
            got=", ".join(unknown) or f"no {INPUT_IDS}",
            expected=f"{', '.join(TOKEN_INPUTS)} and the past",
            fix="Export the decoder alone: no embeddings, token types or states of an encoder among its inputs.",
        )
    others = _WRITTEN | {file.name for file in source.companions}
    taken = sorted(location for location in source.weights if location in others)
    if taken:
        raise SkvError(
            f"{source.path}: weights in a file of another purpose", got=taken[0], fix="Save the model again."
        )


def _attention_nodes(source: OnnxSource, context_length: int) -> list[AttentionNode]:
    """Every attention node, layer by layer."""
    graph, found, refused = source.graph.graph, [], []
    probe, head_dim = MaskProbe(source.graph, context_length), _configured_head_dim(source)
    for node in [*graph.all_nodes(), *(n for function in source.graph.functions.values() for n in function)]:
        if not is_attention(node):
            continue
        try:
            attention = read_node(node, graph, head_dim)
            probe.check_repeats(attention)
            window = attention.params.local_window_size or probe.window(attention)
            params = dataclasses.replace(attention.params, local_window_size=window)
            found.append(dataclasses.replace(attention, params=params))
        except Refusal as reason:
            refused.append(f"{node.name or node.op_type}: {reason}")
    if refused:
        raise SkvError(
            f"{source.path}: {len(refused)} of {len(found) + len(refused)} attention nodes can't be rewritten",
            got="\n  ".join(["", *refused]),
            fix="Or export from the checkpoint: skv-export model CHECKPOINT.",
        )
    if not found:
        raise SkvError(
            f"{source.path}: no attention to rewrite",
            got=f"{graph.num_nodes()} nodes, none of them attention",
            expected="com.microsoft::GroupQueryAttention, or Attention of opset 23 on, with a past",
            fix="Build it with onnxruntime-genai's model builder, or torch.onnx.export (attn_implementation='sdpa', "
            "opset_version=23), or export from the checkpoint.",
        )
    return _in_order(found, source)


def _in_order(nodes: Sequence[AttentionNode], source: OnnxSource) -> list[AttentionNode]:
    """Sorted by the layers' numbers; every cache of the graph must belong to one of the nodes."""
    numbers = [node.layer for node in nodes if node.layer is not None]
    if len(set(numbers)) == len(nodes):
        nodes = sorted(nodes, key=lambda node: node.layer or 0)
        if sorted(numbers) != list(range(len(nodes))):
            raise SkvError(
                f"{source.path}: layers without attention",
                got=f"caches of the layers {sorted(numbers)}",
                expected=f"0 ... {len(nodes) - 1}",
                fix="Hybrid models, with linear attention or convolutions between, are not supported.",
            )
    ours = {value for node in nodes for value in node.past}
    others = [str(x.name) for x in source.graph.graph.inputs if x.name not in TOKEN_INPUTS and x not in ours]
    if others:
        raise SkvError(
            f"{source.path}: state that no attention node holds",
            got=", ".join(others[:4]),
            expected="keys and values only",
            fix="Hybrid models and encoder-decoders are not supported.",
        )
    if len({node.dtype for node in nodes}) > 1:
        raise SkvError(f"{source.path}: caches of several number formats", expected="one")
    return list(nodes)


# Writing.


def _bytes_to_write(rewrite: Rewrite, out: Path, copy_weights: bool) -> int:
    """Bytes that the new folder adds to its disk; weights on the same disk add none."""
    files = [rewrite.source.path, *rewrite.source.companions]
    disk = next(folder for folder in out.resolve().parents if folder.exists()).stat().st_dev
    files += [file for file in rewrite.source.weights.values() if copy_weights or file.stat().st_dev != disk]
    return sum(file.stat().st_size for file in files)


def _share(file: Path, target: Path, *, copy: bool) -> None:
    """Puts a file into the new folder: cloned where the file system can, else hard-linked, else copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        for way in (_clone, os.link):
            try:
                way(file, target)
            except OSError:  # another disk, another file system, or no right to: the next way
                continue
            return
    shutil.copyfile(file, target)


def _clone(file: Path, target: Path) -> None:
    """Clones a file; the two share blocks until one is written to (Btrfs, XFS)."""
    with file.open("rb") as source, target.open("xb") as made:
        try:
            fcntl.ioctl(made, _FICLONE, source.fileno())
        except OSError:
            target.unlink()
            raise
