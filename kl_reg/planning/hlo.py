"""What a compiled program moves, read from its HLO text: collectives by kind, and bytes of device memory.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs, where the loop's condition
compares a counter with a constant. All numbers are of one device.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
         "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8,
         "f8e5m2": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_MOVES_NOTHING = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call",
                  "after-all", "iota", "partition-id", "replica-id", "copy-done", "slice-done", "optimization-barrier"}


class Instruction(NamedTuple):
    """One line of HLO text; `shape` is its result's, `rest` what follows the operands."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def called(self) -> list[str]:
        """Computations that run inside this instruction, but for a loop's condition."""
        names = re.findall(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", self.rest)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        return names + ([name.strip(" %") for name in branches[1].split(",")] if branches else [])


class Module(NamedTuple):
    """Computations by name, each its instructions by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


class Collective(NamedTuple):
    """One collective instruction: its `kind`, the `bytes` of its whole payload (of an all-gather what comes out, of a
    reduce-scatter what goes in), the partitions of each of its `groups` [n, size], and how many `times` it runs. Of
    what slices exchange through their runtime, groups are [0, slices]."""

    kind: str
    bytes: int
    groups: np.ndarray
    times: int


class Traffic(NamedTuple):
    """Of one run of a program: its collectives; bytes read and written in device memory; and the loops whose number of
    turns is unknown, which count once."""

    collectives: list[Collective]
    memory: float
    unknown: list[str]


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` gives.

    Raises:
        ValueError: it is no HLO module.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            found = _INSTRUCTION.match(line) if current is not None else None
            if found:
                instruction = _instruction(bool(found[1]), found[2], found[3])
                current[instruction.name] = instruction
            continue
        found = _COMPUTATION.match(line)
        if found:
            current = computations.setdefault(found[2], {})
            entry = found[2] if found[1] else entry
    if entry is None:
        raise ValueError("no HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(root, name, text) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    end = _closing(text, start)
    operands = tuple(re.findall(r"%([\w.\-]+)", text[start:end])) or tuple(
        part.split()[-1] for part in text[start + 1:end].split(",") if part.strip())
    return Instruction(name, shape, text[:start], operands, text[end + 1:], root)


def _closing(text, start):
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"no HLO: a parenthesis stays open in {text[:80]!r}")


def arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """Bytes of each array of a shape, and whether it lies in device memory (and not in memory space 1 or above, which
    are on the chip)."""
    for kind, sizes, layout in _ARRAY.findall(shape):
        if kind in _BITS:
            count = int(np.prod([int(size) for size in sizes.split(",") if size], dtype=np.int64))
            yield -(-count * _BITS[kind] // 8), "S(" not in layout


def _size(shape):
    return sum(size for size, _ in arrays(shape))


def groups(rest: str) -> np.ndarray:
    """The partitions of each group [n, size] of a collective, in any of the notations of HLO: {{0,1},{2,3}},
    [2,2]<=[4], [2,2]<=[2,2]T(1,0), and mesh['x'=2,'y'=2] {'y'}; of a permute its pairs.

    Raises:
        ValueError: there are none.
    """
    pairs = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest)
    if pairs:
        return np.array([[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", pairs[1])])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if iota:
        return _iota(iota[2]).reshape(_numbers(iota[1]))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", rest)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = np.arange(np.prod(list(axes.values()))) if mesh[2] is None else _iota(mesh[2]).ravel()
        inner = re.findall(r"'(\w+)'", mesh[3])
        order = [list(axes).index(name) for name in [*(name for name in axes if name not in inner), *inner]]
        size = int(np.prod([axes[name] for name in inner]))
        return ids.reshape(list(axes.values())).transpose(order).reshape(-1, size)
    raise ValueError(f"no replica groups that are known in {rest[:200]!r}")


def _iota(text):
    """[4,2]T(1,0): the numbers from 0 on in that shape, transposed."""
    shape, _, order = text.partition("T")
    numbers = np.arange(np.prod(_numbers(shape))).reshape(_numbers(shape))
    return numbers.transpose(_numbers(order)) if order else numbers


def _numbers(text):
    return [int(x) for x in re.findall(r"\d+", text)]


def turns(module: Module, loop: Instruction) -> int | None:
    """How often a loop's body runs at most: the constant that its condition compares a counter with."""
    condition = module.computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    known = re.search(r'known_trip_count\D+(\d+)', loop.rest)
    if known:
        return int(known[1])
    found = [_limit(condition, line) for line in condition.values() if line.op == "compare"]
    return max((limit for limit in found if limit is not None), default=None)


def _limit(condition, compare):
    """Of a comparison of scalars, the constant."""
    sides = [condition[name] for name in compare.operands if name in condition]
    constants = [side for side in sides if side.op == "constant" and re.match(r"[su]\d+\[\]", side.shape)]
    direction = re.search(r"direction=(\w+)", compare.rest)[1]
    if len(constants) != 1 or direction not in ("LT", "GT", "NE"):
        return None
    return int(constants[0].operands[0])


def traffic(module: Module) -> Traffic:
    """All that one run of the program moves."""
    found, unknown, chains = [], [], set()

    def add(name, line, times):
        """What is overlapped with other work stands in several fusions, which have its chain in common."""
        between = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', line.rest) if line.op == "send" else None
        if between:
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.rest)[1].lower().replace("_", "-")
            size = _size(module.computations[name][line.operands[0]].shape)
            found.append(Collective(kind, size, np.empty((0, _members(between[1])), int), times))
        kind, chain = line.op.removesuffix("-start"), re.search(r'chain_id="(\d+)"', line.rest)
        if kind in KINDS and not (chain and chain[1] in chains):
            found.append(Collective(kind, _payload(module.computations[name], line, kind), groups(line.rest), times))
            chains.update([chain[1]] if chain else [])

    def walk(name, times, fused):
        memory = 0.0
        for line in module.computations[name].values():
            add(name, line, times)
            if line.op == "while":
                count = turns(module, line)
                unknown.extend([line.name] if count is None else [])
                memory += walk(re.search(r"body=%?([\w.\-]+)", line.rest)[1], times * (count or 1), fused)
                continue
            if not fused:
                memory += times * touched(module, module.computations[name], line)
            inside = fused or line.op not in ("call", "conditional")
            memory += sum(walk(called, times, inside) for called in line.called())
        return memory

    memory = walk(module.entry, 1, False)
    return Traffic(found, memory, unknown)


