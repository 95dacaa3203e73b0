"""From a float checkpoint to a quantized one, layer by layer.

Each layer is run on the text as the layers before it are by now, quantized; what its matrices read decides on their
codes; then it is run again with these.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.model_config import context_length, load_config
from skv_export.checkpoints.pretrained import download, load_tokenizer
from skv_export.checkpoints.snapshot import Snapshot
from skv_export.errors import SkvError
from skv_export.evaluation.decode_simulation import AttentionOptions, Simulation
from skv_export.evaluation.text import cut_windows
from skv_export.export.checkpoint_weights import warn_of_rounding_again
from skv_export.export.vision_language import is_vision_language
from skv_export.model_folder.output import check_target, output_folder
from skv_export.model_folder.tokenizer import write_tokenizer
from skv_export.model_folder.writer import generation_config
from skv_export.quantization.checkpoint_writer import CheckpointWriter, packed
from skv_export.quantization.error_propagation import fit_layer, run_exactly
from skv_export.quantization.importance import token_importance
from skv_export.quantization.layer_by_layer import LayerByLayer, SharedInputs, reading
from skv_export.quantization.norm_tweaking import tweak
from skv_export.quantization.rotation import rotate
from skv_export.quantization.scaling import scale_inputs
from skv_export.quantization.sensitivity import Unit, allocate, measure
from skv_export.quantization.solver import Form, Grid, fit_grid, gptq
from skv_export.spec.recipe import Recipe

METHODS = ("qep", "rsq", "gptq", "awq", "rtn")
"""Ways to find codes; ``quantize`` says what they are."""
_UNFITTED = "`skv-export model --weights int8` or int4 rounds weights without a text."

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""


@dataclass(frozen=True)
class Options:
    """How a checkpoint is quantized.

    Attributes:
        method: ``qep``, fitted to the unquantized model's outputs, each matrix making up for the errors before it;
            ``gptq``; ``rsq``, GPTQ in which tokens count as much as attention reads them; ``awq``, rounding to the
            nearest with scales in the norms; ``rtn``, without.
        form: Bits and size of the groups.
        windows: Windows of text; fewer if the text has no more.
        window: Tokens per window; the model's context where that is shorter.
        head_bits: Of the input and output embedding: 16 = as they are, 8 = rounded to the nearest.
        budget: Bits per weight, scales and zero points included, over all matrices: those that need it most get 8.
            None = all as ``form`` says.
        cache: The recipe of the cache that the layers have while they read, as the exported model will; None =
            unquantized.
        rotate: Turn the residual stream first, so that none of its channels is much larger than the others.
        norm_tweaking: Move each quantized layer's norms until its output is distributed as it was.

    Raises:
        SkvError: Values that make no sense.
    """

    method: str = "qep"
    form: Form = field(default_factory=Form)
    windows: int = 16
    window: int = 1024
    head_bits: int = 16
    budget: float | None = None
    cache: Recipe | None = None
    rotate: bool = False
    norm_tweaking: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SkvError("method", got=self.method, expected=" | ".join(METHODS))
        if self.form.bits not in (4, 8):
            raise SkvError("bits", got=self.form.bits, expected="4 or 8")
        if self.head_bits not in (8, 16):
            raise SkvError("head_bits", got=self.head_bits, expected="8 or 16")
        if self.form.group_size not in (16, 32, 64, 128):
            raise SkvError("group_size", got=self.form.group_size, expected="16, 32, 64 or 128")
        if self.budget is not None and not self.form.effective_bits <= self.budget < math.inf:
            raise SkvError(
                "weight_bits_budget",
                got=f"{self.budget:g} bits per weight",
                expected=f"at least {self.form.effective_bits:.3f}, {self.form.bits} bits in groups of "
                f"{self.form.group_size} with scales and zero points",
                fix="Raise it, or take larger groups (--group-size).",
            )
        most = replace(self.form, bits=8).effective_bits
        if self.budget is not None and self.budget > most:
            raise SkvError(
                "weight_bits_budget",
                got=f"{self.budget:g} bits per weight",
                expected=f"at most {most:.3f}, with which all matrices have 8 bits",
                fix="Lower it, or take --bits 8.",
            )


@dataclass(frozen=True)
class Quantized:
    """What was written.

    Attributes:
        matrices: Matrices in few bits.
        plain: Names of those that stay as they were, and why.
        nbytes: Bytes of all tensors.
        effective_bits: Per weight of these matrices in an export with 16 bits, scales and zero points included.
        wide: Names of the modules that got more bits than the others.
        kld: What rounding matrices alone does to the model's tokens, in nats; empty unless there is a budget.
    """

    matrices: int
    plain: dict[str, str]
    nbytes: int
    effective_bits: float
    wide: list[str]
    kld: dict[str, float]


def quantize(
    source: Source,
    text: str,
    out: Path,
    options: Options,
    *,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> Quantized:
    """Quantizes the matrices of a checkpoint's layers; embeddings, norms and the head stay as they are.

    In memory are a layer in float32, the embedding, the text's hidden states, and the second moments of what the
    layer's matrices read.

    Args:
        source: A float checkpoint.
        text: What the model reads.
        out: Folder to write; it appears complete or not at all.
        options: The method and its options.
        device: Where layers run.
        force: Replace ``out`` if it was written by this tool.
        progress: Told of each step.

    Raises:
        SkvError: The checkpoint can't be read or is quantized already; the text is too short; ``out`` can't be
            written; or what a layer reads is not finite.
    """
    check_target(out, force=force)
    tick = progress or (lambda *_: None)
    local = download(source)
    before = Snapshot.take(local)
    length = min(options.window, context_length(load_config(local)))
    windows = torch.from_numpy(cut_windows(load_tokenizer(local), text, options.windows, length))
    model = LayerByLayer(local, device, instead=_UNFITTED)
    if is_vision_language(model.config):
        raise SkvError(
            f"{source}: its weights fitted to a text",
            got=f"{model.config.model_type}, a vision-language checkpoint, whose images the text tower reads as well",
            expected="a model of text alone",
            fix=_UNFITTED,
        )
    held = [name for name in model.weights.held() if name.startswith(f"{model.path}.")]
    if held and local.kind != "gguf":
        got = f"{len(held)} quantized matrices, {held[0]} among them"
        raise SkvError(f"{source}: its weights are quantized already", got=got, fix="Export it as it is.")
    warn_of_rounding_again(source, held)
    if not any(True for _ in _matrices(model, options.form)):
        inside = (m for name, m in model.model.named_modules() if name.startswith(f"{model.path}."))
        linear = {m.in_features for m in inside if isinstance(m, torch.nn.Linear)}
        got = (
            f"matrices with {', '.join(map(str, sorted(linear)))} inputs" if linear else "no torch.nn.Linear (GPT-2's)"
        )
        raise SkvError(
            f"{source}: nothing to quantize",
            got=got,
            expected=f"linear layers whose inputs are groups of {options.form.group_size}",
            fix="Pass a smaller --group-size; `model --weights int4` rounds to the nearest, other matrices too.",
        )
    if options.rotate:
        rotate(model, windows[0])
    units: list[Unit] = []
    sizes = {name: module.weight.numel() for name, module in _matrices(model, options.form)}
    forms = dict.fromkeys(sizes, options.form)
    if options.budget is not None:

        def chosen(index: int, layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
            return _choose(model, index, layer, forms)

        units = measure(model, windows, options.form, chosen, tick)
        forms = allocate(units, options.form, options.budget)
    bits = sum(forms[name].effective_bits * size for name, size in sizes.items())
    size = _file_bytes(model, bits, sum(sizes.values()), options.rotate and options.head_bits == 16)
    with output_folder(out, size, force=force) as folder:
        write_tokenizer(local, folder)
        writer = CheckpointWriter(folder)
        plain: dict[str, str] = {}
        count = 0
        # Rounding asks for no text.
        states = model.embed(windows) if options.method != "rtn" or options.norm_tweaking else []
        exact = states if options.method == "qep" or options.norm_tweaking else []
        for index in model.layers:
            tick("quantizing layers", index, len(model.layers))
            with model.loaded(index) as layer:
                done, left, exact = _quantize_layer(model, index, layer, states, exact, options, forms)
                writer.add(_layer_tensors(model, index, layer, done))
                states = [model.run(index, hidden, _simulation(options)) for hidden in states]
            count += sum(name.endswith("weight_packed") for tensors in done.values() for name in tensors)
            plain |= left
        tick("quantizing layers", len(model.layers), len(model.layers))
        embeddings = _embeddings(model, options)
        writer.add(_outside(model, embeddings))
        about: dict[str, Any] = {"method": options.method, **asdict(options.form)}
        about |= {"windows": len(windows), "window": windows.shape[1]}
        if options.budget is not None:
            about["weight_bits_budget"] = options.budget
        about |= {name: True for name in ("rotate", "norm_tweaking") if getattr(options, name)}
        about["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        config = model.config.to_dict()
        config["architectures"] = [type(model.model).__name__]
        generation_config(local, model.config).save_pretrained(folder)
        kept = [name for name in _outside_modules(model) if name not in embeddings]
        writer.finish(config, {**forms, **embeddings}, [*plain, *kept], about)
        before.check()
        nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Quantized(
        count, plain, nbytes, bits / sum(sizes.values()),
        [name for name, form in forms.items() if form != options.form],
        {name: unit.kld for unit in units for name in unit.names},
    )  # fmt: skip


def _file_bytes(model: LayerByLayer, bits: float, elements: int, rotated: bool) -> int:
    """About what the files will take: so many bits of so many weights, and 16 for what is not quantized.

    Rotated embeddings are two matrices in float32.
    """
    every = sum(parameter.numel() for parameter in model.model.parameters())
    embedding: Any = model.model.get_input_embeddings()
    return math.ceil(bits / 8) + 2 * (every - elements) + (6 * embedding.weight.numel() if rotated else 0)


def _matrices(model: LayerByLayer, form: Form) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The modules whose matrices are quantized, by name."""
    for name, module in model.model.named_modules():
        inside = isinstance(module, torch.nn.Linear) and name.startswith(f"{model.path}.")
        if inside and module.in_features % form.group_size == 0:
            yield name, module


