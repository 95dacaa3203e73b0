"""Executes PTX, a block at a time: what nvcc emits, without a GPU.

All threads of a block that stand at the same instruction execute it together, those that are furthest behind first. So
threads of a warp that have parted meet again, as they do on the hardware. An instruction for a whole warp (shuffles,
votes, mma, movmatrix, bar.warp.sync) waits for all lanes in its mask.

What ends a run with ``TrapError``: accesses that are not aligned, or outside of the buffers; shared memory that is read
before it is written, or before its copy was waited for; lanes that never meet; barriers that not all threads reach. It
does not look for races between warps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ptx_memory import PARAMETERS, SHARED, Array, Counters, GlobalMemory, TrapError, conflicts, sectors
from ptx_operations import (
    ARITHMETIC,
    DTYPES,
    multiply_matrices,
    operand_types,
    result_type,
    transpose_matrix,
)
from ptx_program import SIZES, Instruction, Kernel


class Block:
    """One block of threads.

    Args:
        kernel: What it executes.
        arguments: Bytes of the kernel's parameters.
        grid: Blocks.
        index: This one's.
        threads: Of the block.
        shared_bytes: Dynamic shared memory.
        memory: Global memory.
        counters: Added to.
    """

    def __init__(
        self,
        kernel: Kernel,
        arguments: Sequence[bytes],
        grid: tuple[int, int, int],
        index: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        memory: GlobalMemory,
        counters: Counters,
    ) -> None:
        self.kernel, self.threads, self.memory, self.counters = kernel, threads, memory, counters
        self.registers = {
            name: np.zeros(threads, DTYPES[kind] if kind != "f16" else np.uint16)
            for name, kind in kernel.registers.items()
        }
        self.shared = np.zeros(shared_bytes, np.uint8)
        self.written = np.zeros(shared_bytes, np.bool_)
        self.parameters, at = np.zeros(sum(len(x) + 16 for x in arguments), np.uint8), 0
        self.symbols: dict[str, int] = dict.fromkeys(kernel.shared, 0)
        for name, data in zip(kernel.parameters, arguments, strict=True):
            self.parameters[at : at + len(data)] = np.frombuffer(data, np.uint8)
            self.symbols[name] = at
            at += (len(data) + 15) // 16 * 16
        thread = np.arange(threads, dtype=np.uint32)
        self.special = {"%tid.x": thread, "%tid.y": thread * 0, "%tid.z": thread * 0, "%ntid.x": thread * 0 + threads}
        for axis, count, at_ in zip("xyz", grid, index, strict=True):
            self.special[f"%nctaid.{axis}"] = np.full(threads, count, np.uint32)
            self.special[f"%ctaid.{axis}"] = np.full(threads, at_, np.uint32)
        self.place = np.zeros(threads, np.int64)  # of the next instruction
        self.at_barrier, self.waits = np.zeros(threads, np.bool_), np.zeros(threads, np.bool_)
        self.copies: list[deque[list[tuple[Array, Array]]]] = [deque([[]]) for _ in range(threads // 32)]
        self.steps: dict[int, Step] = {}
        self.leaders = np.zeros(len(kernel.code) + 1, np.bool_)
        self.leaders[list(kernel.labels.values())] = True

    def run(self) -> None:
        """Executes the block to its end.

        Raises:
            TrapError: See the module.
        """
        end = len(self.kernel.code)
        while True:
            runs = ~(self.at_barrier | self.waits) & (self.place < end)
            if not runs.any():
                if (self.place >= end).all():
                    return
                self._release()
                continue
            place = int(self.place[runs].min())
            self._execute(place, runs & (self.place == place))

    def _release(self) -> None:
        if self.waits.any():
            lines = {self.kernel.code[p].line for p in self.place[self.waits]}
            raise TrapError(f"lanes that never meet, at lines {sorted(lines)}")
        if not self.at_barrier.all() or len(set(self.place.tolist())) != 1:
            raise TrapError("a barrier that not all threads of the block reach")
        self.at_barrier[:] = False
        self.place += 1

    def _execute(self, place: int, mask: Array) -> None:
        """Executes instructions until threads may part or meet."""
        code, everyone = self.kernel.code, bool(mask.all())
        warps = int(mask.reshape(-1, 32).any(1).sum())
        while place < len(code):
            instruction = code[place]
            self.counters.instructions[place] += warps
            active = mask
            if instruction.guard:
                guard = self.registers[instruction.guard]
                active = mask & (~guard if instruction.negated else guard)
            try:
                step = self.steps.get(place)
                if step is None:
                    step = _COMPILERS.get(instruction.operation[0], _arithmetic)(self, place, instruction)
                    self.steps[place] = step
                moved = step(active, everyone and not instruction.guard)
            except TrapError as trap:
                raise TrapError(f"{trap}; line {instruction.line}: {'.'.join(instruction.operation)}") from None
            if moved is not None:
                moved(mask, active, place)
                return
            place += 1
            if self.leaders[place]:
                break
        self.place[mask] = place

    def meet(self, active: Array, place: int, needed: Array) -> Array:
        """Holds the lanes of warps that are not complete yet; returns those of the others.

        Args:
            active: Lanes that are there now.
            place: Of the instruction.
            needed: Lanes of each warp that it takes, ``[T]``.
        """
        there = active | (self.waits & (self.place == place))
        complete = np.repeat((there | ~needed).reshape(-1, 32).all(1), 32)
        self.place[active] = place
        self.waits[there] = True
        ready = there & complete
        self.waits[ready] = False
        return ready

    def read(self, operand: str, kind: str) -> Array:
        """An operand as numbers of a type, one for each thread."""
        dtype = DTYPES[kind]
        register = self.registers.get(operand)
        if register is None:
            register = self.special.get(operand)
        if register is not None:
            if register.dtype == dtype:
                return register
            if register.dtype.itemsize == np.dtype(dtype).itemsize:
                return register.view(dtype)
            return register.astype(dtype)
        return np.full(self.threads, self._constant(operand, kind))

    def _constant(self, operand: str, kind: str) -> Any:
        dtype = np.dtype(DTYPES[kind])
        if operand in self.symbols:
            base = PARAMETERS if operand in self.kernel.parameters else 0
            return dtype.type(self.symbols[operand] + (base if dtype.itemsize == 8 else 0))
        if operand.startswith("0f"):
            return np.uint32(int(operand[2:], 16)).view(np.float32)
        if kind == "pred":
            return np.bool_(int(operand))
        number = int(operand, 0)
        return np.uint64(number & (1 << 8 * dtype.itemsize) - 1).astype(f"u{dtype.itemsize}").view(dtype)

    def write(self, register: str, value: Array, mask: Array, everyone: bool) -> None:
        """Stores numbers in a register, as many bits as both have."""
        to = self.registers[register]
        if value.dtype != to.dtype:
            if value.dtype.itemsize == to.dtype.itemsize:
                value = np.ascontiguousarray(value).view(to.dtype)
            else:
                value = value.astype(to.dtype)
        if everyone:
            to[:] = value
        else:
            np.copyto(to, value, where=mask)

    def address(self, operand: str) -> Array:
        """Of ``[%rd1+16]``."""
        base, _, offset = operand.strip("[]").replace(" ", "").partition("+")
        kind = "u32" if self.kernel.registers.get(base) == "b32" else "u64"
        wide = self.read(base, kind).astype(np.int64)
        return (wide + int(offset or 0)).astype(np.uint64)

    def spaces(self, space: str, addresses: Array, size: int) -> list[tuple[str, Array]]:
        """The spaces that aligned addresses are in, and which of them; a generic address says it itself."""
        if (addresses % np.uint64(size)).any():
            raise TrapError(f"an address that is no multiple of {size}")
        if space != "generic":
            return [(space, np.ones(len(addresses), np.bool_))]
        in_shared = addresses >= np.uint64(SHARED)
        in_parameters = (addresses >= np.uint64(PARAMETERS)) & ~in_shared
        every = ("shared", in_shared), ("param", in_parameters), ("global", ~(in_shared | in_parameters))
        return [(name, own) for name, own in every if own.any()]

    def load(self, space: str, addresses: Array, size: int) -> Array:
        """``[n, size]`` bytes of one space."""
        if space == "global":
            return self.memory.read(addresses, size)
        data, at = self.inside(space, addresses, size)
        if space == "shared" and not self.written[at].all():
            raise TrapError("shared memory that nobody wrote")
        return np.ascontiguousarray(data[at])

    def store(self, space: str, addresses: Array, given: Array) -> None:
        """Stores ``[n, size]`` bytes in one space."""
        if space == "global":
            self.memory.write(addresses, given)
            return
        data, at = self.inside(space, addresses, given.shape[1])
        data[at], self.written[at] = given, True

    def inside(self, space: str, addresses: Array, size: int) -> tuple[Array, Array]:
        """Shared memory or parameters, and the addresses' bytes in them, ``[n, size]``."""
        base = np.uint64({"shared": SHARED, "param": PARAMETERS}[space])
        places = np.where(addresses >= base, addresses - base, addresses).astype(np.int64)
        data = self.shared if space == "shared" else self.parameters
        if places.max() + size > data.size:
            raise TrapError(f"{space} memory beyond its {data.size} bytes")
        return data, places[:, None] + np.arange(size)

    def count(self, place: int, space: str, mask: Array, addresses: Array, size: int) -> None:
        """Counts the sectors, or the conflicts, of an access by the lanes in a mask."""
        if space == "global":
            self.counters.asked[place] += len(addresses) * size
            self.counters.sectors[place] += sectors(addresses, mask)
        if space == "shared":
            self.counters.conflicts[place] += conflicts(addresses, mask, size)


