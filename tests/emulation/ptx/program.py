"""The text of a PTX kernel, taken apart: instructions with their operands, labels, parameters, register types."""

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Register:
    """A register, special ones included: "%r12", "%tid.x"; "_" takes a result that nobody wants."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: the integer, or the bits of the floating-point number."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or the name of shared memory."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Vector:
    """Several registers in braces, or the two results of `shfl`, which PTX writes as `value|predicate`."""

    elements: "tuple[Operand, ...]"


@dataclass(frozen=True)
class Address:
    base: "Operand"
    offset: int


Operand = Register | Immediate | Symbol | Vector | Address


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "ld.global.v4.b32"
    operands: tuple[Operand, ...]
    predicate: Register | None
    negated: bool  # the predicate
    where: str  # the line of the PTX and, as far as the compiler told, of the kernel's source

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    @cached_property
    def root(self) -> str:
        return self.parts[0]

    @cached_property
    def type(self) -> str:
        return self.parts[-1]


@dataclass(frozen=True)
class Program:
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # -> index of the instruction that follows
    parameters: tuple[tuple[str, str], ...]  # name, type
    registers: dict[str, str]  # name up to its number -> type
    threads: int  # per block

    def register_type(self, name: str) -> str:
        return self.registers[name.rstrip("0123456789")]


def parse(text: str) -> Program:
    """The one kernel in `text`."""
    head, body = re.split(r"^\{\s*$", text, maxsplit=1, flags=re.MULTILINE)
    parameters = tuple((name, kind) for kind, name in re.findall(r"\.param \.(\w+)[^,)]*?(\w+)\s*[,)]", head))
    [threads] = map(int, re.findall(r"\.reqntid (\d+)", head))
    body = re.split(r"^\}\s*$", body, maxsplit=1, flags=re.MULTILINE)[0]

    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, str] = {}
    source, statement = "", ""
    for number, line in enumerate(body.splitlines(), start=head.count("\n") + 2):
        code, _, comment = line.partition("//")
        if code.strip().startswith(".loc"):
            source = f" ({comment.strip()})"
            continue
        statement += " " + code
        while match := re.match(r"\s*[{}]?\s*([$\w]+):", statement):
            labels[match[1]] = len(instructions)
            statement = statement[match.end() :]
        while ";" in statement:
            one, statement = statement.split(";", 1)
            # A brace that opens a statement is a scope (of inline assembly), any other holds a vector.
            one = re.sub(r"^[\s{}]+", "", one).strip()
            if one.startswith(".reg"):
                _, kind, names = one.split(None, 2)
                for name in names.split(","):
                    registers[re.sub(r"<\d+>", "", name).strip().rstrip("0123456789")] = kind.lstrip(".")
            elif one and not one.startswith("."):
                instructions.append(_instruction(one, registers, f"line {number}{source}"))
        if re.fullmatch(r"[\s{}]*", statement):
            statement = ""
    return Program(tuple(instructions), labels, parameters, registers, threads)


def _instruction(text: str, registers: dict[str, str], where: str) -> Instruction:
    [(predicate, opcode, operands)] = re.findall(r"^(?:@(!?\S+)\s+)?(\S+)\s*(.*)", text, re.DOTALL)
    parts = re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", operands)
    return Instruction(
        opcode=opcode,
        operands=tuple(_operand(part.strip(), registers) for part in parts if part.strip()),
        predicate=Register(predicate.lstrip("!")) if predicate else None,
        negated=bool(predicate) and predicate.startswith("!"),
        where=f"{where}: {text}",
    )


def _operand(text: str, registers: dict[str, str]) -> Operand:
    if text[0] == "{":
        return Vector(tuple(_operand(part.strip(), registers) for part in text[1:-1].split(",")))
    if text[0] == "[":
        [(base, offset)] = re.findall(r"^\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+)\s*)?\]$", text)
        return Address(_operand(base, registers), int(offset or "0", 0))
    if "|" in text:
        return Vector(tuple(_operand(part.strip(), registers) for part in text.split("|")))
    if text[0] == "%" or text == "_" or text.rstrip("0123456789") in registers:
        return Register(text)
    if match := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", text):
        return Immediate(int(match[1], 16))
    if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