def _members(text):
    """How many there are in 1,2,5 or 1:4."""
    return sum(int(part.split(":")[-1]) - int(part.split(":")[0]) + 1 for part in text.split(","))


def _payload(computation, line, kind):
    """Bytes; a start's result holds its operands as well, so its own are those of the operands, times what the kind
    makes of them."""
    members = groups(line.rest).shape[1]
    if line.op == kind:
        return _size(line.shape) * (members if kind == "reduce-scatter" else 1)
    operands = sum(_size(computation[name].shape) for name in line.operands if name in computation)
    return operands * (members if kind == "all-gather" else 1)


def touched(module: Module, computation: dict[str, Instruction], line: Instruction) -> float:
    """Bytes of device memory that an instruction outside of fusions reads and writes; of slices what is cut out, of an
    update in place what is written."""
    if line.op in _MOVES_NOTHING or line.op.endswith("-done"):
        return 0.0
    if line.op in ("copy-start", "slice-start"):       # source and target, in either order
        ends = list(arrays(line.shape))[:2]
        return float(min(size for size, _ in ends) * sum(memory for _, memory in ends))
    if line.op == "fusion":
        called = module.computations[line.called()[0]]
        inputs = [own.name for own in called.values() if own.op == "parameter"]
        return sum(_read(module, line.called()[0], name) for name in inputs) + _written(module, line.called()[0])
    if line.op == "dynamic-update-slice":
        return 2.0 * _in_memory(computation[line.operands[1]].shape)
    if line.op in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _in_memory(line.shape)
    return float(_in_memory(line.shape) + sum(_in_memory(computation[name].shape) for name in line.operands
                                              if name in computation))


def _in_memory(shape):
    return sum(size for size, memory in arrays(shape) if memory)


def _read(module, name, value) -> float:
    """Bytes that a fused computation reads of one of its parameters, or of what is the same in another shape."""
    computation, read = module.computations[name], 0.0
    whole = _in_memory(computation[value].shape)
    for user in computation.values() if whole else ():
        if value not in user.operands or user.op == "tuple":
            continue
        place = user.operands.index(value)
        if user.op in ("dynamic-slice", "slice", "gather") and place == 0:
            read += _size(user.shape)
        elif user.op == "bitcast":
            read += _read(module, name, user.name)
        elif user.op == "fusion":
            read += _read(module, user.called()[0], _parameter(module, user.called()[0], place))
        elif user.op != "dynamic-update-slice" or place:
            return float(whole)
    return min(read, float(whole))


def _parameter(module, name, place):
    return next(line.name for line in module.computations[name].values()
                if line.op == "parameter" and int(line.operands[0]) == place)


def _written(module, name, value=None) -> float:
    """Bytes that a fused computation writes: of its result, or of `value`."""
    computation = module.computations[name]
    line = next(line for line in computation.values() if line.root) if value is None else computation[value]
    if line.op == "tuple":
        return sum(_written(module, name, part) for part in line.operands)
    if line.op == "bitcast":
        return _written(module, name, line.operands[0])
    if line.op == "fusion":
        return _written(module, line.called()[0])
    if line.op == "parameter" or not _in_memory(line.shape):
        return 0.0
    return float(_size(computation[line.operands[1]].shape) if line.op == "dynamic-update-slice" else _size(line.shape))