def _choose(
    model: LayerByLayer, index: int, layer: torch.nn.Module, forms: Mapping[str, Form]
) -> dict[str, torch.nn.Linear]:
    """The modules of a layer whose matrices are quantized, by their names in it."""
    return {name: module for name, module in layer.named_modules() if model.name(index, name) in forms}


def _simulation(options: Options) -> Simulation:
    return Simulation.full_precision() if options.cache is None else Simulation.of_recipe(options.cache)


def _quantize_layer(
    model: LayerByLayer,
    index: int,
    layer: torch.nn.Module,
    states: list[Tensor],
    exact: list[Tensor],
    options: Options,
    forms: Mapping[str, Form],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str], list[Tensor]]:
    """Puts each matrix's quantized form in its place.

    Returns:
        The packed tensors by the names of the parameters; the matrices that stay as they are with the reason; and what
        the next layer reads in the unquantized model, if ``exact`` is what this one does.
    """
    chosen = _choose(model, index, layer, forms)
    plain = {
        model.name(index, name): f"{module.in_features} inputs are no multiple of {options.form.group_size}"
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in chosen
    }
    own = {name: forms[model.name(index, name)] for name in chosen}
    fitted: dict[str, tuple[Tensor, Grid]] = {}
    norms: dict[str, Tensor] = {}
    runs = [run_exactly(model, index, chosen, hidden) for hidden in exact]
    exact = [run.out for run in runs]
    if options.method == "qep":
        fitted = fit_layer(model, index, chosen, runs, states, _simulation(options), own)
    elif options.method == "rtn":
        for name, module in chosen.items():
            grid = fit_grid(module.weight.data, own[name])
            fitted[name] = grid.codes(module.weight.data), grid
    else:
        moments = _moments(model, index, chosen, states, options)
        for name in chosen:
            if not moments[name].isfinite().all():
                whole = model.name(index, f"{name}.weight")
                raise SkvError(f"{whole}: what it reads is not finite", fix="Check the checkpoint with `quality`.")
        if options.method == "awq":
            norms = scale_inputs(model, index, layer, chosen, states[0], moments, own)
        for name, module in chosen.items():
            weight = module.weight.data
            grid = fit_grid(weight, own[name], moments[name].diagonal())
            fitted[name] = (grid.codes(weight) if options.method == "awq" else gptq(weight, moments[name], grid)), grid
    done = {model.name(index, name): {model.name(index, name): tensor} for name, tensor in norms.items()}
    for name, (codes, grid) in fitted.items():
        whole = model.name(index, f"{name}.weight")
        chosen[name].weight.data = grid.values(codes)
        done[whole] = packed(whole, codes, grid)
    if options.norm_tweaking:
        norms = tweak(model, index, layer, states, exact, _simulation(options))
        done |= {model.name(index, name): {model.name(index, name): tensor} for name, tensor in norms.items()}
    return done, plain, exact


