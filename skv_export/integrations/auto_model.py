"""Makes ``AutoModelForCausalLM`` and ``pipeline`` load exported folders, once ``skv_export`` is imported.

transformers finds a model's class by the type of its configuration, and an export of a Llama has Llama's, which must
stay: tokenizers and other tools go by it. So the folder decides: where it holds ``skv_config.json``, our class loads
it, and transformers' own code does in all other cases. `transformers serve` goes by the class that config.json names,
which an export's says is ours. transformers is not loaded for that: what is here waits for it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_MODULE = "transformers.models.auto.modeling_auto"
_ADDED = {"config", "adapter_kwargs", "code_revision", "tqdm_class", "_commit_hash", "_from_auto", "_from_pipeline"}
"""What transformers' own callers of ``from_pretrained`` pass along."""


def install() -> None:
    """Joins transformers' auto model: now if it is loaded, else as soon as it is."""
    loaded = sys.modules.get(_MODULE)
    if loaded is not None and hasattr(loaded, "AutoModelForCausalLM"):
        _join(loaded)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(importlib.abc.MetaPathFinder):
    """Sees transformers' module being imported, lets it be imported as ever, and joins it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_join(module: ModuleType) -> None:
                execute(module)
                _join(module)

            loader.exec_module = execute_and_join
        return spec


def _join(module: ModuleType) -> None:
    auto = module.AutoModelForCausalLM
    theirs = auto.from_pretrained.__func__
    if getattr(theirs, "loads_exports", False):
        return

    @functools.wraps(theirs)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        from skv_export.model_folder.names import SKV_CONFIG_FILE

        given = pretrained_model_name_or_path
        if not isinstance(given, str | os.PathLike) or not (Path(given) / SKV_CONFIG_FILE).is_file():
            return theirs(cls, given, *arguments, **options)
        from skv_export.integrations.transformers_model import SkvForCausalLM

        ours = {name: value for name, value in options.items() if name not in _ADDED and value is not None}
        return SkvForCausalLM.from_pretrained(given, **ours)  # type: ignore[arg-type]

    from_pretrained.loads_exports = True  # type: ignore[attr-defined]
    auto.from_pretrained = classmethod(from_pretrained)
    add_class(sys.modules["transformers"], auto)


def add_class(transformers: ModuleType, auto: Any) -> None:
    """Gives transformers the class that an exported ``config.json`` names: `transformers serve` looks for it there.

    Args:
        transformers: The module.
        auto: ``AutoModelForCausalLM``, joined.
    """
    from skv_export.model_folder.names import MODEL_CLASS

    setattr(transformers, MODEL_CLASS, type(MODEL_CLASS, (), {"from_pretrained": auto.from_pretrained}))
