"""What can be exported? Writes docs/tested.md: every causal language model of transformers, and kinds of files.

    python benchmarks/tested.py                  # all of it, about half an hour of one core
    python benchmarks/tested.py llama falcon     # these architectures, to standard output
    python benchmarks/tested.py --state tested.jsonl --minutes 8     # in parts; the page says what has not been run

Each architecture gets a tiny model (its default configuration scaled down, random weights, fixed seed), which is
exported without quantization (K16V16) and with the default recipe (K4V2). Both exports decode the same tokens, a prompt
and then one by one, and their logits are compared with those of transformers' own forward pass. An architecture is a
process of its own with a time limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "support"))

from source_graphs import VOCAB, SourceGraph, run_source  # noqa: E402
from tiny_models import HYBRID, TINY, save_random, small_config, tiny_config  # noqa: E402

from skv_export.errors import SkvError  # noqa: E402
from skv_export.evaluation.finished_steps import FinishedSteps  # noqa: E402
from skv_export.spec.recipe import Recipe  # noqa: E402

PAGE = ROOT / "docs" / "tested.md"
TOLERANCE = 1e-3
"""Of K16V16, as the tests have it: logits are of size 1 to 10, and only the order of additions differs."""
TIMEOUT = 600
"""Seconds for one line; it takes about ten, and much more on a busy machine."""
PROMPT, TOKENS = 20, 60
NOT_RUN = "not run yet"
MOST_PARAMETERS = 100_000_000
"""Of a tiny model: configurations of several parts can't all be scaled down by the names that they share."""
EXACT = Recipe().with_options(
    k_bits=16, v_bits=16, tile_tokens=32, recent_tokens=8, num_sink_tokens=2, recent_type="float"
)
RECIPES = (EXACT, Recipe())
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Those that the gguf package can write."""
ONNX_KINDS = {
    "GroupQueryAttention": SourceGraph(rotary=32),
    "GroupQueryAttention, packed": SourceGraph(packed=True, rotary=32),
    "GroupQueryAttention, softcap and window": SourceGraph(attributes={"softcap": 2.0, "local_window_size": 40}),
    "Attention (opset 23)": SourceGraph("attention"),
    "Attention, mask as an input": SourceGraph("attention", mask="bool"),
    "Attention after a Concat of the past": SourceGraph("attention", mask="float", heads_first=True, concat="repeated"),
}


@dataclass(frozen=True)
class Row:
    """One line of the page.

    Attributes:
        name: The architecture, or the kind of file.
        verdict: ``exact``, or why not.
        differences: Largest differences of logits to PyTorch, with K16V16 and with K4V2; empty if not exported.
        size: Largest logit.
    """

    name: str
    verdict: str
    differences: tuple[float, ...] = ()
    size: float = 0.0

    @classmethod
    def of(cls, name: str, expected: Any, got: list[Any]) -> Row:
        """Returns the line of an export's logits beside the expected ones."""
        differences = tuple(float(np.abs(x - expected).max()) for x in got)
        verdict = "exact" if differences[0] <= TOLERANCE else "**differs**"
        return cls(name, verdict, differences, float(np.abs(expected).max()))

    def markdown(self) -> str:
        """Returns the line as Markdown."""
        exact, quantized = (f"{x:.0e}" for x in self.differences) if self.differences else ("", "")
        size = f"{self.size:.1f}" if self.size else ""
        return f"| {self.name} | {self.verdict} | {exact} | {quantized} | {size} |"


def architecture(folder: Path, model_type: str) -> Row:
    """Exports a tiny model of an architecture and compares it with PyTorch."""
    try:
        given = HYBRID.get(model_type, TINY.get(model_type))
        config = small_config(model_type) if given is None else tiny_config(model_type, **given)
    except Exception as error:  # noqa: BLE001  configurations check themselves in ways of their own
        untried = Row(model_type, f"not tried: no tiny configuration ({_line(error)})")
        return _refused_by_default(model_type) or untried
    return _compare(model_type, config, folder)


