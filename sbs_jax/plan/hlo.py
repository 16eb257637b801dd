"""Cost of one run of a compiled TPU program, read from its optimized HLO text.

The compiler writes `estimated_cycles` beside most operations. Their sum, with loops multiplied by their trip counts, is
its estimate of one chip's computing time. It gives no estimate for communication or for opaque operations (a Pallas
kernel, sorting, random bits), so both are listed separately.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

# The compiler writes larger values for "unknown".
_UNKNOWN = 2**60
# Smaller results are scalars and bookkeeping, which cost next to nothing.
_SMALL = 64 * 1024
_BYTES = {
    **dict.fromkeys(("pred", "s4", "u4", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that take no time themselves: names for values, and copies that overlap with computation.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("call", "while", "conditional", "optimization-barrier", "iota", "send", "recv"),
}
_FREE_CALLS = {
    *("AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast", "Sharding"),
    *("AllocateBuffer", "SliceId", "X64Combine", "X64SplitHigh", "X64SplitLow", "ZeroCrop"),
}

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*->.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BODY = re.compile(r"body=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_INDEX = re.compile(r"index=(\d+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_NETWORK = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips, run `count` times per program run.

    `bytes` is the size of its result on one chip, `moved` the bytes one chip sends (by the usual ring algorithms).
    """

    kind: str
    count: int
    bytes: int
    moved: float
    group: int  # chips in one exchange
    across_slices: bool  # over the data-center network
    overlapped: bool  # with computation
    loop: str | None  # body of the outermost loop it runs in
    arrays: tuple[str, ...]  # result arrays: "bf16[768,2048]"
    op_name: str  # its place in the traced program


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop; `trips` is None if unknown (a decoding loop), and its cycles then count once."""

    body: str
    trips: int | None
    cycles: int  # per trip


@dataclasses.dataclass(frozen=True)
class Program:
    """Cost of one run on one chip; `cycles` is the compiler's estimate."""

    cycles: int
    loops: tuple[Loop, ...]
    without_estimate: Mapping[str, int]  # operation -> number of runs
    collectives: tuple[Collective, ...]

    def by_kind(self) -> dict[str, dict[str, int | float]]:
        """Sums by kind, largest first: {"all-gather": {"count": 12, "bytes": .., "moved": ..}, ..}."""
        found: dict[str, dict[str, int | float]] = {}
        for one in self.collectives:
            total = found.setdefault(one.kind, {"count": 0, "bytes": 0, "moved": 0.0})
            total["count"] += one.count
            total["bytes"] += one.count * one.bytes
            total["moved"] += one.count * one.moved
        return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    root: bool
    line: str


_Computation = dict[str, _Instruction]


def array_bytes(shape: str) -> int:
    """Sums the bytes of all arrays in an HLO shape: 12,288 for "(f32[8,128]{1,0:T(8,128)}, bf16[64,64])"."""
    return sum(
        _BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes in _ARRAY.findall(shape)
        if kind in _BYTES
    )


