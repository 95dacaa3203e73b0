"""Names in an exported folder: its files, and its graph's inputs and outputs."""

from __future__ import annotations

from skv_export.native.library import FILE_NAME

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
"""The graph's weights, as external data."""
CALIBRATION_FILE = "calibration.safetensors"
"""Constants of calibrated keys, to which the graph refers; only in folders that have them."""
SKV_CONFIG_FILE = "skv_config.json"
GENAI_CONFIG_FILE = "genai_config.json"
RECIPE_FILE = "recipe.toml"
MANIFEST_FILE = "skv_files.json"
"""The folder's own list of files: ``{"files": {name: size}}``, itself left out; written last."""
CARD_FILE = "README.md"
LIBRARY_FILE = FILE_NAME
MODEL_CLASS = "SkvForCausalLM"
"""What ``config.json`` of an exported checkpoint names under ``architectures``."""
"""onnxruntime-genai loads a custom-op library from the folder, the working directory or its own only."""
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
CHAT_TEMPLATES_FOLDER = "additional_chat_templates"
"""Templates that a model has beside its default, ``NAME.jinja``: where transformers looks for them."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of special tokens, which templates know too."""

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"
TOKEN_INPUTS = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)
"""The graph's inputs beside the caches; a rewritten one that counts positions itself does without the last."""
INPUTS_EMBEDS = "inputs_embeds"
"""Embeddings in the place of tokens: an input that may be left out, of graphs that take them."""
LOGITS = "logits"
PAST, PRESENT = "past_key_values", "present"
TENSORS = ("key", "value")
"""The two tensors of a layer's cache, in the order of layouts."""
PAST_STATE, PRESENT_STATE = "past_state", "present_state"


def past_name(layer: int | str, tensor: str) -> str:
    """Returns the graph's input of a layer's keys or values; ``%d`` for a layer gives onnxruntime-genai's pattern."""
    return f"{PAST}.{layer}.{tensor}"


def present_name(layer: int | str, tensor: str) -> str:
    """Returns the graph's output of a layer's keys or values; see ``past_name``."""
    return f"{PRESENT}.{layer}.{tensor}"


def layer_of_cache(name: str | None) -> int | None:
    """Returns the layer whose ``past_name`` or ``present_name`` this is; None = another value's name."""
    kind, _, rest = (name or "").partition(".")
    layer, _, tensor = rest.partition(".")
    return int(layer) if kind in (PAST, PRESENT) and layer.isdigit() and tensor in TENSORS else None


def past_state_name(layer: int | str, state: str) -> str:
    """Returns the graph's input of a layer's recurrent state; ``layer`` as in ``past_name``."""
    return f"{PAST_STATE}.{layer}.{state}"


def present_state_name(layer: int | str, state: str) -> str:
    """Returns the graph's output of a layer's recurrent state; ``layer`` as in ``past_name``."""
    return f"{PRESENT_STATE}.{layer}.{state}"


def layer_of_state(name: str | None) -> int | None:
    """Returns the layer whose ``past_state_name`` or ``present_state_name`` this is; None = another value's name."""
    kind, _, rest = (name or "").partition(".")
    layer, _, state = rest.partition(".")
    return int(layer) if kind in (PAST_STATE, PRESENT_STATE) and layer.isdigit() and state else None
