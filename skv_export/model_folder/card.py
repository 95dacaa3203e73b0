"""``README.md`` of an exported folder: what it is, how to run it, whose licence it has; the hub shows it as a card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skv_export import __version__
from skv_export.model_folder.names import CARD_FILE, RECIPE_FILE
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.spec.layout import cache_bytes

_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_LICENCE = re.compile(r"^license:[ \t]*[\"']?([\w.\-+ ]{1,60}?)[\"']?[ \t]*$", re.MULTILINE)


def licence_of(folder: Path | None, gguf_metadata: Mapping[str, Any] | None = None) -> str:
    """Returns the licence's identifier that a checkpoint states, such as ``apache-2.0``; "" if it states none.

    Args:
        folder: The checkpoint's folder, whose ``README.md`` may begin with a card's metadata.
        gguf_metadata: Of a GGUF file.
    """
    given = (gguf_metadata or {}).get("general.license")
    if isinstance(given, str) and re.fullmatch(r"[\w.\-+ ]{1,60}", given):
        return given
    card = folder / CARD_FILE if folder is not None else None
    if card is None or not card.is_file():
        return ""
    with card.open(encoding="utf-8", errors="replace") as file:
        front = _FRONT.match(file.read(1 << 16))
    found = _LICENCE.search(front[1]) if front else None
    return found[1] if found else ""


def model_card(config: ModelConfig, name: str, *, licence: str = "", evidence: str = "") -> str:
    """Returns the card of an exported model.

    Args:
        config: Its ``skv_config.json``.
        name: What the examples load: a hub id, or ``.``, the folder that they are run in.
        licence: The checkpoint's, if known.
        evidence: What is known of its quality: a recipe's description.
    """
    source = config.source
    origin = str(source.get("name") or config.model_type)
    front = ["library_name: skv_export", "pipeline_tag: text-generation", "tags: [onnx, kv-cache-quantization]"]
    front += [f"license: {licence}"] if licence else []
    front += [f"base_model: {origin}"] if source.get("kind") == "hub" else []
    length = min(config.context_length, 32768)
    layouts = [(layer.key, layer.value) for layer in config.layers]
    ours = cache_bytes(layouts, [layer.num_key_value_heads for layer in config.layers], length)
    half = sum(4 * length * layer.num_key_value_heads * layer.key.head_dim for layer in config.layers)
    ours, half = ours + config.state_bytes, half + config.state_bytes
    weights = config.weights or config.dtype
    title = name.rpartition("/")[2] if name != "." else f"{Path(origin).stem}, cache {config.bits}"
    quality = f"{evidence}\n\n" if evidence else ""
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {title}",
            "",
            f"{origin}, exported by skv_export {__version__} to ONNX Runtime with a quantized KV cache.",
            "",
            "| | |",
            "|---|---|",
            f"| cache | {config.bits}: bits of keys (K) and values (V); `{RECIPE_FILE}` has every option |",
            f"| its size at {length:,} tokens | {ours / 2**20:.1f} MiB; in fp16 {half / 2**20:.1f} MiB |",
            f"| weights | {weights or 'as in the source'} |",
            f"| layers, context | {config.num_hidden_layers or len(config.layers)} of {config.model_type}, "
            f"{config.context_length:,} tokens |",
            f"| licence of the source | {licence or 'not stated: see the source'} |",
            "",
            "## Quality",
            "",
            f"{quality}`skv-export verify` measures what the quantized cache costs on this model: perplexity, KL",
            "divergence and agreement with the unquantized model.",
            "",
            "## Run",
            "",
            "On the command line" + (" (`.` is this folder):" if name == "." else ":"),
            "",
            f'    skv-export generate {name} --prompt "The capital of France is"',
            f"    skv-export chat {name}",
            "",
            "In Python, with transformers' interface:",
            "",
            "```python",
            "from transformers import AutoTokenizer",
            "from skv_export import SkvForCausalLM",
            "",
            f'model = SkvForCausalLM.from_pretrained("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            'inputs = tokenizer("The capital of France is", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
            "```",
            "",
            *(_genai_lines(config, name) if config.position_axes == 1 else []),
        ]
    )


def _genai_lines(config: ModelConfig, name: str) -> list[str]:
    """How to run it in onnxruntime-genai."""
    return [
        "In onnxruntime-genai, which loads the op's library from the folder:",
        "",
        "```python",
        "import onnxruntime_genai as og",
        "",
        f'model = og.Model("{name}")',
        "tokenizer = og.Tokenizer(model)",
        "params = og.GeneratorParams(model)",
        f"params.set_search_options(max_length={min(config.context_length, 2048)}, do_sample=False)",
        "generator = og.Generator(model, params)",
        'generator.append_tokens(tokenizer.encode("The capital of France is"))',
        "for _ in range(20):",
        "    generator.generate_next_token()",
        "print(tokenizer.decode(generator.get_sequence(0)))",
        "```",
        "",
    ]
