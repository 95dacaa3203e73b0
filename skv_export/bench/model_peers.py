"""Whole models in the runtimes that a user would pick instead, each timed in a process of its own.

A candidate is ``NAME=PATH``: a name of ``PEERS``, and the file or folder that it runs. Its package must be installed.
Sequences that decode together are a batch in each runtime's own way: a call takes a token of each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
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
        prefill_seconds: From the prompts to all their logits, by the clock that was asked for, as is ``decode_ms``.
        decode_ms: Milliseconds of each decode step, which takes a token of each sequence.
        peak_bytes: Peak resident memory of the process, weights and imports included.
        tokens: Of each sequence, what its prompt and each step gave; the first step, which is not timed, too.
    """

    prefill_seconds: float
    decode_ms: tuple[float, ...]
    peak_bytes: int
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        name: A key of ``PEERS``.
        path: The file or folder it runs.
        context: Tokens of each prompt.
        threads: 0 = the runtime's choice.
        steps: Decode steps that are timed.
        clock: A key of ``noise.CLOCKS``.
        sequences: That decode together, each with a prompt of its own.
    """

    name: str
    path: str
    context: int
    threads: int
    steps: int
    clock: str
    sequences: int = 1

    @property
    def capacity(self) -> int:
        """Tokens of a sequence in the cache: its prompt, the first step, which is not timed, the others, and one."""
        return self.context + self.steps + 2

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random tokens, other ones for each sequence, so that none begins alike; the same for all runtimes.

        They are of the vocabulary's middle: its ends have the special tokens, of which genai takes padding for what it
        is wherever it stands.
        """
        low, high = vocab_size // 4, 3 * vocab_size // 4
        random = map(np.random.default_rng, range(self.sequences))
        return [each.integers(low, high, self.context).tolist() for each in random]


@dataclass(frozen=True)
class Peer:
    """A runtime and its cache.

    Attributes:
        measure: Loads what the job names, and measures.
        package: What it needs, as pip names it.
        module: The same, as Python does.
        cache: Of which type its cache is, as the runtime calls it; "" = the runtime's choice.
        max_sequences: That it decodes together; None = as many as fit into the memory.
    """

    measure: Callable[[Job, str], Run]
    package: str = ""
    module: str = ""
    cache: str = ""
    max_sequences: int | None = None


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


def check_sequences(name: str, count: int) -> None:
    """Refuses what a runtime can't decode together.

    Raises:
        SkvError: More sequences than it takes; the message names the runtimes that can.
    """
    able = [peer for peer, found in PEERS.items() if found.max_sequences is None or count <= found.max_sequences]
    if name not in able:
        raise SkvError(
            f"bench: sequences that {name} decodes together",
            got=count,
            expected=f"at most {PEERS[name].max_sequences}",
            fix=f"Fewer, or one of {', '.join(able)}.",
        )


def measure(job: Job) -> Run:
    """Runs one measurement in this process."""
    peer = PEERS[job.name]
    return peer.measure(job, peer.cache)


Call = Callable[[], Sequence[int]]
"""Runs the prompts, or a step; returns the most likely next token of each sequence."""


def _timed(job: Job, prefill: Call, step: Call) -> Run:
    now = CLOCKS[job.clock]
    ends, calls = [now()], list[Sequence[int]]()
    for call in (prefill, *(step,) * (1 + job.steps)):
        calls.append(call())
        ends.append(now())
    if any(len(tokens) != job.sequences for tokens in calls):
        raise SkvError(f"bench: tokens of a step of {job.name}", got=list(map(len, calls)), expected=job.sequences)
    return _run(ends, calls)


def _run(ends: Sequence[float], calls: Sequence[Sequence[int]]) -> Run:
    """From the times at which the prompts began, they ended, and each step ended, of which the first is left out.

    It sizes the runtime's buffers for a single token.
    """
    prefill, _, *steps = np.diff(ends).tolist()
    tokens = tuple(tuple(map(int, each)) for each in zip(*calls, strict=True))
    return Run(prefill, tuple(1e3 * seconds for seconds in steps), _peak_bytes(), tokens)


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    if found is None:
        raise SkvError("bench: peak memory", got="no VmHWM in /proc/self/status", fix="Measure on Linux.")
    return int(found[1]) * 1024


def _skv(job: Job, _: str) -> Run:
    from skv_export.runtime.session import Session

    session = Session(job.path, num_threads=job.threads)
    cache = session.cache(job.sequences, job.capacity)
    pending: Any = job.prompts(session.config.vocab_size)

    def call() -> list[int]:
        nonlocal pending
        tokens = session.run(pending, None, None, cache)[:, -1].argmax(-1)
        pending = tokens[:, None]
        return tokens.tolist()

    return _timed(job, call, call)


def _genai(job: Job, _: str) -> Run:
    import onnxruntime_genai as og

    config = og.Config(job.path)
    if job.threads:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": job.threads}}}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    length = job.capacity  # an end token ends no sequence
    params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=job.sequences)
    generator = og.Generator(model, params)
    known = json.loads((Path(job.path) / GENAI_CONFIG_FILE).read_text(encoding="utf-8"))
    tokens = np.array(job.prompts(known["model"]["vocab_size"]), np.int32)

    def step() -> Sequence[int]:
        generator.generate_next_token()
        return generator.get_next_tokens().tolist()

    def prefill() -> Sequence[int]:
        generator.append_tokens(tokens)
        return step()

    return _timed(job, prefill, step)


