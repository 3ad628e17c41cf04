"""What a compiled program needs and sends: memory a device, and collectives by kind.

Memory is what the compiler planned. Collectives are read from the text of the compiled program,
which has the shapes of one device: a loop's count as often as it runs where its trip count stands
in the text, which is so for loops over layers, chunks and tokens.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

_KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of each device, as the compiler planned them.

    Attributes:
        arguments: What goes in.
        outputs: What comes out.
        donated: Arguments that outputs take over.
        temporaries: The room set aside for everything in between, gaps in it included.
        code: The program itself.
        peak: The most that is alive at one time, arguments, outputs and temporaries.
        reserved: What has to be free: arguments, outputs beyond the donated, temporaries, code.
    """

    arguments: int
    outputs: int
    donated: int
    temporaries: int
    code: int
    peak: int
    reserved: int


def memory_of(compiled: Any) -> Memory | None:
    """The memory of a `jax.stages.Compiled`, or None on a platform that does not say."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "donated": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    reserved = sum(parts.values()) - 2 * parts["donated"]
    return Memory(**parts, peak=stats.peak_memory_in_bytes, reserved=reserved)


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s*([KMGT]?)i?B?"
_OUT_OF_MEMORY = (
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)


def out_of_memory(error: BaseException) -> tuple[int | None, int | None] | None:
    """(bytes needed, bytes there are) of a device, where a compiler refuses a program for that.

    Returns:
        Either figure is None where the message does not give it. None for any other error.
    """
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message and "memory" not in message.lower():
        return None
    for pattern in _OUT_OF_MEMORY:
        found = re.search(pattern, message, re.IGNORECASE)
        if found:
            needed, needed_unit, there, there_unit = found.groups()
            return (
                round(float(needed) * _UNITS[needed_unit.upper()]),
                round(float(there) * _UNITS[there_unit.upper()]),
            )
    return (None, None) if "RESOURCE_EXHAUSTED" in message else None


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What a program sends, on each device and in each run.

    Attributes:
        counts: Kind -> how many.
        bytes: Kind -> bytes of the whole arrays: what comes out of a gather, what goes into a
            reduction. A ring sends (n - 1) / n of it, and twice that for an all-reduce.
        unknown_loops: Loops that hold collectives and whose trip count nobody knows; theirs are
            counted once.
    """

    counts: dict[str, int]
    bytes: dict[str, int]
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.$-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.$-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|\b(?:true|false)_computation=%?([\w.$-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def collectives_of(text: str) -> Collectives:
    """Collectives of a compiled program's text (`jax.stages.Compiled.as_text`).

    Raises:
        ValueError: The text has no entry computation.
    """
    computations, entry = _computations(text)
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    unknown: set[str] = set()

    def walk(name: str, times: int, in_unknown: str | None) -> None:
        shapes = {one.name: one.shape for one in computations.get(name, ())}
        for one in computations.get(name, ()):
            kind = one.opcode.removesuffix("-start")
            if kind in _KINDS:
                # The TPU compiler fuses the reduction with the choice of this device's part.
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                counts[kind] = counts.get(kind, 0) + times
                sizes[kind] = sizes.get(kind, 0) + times * _payload(one, shapes)
                unknown.update([in_unknown] if in_unknown else [])
            elif one.opcode == "while":
                trips = _trips(one, computations)
                inside = in_unknown if trips is not None else one.name
                body = re.search(r"\bbody=%?([\w.$-]+)", one.rest)
                walk(body.group(1) if body else "", times * (trips or 1), inside)
            elif not one.opcode.endswith(("-done", "-update")):
                for called in _called(one):
                    walk(called, times, in_unknown)

    walk(entry, 1, None)
    return Collectives(counts, sizes, len(unknown))


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Name -> instructions, and the name of the entry."""
    found: dict[str, list[_Instruction]] = {}
    entry, current = None, ""
    for line in text.splitlines():
        if line[:1] not in (" ", "", "}"):
            head = _COMPUTATION.match(line)
            if head:
                current = head.group(2)
                found[current] = []
                entry = current if head.group(1) else entry
        elif current and (one := _INSTRUCTION.match(line)):
            found[current].append(_Instruction(*one.groups()))
    if entry is None:
        raise ValueError("the text of the program has no ENTRY computation")
    return found, entry


def _called(one: _Instruction) -> Iterator[str]:
    """Computations that an instruction runs once; of a conditional, all branches."""
    for found in _CALLED.finditer(one.rest):
        yield found.group(1)
    for found in _BRANCHES.finditer(one.rest):
        names = found.group(1) or found.group(2)
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    """How often a loop runs: what the compiler noted, or the bound of a counter from 0."""
    noted = _KNOWN_TRIPS.search(loop.rest)
    if noted:
        return int(noted.group(1))
    condition = re.search(r"\bcondition=%?([\w.$-]+)", loop.rest)
    inside = computations.get(condition.group(1), []) if condition else []
    bounds = [
        int(value.group(1))
        for one in inside
        if one.opcode == "constant" and (value := re.match(r"(\d+)\)", one.rest))
    ]
    # Counters of jax start at 0 and go up to, but not including, one constant.
    is_less = any("direction=LT" in one.rest or one.opcode == "fusion" for one in inside)
    return bounds[0] if len(bounds) == 1 and is_less else None


def _payload(one: _Instruction, shapes: dict[str, str]) -> int:
    """Bytes of the whole arrays of a collective."""
    operands = one.rest.split(")", 1)[0].split(",")
    given = sum(
        _bytes(shapes.get(name.strip().split(" ")[-1].lstrip("%"), "")) for name in operands
    )
    made = _bytes(one.shape)
    # The first half of a collective returns its operands beside its results.
    if one.opcode.endswith("-start") and one.opcode != "all-reduce-start":
        made -= given
    return max(given, made)


def _bytes(shape: str) -> int:
    """Bytes of all arrays in the text of a shape."""
    total = 0
    for kind, bits, sizes in _ARRAY.findall(shape):
        count = math.prod(int(size) for size in sizes.split(",") if size)
        total += count * (8 if kind == "pred" else int(bits)) // 8
    return total
