"""Writes a model repository for the Triton Inference Server from an exported folder.

    python examples/triton/model_repository.py demo-model models --max-length 4096 --mounted-at /models

The caches are Triton's implicit state: it keeps them between the requests of a sequence, so a client sends token ids
and gets logits. A sequence of requests is one text: the first holds the prompt, later ones a token each, and the mask
is as long as the text so far (docs/deploy.md). Needs the folder, this package and nothing else.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from skv_export import SkvError
from skv_export.model_folder.names import TENSORS, past_name, past_state_name, present_name, present_state_name
from skv_export.model_folder.skv_config import ModelConfig
from skv_export.native.library import library_path

WEIGHTS = ("model.onnx", "model.onnx.data", "calibration.safetensors")
LIBRARY = "libskv_ops.so"


def config(model: ModelConfig, name: str, library: str, max_length: int, sequences: int) -> str:
    """Returns ``config.pbtxt``; sizes leave out the batch, whose one row is a sequence's.

    Args:
        model: The folder's configuration.
        name: The model's name in the repository.
        library: Path of the op's library on the server.
        max_length: Tokens of a sequence, at most.
        sequences: Sequences at a time.
    """
    tensors = [("input", n, "TYPE_INT64", [-1]) for n in ("input_ids", "attention_mask", "position_ids")]
    rows = -1 if model.all_logits else 1
    tensors.append(("output", "logits", "TYPE_FP32", [rows, model.vocab_size]))
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', "max_batch_size: 1"]
    for kind, tensor, dtype, dims in tensors:
        lines.append(f'{kind} {{ name: "{tensor}" data_type: {dtype} dims: {dims} }}')
    lines += [f'model_operations {{ op_library_filename: "{library}" }}', "sequence_batching {"]
    lines.append(f"  oldest {{ max_candidate_sequences: {sequences} }}")
    for index, layer in model.by_index.items():
        for tensor, layout in zip(TENSORS, (layer.key, layer.value), strict=True):
            dims = [layer.num_key_value_heads, *layout.shape(max_length)]
            names = f'input_name: "{past_name(index, tensor)}" output_name: "{present_name(index, tensor)}"'
            start = f'initial_state {{ name: "empty" data_type: TYPE_UINT8 dims: {dims} zero_data: true }}'
            lines.append(f"  state {{ {names} data_type: TYPE_UINT8 dims: {dims} {start} }}")
    for state in model.states:
        key, dims = (state.layer, state.name), list(state.shape)
        names = f'input_name: "{past_state_name(*key)}" output_name: "{present_state_name(*key)}"'
        start = f'initial_state {{ name: "empty" data_type: TYPE_FP32 dims: {dims} zero_data: true }}'
        lines.append(f"  state {{ {names} data_type: TYPE_FP32 dims: {dims} {start} }}")
    return "\n".join([*lines, "}"]) + "\n"


def write(folder: Path, repository: Path, *, max_length: int, mounted_at: str, sequences: int) -> Path:
    """Writes the repository's model and returns its folder, which must not exist yet.

    Raises:
        SkvError: It does, or ``folder`` is no exported folder.
    """
    model, name = ModelConfig.load(folder), folder.resolve().name
    target = repository / name
    if target.exists():
        raise SkvError(f"{target}: exists already", fix="Remove it, or choose another repository.")
    if not 1 <= max_length <= model.context_length:
        raise SkvError("--max-length", got=max_length, expected=f"1 ... {model.context_length}, the model's context")
    (target / "1").mkdir(parents=True)
    for file in WEIGHTS:
        if (folder / file).is_file():
            shutil.copy(folder / file, target / "1")
    shutil.copy(library_path(), target / LIBRARY)  # the installed one: a folder's may be anybody's
    text = config(model, name, f"{mounted_at}/{name}/{LIBRARY}", max_length, sequences)
    (target / "config.pbtxt").write_text(text, encoding="utf-8")
    return target


def main() -> None:
    """Parses and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="What `skv-export model` wrote.")
    parser.add_argument("repository", type=Path)
    parser.add_argument("--max-length", type=int, default=4096, help="Tokens of a sequence, at most.")
    parser.add_argument("--sequences", type=int, default=4, help="Sequences at a time.")
    parser.add_argument("--mounted-at", help="The repository's place on the server.  [default: as here]")
    given = parser.parse_args()
    place = given.mounted_at or str(given.repository.resolve())
    try:
        made = write(
            given.folder, given.repository, max_length=given.max_length, mounted_at=place, sequences=given.sequences
        )
    except SkvError as error:
        raise SystemExit(f"Error: {error}") from error
    print(f"wrote {made}\nNext: tritonserver --model-repository={place}")


if __name__ == "__main__":
    main()
