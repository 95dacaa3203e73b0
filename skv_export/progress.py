"""How far a long run is, on standard error: a bar on a terminal, a plain line per phase elsewhere, or nothing."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

_Item = TypeVar("_Item")
logger = logging.getLogger(__name__)
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def set_quiet(quiet: bool = True) -> None:
    """Says nothing from here on (``--quiet``)."""
    _quiet.set(quiet)


class Progress:
    """Told what is being done and how much of it is; shows one phase after the other.

    Example::

        with Progress() as progress:
            for i, layer in enumerate(layers):
                read(layer)
                progress("reading layers", i + 1, len(layers))
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._phase = ""
        self._said: set[str] = set()
        self._begun: set[str] = set()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, phase: str, done: float = 0.0, total: float = 1.0) -> None:
        """Says that ``done`` of ``total`` of a phase is done."""
        if phase not in self._begun:
            self._begun.add(phase)
            logger.info("%s", phase)
        if _quiet.get():
            return
        if not sys.stderr.isatty():
            if phase not in self._said:
                self._said.add(phase)
                print(phase, file=sys.stderr, flush=True)
            return
        if phase != self._phase or self._bar is None:
            self._close()
            self._bar, self._phase = _bar(phase, total), phase
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def track(items: Collection[_Item], phase: str) -> Iterator[_Item]:
    """Yields the items and shows how many of them are done."""
    with Progress() as progress:
        progress(phase, 0, len(items))
        for done, item in enumerate(items, 1):
            yield item
            progress(phase, done, len(items))


def silence_other_bars() -> None:
    """Turns off the bars that huggingface_hub and transformers draw, for this process; HF's own variable wins."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _bar(phase: str, total: float) -> Any:
    from tqdm import tqdm

    shape = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"
    return tqdm(total=total, desc=phase, bar_format=shape, leave=False, file=sys.stderr)
