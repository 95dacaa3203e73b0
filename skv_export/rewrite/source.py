"""ONNX files as input: resolves a path, and checks that the graph is complete and safe to use.

Only the graph is read. Weights in files beside it are checked by place and size and never loaded; nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import google.protobuf.message  # type: ignore[import-untyped]
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from skv_export.checkpoints.checkpoint import refuse_exported
from skv_export.errors import SkvError
from skv_export.model_folder.names import CHAT_TEMPLATES_FOLDER, GENAI_CONFIG_FILE, MODEL_FILE
from skv_export.model_folder.skv_config import read_json
from skv_export.paths import to_path

MAX_GRAPH_BYTES = (1 << 31) - 1
"""A protobuf message can't be larger; weights beyond that stand in files of their own."""
MAX_TENSORS = 1 << 20
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
    f"{CHAT_TEMPLATES_FOLDER}/*.jinja",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Small files that belong to a model and are carried along."""
_INCOMPLETE = "Download or export the model again, completely."


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX model on disk, checked.

    Attributes:
        path: The ``.onnx`` file.
        graph: The model; weights in other files are references to them.
        weights: Location, as the graph says it, to the file that holds the weights.
        companions: Configuration and tokenizer files of the model.
        config: ``config.json``, or empty.
        genai_config: onnxruntime-genai's ``genai_config.json``, or empty.
    """

    path: Path
    graph: ir.Model
    weights: Mapping[str, Path]
    companions: tuple[Path, ...]
    config: Mapping[str, Any]
    genai_config: Mapping[str, Any]

    @classmethod
    def open(cls, source: Path | str) -> OnnxSource:
        """Opens a ``.onnx`` file, or a folder that holds one (as ``model.onnx``, alone, or in ``onnx/``).

        Raises:
            SkvError: No such file, no ONNX, a graph that is damaged, or weights that are missing, cut short, or stand
                outside the model's folder; the message names the file and the tensor or node.
        """
        path = find_onnx(source)
        proto = _parse(path)
        weights = dict(_external_files(proto, path))
        try:
            graph = ir.from_proto(proto)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError) as error:
            raise SkvError(f"{path}: a damaged graph", got=_brief(error), fix=_INCOMPLETE) from error
        _check_order(graph.graph, path)
        if not proto.graph.value_info:
            ShapeInferencePass()(graph)
        folders = [path.parent, path.parent.parent] if path.parent.name == "onnx" else [path.parent]
        found = {file.name: file for folder in reversed(folders) for file in _companions(folder)}
        genai = path.parent / GENAI_CONFIG_FILE
        return cls(
            path=path,
            graph=graph,
            weights=weights,
            companions=tuple(found[name] for name in sorted(found)),
            config=read_json(found["config.json"], fix=_INCOMPLETE) if "config.json" in found else {},
            genai_config=read_json(genai, fix=_INCOMPLETE) if genai.is_file() else {},
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files that hold weights."""
        return sum(file.stat().st_size for file in set(self.weights.values()))


def find_onnx(source: Path | str) -> Path:
    """Returns the ``.onnx`` file that ``source`` names.

    Raises:
        SkvError: There is none, or several and none of them is ``model.onnx``; or it is an export's.
    """
    path = to_path(source, "checkpoint")
    refuse_exported(path if path.is_dir() else path.parent)
    if path.is_file() and path.suffix == ".onnx":
        return path.absolute()
    if not path.is_dir():
        raise SkvError(f"{path}: no ONNX model there", expected="a .onnx file, or a folder that holds one")
    for folder in (path, path / "onnx"):
        files = sorted(folder.glob("*.onnx"))
        named = [file for file in files if file.name == MODEL_FILE]
        if named or len(files) == 1:
            return (named or files)[0].absolute()
        if files:
            names = ", ".join(file.name for file in files[:8])
            raise SkvError(f"{folder}: several ONNX models", got=names, fix="Pass the path of one of them.")
    raise SkvError(f"{path}: no ONNX model in this folder", expected="a .onnx file, there or in its folder onnx")


def _parse(path: Path) -> onnx.ModelProto:
    size = path.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise SkvError(
            f"{path}: too large for an ONNX file",
            got=f"{size} bytes",
            expected=f"at most {MAX_GRAPH_BYTES}",
            fix="Save it with its weights in external data.",
        )
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except google.protobuf.message.DecodeError as error:
        raise SkvError(f"{path}: not an ONNX file", got=_brief(error), fix=_INCOMPLETE) from error
    if not proto.graph.node or not proto.opset_import:
        raise SkvError(f"{path}: not an ONNX file", got="no nodes, or no opset", fix=_INCOMPLETE)
    return proto


def _companions(folder: Path) -> list[Path]:
    return [file for pattern in COMPANIONS for file in folder.glob(pattern) if file.is_file()]


def _brief(error: Exception) -> str:
    """The innermost message of an onnx_ir error, which names the graph at every level."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    return (str(inner) or type(inner).__name__).strip()[:300]


# Weights beside the graph.


def _external_files(model: onnx.ModelProto, path: Path) -> Iterator[tuple[str, Path]]:
    """Checks every tensor with external data; yields its location and the file."""
    checked: dict[str, Path] = {}
    for count, tensor in enumerate(_tensors(model)):
        if count >= MAX_TENSORS:
            raise SkvError(f"{path}: too many tensors", expected=f"at most {MAX_TENSORS}")
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        what = f"{path}: weights of {tensor.name!r}"
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if not all(isinstance(text, str) for text in entries.values()):  # protobuf gives bytes where they are no UTF-8
            raise SkvError(f"{what}: place", got=repr(entries), expected="text", fix=_INCOMPLETE)
        if location not in checked:
            checked[location] = _locate(location, path, what)
            yield location, checked[location]
        _check_span(tensor, entries, checked[location].stat().st_size, what)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers and attributes, in subgraphs and functions too."""
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            for sparse in [attribute.sparse_tensor, *attribute.sparse_tensors]:
                yield from (sparse.values, sparse.indices)
            if attribute.HasField("g"):
                graphs.append(attribute.g)
            graphs += attribute.graphs


def _locate(location: str, path: Path, what: str) -> Path:
    """The file of a location; it must be in the model's folder, by name and after following symbolic links.

    The hub's cache is the one exception: its snapshots are folders of links into ``blobs``.
    """
    parts = PurePosixPath(location).parts
    if (
        not parts
        or location.startswith("/")
        or "\\" in location
        or "\0" in location
        or ":" in parts[0]
        or ".." in parts
    ):
        raise SkvError(
            f"{what}: outside the model's folder",
            got=repr(location),
            expected="a file in the folder of the .onnx file",
            fix="Don't use this model: a file should not ask for others of your machine.",
        )
    folder = path.parent
    file = folder / location
    if not file.is_file():
        raise SkvError(f"{what}: the file is missing", got=str(file), fix=_INCOMPLETE)
    resolved = file.resolve()
    roots = [folder.resolve()]
    if "snapshots" in folder.parts:
        repository = Path(*folder.parts[: len(folder.parts) - 1 - folder.parts[::-1].index("snapshots")])
        roots.append((repository / "blobs").resolve())
    if not any(resolved.is_relative_to(root) for root in roots):
        raise SkvError(
            f"{what}: a link that leads outside the model's folder",
            got=f"{location} -> {resolved}",
            fix="Copy the weights into the folder, if you trust them.",
        )
    return resolved


def _check_span(tensor: onnx.TensorProto, entries: Mapping[str, str], size: int, what: str) -> None:
    numbers = [entries.get("offset") or "0", entries.get("length") or "0"]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in numbers):
        raise SkvError(f"{what}: offset and length", got=", ".join(map(repr, numbers)), expected="numbers of bytes")
    offset, length = map(int, numbers)
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise SkvError(f"{what}: number format", got=tensor.data_type, fix=_INCOMPLETE) from error
    if any(dim < 0 for dim in tensor.dims):
        raise SkvError(f"{what}: shape", got=list(tensor.dims), expected="no negative sizes")
    needed = -(-math.prod(tensor.dims) * bits // 8)
    if entries.get("length") and length != needed:
        raise SkvError(f"{what}: length", got=f"{length} bytes", expected=f"{needed} for {list(tensor.dims)}")
    if offset + needed > size:
        raise SkvError(
            f"{what}: beyond the end of {entries['location']}",
            got=f"bytes {offset} to {offset + needed}",
            expected=f"at most {size}",
            fix=_INCOMPLETE,
        )


# The graph's order.


def _check_order(graph: ir.Graph, path: Path) -> None:
    """Sorts the nodes; refuses cycles and inputs that nothing defines."""
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is None or value.producer() is not None or value.is_graph_input() or value.is_initializer():
                continue
            raise SkvError(f"{path}: node {node.name!r} reads {value.name!r}, which nothing defines", fix=_INCOMPLETE)
    try:
        graph.sort()
    except ValueError as error:
        raise SkvError(f"{path}: the graph has a cycle", got=_brief(error), fix=_INCOMPLETE) from error