def _refused_by_default(model_type: str) -> Row | None:
    """The line of an architecture whose default configuration is refused already."""
    from transformers import AutoConfig

    from skv_export.export.supported import check_config

    try:
        check_config(AutoConfig.for_model(model_type))
    except SkvError as refusal:
        return Row(model_type, f"refused: {_line(refusal)}")
    except Exception:  # noqa: BLE001  it is no valid one either
        return None
    return None


def _compare(name: str, config: Any, folder: Path) -> Row:
    from skv_export.export.pipeline import plan
    from skv_export.export.supported import check_config

    try:
        check_config(config)
    except SkvError as error:
        return Row(name, f"refused: {_line(error)}")
    try:
        if (count := _parameters(config)) > MOST_PARAMETERS:
            return Row(name, f"not tried: the tiny configuration has {count / 1e6:,.0f} million parameters")
        checkpoint = save_random(folder / "checkpoint", config)
        expected = _torch_logits(checkpoint)
    except Exception as error:  # noqa: BLE001  whatever transformers does to a tiny model is no fault of the export
        return Row(name, f"not tried: the tiny model does not run in transformers ({_line(error)})")
    try:
        plan(checkpoint, EXACT)
    except SkvError as error:
        return Row(name, f"refused: {_line(error)}")
    return _export(name, checkpoint, expected, folder, lambda: _precise_logits(checkpoint))


def _parameters(config: Any) -> int:
    """Counts a model's parameters without memory for them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _export(name: str, source: Path, expected: Any, folder: Path, precise: Callable[[], Any] | None = None) -> Row:
    """The line of a file; where float32 itself is as far off, ``precise`` gives the yardstick."""
    from skv_export.export.pipeline import export_model

    try:
        outs = [
            export_model(source, out=folder / f"out{i}", recipe=recipe, progress=_quiet)
            for i, recipe in enumerate(RECIPES)
        ]
        got = [_decode(out, _ids()[0].tolist()) for out in outs]
        row = Row.of(name, expected, got)
        if precise is None or row.verdict == "exact" or np.abs((better := precise()) - expected).max() < TOLERANCE / 4:
            return row
        return Row.of(name, better, got)
    except SkvError as error:
        return Row(name, f"refused: {_line(error)}")
    except Exception as error:  # noqa: BLE001  the page has to say so, and go on with the next
        return Row(name, f"**failed**: {_line(error)}")


def safetensors(folder: Path, *, shard: str = "5GB", dtype: str = "float32") -> Row:
    """A tiny llama in safetensors files of at most ``shard``."""
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = save_random(folder / "whole", tiny_config("llama"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    model.save_pretrained(folder / "checkpoint", max_shard_size=shard)
    files = len(list((folder / "checkpoint").glob("*.safetensors")))
    name = f"safetensors, {dtype}" + (f", {files} shards" if files > 1 else "")
    return _export(name, folder / "checkpoint", _torch_logits(folder / "checkpoint"), folder)


def gguf(folder: Path, kind: str) -> Row:
    """A tiny llama's GGUF file with its matrices in one type."""
    from transformers import AutoModelForCausalLM

    file = _write_gguf(folder / "checkpoint" / "model.gguf", kind)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    return _export(f"GGUF, {kind}", file, _logits(model), folder)