def read(text: str, *, slices: int = 1) -> Program:
    """Reads the costs of an optimized module, `jitted.lower(..).compile().as_text()`, compiled for `slices`."""
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("Got a text without an ENTRY computation; expected an HLO module.")
    loops: dict[str, Loop] = {}
    cycles: dict[str, int] = {}

    def cycles_of(name: str) -> int:
        if name not in cycles:
            cycles[name] = 0
            for one in computations.get(name, {}).values():
                cycles[name] += _estimate(one.line) or 0
                if one.opcode == "while" and (body := _BODY.search(one.line)):
                    inner, trips = cycles_of(body[1]), _trips(one, computations[name], computations)
                    loops[body[1]] = Loop(body[1], trips, inner)
                    cycles[name] += inner * (1 if trips is None else trips)
                elif one.opcode in ("call", "conditional", "async-start"):
                    cycles[name] += sum(cycles_of(called) for called in _CALLED.findall(one.line))
        return cycles[name]

    total = cycles_of(entry)
    without: collections.Counter[str] = collections.Counter()
    found: list[Collective] = []
    seen: set[tuple[str, ...]] = set()

    def walk(name: str, *, times: int, loop: str | None, inside: str | None) -> None:
        """Collects collectives and operations without an estimate; `inside` names the fusion that holds `name`."""
        for one in computations.get(name, {}).values():
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                if inside is not None:
                    # A collective that overlaps with fusions appears in each of them: count it once.
                    key = (kind, _first(_CHANNEL, one.line), _first(_CHAIN, one.line), loop or "")
                    if key[1] and key in seen:
                        continue
                    seen.add(key)
                overlapped = inside is not None or one.opcode.endswith("-start")
                found.append(_collective(kind, one, times=times, loop=loop, overlapped=overlapped))
            elif one.opcode == "send" and (transfer := _NETWORK.search(one.line)):
                kind = transfer[1].lower().replace("_", "-")
                found.append(_collective(kind, one, times=times, loop=loop, overlapped=True, slices=slices))
            elif one.opcode == "while" and (body := _BODY.search(one.line)):
                trips = _trips(one, computations[name], computations) or 1
                walk(body[1], times=times * trips, loop=loop or body[1], inside=inside)
            elif one.opcode == "fusion":
                called = _first(_CALLED, one.line)
                if called.startswith("all-reduce-scatter"):
                    line = next(i.line for i in computations[called].values() if i.opcode == "all-reduce") + one.line
                    scattered = dataclasses.replace(one, line=line)
                    found.append(_collective("reduce-scatter", scattered, times=times, loop=loop, overlapped=False))
                else:
                    walk(called, times=times, loop=loop, inside=called)
            elif one.opcode in ("call", "conditional", "async-start"):
                for called in _CALLED.findall(one.line):
                    nested = called if one.opcode == "async-start" else inside
                    walk(called, times=times, loop=loop, inside=nested)
            if inside is None and _lacks_estimate(one):
                target = _TARGET.search(one.line)
                without[f"{one.opcode} {target[1]}" if target else one.opcode] += times

    walk(entry, times=1, loop=None, inside=None)
    return Program(
        cycles=total,
        loops=tuple(sorted(loops.values(), key=lambda loop: -loop.cycles)),
        without_estimate=dict(without),
        collectives=tuple(found),
    )


def _computations(text: str) -> tuple[dict[str, _Computation], str | None]:
    """Parses the instructions by computation, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if not line.startswith((" ", "\t")):
            header = _HEADER.match(line)
            current = header[2] if header else None
            if header:
                computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            operands = tuple(_OPERAND.findall(line[match.end() :].partition(")")[0]))
            one = _Instruction(match[2], match[3], match[4], operands, match[1] is not None, line)
            computations[current][one.name] = one
    return computations, entry


def _estimate(line: str) -> int | None:
    match = _CYCLES.search(line)
    return int(match[1]) if match and int(match[1]) < _UNKNOWN else None


def _trips(loop: _Instruction, caller: _Computation, computations: Mapping[str, _Computation]) -> int | None:
    """Returns a loop's trip count. libtpu does not write it, so it is read from a condition `counter < constant`.

    None for any other condition (a decoding loop also ends when all rows have ended).
    """
    if match := _TRIPS.search(loop.line):
        return int(match[1])
    condition = computations.get(_first(_CONDITION, loop.line), {})
    body = computations.get(_first(_BODY, loop.line), {})
    if not condition or not body:
        return None
    test, result = _root(condition), _root(body)
    if test.opcode != "compare" or "direction=LT" not in test.line:
        return None
    counter, limit = (_trace(condition, name) for name in test.operands)
    if not isinstance(counter, _Element) or not isinstance(limit, int):
        return None
    start = _trace(caller, _tuple_operand(caller, loop.operands[0], counter.index))
    advance = body.get(_tuple_operand(body, result.name, counter.index))
    if not isinstance(start, int) or advance is None or advance.opcode != "add":
        return None
    steps = [value for value in (_trace(body, name) for name in advance.operands) if isinstance(value, int)]
    return -((start - limit) // steps[0]) if len(steps) == 1 and steps[0] > 0 else None


def _root(computation: _Computation) -> _Instruction:
    return next(one for one in computation.values() if one.root)


@dataclasses.dataclass(frozen=True)
class _Element:
    """An element of the tuple that a loop carries."""

    index: int


def _trace(computation: _Computation, name: str) -> int | _Element | None:
    """Traces a scalar to a constant or to an element of the computation's parameter."""
    one = computation.get(name)
    while one is not None and one.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        one = computation.get(one.operands[0])
    if one is not None and one.opcode == "constant":
        match = re.search(r" constant\((-?\d+)\)", one.line)
        return int(match[1]) if match else None
    if one is not None and one.opcode == "get-tuple-element":
        source = computation.get(one.operands[0])
        if source is not None and source.opcode == "parameter":
            return _Element(int(_first(_INDEX, one.line)))
    return None


