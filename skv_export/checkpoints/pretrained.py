"""Checkpoints as transformers' models: the one place that calls ``from_pretrained`` on a checkpoint.

What is loaded are the files whose headers ``resolve`` checked, safetensors or GGUF and nothing beside them; a tensor
that is missing is an error, never a random number; code of a checkpoint's is never run, and nobody is asked whether to.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from skv_export.arguments import check_fields
from skv_export.checkpoints import tokenizer
from skv_export.checkpoints.attention_patches import OWN_ATTENTION, Patches, patch_attention, restore_attention
from skv_export.checkpoints.checkpoint import Checkpoint, Source, hub_endpoint
from skv_export.checkpoints.foreign_tensors import adapter_in, unfit_tensors
from skv_export.checkpoints.gguf_weights import load_gguf_model
from skv_export.checkpoints.model_config import load_config
from skv_export.checkpoints.tensor_files import DTYPES as DTYPES_IN_FILES
from skv_export.checkpoints.tensor_files import TensorEntry
from skv_export.errors import SkvError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Number formats by the names that recipes and the command line use."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""accelerate's ways of spreading a model over GPUs, memory and disk."""
_DOWNLOADED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md")
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
        check_fields(self)
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


def download(source: Source) -> Source:
    """Returns a source whose files are on this disk: a hub id's are fetched into huggingface_hub's cache.

    Where its branch is still the commit that the source is pinned to, the cache learns so, and knows the name offline.

    Raises:
        SkvError: The hub can't be reached, or stops answering.
    """
    if source.kind != "hub":
        return source
    if source.path is not None:
        return Source("safetensors", source.path, adapter=source.adapter)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    patterns, hub, repo_id = [*_DOWNLOADED, *Checkpoint(source).shards()], HfApi(hub_endpoint()), str(source.repo_id)
    try:
        now = hub.model_info(repo_id, revision=source.revision).sha
        revision = source.revision if source.commit in (None, now) else source.commit
        folder = hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
    except (OSError, ValueError, HTTPError) as error:
        raise SkvError(f"{source}: can't be downloaded", got=str(error)[:500], fix="Check the connection.") from error
    return Source("safetensors", Path(folder), adapter=source.adapter)


def load_tokenizer(source: Source) -> Any:
    """Loads a checkpoint's tokenizer as transformers' users do; a hub id's files are downloaded first.

    Raises:
        SkvError: There is none, or it needs code of the checkpoint's.
    """
    with _quiet():
        found = tokenizer.load_tokenizer(download(source))
    if found is None:
        raise SkvError(f"{source}: no tokenizer", fix="Put the model's tokenizer.json beside its weights.")
    return found


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
    checkpoint, config = Checkpoint.open(source), config or load_config(source)
    if adapter_in(names := list(checkpoint.names())):
        raise unfit_tensors(source, [], names)
    if source.kind == "gguf":
        return _load_gguf(source, config, placement)
    model_class, config = _model_class(source, config)
    arguments: dict[str, Any] = {"config": config, "dtype": placement.torch_dtype, "output_loading_info": True}
    arguments["ignore_mismatched_sizes"] = True  # reported below, by name
    with contextlib.ExitStack() as offloaded:
        if placement.device_map is not None:
            folder = offloaded.enter_context(tempfile.TemporaryDirectory(prefix="skv-offload-"))
            arguments |= {"device_map": placement.device_map, "offload_folder": folder}
        elif placement.device != "cpu":
            arguments["device_map"] = {"": placement.device}
        try:
            tensors = {name: _StoredTensor(entry) for name, entry in checkpoint.entries.items()}
            with _quiet():
                model, found = model_class.from_pretrained(None, state_dict=tensors, **arguments)
        except _FAILURES as error:
            raise SkvError(f"{source}: transformers can't load its weights", got=str(error)[:500]) from error
        wrong = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
        if wrong:
            raise unfit_tensors(source, wrong, names)
        weakref.finalize(model, offloaded.pop_all().close)
    model.eval().requires_grad_(False)
    return model


def _load_gguf(source: Source, config: PreTrainedConfig, placement: Placement) -> PreTrainedModel:
    """Loads a GGUF file whole, then puts it where it runs."""
    model: Any = load_gguf_model(source, config, placement.torch_dtype)
    if placement.device_map is not None:
        from accelerate import dispatch_model, infer_auto_device_map

        model = dispatch_model(model, infer_auto_device_map(model, no_split_module_classes=model._no_split_modules))
    elif placement.device != "cpu":
        model.to(placement.device)
    model.eval().requires_grad_(False)
    return model


