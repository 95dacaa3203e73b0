"""The export pipeline: from a checkpoint to a folder with the graph, its weights, and the files that a runtime reads.

``Export.read`` plans it without reading weights, by running the model with fake parameters: its layers are those that
the traced graph will have. ``Export.write`` reads the weights and writes. ``plan`` and ``export_model`` are shorthands.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from transformers import GenerationConfig, PreTrainedConfig

from skv_export.arguments import checked
from skv_export.calibration.file import Calibration
from skv_export.checkpoints.checkpoint import Checkpoint, Source, resolve
from skv_export.checkpoints.model_config import context_length, load_config
from skv_export.checkpoints.pretrained import DTYPES, download
from skv_export.checkpoints.purpose import check_purpose
from skv_export.checkpoints.shared_caches import count_caches
from skv_export.checkpoints.snapshot import Snapshot
from skv_export.errors import SkvError
from skv_export.export import empty_model, experts, latent_attention, repeat_layers, rope_by_length, vision_language
from skv_export.export.checkpoint_weights import Weights, separate_head, warn_of_rounding_again
from skv_export.export.decoder import SkvDecoder
from skv_export.export.empty_model import EmptyModel
from skv_export.export.supported import attention_layers, check_config, check_windows
from skv_export.export.to_onnx import build, save
from skv_export.export.weight_quantization import stored_bytes
from skv_export.model_folder.card import licence_of
from skv_export.model_folder.labels import label_model, label_nodes
from skv_export.model_folder.names import MODEL_CLASS, TOKEN_INPUTS
from skv_export.model_folder.output import check_target, output_folder
from skv_export.model_folder.plan import Plan
from skv_export.model_folder.skv_config import LayerCache, ModelConfig
from skv_export.model_folder.tokenizer import write_tokenizer
from skv_export.model_folder.writer import digest, generation_config, write_configs
from skv_export.native.library import library_path
from skv_export.paths import to_path
from skv_export.progress import Progress as Shown
from skv_export.spec.key_basis import can_be_calibrated
from skv_export.spec.recipe import AS_IS, Recipe, as_recipe
from skv_export.spec.recipe import DTYPES as NUMBER_FORMATS

PHASES = {"opening the weights": 0.0, "building the graph": 0.1, "writing": 0.6}
"""Phases of writing, and the fraction of its time that has passed when each starts."""

Progress = Callable[[str, float], None]
"""Called with a phase's name and the fraction of the whole that is done."""


