"""Owns the export: a checkpoint becomes a folder with the graph, its weights, and everything a runtime reads beside it.

``plan`` says what would be written, from the configuration alone: it runs the model on torch's meta device, so what it
knows of each layer is what the traced graph will have. ``export_model`` loads the weights and writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig

from skv_export.checkpoints.checkpoint import Source, resolve
from skv_export.checkpoints.model_config import load_config
from skv_export.checkpoints.snapshot import Snapshot
from skv_export.errors import SkvError
from skv_export.export import empty_model, repeat_layers
from skv_export.export.checkpoint_weights import Weights, download, separate_head
from skv_export.export.decoder import LayerAttention, SkvDecoder
from skv_export.export.empty_model import Skeleton
from skv_export.export.supported import check_config, check_purpose, check_windows, context_length
from skv_export.export.to_onnx import INPUT_NAMES, build, save
from skv_export.export.weight_quantization import stored_bytes
from skv_export.model_folder import genai_config
from skv_export.model_folder.skv_config import CONFIG_FILE, LayerCache, ModelConfig
from skv_export.model_folder.tokenizer import write_tokenizer
from skv_export.model_folder.writer import (
    check_target,
    digest,
    generation_config,
    output_folder,
    write_json,
)
from skv_export.native.library import library_path
from skv_export.spec.layout import cache_bytes
from skv_export.spec.recipe import Recipe

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PHASES = {"reading the configuration": 0.0, "opening the weights": 0.1, "building the graph": 0.15, "writing": 0.5}
"""Phases of an export, and the fraction of its time that has passed when each starts."""
PLAN_LENGTHS = (4096, 32768, 131072)
"""Lengths at which a plan compares the cache with an fp16 one."""

Progress = Callable[[str, float], None]
"""Called with a phase's name and the fraction of the whole that is done."""


@dataclass(frozen=True)
class Plan:
    """What an export would write.

    Attributes:
        source: The checkpoint.
        recipe: The options.
        model_type: Hugging Face's name of the architecture.
        layers: Attention of each layer, as the graph will have it.
        weight_bytes: Size of the weights as the recipe wants them, tied ones once.
        context_length: Tokens that the model can attend to.
    """

    source: Source
    recipe: Recipe
    model_type: str
    layers: tuple[LayerAttention, ...]
    weight_bytes: int
    context_length: int

    def cache_bytes(self, length: int) -> int:
        """Returns the bytes that the cache of one sequence of ``length`` tokens takes."""
        return cache_bytes(
            [layer.layouts for layer in self.layers], [layer.params.kv_num_heads for layer in self.layers], length
        )

    def half_cache_bytes(self, length: int) -> int:
        """Returns what an fp16 cache takes that keeps every token in every layer."""
        return sum(2 * 2 * length * layer.params.kv_num_heads * layer.layouts[0].head_dim for layer in self.layers)

    @property
    def bytes_per_token(self) -> float:
        """Bytes by which one more token makes the cache larger, sliding windows aside."""
        full = [layer for layer in self.layers if not layer.params.local_window_size] or self.layers
        return sum(
            layer.params.kv_num_heads * layout.tile_bytes / layout.tile_tokens
            for layer in full
            for layout in layer.layouts
        )

    def table(self) -> str:
        """Returns the plan as text."""
        lines = [
            f"{self.source}: {self.model_type}, {len(self.layers)} layers, context {self.context_length:,}",
            self._weights_row(),
            "",
        ]
        lines += [f"  {row}" for row in self._layer_rows()]
        lines += ["", f"cache: {self.bytes_per_token:,.0f} bytes per token and sequence"]
        for length in PLAN_LENGTHS:
            ours, half = self.cache_bytes(length), self.half_cache_bytes(length)
            ratio = f"{half / ours:.1f}x smaller"
            lines.append(f"  {length:>7,} tokens: {_size(ours):>9} instead of {_size(half):>9} in fp16, {ratio}")
        pairs = [layer.layouts for layer in self.layers]
        return "\n".join([*lines, "", genai_config.advice(self.recipe.layers(len(pairs)), pairs, self.context_length)])

    def _weights_row(self) -> str:
        recipe = self.recipe
        if not recipe.weight_bits:
            return f"weights: {recipe.dtype}, {_size(self.weight_bytes)}"
        kept = [
            *(["the output embedding"] if not recipe.quantize_head else []),
            *(["the input embedding"] if not recipe.quantize_embeddings else []),
        ]
        rest = f" but for {' and '.join(kept)}" if kept else ""
        return f"weights: matrices in {recipe.weights}{rest}, the rest in {recipe.dtype}, {_size(self.weight_bytes)}"

    def _layer_rows(self) -> list[str]:
        """One line for each run of equal layers."""
        rows: list[tuple[int, int, str]] = []
        for i, layer in enumerate(self.layers):
            key, value = layer.layouts
            params = layer.params
            window = f", window {params.local_window_size}" if params.local_window_size else ""
            text = (
                f"K{key.bits}V{value.bits}, {params.num_heads} query heads on {params.kv_num_heads}, "
                f"head_dim {key.head_dim}{window}, keys per {key.granularity}, values per {value.granularity}, "
                f"first {key.num_sink_tokens} and last {key.recent_tokens} tokens exact"
            )
            if rows and rows[-1][2] == text:
                rows[-1] = (rows[-1][0], i, text)
            else:
                rows.append((i, i, text))
        return [f"layer{'s' if a < b else ''} {a if a == b else f'{a}-{b}'}: {text}" for a, b, text in rows]


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def plan(source: str | Path | Source, recipe: Recipe | None = None, *, as_causal_lm: bool = False) -> Plan:
    """Says what an export would write; reads the configuration and no weights.

    Args:
        source: A folder with safetensors, a GGUF file, or a hub id.
        recipe: The options; the defaults if not given.
        as_causal_lm: Take a classifier, reward or embedding model for the language model that it was made from.

    Raises:
        SkvError: The checkpoint, its architecture or the recipe can't be used; the message says why.
    """
    resolved = resolve(source)
    return _plan(resolved, recipe or Recipe(), as_causal_lm)[0]


