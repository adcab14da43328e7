"""Reads the cost of a step from the text of a compiled TPU module.

The compiler annotates fusions and copies with estimated cycles; this module multiplies them by loop trips.
Pallas kernels and collectives have no estimate; they are listed with their shapes and groups for a roofline.

Conventions of TPU modules:
- An asynchronous collective is a pair of fusions around `AsyncCollectiveStart` and `...Done`. The overlapping
  fusions in between repeat it; it is one transfer, counted at its start. On the sparse cores it is a
  computation called by `call-start` or `custom-call-start`; so may copies be.
- A reduce-scatter is a fusion `all-reduce-scatter` of an all-reduce and a slice.
- The part of a collective between slices is a host `send` and `recv` (`megascale`). Partitions are numbered
  within a slice.
- `backend_config` and `frontend_attributes` of kernels may contain line breaks, and lines that begin with the
  bracket that ends a computation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

_UNKNOWN = 2**63 - 1
_BYTES = {
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("s8", "u8", "pred", "f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz"), 1),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
}
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip
KERNEL = "tpu_custom_call"
_PRODUCTS = ("convolution", "dot")
_SPARSE_CORE_CALLS = ("call-start", "custom-call-start")  # of libtpu 0.0.42 and 0.0.52
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = ")
# Result, opcode, operands and attributes. Types contain brackets, but no name before a round one.
_PARTS = re.compile(r"(.+?) ([\w-]+)\(((?:[^()]|\([^()]*\))*)\)(.*)", re.DOTALL)
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_RENDEZVOUS = '_xla_host_transfer_rendezvous="([^"]*)"'  # key that a `send` shares with its `recv`
_RANGE = re.compile(r"(\d+)(?::(\d+))?")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([0-9,]*)\]")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of the module."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        """Size without padding."""
        return math.prod(self.dims) * _BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line `%name = result opcode(operands), attributes`."""

    name: str
    result: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    text: str

    def find(self, pattern: str) -> str:
        """The first group of a pattern in the attributes; '' without a match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""

    def called(self, key: str) -> str:
        """The computation that an attribute names; '' if there is none."""
        return self.find(rf"\b{key}=\{{?%?([^\s,{{}}]+)")

    @property
    def channel(self) -> str:
        """Channel of a collective; its name if it has none."""
        return self.find(r"channel_id=(\d+)") or self.name

    @property
    def source(self) -> str:
        """JAX's name of the operation that it implements."""
        return self.find('op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      payload: global bytes: the result of an all-gather, the operand of a reduction.
      group: partition ids of one group; for a permute, of one pair. Ids continue from slice to slice.
      overlapped: whether it runs in parallel with other work.
    """

    kind: str
    payload: float
    group: tuple[int, ...]
    overlapped: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel: its name, JAX's name of the operation, and its shapes."""

    name: str
    source: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]


