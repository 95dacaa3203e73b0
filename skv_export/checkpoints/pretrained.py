"""Checkpoints as transformers' models: the one place that calls ``from_pretrained`` on a checkpoint.

What is loaded are the files whose headers ``resolve`` checked, safetensors or GGUF and nothing beside them; a tensor
that is missing is an error, never a random number; code of a checkpoint's is never run, and nobody is asked whether to.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from skv_export.checkpoints.checkpoint import Checkpoint, Source, hub_endpoint
from skv_export.errors import SkvError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Number formats by the names that recipes and the command line use."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""accelerate's ways of spreading a model over GPUs, memory and disk."""
_DOWNLOADED = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)
"""What transformers raises for a checkpoint that it can't read."""


@dataclass(frozen=True)
class Placement:
    """Where a model runs in PyTorch, and in which number format.

    Attributes:
        device: torch's name of one: ``cpu``, ``cuda``, ``cuda:1``.
        dtype: Of ``DTYPES``.
        device_map: Of ``DEVICE_MAPS``, in place of ``device``; None = all on ``device``.

    Raises:
        SkvError: This machine has no such device, or the values contradict each other.
    """

    device: str = "cpu"
    dtype: str = "fp32"
    device_map: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SkvError("dtype", got=self.dtype, expected=", ".join(DTYPES))
        if self.device_map is not None and self.device_map not in DEVICE_MAPS:
            raise SkvError("device_map", got=self.device_map, expected=", ".join(DEVICE_MAPS))
        if self.device_map is not None and self.device != "cpu":
            raise SkvError("device and device_map", got=f"{self.device} and {self.device_map}", expected="one of them")
        _check_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format, as torch knows it."""
        return DTYPES[self.dtype]


def _check_device(name: str) -> None:
    """Refuses a device that a tensor can't be put on; ``meta`` holds none."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise SkvError(f"device {name}: not available", got=reason, fix="Leave it out to run on the CPU.") from error
    if torch.device(name).type == "meta":
        raise SkvError(f"device {name}: it holds no numbers", expected="cpu, cuda, cuda:1, ...")


def pretrained_arguments(source: Source) -> dict[str, Any]:
    """What transformers' ``from_pretrained`` needs beside the name; never code of the checkpoint's."""
    arguments: dict[str, Any] = {"trust_remote_code": False, "local_files_only": source.repo_id is None}
    if source.revision:
        arguments["revision"] = source.revision
    if source.gguf_file:
        arguments["gguf_file"] = source.gguf_file
    return arguments


def download(source: Source) -> Source:
    """Returns a source whose files are on this disk: a hub id's are fetched into huggingface_hub's cache.

    Raises:
        SkvError: The hub can't be reached, or stops answering.
    """
    if source.kind != "hub":
        return source
    if source.path is not None:
        return Source("safetensors", source.path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    patterns = [*_DOWNLOADED, *Checkpoint(source).shards()]
    try:
        folder = snapshot_download(
            str(source.repo_id), revision=source.revision, allow_patterns=patterns, endpoint=hub_endpoint()
        )
    except (OSError, ValueError, HTTPError) as error:
        raise SkvError(f"{source}: can't be downloaded", got=str(error)[:500], fix="Check the connection.") from error
    return Source("safetensors", Path(folder))


def load_config(source: Source) -> PreTrainedConfig:
    """Reads a checkpoint's configuration.

    Raises:
        SkvError: transformers can't read it.
    """
    try:
        return AutoConfig.from_pretrained(source.pretrained, **pretrained_arguments(source))
    except (OSError, ValueError, KeyError) as error:
        raise SkvError(f"{source}: transformers can't read its configuration", got=str(error)[:500]) from error


def load_tokenizer(source: Source) -> Any:
    """Loads a checkpoint's tokenizer as transformers' users do.

    Raises:
        SkvError: There is none, or it needs code of the checkpoint's.
    """
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(source.pretrained, **pretrained_arguments(source))
    except _FAILURES as error:
        raise SkvError(f"{source}: transformers can't load its tokenizer", got=str(error)[:500]) from error


def load_model(
    source: Source, config: PreTrainedConfig | None = None, placement: Placement | None = None
) -> PreTrainedModel:
    """Loads a whole checkpoint into PyTorch, in evaluation mode and without gradients of its weights.

    Args:
        source: The checkpoint; a hub id is downloaded first.
        config: Its configuration, if it has been read already.
        placement: Device and number format; float32 on the CPU if not given.

    Raises:
        SkvError: transformers can't load it, or tensors are missing or do not fit; the message names them.
    """
    placement, source = placement or Placement(), download(source)
    _ = Checkpoint.open(source)
    model_class, config = _model_class(source, config or load_config(source))
    arguments: dict[str, Any] = {"config": config, "dtype": placement.torch_dtype, "output_loading_info": True}
    arguments["ignore_mismatched_sizes"] = True  # reported below, by name
    with contextlib.ExitStack() as offloaded:
        if placement.device_map is not None:
            folder = offloaded.enter_context(tempfile.TemporaryDirectory(prefix="skv-offload-"))
            arguments |= {"device_map": placement.device_map, "offload_folder": folder}
        elif placement.device != "cpu":
            arguments["device_map"] = {"": placement.device}
        try:
            with _quiet(), _weights(source) as weights:
                model, found = model_class.from_pretrained(**weights, **arguments)
        except _FAILURES as error:
            raise SkvError(f"{source}: transformers can't load its weights", got=str(error)[:500]) from error
        wrong = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
        if wrong:
            raise unfit_tensors(source, wrong)
        weakref.finalize(model, offloaded.pop_all().close)
    model.eval().requires_grad_(False)
    return model


@contextlib.contextmanager
def _weights(source: Source) -> Iterator[dict[str, Any]]:
    """What tells ``from_pretrained`` to read a GGUF file, or the very safetensors files that were checked."""
    assert source.path is not None
    if source.kind == "gguf":
        yield {"pretrained_model_name_or_path": source.pretrained, **pretrained_arguments(source)}
        return
    with contextlib.ExitStack() as files:
        tensors: dict[str, Any] = {}
        for shard in Checkpoint(source).shards():
            opened: Any = files.enter_context(safe_open(source.path / shard, "pt"))
            tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        yield {"pretrained_model_name_or_path": None, "state_dict": tensors}


def _model_class(source: Source, config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """Returns transformers' own class of a causal language model, and its part of the configuration."""
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(found, tuple | list):
        named = [kind for kind in found if kind.__name__ in (config.architectures or ())]
        found = (named or found)[0]
    if found is None:
        raise SkvError(f"{source}: transformers has no causal language model of type {config.model_type}")
    text = config.sub_configs.get("text_config")
    return found, config.get_text_config() if text is not None and found.config_class is text else config


def unfit_tensors(source: Source, names: Sequence[str]) -> SkvError:
    """Returns the error for tensors that are missing or have another shape than the model's."""
    return SkvError(
        f"{source}: tensors are missing or have another shape",
        got=", ".join(sorted(names)[:4]),
        fix="Download the checkpoint again.",
    )


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns where a model takes its tokens; one that is spread over devices takes and gives tensors on the CPU."""
    return torch.device("cpu") if hasattr(model, "_hf_hook") else model.device


def replace_attention(model: PreTrainedModel, name: str) -> None:
    """Makes a model use an attention function that was registered with transformers' AttentionInterface.

    Raises:
        SkvError: The model has an attention of its own.
    """
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise SkvError(f"{model.config.model_type}: its attention can't be replaced, so its cache can't be simulated")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' bars and its report of the loading off the terminal: ours says what is wrong."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity(40)  # ERROR
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
