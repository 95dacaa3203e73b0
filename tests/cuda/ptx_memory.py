"""Memory of ptx_machine, and what accesses to it cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SHARED, PARAMETERS = 1 << 62, 1 << 61
"""Generic addresses of shared memory and of parameters."""
SECTOR, BANKS = 32, 32


class TrapError(Exception):
    """The program did what a GPU would not, or not reliably, do."""


@dataclasses.dataclass
class Counters:
    """What a launch did, in all of its blocks.

    Attributes:
        instructions: By warps, of each instruction of the kernel.
        asked: Bytes that global loads and copies asked for, of each instruction.
        sectors: Sectors of 32 bytes that warps fetched for them.
        conflicts: Accesses to shared memory that had to wait for another of the same warp's, for a bank.
        longest: Most instructions of a block, by a warp of it on average.
    """

    instructions: Counter[int] = dataclasses.field(default_factory=Counter)
    asked: Counter[int] = dataclasses.field(default_factory=Counter)
    sectors: Counter[int] = dataclasses.field(default_factory=Counter)
    conflicts: Counter[int] = dataclasses.field(default_factory=Counter)
    longest: float = 0


class GlobalMemory:
    """Buffers of this process that a kernel may use, at their own addresses."""

    def __init__(self) -> None:
        self._buffers: list[tuple[int, Array]] = []

    def add(self, array: Array) -> None:
        """Adds a buffer, in order to be read and written."""
        self._buffers.append((array.ctypes.data, array.reshape(-1).view(np.uint8)))
        self._buffers.sort(key=lambda buffer: buffer[0])

    def places(self, addresses: Array, size: int) -> list[tuple[Array, Array, Array]]:
        """The buffers that addresses are in: which addresses, the buffer, and their bytes in it, ``[n, size]``.

        Raises:
            TrapError: One is in none.
        """
        starts = np.array([start for start, _ in self._buffers], np.uint64)
        which = np.searchsorted(starts, addresses, "right") - 1
        found = []
        for i in np.unique(which):
            start, data = self._buffers[i]
            own = which == i
            places = (addresses[own] - np.uint64(start)).astype(np.int64)
            if i < 0 or places.max() + size > data.size:
                raise TrapError(f"an address in no buffer: {places.max()} bytes after the start of one of {data.size}")
            found.append((own, data, places[:, None] + np.arange(size)))
        return found

    def read(self, addresses: Array, size: int) -> Array:
        """``[n, size]`` bytes."""
        got = np.empty((len(addresses), size), np.uint8)
        for own, data, at in self.places(addresses, size):
            got[own] = data[at]
        return got

    def write(self, addresses: Array, given: Array) -> None:
        """Stores ``[n, size]`` bytes."""
        for own, data, at in self.places(addresses, given.shape[1]):
            data[at] = given[own]


def _by_groups(addresses: Array, mask: Array, lanes: int) -> Array:
    """Addresses of each so many lanes in a row, -1 for lanes that have none."""
    every = np.full(len(mask), -1, np.int64)
    every[mask] = (addresses & np.uint64(SHARED - 1)).astype(np.int64)
    return every.reshape(-1, lanes)


def sectors(addresses: Array, mask: Array) -> int:
    """Sectors that warps fetch, whose lanes in a mask have these addresses, none across two sectors."""
    warps = np.sort(np.where((of := _by_groups(addresses, mask, 32)) < 0, -1, of // SECTOR), 1)
    new = np.diff(warps, axis=1, prepend=-1) != 0
    return int((new & (warps >= 0)).sum())


def conflicts(addresses: Array, mask: Array, size: int) -> int:
    """Times that a bank of shared memory is wanted again for another word, 128 bytes of a warp at a time."""
    waits = 0
    for phase in _by_groups(addresses, mask, max(1, 32 * 4 // max(4, size))):
        words = np.unique(phase[phase >= 0] // 4)
        if len(words):
            waits += int(np.bincount(words % BANKS).max()) - 1
    return waits