def load_untouched(source: Source, placement: Placement | None = None) -> PreTrainedModel:
    """Loads a checkpoint as transformers' users do: its own choice of files, its generation defaults, no preparation.

    For comparisons with what users get. The checkpoint's code is not run and pickles are not read here either. GGUF
    files, of which transformers ignores much, and what transformers does not load by itself go through ``load_model``.

    Raises:
        SkvError: It can't be loaded.
    """
    placement, source = placement or Placement(), download(source)
    if source.kind == "gguf":
        return load_model(source, placement=placement)
    if source.adapter is not None and (source.adapter == source.path or not importlib.util.find_spec("peft")):
        return load_model(source, placement=placement)
    # Not mapped: where a mapped file becomes shorter, the process is killed.
    arguments: dict[str, Any] = {"dtype": placement.torch_dtype, "use_safetensors": True, "disable_mmap": True}
    if placement.device_map is not None or placement.device != "cpu":
        arguments["device_map"] = placement.device_map or {"": placement.device}
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                source.pretrained, trust_remote_code=False, local_files_only=True, **arguments
            )
    except _FAILURES:
        return load_model(source, placement=placement)
    if source.adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(source.adapter)).merge_and_unload()
        except _FAILURES as error:
            raise SkvError(f"{source}: peft can't load the adapter", got=str(error)[:500]) from error
    model.requires_grad_(False)
    return model


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor that transformers reads when it takes ``[...]`` or a slice of it, as it does with safetensors' own.

    Safetensors' are mapped: where a mapped file becomes shorter, the process is killed. This one is an error then.
    """

    entry: TensorEntry

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._whole()[index]

    def get_shape(self) -> list[int]:
        return list(self.entry.shape)

    def get_dtype(self) -> str:
        return self.entry.dtype if self.entry.dtype in DTYPES_IN_FILES else "F32"

    def _whole(self) -> torch.Tensor:
        if self.entry.dtype not in DTYPES_IN_FILES:  # quantized by another tool
            return torch.from_numpy(self.entry.array())
        dtype = getattr(torch, np.dtype(DTYPES_IN_FILES[self.entry.dtype]).name)
        tensor = torch.empty(self.entry.shape, dtype=dtype)
        data = np.frombuffer(self.entry.file.read(self.entry.start, self.entry.stop), np.uint8)
        tensor.view(-1).view(torch.uint8).numpy()[:] = data
        return tensor


def _model_class(source: Source, config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """Returns transformers' own class of a causal language model, and its part of the configuration."""
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(found, tuple | list):
        named = [kind for kind in found if kind.__name__ in (config.architectures or ())]
        found = (named or found)[0]
    if found is None and (found := MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)) is not None:
        return found, config  # whole: its text tower has no class of its own
    if found is None:
        raise SkvError(f"{source}: transformers has no causal language model of type {config.model_type}")
    text = config.sub_configs.get("text_config")
    return found, config.get_text_config() if text is not None and found.config_class is text else config


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns where a model takes its tokens; one that is spread over devices takes and gives tensors on the CPU."""
    return torch.device("cpu") if hasattr(model, "_hf_hook") else model.device


def replace_attention(model: PreTrainedModel, name: str, patches: Patches = OWN_ATTENTION) -> None:
    """Makes a model use an attention function that was registered with transformers' AttentionInterface.

    Args:
        model: Changed in place.
        name: Of the function; one that transformers makes no mask for.
        patches: Classes that have to be changed because they do not go through AttentionInterface.

    Raises:
        SkvError: The model has an attention of its own that is not among ``patches``.
    """
    if patch_attention(model, ALL_ATTENTION_FUNCTIONS[name], patches):
        model.config._attn_implementation_internal = name
    else:
        with _quiet():
            model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise SkvError(
            f"{model.config.model_type}: its attention can't be replaced: it does not go through AttentionInterface"
        )


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, a model has transformers' attention instead of the one that replaced it."""
    replaced = model.config._attn_implementation
    if restore_attention(model):
        model.config._attn_implementation_internal = "eager"
    else:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        replace_attention(model, str(replaced))


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
