"""Owns SkvForCausalLM: transformers' ``generate`` over the runtime. What optimum's ORTModelForCausalLM users know."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache as TransformersCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.pretrained import load_config
from skv_export.errors import SkvError
from skv_export.model_folder import genai_config, hub
from skv_export.model_folder.writer import output_folder
from skv_export.runtime.cache import Cache
from skv_export.runtime.session import Session, last_logits

logger = logging.get_logger(__name__)
# A pipeline looks its model's class up in this table and reports an error, yet works, when it is not there.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["skv"] = "SkvForCausalLM"


class SkvCache(TransformersCache):
    """A runtime's cache as transformers counts it: in columns, padding included.

    Attributes:
        cache: The runtime's cache, which counts tokens.
        columns: Columns of the attention mask so far.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__(layers=[])  # transformers' layers hold tensors; ours are the runtime's buffers
        self.cache = cache
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the columns so far."""
        return self.columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Puts each sequence's cache where beam search wants it."""
        self.cache.reorder(beam_idx.numpy())

    def reset(self) -> None:
        """Forgets every token; the buffers stay."""
        self.cache.reset()
        self.columns = 0


class SkvForCausalLM(GenerationMixin):
    """An exported model with transformers' ``generate``: greedy, sampling, beam search, padded batches, streaming.

    Example::

        model = SkvForCausalLM.from_pretrained("smollm2-k4v2")
        tokenizer = AutoTokenizer.from_pretrained("smollm2-k4v2")
        inputs = tokenizer(["The capital of France is"], return_tensors="pt")
        print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=20)))

    Attributes:
        session: The runtime.
        config: transformers' configuration of the model.
        generation_config: transformers' defaults of ``generate``.
        max_length: Most tokens of one sequence.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    _is_stateful = True  # the cache can't be handed to an assistant
    _supported_generation_modes: ClassVar[list[GenerationMode]] = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    ]

    def __init__(
        self,
        session: Session,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        max_length: int | None = None,
    ) -> None:
        context = session.config.context_length
        self.max_length = context if max_length is None else max_length
        if not 1 <= self.max_length <= context:
            raise SkvError("max_length", got=max_length, expected=f"1 ... {context}, the model's context")
        self.session, self.config, self.generation_config = session, config, generation_config
        self.device, self.dtype = torch.device("cpu"), torch.float32  # of what goes in and comes out

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        execution_provider: str = "cpu",
        cuda_graph: bool = False,
        max_length: int | None = None,
        num_threads: int = 0,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> SkvForCausalLM:
        """Loads an exported model.

        Args:
            model: A folder that ``skv-export model`` wrote, or the hub id of one that was pushed.
            execution_provider: ``cpu`` or ``cuda``.
            cuda_graph: On a GPU, decode as a CUDA graph; see ``runtime.Session``.
            max_length: Most tokens of one sequence; the model's context length if not given.
            num_threads: Threads inside an op; 0 = ONNX Runtime's choice.
            revision: Branch, tag or commit of a hub id.
            token: Of the hub; the stored one if not given.
            cache_dir: Where downloads are kept; huggingface_hub's cache if not given.
            local_files_only: Take what has been downloaded already, and ask no server.

        Raises:
            SkvError: No such model, a file is missing or damaged, or the provider is not there.
        """
        folder = hub.fetch(
            model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        session = Session(folder, execution_provider=execution_provider, cuda_graph=cuda_graph, num_threads=num_threads)
        if not (session.folder / "config.json").is_file():
            raise SkvError(f"{session.folder}/config.json: no such file", fix="Export the model again.")
        config = load_config(Source("safetensors", session.folder))
        if (session.folder / "generation_config.json").is_file():
            generation_config = GenerationConfig.from_pretrained(session.folder, local_files_only=True)
        else:
            generation_config = GenerationConfig.from_model_config(config)
        return cls(session, config.get_text_config(decoder=True), generation_config, max_length)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes the model into another folder, complete or not at all, with ``generation_config`` as it is now.

        An exported folder that is there already is replaced; what is written runs wherever ``skv-export model``'s does.

        Raises:
            SkvError: The folder holds something else, can't be written, or is the one the model runs from.
        """
        source, target = self.session.folder.resolve(), Path(save_directory)
        if target.resolve() == source:
            raise SkvError(f"{target}: the model runs from this folder", fix="Choose another one.")
        files = [path for path in source.iterdir() if path.is_file()]
        with output_folder(target, sum(path.stat().st_size for path in files), force=True) as folder:
            for path in files:
                shutil.copyfile(path, folder / path.name)
            # A model of the hub comes without native code, which onnxruntime-genai wants in the folder.
            shutil.copyfile(self.session.library.path, folder / genai_config.LIBRARY_FILE)
            self.generation_config.save_pretrained(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload exported model",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads the model to the hub as one commit, with ``generation_config`` as it is now; see ``hub.push``.

        Returns:
            The commit's URL.

        Raises:
            SkvError: The hub can't be reached or refuses.
        """
        return hub.push(
            self.session.folder,
            repo_id,
            commit_message=commit_message,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            replaced={"generation_config.json": self.generation_config.to_json_string().encode()},
        )

    @property
    def name_or_path(self) -> str:
        """The folder, as transformers asks for it."""
        return str(self.session.folder)

    def to(self, device: torch.device | str) -> SkvForCausalLM:
        """Returns the model: what goes in and comes out is on the CPU, whichever provider computes.

        Raises:
            SkvError: Another device.
        """
        if torch.device(device).type != "cpu":
            raise SkvError(
                "device of SkvForCausalLM",
                got=device,
                expected="cpu",
                fix="Choose where it computes with execution_provider; leave out device.",
            )
        return self

    def can_generate(self) -> bool:
        """Returns True."""
        return True

    def new_cache(self, batch: int, max_length: int | None = None) -> SkvCache:
        """Allocates an empty cache, to be passed as ``past_key_values``.

        Raises:
            SkvError: More tokens than the model was loaded for.
        """
        wanted = self.max_length if max_length is None else max_length
        if wanted > self.max_length:
            raise SkvError(
                "generate: total length",
                got=f"{wanted} tokens",
                expected=f"at most max_length = {self.max_length}",
                fix="Lower max_new_tokens, or pass a larger max_length to from_pretrained.",
            )
        return SkvCache(self.session.cache(batch, wanted))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransformersCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Runs new tokens.

        Args:
            input_ids: ``[B, S]``, new tokens.
            attention_mask: ``[B, past columns + S]``; None = no padding.
            past_key_values: Of ``new_cache``, or what an earlier call returned; it is changed in place. None = empty.
            use_cache: False: the cache is made for this call alone.
            return_dict: A ModelOutput is returned in any case.
            logits_to_keep: 1 = only the last real token of each sequence; 0 = all that the graph returns.

        Returns:
            ``logits`` ``[B, 1, vocab]`` (``[B, S, vocab]`` if exported with all logits), and ``past_key_values``.

        Raises:
            SkvError: See ``Session.run``.
        """
        batch, tokens = input_ids.shape
        state = past_key_values
        if state is None:
            state = self.new_cache(batch, tokens if use_cache is False else None)
        if not isinstance(state, SkvCache):
            raise SkvError(
                "past_key_values", got=type(state).__name__, expected="SkvCache", fix="Make it with model.new_cache."
            )
        if attention_mask is None and state.columns != int(state.cache.lengths.min()):
            raise SkvError("attention_mask: needed, as the sequences so far have padding", fix="Pass the whole mask.")
        mask = None if attention_mask is None else attention_mask.numpy()
        logits = self.session.run(input_ids.numpy(), mask, None, state.cache)
        state.columns += tokens
        if logits_to_keep == 1 and mask is not None:
            logits = last_logits(logits, mask[:, -tokens:] != 0)[:, None]
        elif logits_to_keep == 1:
            logits = logits[:, -1:]
        return CausalLMOutputWithPast(
            logits=torch.from_numpy(logits), past_key_values=None if use_cache is False else state
        )

    __call__ = forward

    # What GenerationMixin asks of a model.

    def prepare_inputs_for_generation(  # type: ignore[override]  # there are no inputs_embeds to take
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: TransformersCache | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        **_: Any,
    ) -> dict[str, Any]:
        """Picks the new tokens; positions follow from the mask inside the runtime."""
        new = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
        return {
            "input_ids": new,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Allocates the cache for exactly this call, once."""
        if generation_config.cache_implementation is not None:
            given = generation_config.cache_implementation
            logger.warning_once(f"cache_implementation={given!r} is ignored: the cache is the export's.")
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return False
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs["past_key_values"] = self.new_cache(batch_size * copies, max_cache_length)
        return False

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        yield