@dataclasses.dataclass
class Cost:
    """The cost of one step on a device.

    Attributes:
      cycles: sum of the compiler's estimates.
      product_cycles: the part of `cycles` in fusions with a matrix product.
      product_flops: operations of these products, two per multiply-add.
      without_estimate: number of fusions without an estimate.
      collectives, kernels: each with its number of runs.
      dynamic_loops: names of loops whose trips depend on data.
    """

    cycles: float = 0
    product_cycles: float = 0
    product_flops: float = 0
    without_estimate: float = 0
    collectives: list[tuple[Collective, float]] = dataclasses.field(default_factory=list)
    kernels: list[tuple[Kernel, float]] = dataclasses.field(default_factory=list)
    dynamic_loops: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Cost, times: float = 1) -> None:
        """Adds `times` times `other`."""
        for name in ("cycles", "product_cycles", "product_flops", "without_estimate"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.collectives += [(item, times * count) for item, count in other.collectives]
        self.kernels += [(item, times * count) for item, count in other.kernels]
        self.dynamic_loops += other.dynamic_loops

    def wire_bytes(self) -> dict[str, float]:
        """Kind of collective → bytes that a device sends."""
        total: dict[str, float] = {}
        for item, count in self.collectives:
            sent = wire_bytes(item.kind, item.payload, len(item.group))
            total[item.kind] = total.get(item.kind, 0.0) + count * sent
        return {kind: total[kind] for kind in COLLECTIVES if total.get(kind)}


def wire_bytes(kind: str, payload: float, devices: int) -> float:
    """Bytes that each of `devices` sends for a collective of `payload` bytes (see `Collective.payload`)."""
    if kind == "collective-permute":
        return payload
    share = (devices - 1) / devices
    return payload * share * (2 if kind == "all-reduce" else 1)


def read(text: str, dynamic_trips: int = 1, costliest_branch: bool = True) -> Cost:
    """The cost of a module.

    Args:
      text: `compiled.as_text()`.
      dynamic_trips: trips of loops whose bound depends on data.
      costliest_branch: whether conditionals take the branch with the most cycles, or that with the fewest.
    """
    reader = _Reader(text, dynamic_trips, costliest_branch)
    return reader.cost(reader.entry)


class _Reader:
    def __init__(self, text: str, dynamic_trips: int, costliest_branch: bool) -> None:
        self._computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        for is_entry, name, lines in _blocks(text):
            self._computations[name] = {item.name: item for item in map(_instruction, lines)}
            self.entry = name if is_entry else self.entry
        self._dynamic_trips = dynamic_trips
        self._taken = max if costliest_branch else min
        counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
        self._devices = max(map(int, counts), default=1)
        self._memo: dict[str, Cost] = {}
        self._products: dict[str, float] = {}
        # Channels of asynchronous collectives, which the fusions between start and done repeat.
        self._started = {
            inner.channel
            for body in self._computations.values()
            if _async_marker(body)
            for inner in body.values()
            if _kind(inner.opcode)
        }

    def cost(self, name: str) -> Cost:
        """The cost of a computation; zero if it is unknown."""
        if name not in self._memo:
            cost = self._memo[name] = Cost()
            body = self._computations.get(name, {})
            for instruction in body.values():
                self._count(cost, instruction, body)
        return self._memo[name]

    def _count(self, cost: Cost, inst: Instruction, body: dict[str, Instruction]) -> None:
        opcode, estimate = inst.opcode, inst.find(r'"estimated_cycles":"?(\d+)')
        known = bool(estimate) and int(estimate) < _UNKNOWN
        flops = self._product_flops(inst, body) if known or opcode in _PRODUCTS else 0.0
        cost.product_flops += flops
        if known:
            cost.cycles += int(estimate)
            cost.product_cycles += int(estimate) if flops else 0
        elif estimate:
            cost.without_estimate += 1
        called = inst.called("calls") or inst.called("to_apply") or inst.called("called_computations")
        if kind := _kind(opcode):
            cost.collectives.append((self._collective(kind, inst, overlapped=opcode.endswith("-start")), 1))
        elif opcode == "custom-call" and f'custom_call_target="{KERNEL}"' in inst.attributes:
            inputs = tuple(shape for name in inst.operands if name in body for shape in body[name].result)
            name = re.sub(r"[.\d]+$", "", inst.name)
            cost.kernels.append((Kernel(name, inst.source, inputs, inst.result), 1))
        elif opcode == "while":
            if (trips := self._trips(inst, body)) is None:
                cost.dynamic_loops.append(inst.source or inst.name)
                trips = self._dynamic_trips
            cost.add(self.cost(inst.called("body")), trips)
        elif opcode == "send" and (between := self._between_slices(inst, body)):
            cost.collectives.append((between, 1))
        elif opcode == "conditional":
            both = (inst.called("true_computation"), inst.called("false_computation"))
            listed = inst.find(r"branch_computations=\{([^}]*)\}") or " ".join(both)
            branches = [self.cost(name) for name in re.findall(r"[^\s,%]+", listed)]
            cost.add(self._taken(branches, key=lambda branch: branch.cycles, default=Cost()))
        elif opcode == "fusion" and called:
            self._count_fusion(cost, called, known)
        elif opcode in ("call", "async-start", *_SPARSE_CORE_CALLS) and called:
            inner = self.cost(called)
            overlapped = [(dataclasses.replace(item, overlapped=True), n) for item, n in inner.collectives]
            if opcode in _SPARSE_CORE_CALLS:  # only the transfers of sparse cores count
                inner = Cost(collectives=overlapped)
            elif opcode == "async-start":
                inner = dataclasses.replace(inner, collectives=overlapped)
            cost.add(inner)

    def _count_fusion(self, cost: Cost, called: str, known: bool) -> None:
        body = self._computations.get(called, {})
        marker = _async_marker(body)
        transfers = [inner for inner in body.values() if _kind(inner.opcode)]
        if not (marker or transfers or known):
            cost.add(self.cost(called))
        for inner in transfers:
            if marker == "AsyncCollectiveDone" or (not marker and inner.channel in self._started):
                continue
            kind = _kind(inner.opcode)
            if kind == "all-reduce" and called.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            cost.collectives.append((self._collective(kind, inner, overlapped=bool(marker)), 1))

    def _trips(self, inst: Instruction, body: dict[str, Instruction]) -> int | None:
        """Trips of a loop; None if its bound is computed."""
        if trips := inst.find(r'known_trip_count"?[:=]\{?"?n"?:"?(\d+)'):
            return int(trips)
        condition = self._computations.get(inst.called("condition"), {})
        bounds = [value for item in condition.values() if (value := _constant(item)) is not None]
        # Counter and bound may both be carried; the counter starts above 0 if trips were peeled off.
        carried = [
            int(index)
            for item in condition.values()
            if item.opcode == "get-tuple-element" and (index := item.find(r"index=(\d+)"))
        ]
        start = body.get(inst.operands[0])
        if start is None or start.opcode != "tuple":
            return max(bounds, default=None)
        values = [_constant(_through_copies(body, start.operands[index])) for index in carried]
        known = bounds + [value for value in values if value is not None]
        if not bounds and len(known) < max(len(carried), 2):
            return None
        return max(known) - min(known) if len(known) > 1 else known[0]

    def _collective(self, kind: str, inst: Instruction, overlapped: bool) -> Collective:
        group = _group(inst.attributes, self._devices)
        results = inst.result
        if inst.opcode.endswith("-start"):
            # (operands, results, contexts): the second half of the arrays.
            arrays = [shape for shape in results if shape.dims]
            results = tuple(arrays[len(arrays) // 2 :])
        payload = sum(shape.bytes for shape in results)
        if kind == "reduce-scatter" and inst.opcode.startswith("reduce-scatter"):
            payload *= len(group)
        return Collective(kind, payload, group, overlapped)

    def _between_slices(self, send: Instruction, body: dict[str, Instruction]) -> Collective | None:
        """The collective between slices that a `send` starts; None for other host transfers."""
        kind = send.find(r'_xla_megascale_transfer_type="(\w+)"')
        target = send.find(r'_xla_megascale_target="\{([\d,:]+)\}')
        own = send.find(_RENDEZVOUS)
        if not kind or not target:
            return None
        slices = sum(int(last or first) - int(first) + 1 for first, last in _RANGE.findall(target))
        name = "collective-permute" if kind == "ONE_TO_ONE" else kind.lower().replace("_", "-")
        payload = send.result[0].bytes * (slices if name == "all-gather" else 1)
        group = tuple(index * self._devices for index in range(slices))
        # Instructions are in order of execution; those before `recv-done` overlap.
        overlapped = False
        for inst in list(body.values())[list(body).index(send.name) :]:
            if inst.opcode == "recv-done" and body[inst.operands[0]].find(_RENDEZVOUS) == own:
                break
            overlapped = overlapped or inst.opcode in ("fusion", "while", "convolution", "dot")
        return Collective(name, payload, group, overlapped)

    def _product_flops(self, inst: Instruction, body: dict[str, Instruction]) -> float:
        """Operations of the products in an instruction; too high for products with batch dimensions."""
        if inst.opcode == "fusion" and (called := inst.called("calls")):
            if called not in self._products:
                inside = self._computations.get(called, {})
                self._products[called] = sum(self._product_flops(inner, inside) for inner in inside.values())
            return self._products[called]
        if inst.opcode not in _PRODUCTS:
            return 0.0
        # (m k) (k n) (m n) is the square of m k n, whatever the layout.
        shapes = [inst.result[0], *(body[name].result[0] for name in inst.operands[:2])]
        return 2 * math.sqrt(math.prod(math.prod(shape.dims) for shape in shapes))


def _blocks(text: str) -> Iterator[tuple[bool, str, list[str]]]:
    """Yields (is entry, name, instructions) of each computation; an instruction may have several lines."""
    header: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if header is None:
            if not line.startswith(" ") and (header := _COMPUTATION.match(line)):
                lines = []
            continue
        if lines and (lines[-1].count('"') - lines[-1].count('\\"')) % 2:  # inside a string
            lines[-1] += "\n" + line
        elif line == "}" or line.startswith("}, execution_thread"):
            yield bool(header[1]), header[2], lines
            header = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += "\n" + line


def _instruction(line: str) -> Instruction:
    name = _INSTRUCTION.match(line)
    assert name is not None
    parts = _PARTS.fullmatch(line, name.end())
    assert parts is not None, line[:80]
    result, opcode, operands, attributes = parts.groups()
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _SHAPE.findall(result)
        if dtype in _BYTES
    )
    names = tuple(re.findall(r"%([^\s,)]+)", operands))
    return Instruction(name[1], shapes, opcode, names, attributes, operands)


def _kind(opcode: str) -> str:
    """The collective that an opcode runs or starts; '' for other opcodes."""
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def _async_marker(body: dict[str, Instruction]) -> str:
    found = (item.find('custom_call_target="(AsyncCollective(?:Start|Done))"') for item in body.values())
    return next(filter(None, found), "")


def _constant(inst: Instruction | None) -> int | None:
    """The value of an integer constant."""
    if inst is None or inst.opcode != "constant" or not re.fullmatch(r"\d+", inst.text.strip()):
        return None
    return int(inst.text)


def _through_copies(body: dict[str, Instruction], name: str) -> Instruction | None:
    inst = body.get(name)
    while inst is not None and inst.opcode in ("copy", "bitcast", "convert") and inst.operands:
        inst = body.get(inst.operands[0])
    return inst


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """Partition ids of the first group, in any of the notations for groups."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes):
        return _mesh_group(match[1], match[2], match[3])
    if match := re.search(r"replica_groups=(\[[^\s]*?\]<=\[[\d,]*\](?:T\([\d,]*\))?)", attributes):
        return tuple(int(i) for i in _iota(match[1])[0])
    if match := re.search(r"(?:source_target_pairs|replica_groups)=\{\{([^}]*)\}", attributes):
        return tuple(int(i) for i in match[1].split(","))
    return tuple(range(devices))


def _iota(text: str) -> np.ndarray:
    """`[8,4]<=[4,8]T(1,0)`: counts up over [4, 8], transposed, then reshaped to [8, 4]."""
    match = re.fullmatch(r"\[([\d,]*)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", text)
    assert match is not None, text
    shape, source = _ints(match[1]), _ints(match[2])
    ids = np.arange(math.prod(source)).reshape(source)
    return (ids.transpose(_ints(match[3])) if match[3] else ids).reshape(shape)


def _mesh_group(axes: str, order: str, grouped: str) -> tuple[int, ...]:
    """`mesh['a'=4,'b'=2] {'b'}`, optionally with `device_ids=([4,2]T(1,0))` and parts of axes, `'a':(2)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if match := re.search(r"device_ids=\(?(\[[\d,]*\])(T\([\d,]*\))?", order):
        ids = _iota(f"[{len(ids)}]<={match[1]}{match[2] or ''}")
    # Axis → (before, part, after), of which `part` is in the group.
    parts = {name: (size, 1, 1) for name, size in sizes.items()}
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped):
        first, size = int(before or 1), int(part or sizes[name])
        parts[name] = (first, size, sizes[name] // (first * size))
    ids = ids.reshape([n for triple in parts.values() for n in triple])
    return tuple(int(i) for i in ids[(0, slice(None), 0) * len(parts)].ravel())


def _ints(text: str) -> Sequence[int]:
    return [int(n) for n in text.split(",") if n]