@dataclass(frozen=True)
class Export:
    """A checkpoint, planned: what would be written, and what that takes.

    Attributes:
        plan: What would be written.
        model: The model without weights.
        calibration: Of the layers that can have one.
        before: The checkpoint's files as they were when it was planned; a hub id's are not there yet.
    """

    plan: Plan
    model: EmptyModel
    calibration: Calibration | None
    before: Snapshot

    @classmethod
    @checked
    def read(
        cls,
        source: str | Path | Source,
        recipe: Recipe | None = None,
        *,
        as_causal_lm: bool = False,
        adapter: str | Path | None = None,
        calibration: Calibration | str | Path | None = None,
        inputs_embeds: bool | None = None,
    ) -> Export:
        """Plans an export. Reads the configuration and the files' headers, and no weights.

        Args:
            source: A folder with safetensors, a GGUF file, or a hub id.
            recipe: The options; the defaults if not given.
            as_causal_lm: Take a classifier, reward or embedding model for the language model that it was made from.
            adapter: Folder of a LoRA adapter to merge into the weights.
            calibration: Of keys: what ``skv-export calibrate`` wrote for this checkpoint; of a hub id whether it did is
                seen when the weights are there.
            inputs_embeds: Whether the graph takes embeddings in the place of tokens too; None = of vision-language
                models.

        Raises:
            SkvError: The checkpoint, its architecture or the recipe can't be used; the message says why.
        """
        if calibration is not None and not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        resolved = resolve(source, adapter=adapter)
        if calibration is not None and resolved.path is not None:
            calibration.check(resolved)
        before = Snapshot.take(resolved)
        planned, model = _plan(resolved, as_recipe(recipe), as_causal_lm, inputs_embeds)
        planned, constants = _calibrated(planned, calibration)
        return cls(planned, model, constants, before)

    @checked
    def write(
        self,
        out: str | Path,
        *,
        force: bool = False,
        all_logits: bool = False,
        progress: Progress | None = None,
    ) -> Path:
        """Exports what was planned.

        Args:
            out: Folder to write; it appears complete or not at all.
            force: Replace ``out`` if it exists.
            all_logits: Return the logits of every position, for evaluation.
            progress: Told of each phase; a bar on standard error if not given.

        Returns:
            ``out``.

        Raises:
            SkvError: The checkpoint or ``out`` can't be used, or the disk is full.
        """
        target = to_path(out, "out")
        check_target(target, force=force)
        library_path()  # it goes into the folder: better none is written than one without it
        with Shown() as shown:
            phases = _Phases(progress or shown)
            with output_folder(target, self.plan.weight_bytes, force=force) as folder:
                self._write(folder, all_logits, phases)
            phases.done()
        return target

    def _write(self, folder: Path, all_logits: bool, phases: _Phases) -> None:
        planned, model = self.plan, self.model
        phases.start("opening the weights")
        local = download(planned.source)
        before = self.before if planned.source.path else Snapshot.take(local)
        if self.calibration is not None:
            self.calibration.check(local)
        write_tokenizer(local, folder)  # before the weights: what is wrong with it shows at once
        ours = _model_config(planned, model.model.config, generation_config(local, model.model.config), all_logits)
        weights = Weights(local, model.model)
        phases.start("building the graph")
        graph = _build(planned, model, weights, all_logits)
        phases.start("writing")
        label_nodes(graph.graph)
        label_model(graph, ours, planned.recipe)
        save(graph, folder, phases.advance, self.calibration)
        _write_beside(folder, planned, local, model.model.config, ours)
        before.check()


def plan(
    source: str | Path | Source,
    recipe: Recipe | None = None,
    *,
    as_causal_lm: bool = False,
    adapter: str | Path | None = None,
    calibration: Calibration | str | Path | None = None,
    inputs_embeds: bool | None = None,
) -> Plan:
    """Plans an export: what it would write; arguments and errors are those of ``Export.read``."""
    return Export.read(
        source,
        recipe,
        as_causal_lm=as_causal_lm,
        adapter=adapter,
        calibration=calibration,
        inputs_embeds=inputs_embeds,
    ).plan


def _calibrated(planned: Plan, calibration: Calibration | None) -> tuple[Plan, Calibration | None]:
    """The plan with a calibration, and what of that its layers can have."""
    if calibration is None:
        return planned, None
    if len(planned.layers) < planned.num_hidden_layers:
        raise SkvError("calibration", got="layers without attention", expected="attention in each", fix="Leave it out.")
    bases = {}
    for index, basis in calibration.bases.items():
        if index >= len(planned.layers):
            raise SkvError("calibration: layer", got=index, expected=f"one of the model's {len(planned.layers)}")
        layer = planned.layers[index]
        if can_be_calibrated(layer.layouts[0]):
            basis.check(layer.layouts[0], layer.params.kv_num_heads)
            bases[index] = basis
    if not bases:
        raise SkvError(
            "calibration: the recipe has no layer for it",
            expected="keys of fewer than 16 bits, granularity channel, rotation none",
            fix="Leave --calibration out, or choose another recipe.",
        )
    return dataclasses.replace(planned, calibrated=frozenset(bases)), dataclasses.replace(calibration, bases=bases)


