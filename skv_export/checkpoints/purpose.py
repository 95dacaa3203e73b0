"""What a checkpoint says it is: a language model, or something else that was made from one."""

from __future__ import annotations

from skv_export.errors import SkvError

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "WithLMHead", "GenerationDecoder")
"""What the class names of language models end with."""


def check_purpose(model_type: object, architectures: object) -> None:
    """Refuses what was saved as another thing than a language model: a classifier, a reward or an embedding model.

    Args:
        model_type: Of config.json, for the message.
        architectures: Of config.json: names of classes; None = it does not say.

    Raises:
        SkvError: ``architectures`` names no class of a language model, or is no list of names.
    """
    given = [architectures] if isinstance(architectures, str) else architectures or ()
    if not isinstance(given, list | tuple):
        raise SkvError(
            f"{model_type}: architectures in config.json makes no sense", got=architectures, expected="names of classes"
        )
    named = [str(name) for name in given]
    if named and not any(name.endswith(LANGUAGE_MODELS) for name in named):
        raise SkvError(
            f"{model_type}: config.json says that this is no language model: architectures",
            got=", ".join(named),
            expected=f"a class whose name ends with {', '.join(LANGUAGE_MODELS)}",
            fix="Use the language model that it was made from; `model --as-causal-lm` exports its layers as one.",
        )
