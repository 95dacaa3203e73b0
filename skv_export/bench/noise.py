"""The clocks of a bench, and whether its times can be read: how far they spread, what to do where it is too far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""By the names of the options: seconds of the wall, and of all threads of this process."""
MAX_SPREAD = 0.25
"""Of a row that can be read: on idle machines the middle half of the times lies within a tenth of the median."""


class Timed(Protocol):
    """A row of a bench."""

    @property
    def name(self) -> str:
        """What was timed."""

    @property
    def spread(self) -> float:
        """See ``spread``."""


def spread(times: Sequence[float]) -> float:
    """Returns the width of the middle half of the times over their median: the interquartile range, relative."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return float((high - low) / median)


def remark(rows: Sequence[Timed]) -> str:
    """Returns a warning that names the rows too noisy to read; "" if there are none."""
    loud = [row for row in rows if row.spread > MAX_SPREAD]
    if not loud:
        return ""
    worst = max(loud, key=lambda row: row.spread)
    names = ", ".join(dict.fromkeys(row.name for row in loud))
    return (
        f"Too noisy to read: {names}. The middle half of the times of {worst.name} is {worst.spread:.0%} of their "
        f"median wide (readable: up to {MAX_SPREAD:.0%}). Something else used the machine: close it, take more "
        "repetitions, or measure --clock cpu with --threads 1."
    )
