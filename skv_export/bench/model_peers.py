"""Whole models in the runtimes that a user would pick instead, each timed in a process of its own.

A candidate is ``NAME=PATH``: a name of ``PEERS``, and the file or folder that it runs. Its package must be installed.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skv_export.bench.noise import CLOCKS
from skv_export.errors import SkvError
from skv_export.model_folder.names import GENAI_CONFIG_FILE, SKV_CONFIG_FILE
from skv_export.paths import to_path


@dataclass(frozen=True)
class Run:
    """One process's measurement.

    Attributes:
        prefill_seconds: From the prompt to its logits, by the clock that was asked for, as is ``decode_ms``.
        decode_ms: Milliseconds of each decode step.
        peak_bytes: Peak resident memory of the process, weights and imports included.
    """

    prefill_seconds: float
    decode_ms: tuple[float, ...]
    peak_bytes: int


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        name: A key of ``PEERS``.
        path: The file or folder it runs.
        context: Tokens of the prompt.
        threads: 0 = the runtime's choice.
        steps: Decode steps that are timed.
        clock: A key of ``noise.CLOCKS``.
    """

    name: str
    path: str
    context: int
    threads: int
    steps: int
    clock: str

    @property
    def capacity(self) -> int:
        """Tokens of the cache: the prompt, the first step, which is not timed, the others, and one more."""
        return self.context + self.steps + 2

    def prompt(self, vocab_size: int) -> list[int]:
        """Random tokens, the same for all runtimes of a model."""
        return np.random.default_rng(0).integers(0, vocab_size, self.context).tolist()


@dataclass(frozen=True)
class Peer:
    """A runtime and its cache.

    Attributes:
        measure: Loads what the job names, and measures.
        package: What it needs, as pip names it.
        module: The same, as Python does.
        cache: Of which type its cache is, as the runtime calls it; "" = the runtime's choice.
    """

    measure: Callable[[Job, str], Run]
    package: str = ""
    module: str = ""
    cache: str = ""


def parse(text: str) -> tuple[str, Path]:
    """Reads a candidate: ``NAME=PATH``, or a path alone, whose content tells the name.

    Raises:
        SkvError: An unknown name, a path that does not exist, a content that no name goes with, a package is missing.
    """
    name, separator, rest = text.partition("=")
    if not separator or (name not in PEERS and to_path(text, "--against").exists()):
        name, rest = "", text
    path = to_path(rest, "--against")
    if not path.exists():
        raise SkvError("bench: what to time", got=text, expected="a file or folder that exists, or NAME=PATH with one")
    if not name:
        name = _told_by(path)
    if name not in PEERS:
        raise SkvError("bench: the name of a runtime", got=name, expected=", ".join(PEERS))
    if PEERS[name].module and importlib.util.find_spec(PEERS[name].module) is None:
        raise SkvError(f"bench: {name} is not installed", got=text, fix=f"pip install {PEERS[name].package}")
    return name, path


def _told_by(path: Path) -> str:
    if path.suffix == ".gguf":
        return "llama.cpp"
    for file, name in ((SKV_CONFIG_FILE, "skv"), (GENAI_CONFIG_FILE, "genai"), ("config.json", "transformers")):
        if (path / file).is_file():
            return name
    raise SkvError(
        "bench: what runs it",
        got=str(path),
        expected="an exported folder, a checkpoint or a GGUF file",
        fix="NAME=PATH",
    )


def measure(job: Job) -> Run:
    """Runs one measurement in this process."""
    peer = PEERS[job.name]
    return peer.measure(job, peer.cache)


def _timed(job: Job, prefill: Callable[[], object], step: Callable[[], object]) -> Run:
    now = CLOCKS[job.clock]
    ends = [now()]
    for call in (prefill, *(step,) * (1 + job.steps)):
        call()
        ends.append(now())
    return _run(ends)


def _run(ends: list[float]) -> Run:
    """From the times at which the prompt began, it ended, and each step ended, of which the first is left out.

    It sizes the runtime's buffers for a single token.
    """
    prefill, _, *steps = np.diff(ends).tolist()
    return Run(prefill, tuple(1e3 * seconds for seconds in steps), _peak_bytes())


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    if found is None:
        raise SkvError("bench: peak memory", got="no VmHWM in /proc/self/status", fix="Measure on Linux.")
    return int(found[1]) * 1024


def _skv(job: Job, _: str) -> Run:
    from skv_export.runtime.session import Session

    session = Session(job.path, num_threads=job.threads)
    cache = session.cache(1, job.capacity)
    pending: Any = job.prompt(session.config.vocab_size)

    def call() -> None:
        nonlocal pending
        pending = [session.run([pending], None, None, cache)[0, -1].argmax()]

    return _timed(job, call, call)