def _moments(
    model: LayerByLayer, index: int, chosen: dict[str, torch.nn.Linear], states: list[Tensor], options: Options
) -> dict[str, Tensor]:
    """Sums of ``x x^T`` over what each matrix reads; matrices that read the same tensor share one."""
    sums: dict[str, Tensor] = {}
    shared = SharedInputs()
    for hidden in states:
        share = _importance(model, index, hidden, options).sqrt()[:, None] if options.method == "rsq" else None
        with reading(chosen) as read:
            model.run(index, hidden, _simulation(options))
        for name, rows in shared.distinct(read):
            weighted = rows if share is None or len(rows) != len(share) else rows * share
            sums[name] = sums.get(name, 0) + weighted.T @ weighted
    return shared.of_each(sums, chosen)


def _importance(model: LayerByLayer, index: int, hidden: Tensor, options: Options) -> Tensor:
    """How much each token of a window is read by the layer's attention, ``[S]``."""
    seen: list[Tensor] = []

    def observe(_: int, tensors: tuple[Tensor, Tensor, Tensor], attention: AttentionOptions, __: Tensor) -> None:
        seen.append(token_importance(tensors[0], tensors[1], attention))

    simulation = _simulation(options)
    simulation.observer = observe
    model.run(index, hidden, simulation)
    return seen[0]