Step = Callable[[Array, bool], Callable[[Array, Array, int], None] | None]


def _arithmetic(block: Block, place: int, instruction: Instruction) -> Step:
    parts, (to, *sources) = instruction.operation, instruction.operands
    if parts[0] == "mov" and (to.startswith("{") or sources[0].startswith("{")):
        return _packed(block, to, sources[0], parts[-1])
    if parts[0] not in ARITHMETIC:
        raise TrapError(f"line {instruction.line}: {'.'.join(parts)} is not known")
    function, kinds = ARITHMETIC[parts[0]], operand_types(parts, len(sources))
    if parts[0] == "cvta" and "shared" in parts:
        into = "to" not in parts

        def change(active: Array, everyone: bool) -> None:
            x = block.read(sources[0], "u64")
            block.write(to, x + np.uint64(SHARED) if into else x - np.uint64(SHARED), active, everyone)

        return change
    kind = DTYPES[result_type(parts)]

    def step(active: Array, everyone: bool) -> None:
        value = function(parts, *(block.read(x, k) for x, k in zip(sources, kinds, strict=True)))
        block.write(to, value.astype(kind, copy=False), active, everyone)

    return step


def _packed(block: Block, to: str, source: str, kind: str) -> Step:
    """mov between a register and several that it consists of."""
    names = [x.strip() for x in (to if to.startswith("{") else source).strip("{}").split(",")]
    part = {"b32": "b16", "b64": "b32"}[kind]

    def unpack(active: Array, everyone: bool) -> None:
        halves = np.ascontiguousarray(block.read(source, kind)).view(DTYPES[part]).reshape(-1, 2)
        for i, name in enumerate(names):
            block.write(name, halves[:, i].copy(), active, everyone)

    def pack(active: Array, everyone: bool) -> None:
        halves = np.stack([block.read(name, part) for name in names], 1)
        block.write(to, np.ascontiguousarray(halves).view(DTYPES[kind]).reshape(-1), active, everyone)

    return unpack if to.startswith("{") else pack