def _plan(source: Source, recipe: Recipe, as_causal_lm: bool) -> tuple[Plan, Skeleton]:
    config = load_config(source)
    check_config(config)
    if not as_causal_lm:
        check_purpose(config)
    separate_head(source, config)
    count = int(config.num_hidden_layers)
    configs = recipe.layers(count)
    try:
        model = empty_model.build(config, DTYPES[recipe.dtype])
        decoder = SkvDecoder(model.model, configs)
        with model.running():
            cache = [torch.empty(2, 1, 1, 1, dtype=torch.uint8)] * count  # its bytes don't matter to shapes
            decoder(*_example_inputs(cache, cache))
    except (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {str(error)[:300]}"
        raise SkvError(
            f"{config.model_type}: can't be exported: its model does not run with the op as its attention", got=got
        ) from error
    check_windows(config, [layer.params.local_window_size for layer in decoder.layers])
    planned = Plan(
        source=source,
        recipe=recipe,
        model_type=config.model_type,
        layers=decoder.layers,
        weight_bytes=stored_bytes(model.model, recipe),
        context_length=context_length(config),
    )
    return planned, model


def _example_inputs(past_keys: list[torch.Tensor], past_values: list[torch.Tensor]) -> tuple[Any, ...]:
    """Inputs to trace with: two sequences of three tokens after four, so that no length is 0 or 1 or equals another."""
    ids, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    return ids, mask, torch.zeros_like(ids), past_keys, past_values


def export_model(
    source: str | Path | Source,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    force: bool = False,
    all_logits: bool = False,
    as_causal_lm: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Exports a checkpoint.

    Args:
        source: A folder with safetensors, a GGUF file, or a hub id.
        out: Folder to write; it appears complete or not at all.
        recipe: The options; the defaults if not given.
        force: Replace ``out`` if it exists.
        all_logits: Return the logits of every position, for evaluation.
        as_causal_lm: Take a classifier, reward or embedding model for the language model that it was made from.
        progress: Told of each phase; a bar on standard error if not given.

    Returns:
        ``out``.

    Raises:
        SkvError: The checkpoint, its architecture, the recipe or ``out`` can't be used, or the disk is full.
    """
    resolved, target = resolve(source), Path(out)
    check_target(target, 0, force=force)
    library_path()  # it goes into the folder: better none is written than one without it
    with _Phases(progress) as phases:
        phases.start("reading the configuration")
        before = Snapshot.take(resolved)
        planned, model = _plan(resolved, recipe or Recipe(), as_causal_lm)
        with output_folder(target, planned.weight_bytes, force=force) as folder:
            phases.start("opening the weights")
            local = download(resolved)
            before = before if resolved.path else Snapshot.take(local)
            write_tokenizer(local, folder)  # before the weights: what is wrong with it shows at once
            weights = Weights(local, model.model)
            phases.start("building the graph")
            graph = _build(planned, model, weights, all_logits)
            phases.start("writing")
            save(graph, folder, phases.advance)
            _write_beside(folder, planned, local, model.model.config, all_logits)
            before.check()
    return target


class _Phases:
    """Tells a progress callback what is being done, or draws a bar."""

    def __init__(self, progress: Progress | None) -> None:
        self._bar = None if progress else tqdm(total=1.0, bar_format="{desc}: {percentage:3.0f}% |{bar}|", leave=False)
        self._progress, self._name = progress, ""

    def __enter__(self) -> _Phases:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._tell("done", 1.0)
        if self._bar is not None:
            self._bar.close()

    def start(self, name: str) -> None:
        """Starts a phase."""
        self._name = name
        self._tell(name, PHASES[name])

    def advance(self, fraction: float) -> None:
        """Says how much of the phase is done; of the last one."""
        begin = PHASES[self._name]
        self._tell(self._name, begin + (1 - begin) * fraction)

    def _tell(self, name: str, done: float) -> None:
        if self._progress is not None:
            self._progress(name, done)
        elif self._bar is not None:
            self._bar.set_description(name)
            self._bar.update(done - self._bar.n)


def _build(planned: Plan, model: Skeleton, weights: Weights, all_logits: bool) -> ir.Model:
    """Returns the graph: of a few layers, the others stamped, where that can be; else all layers are traced."""
    samples = repeat_layers.choose(model.model, planned.layers)
    if samples is not None:
        with repeat_layers.cut(model.model, samples):
            program = _trace(planned, model, samples.traced, all_logits)
        if (graph := build(program, weights, planned.layers, planned.recipe, samples)) is not None:
            return graph
    program = _trace(planned, model, range(len(planned.layers)), all_logits)
    whole = build(program, weights, planned.layers, planned.recipe)
    assert whole is not None
    return whole


def _trace(planned: Plan, model: Skeleton, traced: Sequence[int], all_logits: bool) -> torch.export.ExportedProgram:
    configs = planned.recipe.layers(len(planned.layers))
    decoder = SkvDecoder(model.model, {i: configs[i] for i in traced}, all_logits=all_logits).eval()
    with model.running():
        keys, values = (
            [
                torch.zeros(2, layer.params.kv_num_heads, rows, layer.layouts[which].width, dtype=torch.uint8)
                for layer in (planned.layers[i] for i in traced)
            ]
            for which, rows in ((0, 2), (1, 3))
        )
        inputs = _example_inputs(keys, values)
    dim = torch.export.Dim
    batch, tokens, columns = dim("batch_size"), dim("sequence_length"), dim("total_sequence_length")
    ids = {0: batch, 1: tokens}
    caches = [{0: batch, 2: dim.DYNAMIC}] * len(traced)
    shapes = (ids, {0: batch, 1: columns}, ids, caches, caches)
    with torch.no_grad():
        return torch.export.export(decoder, inputs, dynamic_shapes=shapes, strict=False)


def _write_beside(folder: Path, planned: Plan, local: Source, config: PreTrainedConfig, all_logits: bool) -> None:
    """Writes every file but the graph and its weights; ``local`` is the source on this disk."""
    generation = generation_config(local, config)
    generation.save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / "recipe.toml").write_text(planned.recipe.to_toml(), encoding="utf-8")
    ours = _model_config(planned, config, generation, all_logits)
    hidden_size = int(config.hidden_size)
    write_json(folder / CONFIG_FILE, ours.to_dict(hidden_size))
    given = {
        name: getattr(generation, name) for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    }
    base = {"search": {name: value for name, value in given.items() if value is not None}}
    write_json(folder / genai_config.CONFIG_FILE, genai_config.genai_config(ours, hidden_size, INPUT_NAMES, base))
    shutil.copyfile(library_path(), folder / genai_config.LIBRARY_FILE)


def _model_config(
    planned: Plan, config: PreTrainedConfig, generation: GenerationConfig, all_logits: bool
) -> ModelConfig:
    source, recipe = planned.source, planned.recipe

    def token(name: str) -> Any:
        given = getattr(generation, name, None)
        return getattr(config, name, None) if given is None else given

    eos = token("eos_token_id")
    ends = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    pad = token("pad_token_id")
    return ModelConfig(
        model_type=planned.model_type,
        dtype=recipe.dtype,
        vocab_size=int(config.vocab_size),
        context_length=planned.context_length,
        bos_token_id=token("bos_token_id"),
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None and ends else pad,
        all_logits=all_logits,
        weights=recipe.weights if recipe.weight_bits else "",
        quantize_head=recipe.quantize_head,
        quantize_embeddings=recipe.quantize_embeddings,
        source={
            "kind": source.kind,
            "name": source.repo_id or source.gguf_file or (source.path.resolve().name if source.path else ""),
            "revision": source.revision,
            "sha256": digest(source, config),
        },
        layers=tuple(
            LayerCache(x.params.num_heads, x.params.kv_num_heads, x.params.local_window_size, *x.layouts)
            for x in planned.layers
        ),
    )
