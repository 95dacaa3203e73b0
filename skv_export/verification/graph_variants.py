"""Variants of an exported graph for verification, made in memory; they use the folder's weights.

Each differs from the exported graph in one respect: which logits it returns, how many bits its cache has, or how its
products with quantized weights are computed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx

from skv_export.checkpoints.block_weights import CODES, ROWS
from skv_export.errors import SkvError
from skv_export.model_folder.names import MODEL_FILE, layer_of_cache
from skv_export.model_folder.skv_config import LayerCache, ModelConfig
from skv_export.runtime.last_logits import with_logits
from skv_export.runtime.session import Session
from skv_export.spec.key_basis import INPUTS
from skv_export.spec.layout import CacheLayout
from skv_export.spec.op import DOMAIN, INPUT_NAMES, OP_NAME

EXACT_BITS, EXACT_TYPE = 16, "float"


def plain(folder: Path, *, execution_provider: str = "cpu") -> Session:
    """Returns a session of the exported graph itself, configured as the variants': it shares the cores with torch."""
    return Session(folder, execution_provider=execution_provider, spinning=False)


def exact_products(folder: Path, *, execution_provider: str = "cpu") -> Session:
    """Returns a session that does not round activations before products with quantized weights, as PyTorch."""
    config = ModelConfig.load(folder)
    if not config.weights:
        return plain(folder, execution_provider=execution_provider)
    return _session(folder, execution_provider, read_with_exact_products(folder / MODEL_FILE), config)


def read_with_exact_products(path: Path) -> onnx.ModelProto:
    """Reads a graph, without the weights beside it; its products with quantized weights do not round activations."""
    model = _read(path)
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type in ("MatMulNBits", "QMoE") else ():
            if attribute.name == "accuracy_level":
                attribute.i = 1  # float32
    return model


def all_logits(folder: Path, *, execution_provider: str = "cpu") -> Session:
    """Returns a session that returns every position's logits, for calls without padding.

    The exported graph picks the hidden states of each sequence's last token before the output embedding; the twin
    leaves that out. Without padding the tokens are already in their order, so nothing has to be unpacked.

    Raises:
        SkvError: The graph does not pick hidden states where it is expected to.
    """
    config = ModelConfig.load(folder)
    if config.all_logits:
        return plain(folder, execution_provider=execution_provider)
    model = with_logits(folder / MODEL_FILE, None)
    config = dataclasses.replace(config, all_logits=True)
    return _session(folder, execution_provider, model, config)


def unquantized(folder: Path, *, execution_provider: str = "cpu") -> Session:
    """Returns a session with an unquantized cache: 16 bits for keys and values, float32 rows.

    All else is ``exact_products``; a difference to the original comes from the graph, and no code can flip.
    """
    config = ModelConfig.load(folder)
    by_index = {i: _unquantized(layer) for i, layer in config.by_index.items()}
    model = read_with_exact_products(folder / MODEL_FILE)
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == OP_NAME:
            del node.input[INPUT_NAMES.index(INPUTS[0]) :]  # such keys have no basis
        for attribute in node.attribute if node.domain == DOMAIN else ():
            if attribute.name in ("k_bits", "v_bits"):
                attribute.i = EXACT_BITS
            elif attribute.name == "recent_type":
                attribute.s = EXACT_TYPE.encode()
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        layer = layer_of_cache(value.name)
        if layer is not None:
            layout: CacheLayout = getattr(by_index[layer], value.name.rpartition(".")[2])
            if value.type.tensor_type.shape.dim[3].HasField("dim_value"):  # else any width will do
                value.type.tensor_type.shape.dim[3].dim_value = layout.width
    return _session(folder, execution_provider, model, dataclasses.replace(config, layers=tuple(by_index.values())))


def _unquantized(layer: LayerCache) -> LayerCache:
    key, value = (dataclasses.replace(x, bits=EXACT_BITS, recent_type=EXACT_TYPE) for x in (layer.key, layer.value))
    return dataclasses.replace(layer, key=key, value=value, calibrated=False)


def _session(folder: Path, execution_provider: str, model: onnx.ModelProto, config: ModelConfig) -> Session:
    graph = model.SerializeToString()
    return Session(folder, execution_provider=execution_provider, spinning=False, model=graph, config=config)


def quantized_weights(folder: Path) -> list[str]:
    """Returns the names of the matrices that an exported graph holds in 4 or 8 bits."""
    names = [tensor.name for tensor in _read(folder / MODEL_FILE).graph.initializer]
    stems = [name.removesuffix(ROWS) for name in names]  # an embedding's codes, by rows
    return list(dict.fromkeys(stem.removesuffix(f".{CODES}") for stem in stems if stem.endswith(f".{CODES}")))


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise SkvError(f"{path}: no such file", fix="Export the model with `skv-export model`.")
    return onnx.load(path, load_external_data=False)