def _tuple_operand(computation: _Computation, name: str, index: int) -> str:
    """Returns the name of an element of a tuple made in the computation, else ""."""
    one = computation.get(name)
    return one.operands[index] if one is not None and one.opcode == "tuple" else ""


def _first(pattern: re.Pattern[str], line: str) -> str:
    match = pattern.search(line)
    return match[1] if match else ""


def _lacks_estimate(one: _Instruction) -> bool:
    if one.opcode in _FREE or one.opcode.endswith(("-start", "-done", "-update")) or _estimate(one.line) is not None:
        return False
    if one.opcode.removesuffix("-start") in COLLECTIVES:
        return False
    if one.opcode == "custom-call":
        return _first(_TARGET, one.line) not in _FREE_CALLS
    if one.opcode == "fusion" and (one.name.startswith("async-collective") or "all-reduce-scatter" in one.line):
        return False
    return array_bytes(one.shape) >= _SMALL


def _collective(
    kind: str,
    one: _Instruction,
    *,
    times: int,
    loop: str | None,
    overlapped: bool,
    slices: int | None = None,
) -> Collective:
    """Sizes one exchange; `slices` counts those on the data-center network, None means within a slice."""
    shape = _result_shape(one)
    size = array_bytes(shape)
    group = slices or _group_size(one.line)
    if kind == "collective-permute":
        share = 1.0
    elif kind == "all-reduce":
        share = 2 * (group - 1) / group
    elif kind == "reduce-scatter":
        share = group - 1.0
    else:
        share = (group - 1) / group
    return Collective(
        kind=kind,
        count=times,
        bytes=size,
        moved=size * share,
        group=group,
        across_slices=slices is not None,
        overlapped=overlapped,
        loop=loop,
        arrays=tuple(f"{kind}[{sizes}]" for kind, sizes in _ARRAY.findall(shape)),
        op_name=_first(_OP_NAME, one.line),
    )


def _result_shape(one: _Instruction) -> str:
    """Returns the result of an asynchronous start (operand, result, ..), or the value of a send (value, ..)."""
    if one.opcode == "send":
        return _parts(one.shape)[0]
    if one.opcode.endswith("-start") and one.opcode != "all-reduce-start":
        return _parts(one.shape)[1]
    return one.shape


def _parts(shape: str) -> list[str]:
    """Splits a tuple's shape at its top level."""
    parts, depth, start = [], 0, 1
    for index, letter in enumerate(shape):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(shape[start:index])
            start = index + 1
            if depth == 0:
                break
    return parts


def _group_size(line: str) -> int:
    """Counts the chips that exchange with one another.

    HLO writes four chips in two pairs in three ways: `replica_groups={{0,1},{2,3}}`, `[2,2]<=[4]` (an iota, perhaps
    transposed) and `mesh['a'=2,'b'=2] {'b'}`, where `'b':(1)2` is part of an axis.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
        chosen = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in chosen)
    return 1