def _write_gguf(file: Path, kind: str) -> Path:
    import gguf

    rng = np.random.default_rng(0)
    hidden, inner, heads, kv_heads, head_dim, vocab = 128, 128, 4, 2, 32, 320
    file.parent.mkdir(parents=True)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *(f"x{i}" for i in range(vocab - 3))])
    writer.add_token_merges(["a b"])
    shapes = {"token_embd": (vocab, hidden), "output": (vocab, hidden)}
    for i in range(2):
        sizes = {"attn_q": (heads * head_dim, hidden), "attn_output": (hidden, heads * head_dim)}
        sizes |= dict.fromkeys(("attn_k", "attn_v"), (kv_heads * head_dim, hidden))
        sizes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in sizes.items()}
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", (1 + rng.standard_normal(hidden) / 8).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    stored = gguf.GGMLQuantizationType[kind]
    for name, shape in shapes.items():
        values = (rng.standard_normal(shape) * 2 / shape[1] ** 0.5).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def onnx_graph(folder: Path, kind: str) -> Row:
    """Another exporter's graph, rewritten; beside the graph itself in ONNX Runtime."""
    from skv_export.rewrite.pipeline import rewrite_model

    source = ONNX_KINDS[kind].write(folder / "source")
    tokens = [int(t) for t in np.random.default_rng(3).integers(3, VOCAB, TOKENS)]
    expected = run_source(source, tokens, [PROMPT, *[1] * (TOKENS - PROMPT)])[PROMPT - 1 :]
    outs = [rewrite_model(source, out=folder / f"out{i}", recipe=recipe) for i, recipe in enumerate(RECIPES)]
    return Row.of(f"ONNX, {kind}", expected, [_decode(out, tokens) for out in outs])


