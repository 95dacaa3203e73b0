"""SkvForCausalLM: transformers' ``generate`` on the runtime, with the interface of optimum's ORTModelForCausalLM."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.cache_utils import Cache as TransformersCache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from skv_export.arguments import checked
from skv_export.checkpoints.checkpoint import Source
from skv_export.checkpoints.model_config import load_config
from skv_export.errors import SkvError
from skv_export.integrations.frozen_model import FrozenModel, check_dtype, provider_of
from skv_export.integrations.generate_options import check_labels, check_options, new_inputs, new_shape
from skv_export.integrations.transformers_cache import Candidates, SkvCache
from skv_export.model_folder import hub
from skv_export.model_folder.names import LIBRARY_FILE
from skv_export.model_folder.output import output_folder
from skv_export.model_folder.writer import generation_config
from skv_export.paths import to_path
from skv_export.runtime.arrays import last_logits
from skv_export.runtime.session import Session

logger = logging.get_logger(__name__)
# A pipeline looks its model's class up in this table and reports an error, yet works, when it is not there.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["skv"] = "SkvForCausalLM"


class SkvForCausalLM(FrozenModel, GenerationMixin):
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
    _is_stateful = False  # its cache can be taken back
    _supported_generation_modes: ClassVar[list[GenerationMode]] = [
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
        GenerationMode.ASSISTED_GENERATION,
    ]

    @checked
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
        self._is_stateful = bool(session.config.keeps_guesses)
        self._running: list[SkvCache] = []  # the cache that the call of generate under way has made
        self.device, self.dtype = torch.device("cpu"), torch.float32  # of what goes in and comes out

    @classmethod
    @checked
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        execution_provider: str = "cpu",
        cuda_graph: bool = False,
        max_length: int | None = None,
        num_threads: int = 0,
        num_logits: int = 1,
        prefix_bytes: int = 0,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        trust_remote_code: bool | None = None,
        **others: Any,
    ) -> SkvForCausalLM:
        """Loads an exported model.

        Args:
            model: A folder that ``skv-export model`` wrote, or the hub id of one that was pushed.
            execution_provider: ``cpu`` or ``cuda``.
            cuda_graph: On a GPU, decode as a CUDA graph; see ``runtime.Session``.
            max_length: Most tokens of one sequence; the model's context length if not given.
            num_threads: Threads inside an op; 0 = ONNX Runtime's choice.
            num_logits: For speculative decoding (``assistant_model``, ``prompt_lookup_num_tokens``): the tokens that a
                call can check, and one; see ``runtime.Session``.
            prefix_bytes: Memory for the beginnings of sequences that ``generate`` has run, so that a prompt that begins
                like one of them runs only what is new; 0 = none is kept.
            revision: Branch, tag or commit of a hub id.
            token: Of the hub; the stored one if not given.
            cache_dir: Where downloads are kept; huggingface_hub's cache if not given.
            local_files_only: Take what has been downloaded already, and ask no server.
            dtype: The export's number format is what it is: this one or ``auto``, else an error.
            torch_dtype: The old name of ``dtype``.
            device_map: ``auto``, or one device for the whole model: ``cuda:1`` means execution_provider ``cuda:1``.
            trust_remote_code: Without effect: code is never taken from a model's folder.
            others: Refused, by name.

        Raises:
            SkvError: No such model, a file is missing or damaged, the provider is not there, or an option that has no
                meaning for an exported model.
        """
        if others:
            raise SkvError(
                f"from_pretrained: {', '.join(sorted(others))}: without a meaning for an exported model",
                expected="execution_provider, num_threads, max_length, and the hub's options",
                fix="Leave it out; bits and number formats are chosen by the export.",
            )
        execution_provider = provider_of(device_map, execution_provider)
        folder = hub.fetch(
            model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        session = Session(
            folder,
            execution_provider=execution_provider,
            cuda_graph=cuda_graph,
            num_threads=num_threads,
            num_logits=num_logits,
            prefix_bytes=prefix_bytes,
        )
        check_dtype(torch_dtype if dtype is None else dtype, session.config.dtype)
        return cls.from_session(session, max_length)

    @classmethod
    @checked
    def from_session(cls, session: Session, max_length: int | None = None) -> SkvForCausalLM:
        """Returns the model of a session that is open, with the configurations of its folder.

        Args:
            session: The runtime.
            max_length: Most tokens of one sequence; the model's context length if not given.

        Returns:
            The model.

        Raises:
            SkvError: The folder has none, or they can't be read.
        """
        if not (session.folder / "config.json").is_file():
            raise SkvError(f"{session.folder}/config.json: no such file", fix="Export the model again.")
        files = Source("safetensors", session.folder)
        config = load_config(files)
        defaults = generation_config(files, config)
        return cls(session, config.get_text_config(decoder=True), defaults, max_length)

    @checked
    def save_pretrained(self, save_directory: str | Path, *, safe_serialization: bool = True, **others: Any) -> None:
        """Writes the model into another folder, complete or not at all, with ``generation_config`` as it is now.

        An exported folder that is there already is replaced; what is written runs wherever ``skv-export model``'s does.

        Args:
            save_directory: The folder.
            safe_serialization: True: weights are never written as pickles.
            others: Refused, by name.

        Raises:
            SkvError: The folder holds something else, can't be written, or is the one the model runs from; or an option
                that has no meaning for an exported model.
        """
        if others or not safe_serialization:
            names = ", ".join(sorted(others)) or "safe_serialization=False"
            raise SkvError(
                f"save_pretrained: {names}: without a meaning for an exported model",
                expected="the folder alone",
                fix="Leave it out; push_to_hub is a method of its own.",
            )
        source, target = self.session.folder.resolve(), to_path(save_directory, "save_directory")
        if target.resolve() == source:
            raise SkvError(f"{target}: the model runs from this folder", fix="Choose another one.")
        files = [path for path in source.rglob("*") if path.is_file()]
        with output_folder(target, sum(path.stat().st_size for path in files), force=True) as folder:
            for path in files:
                copy = folder / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            # A model of the hub comes without native code, which onnxruntime-genai wants in the folder.
            shutil.copyfile(self.session.library.path, folder / LIBRARY_FILE)
            self.generation_config.save_pretrained(folder)

    @checked
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
        """Uploads the model to the hub as one commit, with the current ``generation_config``.

        Args:
            repo_id: ``owner/name``; created if it does not exist.
            commit_message: Of the commit.
            private: Whether a new repository is private; the account's default if not given.
            token: Of the hub; the stored one if not given.
            revision: Branch to commit to; the default branch if not given.
            create_pr: Open a pull request instead of committing to the branch.

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

    def __repr__(self) -> str:
        config, session = self.session.config, self.session
        weights = config.weights or config.dtype or "its own"
        return (
            f"SkvForCausalLM({session.folder}: {config.model_type}, {len(config.layers)} layers, cache {config.bits}, "
            f"weights {weights}, context {config.context_length:,}, on {session.execution_provider})"
        )

    @property
    def name_or_path(self) -> str:
        """The folder, as transformers asks for it."""
        return str(self.session.folder)

    def can_generate(self) -> bool:
        """Returns True."""
        return True

    @checked
    def new_cache(self, batch: int, max_length: int | None = None) -> SkvCache:
        """Allocates an empty cache, to be passed as ``past_key_values``.

        Args:
            batch: Sequences.
            max_length: Tokens per sequence; the model's ``max_length`` if not given.

        Returns:
            The cache; calls change it in place.

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

    @checked
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransformersCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Runs new tokens.

        Args:
            input_ids: ``[B, S]``, new tokens.
            attention_mask: ``[B, past columns + S]``; None = no padding.
            past_key_values: Of ``new_cache``, or what an earlier call returned; it is changed in place. None = empty.
            use_cache: False: the cache is made for this call alone.
            return_dict: A ModelOutput is returned in any case.
            logits_to_keep: 1 = only the last real token of each sequence; 0 = all that the graph returns.
            position_ids: ``[B, S]``; None = as the mask says.
            labels: ``[B, S]``, as ``input_ids``, -100 = not counted: adds ``loss``, the mean cross entropy of each
                token given those before it in this call.
            inputs_embeds: ``[B, S, hidden]``, in place of ``input_ids``, where the export takes embeddings.

        Returns:
            ``logits`` ``[B, 1, vocab]`` (``[B, S, vocab]`` if exported with all logits), and ``past_key_values``.

        Raises:
            SkvError: ``labels`` where the graph returns the last logits only, or see ``Session.run``.
        """
        batch, tokens = new_shape(input_ids, inputs_embeds)
        if labels is not None:
            check_labels(labels, (batch, tokens), all_logits=self.session.config.all_logits and not logits_to_keep)
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
        if mask is not None and mask.shape != (batch, state.columns + tokens):
            raise SkvError("attention_mask: shape", got=list(mask.shape), expected=[batch, state.columns + tokens])
        new = np.ones((batch, tokens), np.bool_) if mask is None else mask[:, -tokens:] != 0
        kept = logits_to_keep == 1 and position_ids is None and state.columns == 0 and use_cache is not False
        if kept and input_ids is not None:
            logits = state.prefill(self.session, input_ids.numpy(), new)[:, None]
        else:
            positions = None if position_ids is None else position_ids.numpy()
            if input_ids is not None:
                logits = self.session.run(input_ids.numpy(), mask, positions, state.cache)
            else:
                assert inputs_embeds is not None  # new_shape has seen to it
                embeds = inputs_embeds.detach().float().numpy()
                logits = self.session.run_embeds(embeds, mask, positions, state.cache)
            if logits_to_keep == 1:
                logits = last_logits(logits, new)[:, None]
        state.append_columns(new)
        result = torch.from_numpy(logits)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(result[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=result, past_key_values=None if use_cache is False else state)

    __call__ = forward

    # What GenerationMixin asks of a model.

    def prepare_inputs_for_generation(  # type: ignore[override]  # it finds out by itself what is the first call
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: TransformersCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Selects the new tokens for ``forward``; called by ``generate``.

        Args:
            input_ids: ``[B, columns]``, all tokens so far.
            next_sequence_length: New tokens, at the end of ``input_ids``; None = all behind the cache's.
            past_key_values: The cache of the tokens before; None = empty.
            attention_mask: ``[B, columns]``; the runtime derives positions from it.
            inputs_embeds: ``[B, S, hidden]``, the prompt; ``input_ids`` are the tokens behind it then.
            use_cache: As in ``forward``.
            logits_to_keep: As in ``forward``.
            position_ids: ``[3, B, columns]`` of multimodal RoPE; others are not looked at.

        Returns:
            The arguments of ``forward``.
        """
        new = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
        if next_sequence_length is None and inputs_embeds is None and isinstance(past_key_values, SkvCache):
            new = input_ids[:, past_key_values.begins(input_ids, attention_mask) :]
        begun = isinstance(past_key_values, SkvCache) and past_key_values.columns > 0
        return {
            **new_inputs(new, None if begun else inputs_embeds, position_ids),
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """Generates, as transformers' ``GenerationMixin.generate``; what ran is kept where ``prefix_bytes`` are given.

        Args:
            arguments: As transformers takes them.
            options: The same.

        Returns:
            What transformers returns.

        Raises:
            SkvError: See ``forward``.
        """
        check_options(*arguments, **options)
        self._running.clear()
        try:
            return super().generate(*arguments, **options)  # type: ignore[misc]  # its self is a Protocol
        finally:
            for state in self._running:
                state.keep(self.session)
            self._running.clear()

    def _get_candidate_generator(self, *arguments: Any, **options: Any) -> CandidateGenerator:
        """Returns transformers' generator of guesses, held to what a call can check and take back exactly."""
        if self.session.max_drafts < 1:
            raise SkvError(
                "generate: speculative decoding needs the logits of several tokens",
                got="the last token's",
                fix="from_pretrained(folder, num_logits=16), or export with --all-logits.",
            )
        found = super()._get_candidate_generator(*arguments, **options)  # type: ignore[misc]  # its self is a Protocol
        return Candidates(found, options["model_kwargs"]["past_key_values"], self.session.max_drafts)

    def _prepare_generated_length(
        self,
        generation_config: GenerationConfig,
        has_default_max_length: bool,
        has_default_min_length: bool,
        model_input_name: str,
        input_ids_length: int,
        inputs_tensor: torch.Tensor,
    ) -> GenerationConfig:
        """Ends generation at the end of the model's context; the last token needs no room there."""
        if input_ids_length > self.max_length:
            raise SkvError(
                "generate: prompt",
                got=f"{input_ids_length} tokens",
                expected=f"at most max_length = {self.max_length}",
                fix="Make the prompt shorter, or pass a larger max_length to from_pretrained.",
            )
        config: GenerationConfig = super()._prepare_generated_length(  # type: ignore[misc]  # its self is a Protocol
            generation_config, has_default_max_length, has_default_min_length, model_input_name, input_ids_length,
            inputs_tensor,
        )  # fmt: skip
        if config.max_length > self.max_length + 1:
            logger.warning(
                f"Generation ends after {self.max_length + 1 - input_ids_length} new tokens at most, "
                f"where max_length = {self.max_length} (the model's context, if not given) is full."
            )
            config.max_length = self.max_length + 1
        return config

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
        given = model_kwargs.get("past_key_values")
        if isinstance(given, SkvCache) and given.get_max_length() < max_cache_length:
            raise SkvError(
                "generate: total length",
                got=f"{max_cache_length} tokens",
                expected=f"at most {given.get_max_length()}, the max_length of past_key_values",
                fix="Lower max_new_tokens, or pass a larger max_length to new_cache.",
            )
        if given is not None or generation_config.use_cache is False:
            return False
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        # An assistant is called for a few tokens again and again, each time with the cache of the last.
        length = None if generation_config.is_assistant else max_cache_length
        model_kwargs["past_key_values"] = self.new_cache(batch_size * copies, length)
        self._running[:] = [model_kwargs["past_key_values"]]
        return False

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        yield