def _load_or_store(block: Block, place: int, instruction: Instruction) -> Step:
    parts = [part for part in instruction.operation if part not in ("volatile", "relaxed", "nc")]
    is_load, kind = parts[0] == "ld", parts[-1]
    space = next((part for part in parts if part in ("global", "shared", "param")), "generic")
    count = next((int(part[1:]) for part in parts if part in ("v2", "v4")), 1)
    register, where = instruction.operands if is_load else instruction.operands[::-1]
    names = [x.strip() for x in register.strip("{}").split(",")]
    size, dtype = SIZES[kind] * count, DTYPES[kind]

    def step(active: Array, everyone: bool) -> None:
        if not active.any():
            return
        addresses = block.address(where)[active]
        bytes_ = np.zeros((len(addresses), size), np.uint8)
        if not is_load:
            given = np.stack([block.read(name, kind)[active] for name in names], 1)
            bytes_ = np.ascontiguousarray(given.astype(dtype, copy=False)).view(np.uint8).reshape(-1, size)
        for name, own in block.spaces(space, addresses, size):
            lanes = active.copy()
            lanes[active] = own
            block.count(place, name, lanes, addresses[own], size)
            if is_load:
                bytes_[own] = block.load(name, addresses[own], size)
            else:
                block.store(name, addresses[own], bytes_[own])
        for i, name in enumerate(names if is_load else ()):
            value = np.zeros(block.threads, dtype)
            value[active] = bytes_.view(dtype).reshape(-1, count)[:, i]
            block.write(name, value, active, everyone)

    return step