def _layer_tensors(
    model: LayerByLayer, index: int, layer: torch.nn.Module, done: dict[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """A layer's tensors as the file gets them."""
    tensors: dict[str, Tensor] = {}
    for inner in layer.state_dict():
        name = model.name(index, inner)
        tensors |= done[name] if name in done else {name: model.weights.tensor(name).clone()}
    return tensors


def _embeddings(model: LayerByLayer, options: Options) -> dict[str, Form]:
    """The embeddings that are rounded, by the names of their modules; tied ones under the name that the file has."""
    if options.head_bits == 16:
        return {}
    form = replace(options.form, bits=options.head_bits)
    inner, outer = model.model.get_input_embeddings(), model.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = {}
    for name, module in model.model.named_modules():
        whole = f"{name}.weight"
        stored = module in (inner, outer) and whole in model.weights and model.weights.canonical(whole) == whole
        if stored and module.weight.shape[1] % form.group_size == 0:
            found[name] = form
    return found


def _outside(model: LayerByLayer, embeddings: Mapping[str, Form]) -> dict[str, Tensor]:
    """The tensors of no layer, in the file's number formats; tied ones once."""
    names = [name for name in model.model.state_dict() if not name.startswith(f"{model.path}.")]
    tensors: dict[str, Tensor] = {}
    for name in names:
        if model.weights.canonical(name) != name:
            continue
        if form := embeddings.get(name.removesuffix(".weight")):
            weight = model.weights.tensor(name).float()
            grid = fit_grid(weight, form)
            tensors |= packed(name, grid.codes(weight), grid)
        else:
            tensors[name] = model.weights.tensor(name).clone()
    return tensors


def _outside_modules(model: LayerByLayer) -> list[str]:
    return [
        name
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.startswith(f"{model.path}.")
    ]