def _llama_cpp(job: Job, cache: str) -> Run:
    """Its C interface: sequences are ids in one ``llama_batch``, with a cache of their own each (its default)."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(job.path.encode(), options)
    if not model:
        raise SkvError("bench: llama.cpp", got=job.path, expected="a GGUF file that it reads")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = job.sequences * job.capacity, job.sequences, False
    params.n_batch = params.n_ubatch = _LLAMA_BATCH
    params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}")
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    cores = os.cpu_count() or 1
    params.n_threads, params.n_threads_batch = job.threads or max(cores // 2, 1), job.threads or cores
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SkvError("bench: llama.cpp", got=f"no context of {params.n_ctx} tokens", expected="room for it")
    batch = llama_cpp.llama_batch_init(_LLAMA_BATCH, 0, 1)

    def decode(start: int, rows: Mapping[int, Sequence[int]]) -> list[int]:
        """One call, with new tokens of these sequences from a position on."""
        ends = (np.cumsum([len(row) for row in rows.values()]) - 1).tolist()  # whose logits are asked for
        each = [(n, place, token) for n, row in rows.items() for place, token in enumerate(row, start)]
        batch.n_tokens = len(each)
        for i, (sequence, place, token) in enumerate(each):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, i in ends
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if code := llama_cpp.llama_decode(context, batch):
            raise SkvError("bench: llama_decode", got=code, expected=0)
        logits = (llama_cpp.llama_get_logits_ith(context, i) for i in ends)
        return [int(np.ctypeslib.as_array(row, (vocab_size,)).argmax()) for row in logits]

    length, pending = job.context, list[int]()

    def prefill() -> list[int]:
        for n, prompt in enumerate(prompts):
            for start in range(0, length, _LLAMA_BATCH):
                (token,) = decode(start, {n: prompt[start : start + _LLAMA_BATCH]})
            pending.append(token)
        return list(pending)

    def step() -> list[int]:
        nonlocal length
        pending[:] = decode(length, {n: [token] for n, token in enumerate(pending)})
        length += 1
        return list(pending)

    prompts = job.prompts(vocab_size)
    return _timed(job, prefill, step)


def _openvino(job: Job, cache: str) -> Run:
    import openvino
    import openvino_genai

    keys, _, values = cache.partition("/")
    properties: dict[str, Any] = {"KEY_CACHE_PRECISION": keys, "VALUE_CACHE_PRECISION": values or keys}
    if job.threads:
        properties["INFERENCE_NUM_THREADS"] = job.threads
    scheduler = openvino_genai.SchedulerConfig()
    # As in LLMPipeline, all prompts run in one step: else the first would decode while the others' prompts run.
    scheduler.max_num_batched_tokens = job.sequences * job.capacity
    scheduler.max_num_seqs = job.sequences
    pipeline = openvino_genai.ContinuousBatchingPipeline(job.path, scheduler, "CPU", properties)
    prompts = job.prompts(len(pipeline.get_tokenizer().get_vocab()))
    greedy = openvino_genai.GenerationConfig(max_new_tokens=job.steps + 2, ignore_eos=True, do_sample=False)
    requests: list[Any] = []

    def step() -> list[int]:
        pipeline.step()
        outputs = [one for request in requests if request.can_read() for one in request.read().values()]
        return [token for output in outputs for token in output.generated_ids]

    def prefill() -> list[int]:
        for i, prompt in enumerate(prompts):
            requests.append(pipeline.add_request(i, openvino.Tensor(np.array([prompt], np.int64)), greedy))
        return step()

    return _timed(job, prefill, step)


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
    pending = torch.tensor(job.prompts(model.config.get_text_config().vocab_size))

    def call() -> list[int]:
        nonlocal pending
        with torch.inference_mode():
            out = model(pending, past_key_values=held, use_cache=True, logits_to_keep=1)
        pending = out.logits[:, -1:].argmax(-1)
        return pending[:, 0].tolist()

    return _timed(job, call, call)


_LLAMA_BATCH = 512
"""Tokens of a prompt in one call."""
_LLAMA = "llama-cpp-python", "llama_cpp"
_LLAMA_SEQUENCES = 256
"""``LLAMA_MAX_SEQ`` of llama.cpp."""
_OPENVINO = "openvino-genai", "openvino_genai"
PEERS = {
    "skv": Peer(_skv),
    "genai": Peer(_genai, "onnxruntime-genai", "onnxruntime_genai"),
    "llama.cpp": Peer(_llama_cpp, *_LLAMA, "f16", _LLAMA_SEQUENCES),
    "llama.cpp-q8_0": Peer(_llama_cpp, *_LLAMA, "q8_0", _LLAMA_SEQUENCES),
    "llama.cpp-q4_0": Peer(_llama_cpp, *_LLAMA, "q4_0", _LLAMA_SEQUENCES),
    "openvino": Peer(_openvino, *_OPENVINO, "f16"),
    "openvino-u8": Peer(_openvino, *_OPENVINO, "u8"),
    "openvino-u8-u4": Peer(_openvino, *_OPENVINO, "u8/u4"),
    "transformers": Peer(_transformers, "torch", "torch"),
    "transformers-quanto-4": Peer(_transformers, "optimum-quanto", "optimum.quanto", "quanto-4"),
    "transformers-hqq-4": Peer(_transformers, "hqq", "hqq", "hqq-4"),
}
"""By name: exported folders, those of onnxruntime-genai's builder, GGUF files in llama.cpp (flash attention) and in
OpenVINO GenAI (paged attention; its own folders, too), checkpoints in transformers."""