def _copy(block: Block, place: int, instruction: Instruction) -> Step:
    """cp.async: done when it is waited for; until then its target counts as not written."""
    what = instruction.operation[2]

    def whole_warps(active: Array) -> list[int]:
        warps = active.reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            raise TrapError("a group of copies that only some lanes of a warp close or wait for")
        return [int(warp) for warp in np.flatnonzero(warps.all(1))]

    def start(active: Array, _: bool) -> None:
        to, source, size = instruction.operands[0], instruction.operands[1], int(instruction.operands[2])
        lanes = np.flatnonzero(active)
        if not len(lanes):
            return
        targets, sources = block.address(to)[active], block.address(source)[active]
        for space, addresses in (("shared", targets), ("global", sources)):
            block.spaces(space, addresses, size)
        block.count(place, "global", active, sources, size)
        _, at = block.inside("shared", targets, size)
        block.written[at] = False
        bytes_ = block.memory.read(sources, size)
        for warp in np.unique(lanes // 32):
            own = lanes // 32 == warp
            block.copies[warp][-1].append((at[own], bytes_[own]))

    def commit(active: Array, _: bool) -> None:
        for warp in whole_warps(active):
            block.copies[warp].append([])

    def wait(active: Array, _: bool) -> None:
        pending = int(instruction.operands[0])
        for warp in whole_warps(active):
            groups = block.copies[warp]
            while len(groups) > pending + 1:
                for at, bytes_ in groups.popleft():
                    block.shared[at], block.written[at] = bytes_, True

    return {"commit_group": commit, "wait_group": wait}.get(what, start)


def _prefetch(block: Block, place: int, instruction: Instruction) -> Step:
    """Changes nothing, but what is asked for must be there."""

    def step(active: Array, _: bool) -> None:
        if active.any():
            block.memory.read(block.address(instruction.operands[0])[active], 1)

    return step


def _branch(block: Block, place: int, instruction: Instruction) -> Step:
    target = block.kernel.labels[instruction.operands[0]]

    def go(mask: Array, active: Array, at: int) -> None:
        block.place[mask] = at + 1
        block.place[active] = target

    return lambda active, everyone: go


def _return(block: Block, place: int, instruction: Instruction) -> Step:
    def leave(mask: Array, active: Array, at: int) -> None:
        block.place[mask] = at + 1
        block.place[active] = len(block.kernel.code)

    return lambda active, everyone: leave


def _barrier(block: Block, place: int, instruction: Instruction) -> Step:
    if "warp" in instruction.operation:
        return _together(block, instruction, instruction.operands[0], lambda ready: None)

    def wait(mask: Array, active: Array, at: int) -> None:
        block.place[mask] = at
        block.at_barrier[mask] = True

    return lambda active, everyone: wait


def _together(block: Block, instruction: Instruction, members: str, body: Callable[[Array], None]) -> Step:
    """An instruction for all lanes of a warp that ``members`` names."""

    def go(mask: Array, active: Array, at: int) -> None:
        lanes = np.arange(block.threads) % 32
        needed = block.read(members, "u32") >> lanes.astype(np.uint32) & 1 != 0
        ready = block.meet(active, at, needed)
        if ready.any():
            body(ready)
            block.place[ready] = at + 1

    if instruction.guard:
        raise TrapError(f"line {instruction.line}: an instruction for a whole warp under a predicate")
    return lambda active, everyone: go


def _shuffle(block: Block, place: int, instruction: Instruction) -> Step:
    to, *rest = instruction.operands
    *outside, a, b, _, members = rest
    mode = instruction.operation[2]

    def body(ready: Array) -> None:
        lane = np.arange(block.threads)
        by = block.read(b, "u32").astype(np.int64)
        source = (lane ^ by) if mode == "bfly" else lane // 32 * 32 + by % 32
        if not ready[source[ready]].all():
            raise TrapError("a shuffle from a lane that is not there")
        block.write(to, block.read(a, "b32")[source % block.threads], ready, False)
        for name in outside:
            block.write(name, np.ones(block.threads, np.bool_), ready, False)

    return _together(block, instruction, members, body)


def _vote(block: Block, place: int, instruction: Instruction) -> Step:
    to, given, members = instruction.operands

    def body(ready: Array) -> None:
        by_warp = (block.read(given, "pred") & ready).reshape(-1, 32).any(1)
        block.write(to, np.repeat(by_warp, 32), ready, False)

    return _together(block, instruction, members, body)


def _matrix(block: Block, place: int, instruction: Instruction) -> Step:
    groups = [[x.strip() for x in operand.strip("{}").split(",")] for operand in instruction.operands]

    def gathered(names: Sequence[str], ready: Array, kind: str) -> Array:
        columns = np.stack([block.read(name, kind)[ready] for name in names], 1)
        return np.ascontiguousarray(columns).reshape(-1, 32, len(names))

    def scattered(names: Sequence[str], values: Array, ready: Array) -> None:
        for i, name in enumerate(names):
            whole = np.zeros(block.threads, values.dtype)
            whole[ready] = values.reshape(-1, len(names))[:, i]
            block.write(name, whole, ready, False)

    def product(ready: Array) -> None:
        a, b = (gathered(names, ready, "b32").view(np.float16) for names in groups[1:3])
        scattered(groups[0], multiply_matrices(a, b, gathered(groups[3], ready, "f32")), ready)

    def transpose(ready: Array) -> None:
        turned = transpose_matrix(gathered(groups[1], ready, "b32").view(np.uint16))
        scattered(groups[0], turned.view(np.uint32), ready)

    body = product if instruction.operation[0] == "mma" else transpose
    return _together(block, instruction, "-1", body)


_COMPILERS: Mapping[str, Callable[[Block, int, Instruction], Step]] = {
    "ld": _load_or_store, "st": _load_or_store, "cp": _copy, "bra": _branch, "ret": _return, "bar": _barrier,
    "shfl": _shuffle, "vote": _vote, "mma": _matrix, "movmatrix": _matrix, "prefetch": _prefetch,
}  # fmt: skip
