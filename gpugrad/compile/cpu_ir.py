"""A writer of LLVM IR: vectors of lanes as Python values, so that a formula in `cpu_math` reads as one.

Every operation on a `Vector` appends one instruction to its `Code`. Vectors are explicit in the IR: the code is
vectorised because it is written so, whatever an optimiser makes of loops, and no fast-math flag is needed or set:
products and sums happen in the order written, and NaN and infinities are what IEEE 754 says.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy

# Kind of a lane, as numpy.dtype.str[1:], and its LLVM type. In memory a bool is a byte.
ELEMENTS = {
    "b1": "i1",
    **{f"{sign}{size}": f"i{8 * size}" for sign in "iu" for size in (1, 2, 4, 8)},
    "f4": "float",
    "f8": "double",
}
Operand = Any  # a Vector or a Python number


class Unsupported(Exception):
    """A kernel holds a dtype or an operation that is not printed here."""


def kind_of(dtype: Any) -> str:
    """Return the kind of a lane of a dtype. Raises Unsupported, such as for float16."""
    kind: str = numpy.dtype(dtype).str[1:]
    if kind not in ELEMENTS or not numpy.dtype(dtype).isnative:
        raise Unsupported(f"dtype {numpy.dtype(dtype)}")
    return kind


def size_of(kind: str) -> int:
    """Return the bytes an element has in memory."""
    return int(kind[1])


class Vector:
    """Lanes of one kind; with one lane, a scalar."""

    __slots__ = ("code", "kind", "lanes", "name")

    def __init__(self, code: "Code", kind: str, lanes: int, name: str) -> None:
        self.code, self.kind, self.lanes, self.name = code, kind, lanes, name

    @property
    def type(self) -> str:
        element = ELEMENTS[self.kind]
        return element if self.lanes == 1 else f"<{self.lanes} x {element}>"

    @property
    def typed(self) -> str:
        return f"{self.type} {self.name}"

    @property
    def is_float(self) -> bool:
        return self.kind[0] == "f"

    def like(self, value: Operand) -> "Vector":
        """Return a number as a constant of this kind; a Vector as it is."""
        return value if type(value) is Vector else self.code.number(value, self.kind, self.lanes)

    def _binary(self, floats: str, ints: str, other: Operand) -> "Vector":
        y = self.like(other)
        return self.code.emit(self.kind, self.lanes, f"{floats if self.is_float else ints} {self.typed}, {y.name}")

    def __add__(self, other: Operand) -> "Vector":
        return self._binary("fadd", "add", other)

    def __sub__(self, other: Operand) -> "Vector":
        return self._binary("fsub", "sub", other)

    def __rsub__(self, other: Operand) -> "Vector":
        return self.like(other) - self

    def __mul__(self, other: Operand) -> "Vector":
        return self._binary("fmul", "mul", other)

    def __truediv__(self, other: Operand) -> "Vector":
        return self._binary("fdiv", "", other)

    def __rtruediv__(self, other: Operand) -> "Vector":
        return self.like(other) / self

    def __neg__(self) -> "Vector":
        if self.is_float:
            return self.code.emit(self.kind, self.lanes, f"fneg {self.typed}")
        return self.like(0) - self

    def __and__(self, other: Operand) -> "Vector":
        return self._binary("", "and", other)

    def __or__(self, other: Operand) -> "Vector":
        return self._binary("", "or", other)

    def __xor__(self, other: Operand) -> "Vector":
        return self._binary("", "xor", other)

    def __lshift__(self, other: Operand) -> "Vector":
        return self._binary("", "shl", other)

    def __rshift__(self, other: Operand) -> "Vector":
        return self._binary("", "ashr", other)

    def _compare(self, name: str, other: Operand) -> "Vector":
        y = self.like(other)
        if self.is_float:
            text = f"fcmp {'une' if name == 'ne' else 'o' + name}"
        else:
            text = f"icmp {name if name in ('eq', 'ne') else ('s' if self.kind[0] == 'i' else 'u') + name}"
        return self.code.emit("b1", self.lanes, f"{text} {self.typed}, {y.name}")

    def __lt__(self, other: Operand) -> "Vector":
        return self._compare("lt", other)

    def __le__(self, other: Operand) -> "Vector":
        return self._compare("le", other)

    def __gt__(self, other: Operand) -> "Vector":
        return self._compare("gt", other)

    def __ge__(self, other: Operand) -> "Vector":
        return self._compare("ge", other)

    def eq(self, other: Operand) -> "Vector":
        return self._compare("eq", other)

    def ne(self, other: Operand) -> "Vector":
        return self._compare("ne", other)

    def isnan(self) -> "Vector":
        return self.code.emit("b1", self.lanes, f"fcmp uno {self.typed}, {self.name}")

    def bits(self) -> "Vector":
        """Return the same bits as signed integers."""
        kind = "i" + self.kind[1]
        made = Vector(self.code, kind, self.lanes, "")
        return self.code.emit(kind, self.lanes, f"bitcast {self.typed} to {made.type}")

    def from_bits(self) -> "Vector":
        """Return the same bits as floating-point numbers."""
        kind = "f" + self.kind[1]
        made = Vector(self.code, kind, self.lanes, "")
        return self.code.emit(kind, self.lanes, f"bitcast {self.typed} to {made.type}")

    def to(self, kind: str) -> "Vector":
        """Convert, as NumPy's astype; NaN becomes the integer 0 and what does not fit the nearest that does."""
        here = self.kind
        if here == kind:
            return self
        code, made = self.code, Vector(self.code, kind, self.lanes, "")
        if kind == "b1":
            return self.ne(0)
        if here[0] == "f" and kind[0] == "f":
            verb = "fpext" if kind == "f8" else "fptrunc"
        elif here[0] == "f":
            verb = "fptosi" if kind[0] == "i" else "fptoui"
            return code.call(f"llvm.{verb}.sat.{_suffix(made)}.{_suffix(self)}", kind, [self])
        elif kind[0] == "f":
            verb = "sitofp" if here[0] == "i" else "uitofp"
        elif size_of(kind) == size_of(here) and here != "b1":
            return Vector(code, kind, self.lanes, self.name)
        elif size_of(kind) < size_of(here):
            verb = "trunc"
        else:
            verb = "sext" if here[0] == "i" else "zext"
        return code.emit(kind, self.lanes, f"{verb} {self.typed} to {made.type}")

    def splat(self, lanes: int) -> "Vector":
        """Return a scalar in every lane."""
        if lanes == self.lanes:
            return self
        made = Vector(self.code, self.kind, lanes, "")
        first = self.code.emit(self.kind, lanes, f"insertelement {made.type} poison, {self.typed}, i32 0")
        return self.code.shuffle(first, first, [0] * lanes)

    def lane(self, k: int) -> "Vector":
        """Return one lane."""
        if self.lanes == 1:
            return self
        return self.code.emit(self.kind, 1, f"extractelement {self.typed}, i32 {k}")


