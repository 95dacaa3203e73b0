"""Where figures come from: versions, date and command, for every report; loads none of what it names."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path

from skv_export import __version__

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "torch", "transformers")


def versions() -> dict[str, str]:
    """Returns the versions of what computes: ``skv-export``, ``python``, and the packages that are installed."""
    found = {name: package_version(name) for name in _PACKAGES}
    return {"skv-export": __version__, "python": platform.python_version()} | {n: v for n, v in found.items() if v}


def package_version(name: str) -> str:
    """Returns an installed package's version; "" if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def command() -> str:
    """Returns the command line of this process as a shell takes it; "" where it is no program of ours."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    return shlex.join([name, *sys.argv[1:]]) if name in ("skv-export", "optimum-cli", "skv-lm-eval") else ""


def today() -> str:
    """Returns the date, ``2024-01-31``."""
    return datetime.date.today().isoformat()