def _plan(
    source: Source, recipe: Recipe, as_causal_lm: bool, inputs_embeds: bool | None = None
) -> tuple[Plan, EmptyModel]:
    config = load_config(source)
    try:
        return _plan_of(config, source, recipe, as_causal_lm, inputs_embeds)
    except SkvError:
        raise
    except Exception as error:  # values of other types than ours and transformers' code expect
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise SkvError(f"{source}: its configuration makes no sense", got=got, fix="Correct config.json.") from error


def _plan_of(
    config: PreTrainedConfig, source: Source, recipe: Recipe, as_causal_lm: bool, inputs_embeds: bool | None
) -> tuple[Plan, EmptyModel]:
    check_config(config)
    text = config.get_text_config()
    sees = vision_language.is_vision_language(config)
    embeds = sees if inputs_embeds is None else inputs_embeds
    if embeds and getattr(text, "hidden_size_per_layer_input", None):
        raise SkvError(
            f"{config.model_type}: inputs_embeds",
            got="a model with embeddings of the tokens for each layer (hidden_size_per_layer_input)",
            expected="one that reads embeddings alone",
            fix="Leave --inputs-embeds out.",
        )
    if not as_causal_lm:
        check_purpose(config.model_type, config.architectures)
    separate_head(source, config)
    count = count_caches(text)
    indices = [i for i in attention_layers(text) if i < count]
    configs = recipe.layers(count)
    try:
        model = empty_model.build(config, DTYPES[recipe.dtype])
        decoder = SkvDecoder(model.model, {i: configs[i] for i in indices})
        with model.running():
            cache = [torch.empty(2, 1, 1, 1, dtype=torch.uint8)] * len(indices)  # its bytes don't matter to shapes
            decoder(*_example_inputs(cache, cache))
    except SkvError:
        raise
    except Exception as error:  # whatever transformers' models raise
        got = f"{type(error).__name__}: {str(error)[:300]}"
        raise SkvError(
            f"{config.model_type}: can't be exported: its model does not run with the op as its attention", got=got
        ) from error
    check_windows(text, decoder.windows)
    weights = Weights(source, model.model)  # compares names and shapes in the files' headers, and reads no weight
    held = weights.held() if recipe.weights in ("", AS_IS) else {}
    if recipe.weight_bits:
        warn_of_rounding_again(source, weights.held())
    _tokens(text, generation_config(source, config))
    if sees:
        vision_language.warn_of_images(config)
    planned = Plan(
        source=source,
        recipe=dataclasses.replace(recipe, weights=AS_IS if held else recipe.weights.removeprefix(AS_IS)),
        model_type=config.model_type,
        layers=decoder.layers,
        weight_bytes=stored_bytes(model.model, recipe, held),
        context_length=context_length(text),
        held=held,
        readers=len(decoder.sources),
        inputs_embeds=int(text.hidden_size) * (1 + vision_language.deepstack_layers(config)) if embeds else 0,
        position_axes=vision_language.position_axes(config),
        latent=any(map(latent_attention.has_latents, model.model.modules())),
        indices=tuple(indices),
        num_hidden_layers=count,
        states=decoder.states,
    )
    return planned, model


def _example_inputs(
    past_keys: list[torch.Tensor],
    past_values: list[torch.Tensor],
    past_states: Sequence[torch.Tensor] = (),
    axes: int = 1,
    hidden: int = 0,
) -> tuple[Any, ...]:
    """Inputs for tracing: two sequences of three tokens after four: lengths differ, and none is 0 or 1.

    With ``axes`` of positions, with recurrent states, and with embeddings of ``hidden`` channels, where there are any.
    """
    ids, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    positions = torch.zeros_like(ids) if axes == 1 else torch.zeros(axes, *ids.shape, dtype=torch.int64)
    given: tuple[Any, ...] = (ids, mask, positions, past_keys, past_values)
    if past_states or hidden:
        given = (*given, list(past_states))
    return (*given, torch.zeros(5, 6, hidden)) if hidden else given