def _suffix(x: Vector) -> str:
    element = ELEMENTS[x.kind]
    element = {"float": "f32", "double": "f64"}.get(element, element)
    return element if x.lanes == 1 else f"v{x.lanes}{element}"


class Code:
    """The body of one function, as it is written: instructions, blocks, and the declarations they need."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.first: list[str] = []  # allocas: in the entry block, so that they become registers
        self.declarations: dict[str, str] = {}
        self._count = 0
        self._block = "entry"

    def fresh(self) -> str:
        self._count += 1
        return f"%v{self._count}"

    def emit(self, kind: str, lanes: int, text: str) -> Vector:
        """Append an instruction with a result."""
        name = self.fresh()
        self.lines.append(f"  {name} = {text}")
        return Vector(self, kind, lanes, name)

    def number(self, value: Any, kind: str, lanes: int = 1) -> Vector:
        """Return a constant in every lane."""
        if kind == "b1":
            text = "true" if value else "false"
        elif kind[0] == "f":
            rounded = float(numpy.dtype(kind).type(value))
            text = f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
        else:
            text = str(int(value))
        if lanes > 1:
            text = "<" + ", ".join([f"{ELEMENTS[kind]} {text}"] * lanes) + ">"
        return Vector(self, kind, lanes, text)

    def numbers(self, values: Sequence[Any], kind: str) -> Vector:
        """Return a constant with a value for each lane."""
        return Vector(self, kind, len(values), "<" + ", ".join(self.number(v, kind).typed for v in values) + ">")

    def call(self, name: str, kind: str, args: Sequence[Vector], lanes: int | None = None) -> Vector:
        """Call a function that returns a vector (or scalar) of a kind."""
        lanes = args[0].lanes if lanes is None else lanes
        made = Vector(self, kind, lanes, "")
        self.declarations[name] = f"declare {made.type} @{name}({', '.join(a.type for a in args)})"
        return self.emit(kind, lanes, f"call {made.type} @{name}({', '.join(a.typed for a in args)})")

    def intrinsic(self, name: str, *args: Vector) -> Vector:
        """Call an LLVM intrinsic whose result is of the kind of its arguments."""
        return self.call(f"llvm.{name}.{_suffix(args[0])}", args[0].kind, args)

    def each_lane(self, name: str, x: Vector) -> Vector:
        """Call a scalar function for every lane, in a loop through memory: little code."""
        if x.lanes == 1:
            return self.call(name, x.kind, [x])
        place = self.allocate(x.kind, x.lanes)
        self.store(x, place)
        with self.loop(0, self.number(x.lanes, "i8"), 1) as k:
            here = self.at(place, k * size_of(x.kind))
            self.store(self.call(name, x.kind, [self.load(here, x.kind)]), here)
        return self.load(place, x.kind, x.lanes)

    def rarely(self, condition: Vector, other: Callable[[], Vector], usual: Vector) -> Vector:
        """Return other() where a condition holds, else usual; skip what other writes where no lane needs it."""
        name = self.fresh()[1:]
        some = condition
        if condition.lanes > 1:
            some = self.call(f"llvm.vector.reduce.or.{_suffix(condition)}", "b1", [condition], 1)
        some = self.call("llvm.expect.i1", "b1", [some, self.number(False, "b1")])
        before = self._block
        self.lines.append(f"  br {some.typed}, label %{name}.then, label %{name}.end")
        self.open(f"{name}.then")
        mixed = self.select(condition, other(), usual)
        after = self._block
        self.block(f"{name}.end")
        pairs = f"[ {usual.name}, %{before} ], [ {mixed.name}, %{after} ]"
        return self.emit(usual.kind, usual.lanes, f"phi {usual.type} {pairs}")

    def select(self, condition: Vector, x: Operand, y: Operand) -> Vector:
        """Return x where condition holds, else y; one of them may be a number."""
        a = x if type(x) is Vector else y.like(x)
        b = a.like(y)
        return self.emit(a.kind, a.lanes, f"select {condition.typed}, {a.typed}, {b.typed}")

    def fma(self, x: Vector, y: Operand, z: Operand) -> Vector:
        """Return x * y + z, in one rounding where the processor has an instruction for it."""
        return self.intrinsic("fmuladd", x, x.like(y), x.like(z))

    def shuffle(self, x: Vector, y: Vector, places: Sequence[int]) -> Vector:
        """Return the lanes of x followed by y at `places`."""
        if len(places) == 1:
            return (x if places[0] < x.lanes else y).lane(places[0] % x.lanes)
        mask = ", ".join(f"i32 {p}" for p in places)
        return self.emit(x.kind, len(places), f"shufflevector {x.typed}, {y.typed}, <{len(places)} x i32> <{mask}>")

    def total(self, x: Vector) -> Vector:
        """Return the sum of the lanes, by halves."""
        while x.lanes > 1:
            half = x.lanes // 2
            x = self.shuffle(x, x, range(half)) + self.shuffle(x, x, range(half, x.lanes))
        return x

    # ------------------------------------------------------------------------------------------------- memory

    def allocate(self, kind: str, count: int) -> str:
        """Return a pointer to room for `count` elements on the stack, aligned for any vector."""
        name = self.fresh()
        element = "i8" if kind == "b1" else ELEMENTS[kind]
        self.first.append(f"  {name} = alloca [{count} x {element}], align 64")
        return name

    def at(self, pointer: str, *offsets: Vector | int) -> str:
        """Return a pointer moved by bytes."""
        for offset in offsets:
            text = f"i64 {offset}" if isinstance(offset, int) else offset.typed
            name = self.fresh()
            self.lines.append(f"  {name} = getelementptr i8, ptr {pointer}, {text}")
            pointer = name
        return pointer

    def load(self, pointer: str, kind: str, lanes: int = 1, mask: Vector | None = None) -> Vector:
        """Read neighbours; where a mask is given only its lanes, the others become 0."""
        if kind == "b1":
            return self.load(pointer, "u1", lanes, mask).ne(0)
        made = Vector(self, kind, lanes, "")
        if mask is None:
            return self.emit(kind, lanes, f"load {made.type}, ptr {pointer}, align {size_of(kind)}")
        name = f"llvm.masked.load.{_suffix(made)}.p0"
        self.declarations[name] = f"declare {made.type} @{name}(ptr, i32, {mask.type}, {made.type})"
        zero = self.number(0, kind, lanes)
        return self.emit(
            kind, lanes, f"call {made.type} @{name}(ptr {pointer}, i32 {size_of(kind)}, {mask.typed}, {zero.typed})"
        )

    def store(self, x: Vector, pointer: str, mask: Vector | None = None) -> None:
        """Write neighbours, of them those in the mask."""
        if x.kind == "b1":
            x = x.to("u1")
        if mask is None:
            self.lines.append(f"  store {x.typed}, ptr {pointer}, align {size_of(x.kind)}")
            return
        name = f"llvm.masked.store.{_suffix(x)}.p0"
        self.declarations[name] = f"declare void @{name}({x.type}, ptr, i32, {mask.type})"
        self.lines.append(f"  call void @{name}({x.typed}, ptr {pointer}, i32 {size_of(x.kind)}, {mask.typed})")

    def mask(self, count: Vector | int, lanes: int) -> Vector:
        """Return the lanes below `count` (int64)."""
        if isinstance(count, int):
            return self.numbers([k < count for k in range(lanes)], "b1") if lanes > 1 else self.number(count > 0, "b1")
        if lanes == 1:
            return count > 0
        return self.numbers(range(lanes), "i4") < count.to("i4").splat(lanes)

    # ------------------------------------------------------------------------------------------------- blocks

    def block(self, label: str) -> None:
        """Start a block, falling into it from the one before."""
        self.lines.append(f"  br label %{label}")
        self.open(label)

    def open(self, label: str) -> None:
        """Start a block that is branched to."""
        self.lines.append(f"{label}:")
        self._block = label

    @contextmanager
    def loop(self, start: Operand, stop: Vector, step: int) -> Iterator[Vector]:
        """Repeat what is written inside while start, start + step, ... is below stop (int64)."""
        name = self.fresh()[1:]
        begin = stop.like(start)
        before = self._block
        self.block(f"{name}.head")
        index = Vector(self, "i8", 1, f"%{name}.i")
        self.lines.append(f"  {index.name} = phi i64 [ {begin.name}, %{before} ], [ %{name}.next, %{name}.latch ]")
        inside = index < stop
        self.lines.append(f"  br {inside.typed}, label %{name}.body, label %{name}.exit")
        self.open(f"{name}.body")
        yield index
        self.block(f"{name}.latch")
        self.lines.append(f"  %{name}.next = add nsw i64 {index.name}, {step}")
        self.lines.append(f"  br label %{name}.head")
        self.open(f"{name}.exit")

    @contextmanager
    def when(self, condition: Vector) -> Iterator[None]:
        """Do what is written inside if a scalar condition holds; nothing written inside is used after."""
        name = self.fresh()[1:]
        self.lines.append(f"  br {condition.typed}, label %{name}.then, label %{name}.end")
        self.open(f"{name}.then")
        yield
        self.block(f"{name}.end")

    def function(self, name: str, parameters: Sequence[str], bits: int) -> str:
        """Return the module that holds this code as a function, for registers of so many bits."""
        declarations = "\n".join(sorted(self.declarations.values()))
        body = "\n".join([*self.first, *self.lines])
        # without these LLVM splits 512-bit vectors on processors that it thinks slow at them
        width = f'"min-legal-vector-width"="{bits}" "prefer-vector-width"="{bits}"'
        return (
            f"{declarations}\n\ndefine void @{name}({', '.join(parameters)}) #0 {{\nentry:\n{body}\n  ret void\n}}\n\n"
            f"attributes #0 = {{ noinline nounwind {width} }}\n"
        )
