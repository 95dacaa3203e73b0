"""Weights and caches compared in the same bytes: what a gigabyte is better spent on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from skv_export.calibration.file import fingerprint
from skv_export.checkpoints.checkpoint import Source, resolve
from skv_export.checkpoints.pretrained import Placement, download
from skv_export.errors import SkvError
from skv_export.evaluation import comparison
from skv_export.evaluation.candidates import ON
from skv_export.evaluation.comparison import BITS_CONTEXT, ComparisonResult
from skv_export.export.pipeline import plan
from skv_export.spec.recipe import Recipe


@dataclass(frozen=True)
class Form:
    """A form of a model's weights.

    Attributes:
        label: The folder's or file's name.
        digest: Identifies the weights.
        model: With simulated attention.
        nbytes: Of the weights in an export with fp16.
    """

    label: str
    digest: str
    model: PreTrainedModel
    nbytes: int


def load_forms(source: Source, model: PreTrainedModel, names: str | None, placement: Placement) -> list[Form]:
    """Loads the other forms of a checkpoint's weights.

    Args:
        source: The checkpoint that they are compared with.
        model: Its model.
        names: Folders or files, separated by commas.
        placement: Where they run.

    Raises:
        SkvError: One can't be read, or is of another architecture or vocabulary.
    """
    forms: list[Form] = []
    for name in filter(None, (part.strip() for part in (names or "").split(","))):
        other = resolve(name)
        loaded, _ = comparison.load(other, placement)
        ours, theirs = ((m.config.model_type, m.config.vocab_size, m.config.num_hidden_layers) for m in (model, loaded))
        if ours != theirs:
            expected = f"{ours[0]} with {ours[1]} tokens and {ours[2]} layers, as {source} is"
            got = f"{theirs[0]} with {theirs[1]} tokens and {theirs[2]} layers"
            raise SkvError(f"--weights: {name}: not a form of the same model", got=got, expected=expected)
        forms.append(Form(_label(other), fingerprint(download(other)), loaded, weight_bytes(other)))
    labels = [form.label for form in forms]
    if len(set(labels)) < len(labels):
        raise SkvError("--weights", got=", ".join(labels), expected="folders with different names")
    return forms


def _label(source: Source) -> str:
    if source.gguf_file or source.path is None:
        return source.gguf_file or str(source.repo_id)
    return source.path.resolve().name


def weight_bytes(source: Source) -> int:
    """Bytes of the weights in an export with fp16, quantized ones as they come."""
    return plan(source, Recipe().with_options(dtype="fp16")).weight_bytes


def bytes_table(source: Source, forms: Sequence[Form], result: ComparisonResult, context: int = BITS_CONTEXT) -> str:
    """A line per row with the bytes of weights and cache, fewest first; ``*`` marks the Pareto front.

    Args:
        source: The checkpoint.
        forms: The other forms of its weights.
        result: Of all caches on all forms.
        context: Tokens of one sequence.
    """
    planned = plan(source, Recipe().with_options(dtype="fp16"))
    sizes = {form.label: form.nbytes for form in forms}
    elements = sum(  # as effective bits count them: a sliding window holds no more than it sees
        2
        * layer.params.kv_num_heads
        * layer.layouts[0].head_dim
        * min(context, layer.params.local_window_size or context)
        for layer in planned.layers
    )
    rows = []
    for row in result.rows:
        _, _, label = row.name.partition(ON)
        cache = elements * row.effective_bits / 8
        weights = sizes.get(label, planned.weight_bytes)
        rows.append((weights + cache, weights, cache, row))
    width = max(len(row.name) for row in result.rows)
    lines = [
        f"Bytes with one sequence of {context:,} tokens, weights that are not quantized in fp16:",
        f"  {'':{width}}  {'weights':>9}  {'cache':>9}  {'both MiB':>9}  {'KLD mean':>8}  {'perplexity':>10}",
    ]
    best = float("inf")
    for total, weights, cache, row in sorted(rows, key=lambda entry: (entry[0], entry[3].kld_mean)):
        mark, best = ("*" if row.kld_mean < best else " "), min(best, row.kld_mean)
        sizes_text = "  ".join(f"{size / 2**20:9,.1f}" for size in (weights, cache, total))
        lines.append(f"{mark} {row.name:{width}}  {sizes_text}  {row.kld_mean:8.5f}  {row.ppl_change_percent:+9.2f}%")
    return "\n".join(lines)