@checked
def export_model(
    source: str | Path | Source,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    force: bool = False,
    all_logits: bool = False,
    as_causal_lm: bool = False,
    adapter: str | Path | None = None,
    calibration: Calibration | str | Path | None = None,
    inputs_embeds: bool | None = None,
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
        adapter: Folder of a LoRA adapter to merge into the weights.
        calibration: Of keys: what ``skv-export calibrate`` wrote for this checkpoint.
        inputs_embeds: Whether the graph takes embeddings in the place of tokens too; None = of vision-language models.
        progress: Told of each phase; a bar on standard error if not given.

    Returns:
        ``out``.

    Raises:
        SkvError: The checkpoint, its architecture, the recipe or ``out`` can't be used, or the disk is full.
    """
    check_target(to_path(out, "out"), force=force)
    planned = Export.read(
        source,
        recipe,
        as_causal_lm=as_causal_lm,
        adapter=adapter,
        calibration=calibration,
        inputs_embeds=inputs_embeds,
    )
    return planned.write(out, force=force, all_logits=all_logits, progress=progress)


class _Phases:
    """Reports progress to a callback."""

    def __init__(self, tell: Progress) -> None:
        self._tell, self._name = tell, ""

    def start(self, name: str) -> None:
        """Starts a phase."""
        self._name = name
        self._tell(name, PHASES[name])

    def advance(self, fraction: float) -> None:
        """Reports the finished fraction of the current phase."""
        begin = PHASES[self._name]
        self._tell(self._name, begin + (1 - begin) * fraction)

    def done(self) -> None:
        """Says that the folder is there."""
        self._tell("done", 1.0)


def _build(planned: Plan, model: EmptyModel, weights: Weights, all_logits: bool) -> ir.Model:
    """Returns the graph: two traced layers of each kind, copied for the others, if possible; else all are traced."""
    every = range(planned.num_hidden_layers)
    layers = planned.by_index
    # A layer that reads another's keys, or that features are added behind, is not one of a stack that are alike.
    alike = not planned.readers and not vision_language.deepstack_layers(model.model.config)
    samples = repeat_layers.choose(model.model, [layers.get(i) for i in every], planned.held) if alike else None
    if samples is not None:
        with repeat_layers.cut(model.model, samples):
            program = _trace(planned, model, samples.traced, all_logits)
        if (graph := build(program, weights, layers, planned.recipe, samples, planned.states)) is not None:
            return graph
    program = _trace(planned, model, every, all_logits)
    whole = build(program, weights, layers, planned.recipe, states=planned.states, readers=planned.readers)
    assert whole is not None
    return whole


def _trace(planned: Plan, model: EmptyModel, traced: Sequence[int], all_logits: bool) -> torch.export.ExportedProgram:
    configs = planned.recipe.layers(planned.num_hidden_layers)
    layers = {i: layer for i, layer in planned.by_index.items() if i in traced}
    states = [state for state in planned.states if state.layer in traced]
    decoder = SkvDecoder(model.model, {i: configs[i] for i in layers}, all_logits=all_logits, states=states).eval()
    with model.running():
        keys, values = (
            [
                torch.zeros(2, layer.params.kv_num_heads, rows, layer.layouts[which].width, dtype=torch.uint8)
                for layer in layers.values()
            ]
            for which, rows in ((0, 2), (1, 3))
        )
        pasts = [torch.zeros(2, *state.shape) for state in states]
        inputs = _example_inputs(keys, values, pasts, planned.position_axes, planned.inputs_embeds)
    dim = torch.export.Dim
    batch, tokens, columns = dim("batch_size"), dim("sequence_length"), dim("total_sequence_length")
    ids = {0: batch, 1: tokens}
    caches = [{0: batch, 2: dim.DYNAMIC}] * len(layers)
    positions = ids if planned.position_axes == 1 else {1: batch, 2: tokens}
    shapes: tuple[Any, ...] = (ids, {0: batch, 1: columns}, positions, caches, caches)
    if len(inputs) > len(shapes):
        shapes = (*shapes, [{0: batch}] * len(pasts))
    if planned.inputs_embeds:
        shapes = (*shapes, {0: dim.DYNAMIC, 1: dim.DYNAMIC})
    try:
        with torch.no_grad(), experts.as_operators(model.model, planned.recipe):
            return torch.export.export(decoder, inputs, dynamic_shapes=shapes, strict=False)
    except SkvError:
        raise
    except Exception as error:  # branches on data, and whatever else a model does that has no graph
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise SkvError(
            f"{planned.model_type}: can't be exported: torch.export finds no graph of its model for every length",
            got=got,
        ) from error


def _write_beside(folder: Path, planned: Plan, local: Source, config: PreTrainedConfig, ours: ModelConfig) -> None:
    """Writes every file but the graph and its weights; ``local`` is the source on this disk."""
    generation = generation_config(local, config)
    generation.save_pretrained(folder)
    exported = copy.deepcopy(config)
    exported.architectures = [MODEL_CLASS]  # no other class can load the folder
    exported.save_pretrained(folder)
    given = {
        name: getattr(generation, name) for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    }
    base = {"search": {name: value for name, value in given.items() if value is not None}}
    metadata = Checkpoint(local).gguf_metadata if local.kind == "gguf" else None
    licence = licence_of(None if local.kind == "gguf" else local.path, metadata)
    hidden_size = int(config.get_text_config().hidden_size)
    write_configs(folder, planned.recipe, ours, hidden_size, TOKEN_INPUTS, base, licence=licence)


def _model_config(
    planned: Plan, config: PreTrainedConfig, generation: GenerationConfig, all_logits: bool
) -> ModelConfig:
    source, recipe = planned.source, planned.recipe
    bos, ends, pad = _tokens(config.get_text_config(), generation)
    return ModelConfig(
        model_type=planned.model_type,
        dtype=recipe.dtype,
        vocab_size=int(config.get_text_config().vocab_size),
        context_length=planned.context_length,
        bos_token_id=bos[0] if bos else None,
        eos_token_id=ends,
        pad_token_id=(pad or ends or (None,))[0],
        all_logits=all_logits,
        weights="" if recipe.weights in NUMBER_FORMATS else recipe.weights,
        quantize_head=recipe.quantize_head,
        quantize_embeddings=recipe.quantize_embeddings,
        source={
            "kind": source.kind,
            "name": source.repo_id or source.gguf_file or (source.path.resolve().name if source.path else ""),
            "revision": source.pinned,
            "sha256": digest(source, config),
            **({"adapter": source.adapter.resolve().name} if source.adapter else {}),
        },
        layers=tuple(LayerCache.of(layer, i in planned.calibrated) for i, layer in planned.by_index.items()),
        indices=planned.indices,
        num_hidden_layers=planned.num_hidden_layers,
        states=planned.states,
        inputs_embeds=planned.inputs_embeds,
        position_axes=planned.position_axes,
        rope_switch=rope_by_length.switch_length(config.get_text_config()),
        dynamic_rope=rope_by_length.is_dynamic(config.get_text_config()),
    )


def _tokens(config: PreTrainedConfig, generation: GenerationConfig) -> list[tuple[int, ...]]:
    """The tokens that begin, end and pad sequences; what the vocabulary does not hold is left out, and said so."""
    made = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(generation, name, None)
        given = getattr(config, name, None) if given is None else given
        ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
        if not all(type(token) is int for token in ids):
            raise SkvError(f"{name} of the checkpoint", got=repr(given)[:100], expected="token ids")
        beyond = [token for token in ids if token >= config.vocab_size]
        if beyond:
            warnings.warn(
                f"{name} of the checkpoint: {', '.join(str(token)[:20] for token in beyond[:4])} is no token of the "
                f"model's {config.vocab_size:,}; left out",
                RuntimeWarning,
                stacklevel=2,
            )
        made.append(tuple(token for token in ids if 0 <= token < config.vocab_size))
    return made