def _genai(job: Job, _: str) -> Run:
    import onnxruntime_genai as og

    config = og.Config(job.path)
    if job.threads:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": job.threads}}}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=job.capacity, do_sample=False)
    generator = og.Generator(model, params)
    known = json.loads((Path(job.path) / GENAI_CONFIG_FILE).read_text(encoding="utf-8"))
    tokens = np.array(job.prompt(known["model"]["vocab_size"]), np.int32)

    def prefill() -> None:
        generator.append_tokens(tokens)
        generator.generate_next_token()

    return _timed(job, prefill, generator.generate_next_token)


def _llama_cpp(job: Job, cache: str) -> Run:
    import llama_cpp

    kind = getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}")
    llama = llama_cpp.Llama(
        job.path, n_ctx=job.capacity, n_batch=512, type_k=kind, type_v=kind, flash_attn=True,
        n_threads=job.threads or None, n_threads_batch=job.threads or None, n_gpu_layers=0, verbose=False,
    )  # fmt: skip
    tokens = job.prompt(llama.n_vocab())
    return _timed(job, lambda: llama.eval(tokens), lambda: llama.eval(tokens[:1]))


def _openvino(job: Job, cache: str) -> Run:
    import openvino
    import openvino_genai

    keys, _, values = cache.partition("/")
    properties: dict[str, Any] = {"KEY_CACHE_PRECISION": keys, "VALUE_CACHE_PRECISION": values or keys}
    if job.threads:
        properties["INFERENCE_NUM_THREADS"] = job.threads
    pipeline = openvino_genai.LLMPipeline(job.path, "CPU", **properties)
    vocab_size = len(pipeline.get_tokenizer().get_vocab())
    tokens = openvino.Tensor(np.array([job.prompt(vocab_size)], np.int64))
    now, ends = CLOCKS[job.clock], list[float]()

    class Clock(openvino_genai.StreamerBase):  # type: ignore[misc] # untyped
        """Takes the time of each token."""

        def write(self, token: int | list[int]) -> Any:
            ends.extend([now()] * (len(token) if isinstance(token, list) else 1))
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Nothing was kept back."""

    greedy = openvino_genai.GenerationConfig(max_new_tokens=job.steps + 2, ignore_eos=True, do_sample=False)
    ends.append(now())
    pipeline.generate(tokens, greedy, Clock())
    return _run(ends)


def _transformers(job: Job, cache: str) -> Run:
    import torch
    import transformers

    if job.threads:
        torch.set_num_threads(job.threads)
    path = Path(job.path)
    place, more = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **more)
    backend, _, bits = cache.partition("-")
    axis = 1 if backend == "hqq" else 0
    held: Any = transformers.DynamicCache(config=model.config)
    if bits:
        held = transformers.QuantizedCache(
            backend=backend, config=model.config, nbits=int(bits), axis_key=axis, axis_value=axis
        )
    pending = torch.tensor([job.prompt(model.config.get_text_config().vocab_size)])

    def call() -> None:
        nonlocal pending
        with torch.inference_mode():
            out = model(pending, past_key_values=held, use_cache=True, logits_to_keep=1)
        pending = out.logits[:, -1:].argmax(-1)

    return _timed(job, call, call)


_LLAMA = "llama-cpp-python", "llama_cpp"
_OPENVINO = "openvino-genai", "openvino_genai"
PEERS = {
    "skv": Peer(_skv),
    "genai": Peer(_genai, "onnxruntime-genai", "onnxruntime_genai"),
    "llama.cpp": Peer(_llama_cpp, *_LLAMA, "f16"),
    "llama.cpp-q8_0": Peer(_llama_cpp, *_LLAMA, "q8_0"),
    "llama.cpp-q4_0": Peer(_llama_cpp, *_LLAMA, "q4_0"),
    "openvino": Peer(_openvino, *_OPENVINO, "f16"),
    "openvino-u8": Peer(_openvino, *_OPENVINO, "u8"),
    "openvino-u8-u4": Peer(_openvino, *_OPENVINO, "u8/u4"),
    "transformers": Peer(_transformers, "torch", "torch"),
    "transformers-quanto-4": Peer(_transformers, "optimum-quanto", "optimum.quanto", "quanto-4"),
    "transformers-hqq-4": Peer(_transformers, "hqq", "hqq", "hqq-4"),
}
"""By name: exported folders, those of onnxruntime-genai's builder, GGUF files in llama.cpp (flash attention) and in
OpenVINO GenAI (paged attention; its own folders, too), checkpoints in transformers."""