def _ids() -> Any:
    import torch

    return torch.randint(3, 320, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def _torch_logits(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return _logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager"))


def _precise_logits(checkpoint: Path) -> Any:
    """The same in float64, experts included."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, attn_implementation="eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return _logits(model)


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(_ids()).logits[0, PROMPT - 1 :].float().numpy()


def _decode(folder: Path, tokens: list[int]) -> Any:
    from skv_export.runtime.session import Session

    session = Session(folder)
    cache = session.cache(1, TOKENS)
    rows = [session.run([tokens[:PROMPT]], None, None, cache)[0, -1]]
    rows += [session.run([[token]], None, None, cache)[0, -1] for token in tokens[PROMPT:]]
    return np.stack(rows)


def _quiet(phase: str, fraction: float) -> None:
    """No progress bar."""


def _line(error: BaseException) -> str:
    """The reason in one line of a table."""
    text = re.sub(r"^\S+: can't be exported: ", "", str(error))
    text = re.sub(
        r"(; expected a decoder such as |\. This architecture can't be exported).*$", "", text, flags=re.DOTALL
    )
    text = re.sub(r"\s+", " ", text).replace("|", "/").strip()
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _guarded(pipe: Any, call: Callable[..., Row], arguments: tuple[Any, ...]) -> None:
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, pipe:
        pipe.send(call(Path(folder), *arguments))


class Job:
    """A call in a process of its own.

    Args:
        name: Of the line, if there is no answer.
        call: Returns the line; given an empty folder and ``arguments``.
        arguments: Further ones.
    """

    def __init__(self, name: str, call: Callable[..., Row], *arguments: Any) -> None:
        self._name = name
        self.answer, there = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self._child = context.Process(target=_guarded, args=(there, call, arguments))
        self._child.start()
        self.deadline = time.monotonic() + TIMEOUT
        there.close()

    def row(self) -> Row:
        """Waits, and returns the line, or what became of it."""
        try:
            answered = self.answer.poll(max(0.0, self.deadline - time.monotonic()))
            return self.answer.recv() if answered else Row(self._name, f"**no answer** in {TIMEOUT} s")
        except EOFError:
            return Row(self._name, "**crashed**")
        finally:
            self._child.terminate()
            self._child.join()


def run(name: str, call: Callable[..., Row], *arguments: Any) -> Row:
    """Returns the line that ``call`` gives in a process of its own."""
    return Job(name, call, *arguments).row()


def model_types() -> list[str]:
    """Every architecture that transformers has a causal language model of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def file_kinds() -> Iterator[tuple[Any, ...]]:
    """What ``run`` takes, for each kind of file."""
    yield "safetensors", safetensors
    yield "safetensors, bfloat16", _bfloat16
    yield "safetensors, shards", _sharded
    for kind in GGUF_TYPES:
        yield f"GGUF, {kind}", gguf, kind
    for kind in ONNX_KINDS:
        yield f"ONNX, {kind}", onnx_graph, kind


def _run_all(calls: Iterable[tuple[Any, ...]], done: FinishedSteps, limit: float = float("inf")) -> list[Row]:
    """Runs a call on each core at a time; the lines come in the calls' order.

    Args:
        calls: What ``run`` takes.
        done: Lines that need not be run again, by name.
        limit: Of the monotonic clock; no call begins after it, and its line says so.
    """
    running: dict[str, Job] = {}
    names = []

    def finish(most: int) -> None:
        while len(running) > most:
            patience = min(job.deadline for job in running.values()) - time.monotonic()
            ready = multiprocessing.connection.wait([job.answer for job in running.values()], max(0.0, patience))
            for name, job in list(running.items()):
                if job.answer in ready or job.deadline < time.monotonic():
                    row = running.pop(name).row()
                    done.save(name, dataclasses.asdict(row))
                    print(row.markdown(), flush=True)

    for name, *call in calls:
        names.append(name)
        if name not in done and time.monotonic() < limit:
            finish((os.cpu_count() or 1) - 1)
            running[name] = Job(name, *call)
    finish(0)
    return [Row(**done[name]) if name in done else Row(name, NOT_RUN) for name in names]


def _bfloat16(folder: Path) -> Row:
    return safetensors(folder, dtype="bfloat16")


def _sharded(folder: Path) -> Row:
    return safetensors(folder, shard="150KB")


def page(architectures: list[Row], files: list[Row]) -> str:
    """Returns docs/tested.md."""
    import transformers

    head = "| | verdict | K16V16 | K4V2 | largest logit |\n|---|---|---|---|---|\n"
    count = sum(row.verdict == "exact" for row in architectures)
    ran = sum(row.verdict != NOT_RUN for row in architectures)
    of_them = f"{ran} of the {len(architectures)} causal language models of transformers were run; {count} of these"
    if ran == len(architectures):
        of_them = f"{count} of the {ran} causal language models of transformers"
    return f"""# What was tested

Made by `python benchmarks/tested.py` with transformers {transformers.__version__}. Each line is a tiny model
with random weights: exported, run for {TOKENS} tokens (a prompt of {PROMPT}, then one by one), and its logits
compared with those of transformers' own forward pass. The columns are the largest difference without
quantization (K16V16) and with the default recipe (K4V2). *Exact* means at most {TOLERANCE:g} without quantization;
where transformers' float32 is itself a quarter of that off its float64, the latter is the yardstick. Random weights
say nothing about quality, only that the cache is read as it was written. *Refused* gives the reason that
`skv-export model` gives.

## Architectures

{of_them} export exactly.

{head}{_table(architectures)}
## Files

Models in other files are compared with the same file in transformers, ONNX models with their source in ONNX Runtime.

{head}{_table(files)}"""


def _table(rows: list[Row]) -> str:
    ranked = sorted(rows, key=lambda row: (row.verdict == NOT_RUN, row.verdict != "exact"))
    return "".join(f"{row.markdown()}\n" for row in ranked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="ARCHITECTURE")
    parser.add_argument("--state", type=Path, help="keep finished lines here; go on from them")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many minutes")
    given = parser.parse_args()
    import torch
    import transformers

    import skv_export.export.pipeline  # noqa: F401  loaded once, for all the processes that are forked

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    done, limit = FinishedSteps(given.state, transformers.__version__), time.monotonic() + 60 * given.minutes
    rows = _run_all(((name, architecture, name) for name in given.model_types or model_types()), done, limit)
    if not given.model_types:
        PAGE.write_text(page(rows, _run_all(file_kinds(), done, limit)), encoding="utf-8")


if __name__ == "__main__":
    main()
