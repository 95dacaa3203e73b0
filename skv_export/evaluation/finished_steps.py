"""The state of a long run: finished steps in a file, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skv_export.errors import SkvError


class FinishedSteps:
    """Results by the step's name, a JSON line each; a run that is killed while it writes loses that line only.

    Args:
        path: The file, made with the first step; None keeps nothing.
        run: What the results depend on beside the step; lines of other runs are passed over.
        exclusive: Refuse a file that holds steps of another run.

    Raises:
        SkvError: The file is no state file, or belongs to another run.
    """

    def __init__(self, path: Path | None, run: str, *, exclusive: bool = False) -> None:
        self._path, self._run = path, run
        self._values: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        if not path.is_file():
            raise SkvError(f"{path}: not a regular file", expected="what an earlier run kept, or no such file")
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                saved = json.loads(line)
                of_run, step, value = saved["run"], saved["step"], saved["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise SkvError(
                    f"{path}, line {number}: no saved step", got=str(error)[:100], fix="Delete the file to start again."
                ) from error
            if of_run == run:
                self._values[step] = value
            elif exclusive:
                raise SkvError(
                    f"{path}: belongs to another run",
                    expected="the same model, text and options",
                    fix="Delete it, or name another --state.",
                )
        if whole != text:  # a run that was killed while writing leaves half a line; only now it is known to be ours
            path.write_text(whole, encoding="utf-8")

    def __contains__(self, step: str) -> bool:
        return step in self._values

    def __getitem__(self, step: str) -> Any:
        return self._values[step]

    def save(self, step: str, value: Any) -> None:
        """Adds a step's result, which is a value of JSON."""
        self._values[step] = value
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": self._run, "step": step, "value": value}) + "\n")
