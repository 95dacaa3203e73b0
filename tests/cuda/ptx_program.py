"""Reads PTX as nvcc writes it: kernels, their registers and parameters, and instructions."""

from __future__ import annotations

import dataclasses
import re

_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%\w+?)(?:<(\d+)>)?;")
_PARAMETER = re.compile(r"\.param(?: \.align (\d+))? \.(\w+) (\w+)(?:\[(\d+)\])?")
_SHARED = re.compile(r"\.extern \.shared .*? (\w+)\[\];")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|]+")
SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4,
         "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f16x2": 4}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        operation: Its name with all modifiers, in parts: ``("ld", "global", "v2", "f32")``.
        operands: As they stand there.
        guard: The predicate's register, or empty; executed where it is true, or where ``negated``, false.
        line: In the file.
    """

    operation: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str
    negated: bool
    line: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: Without namespaces, with its template arguments' mangled form: how it is told apart in a file.
        registers: Type by name.
        parameters: Bytes by name, in order.
        code: Its instructions.
        labels: The instruction that follows each label.
        shared: Names of the dynamic shared memory.
    """

    name: str
    registers: dict[str, str]
    parameters: dict[str, int]
    code: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: tuple[str, ...]


def kernels_of(text: str) -> dict[str, Kernel]:
    """Returns the kernels of a file, by mangled name.

    Raises:
        ValueError: Something that nvcc was not seen to write.
    """
    shared = tuple(_SHARED.findall(text))
    if ".local" in text:
        raise ValueError("a kernel has something in local memory")
    found = {}
    heads = list(re.finditer(r"\.entry (\w+)\((.*?)\)\n.*?^\{\n", text, re.DOTALL | re.MULTILINE))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    for head, end in zip(heads, ends, strict=True):
        name, parameters = head.groups()
        body = text[head.end() : text.rindex("\n}", head.end(), end)]  # inline assembly has lines of "}" too
        first_line = text.count("\n", 0, head.end()) + 1
        sizes = {p: int(n or 1) * SIZES[kind] for _, kind, p, n in _PARAMETER.findall(parameters)}
        found[name] = _kernel(name, sizes, body, first_line, shared)
    if len(found) != text.count(".entry "):
        raise ValueError("a kernel could not be read")
    return found


def _kernel(name: str, parameters: dict[str, int], body: str, first_line: int, shared: tuple[str, ...]) -> Kernel:
    registers: dict[str, str] = {}
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    scope = 0  # of inline assembly: its registers are its own
    suffix = ""
    for number, raw in enumerate(body.split("\n"), first_line):
        line = raw.split("//")[0].strip()
        if line.startswith("{") and not line.startswith("{%"):
            scope, line = scope + 1, line[1:].strip()
            suffix = f"@{scope}"
        closes = line == "}" or line.endswith((";}", "; }"))
        for statement in filter(None, (part.strip() for part in line.rstrip("}").split(";"))):
            if statement.startswith(".reg"):
                registers |= _declared(statement + ";", suffix)
            elif statement.startswith("."):
                continue  # .pragma, .loc
            elif statement.endswith(":"):
                labels[statement[:-1]] = len(code)
            else:
                code.append(_instruction(statement, number, registers, suffix))
        if closes:
            suffix = ""
    return Kernel(name, registers, parameters, tuple(code), labels, shared)


def _declared(statement: str, suffix: str) -> dict[str, str]:
    names = re.match(r"\.reg \.(\w+)\s+(.*);", statement)
    assert names is not None, statement
    kind, rest = names.groups()
    counted = re.fullmatch(r"(%\w+?)<(\d+)>", rest.strip())
    if counted:
        return {f"{counted[1]}{i}": kind for i in range(int(counted[2]))}
    return {name.strip() + suffix: kind for name in rest.split(",")}


def _instruction(statement: str, number: int, registers: dict[str, str], suffix: str) -> Instruction:
    guard, negated = "", False
    if statement.startswith("@"):
        guard, statement = statement[1:].split(None, 1)
        negated, guard = guard.startswith("!"), guard.lstrip("!")
    operation, *more = statement.split(None, 1)
    operands = tuple(
        re.sub(r"[%\w]+", lambda m: m[0] + suffix if suffix and m[0] + suffix in registers else m[0], operand)
        for operand in _OPERAND.findall(more[0] if more else "")
    )
    return Instruction(tuple(operation.split(".")), operands, guard, negated, number)
