"""CUDA kernels from a `Loop` or a `RowPass`: their text, what builds them, and how they are launched.

The text of a kernel is what loop.cuh or row_pass.cuh in cuda_kernels has, and a structure written here that holds the
operands and does the pointwise work, one line an operation:

    const float t2 = gpugrad::scalar::exp(t1);

half is read and written as half and computed in float, as gpugrad's other kernels do. Each kernel has a form for
aligned operands and one that goes by elements, chosen by addresses and strides; a form is built on its first launch.
Nothing here waits for the device.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy

from gpugrad import backend, kernels
from gpugrad.backend import Array
from gpugrad.compile.kernels import Loop, RowPass
from gpugrad.compile.scalar import Expr, NotExpressible, in_order

HALF, SINGLE, DOUBLE = kernels.DTYPES

# Types in memory, and in registers where they differ.
CUDA = {
    numpy.dtype(name): word
    for name, word in {
        "bool": "bool",
        "int8": "signed char",
        "int16": "short",
        "int32": "int",
        "int64": "long long",
        "uint8": "unsigned char",
        "uint16": "unsigned short",
        "uint32": "unsigned",
        "uint64": "unsigned long long",
        "float16": "__half",
        "float32": "float",
        "float64": "double",
    }.items()
}

# As in row_pass.cuh, totals.cu and sums.cuh.
ROW_THREADS, WARP = 128, 32
TOTAL_MANY, TOTAL_THREADS, TOTAL_COLUMNS = 16, 512, 8
BLOCK = kernels.BLOCK
# Blocks of a kernel with sums: enough for any device, few enough that what they leave is little beside the data. Not by
# the device: the order of a sum would depend on it.
BLOCKS = 2048
BLOCKS_WITHOUT = 1 << 15  # where there is no sum: so many that none is left over long
ROWS_A_BLOCK = 128  # of a RowPass at least
ROWS_A_THREAD = 16  # of a Loop at least, where each block leaves a sum a column
# Of a RowPass, at the most: 4-byte registers that hold rows (with 8 warps of them, as many bytes are under way as
# 4.8 TB/s and 700 ns need, and again as many); those that hold a row, weights and gradients, where more would spill;
# loads under way, each of which has an address; rows of a set; bytes of shared memory that a block has without asking.
HELD, REGISTERS, LOADS, SET, SHARED = 32, 96, 16, 8, 48 * 1024

OPTIONS = ("-std=c++17",)
SOURCES = ("row_pass.cuh", "loop.cuh", "totals.cu")  # of cuda_kernels/, what kernels here are made of


# ---------------------------------------------------------------------------------------------------- expressions

_NAMES = {"and": "both", "or": "either", "not": "opposite"}
_FOR_INTEGERS = frozenset(
    [
        "add",
        "sub",
        "mul",
        "neg",
        "abs",
        "sign",
        "maximum",
        "minimum",
        "where",
        "isnan",
        "isfinite",
        "lt",
        "le",
        "gt",
        "ge",
        "eq",
        "ne",
        "and",
        "or",
        "not",
    ]
)


def register(dtype: Any) -> str:
    """Return the CUDA type that values of a dtype are computed in. Raises NotExpressible for dtypes without one."""
    if dtype not in CUDA:
        raise NotExpressible(f"CUDA code for {dtype}")
    return "float" if dtype == HALF else CUDA[dtype]


def literal(value: Any, dtype: Any) -> str:
    """Return a number as CUDA text, exactly."""
    if dtype.kind == "b":
        return "true" if value else "false"
    kind = register(dtype)
    if dtype.kind in "iu":
        if value == -(2**63):
            return f"({kind})(-9223372036854775807ll - 1)"
        return f"({kind})({int(value)}{'ull' if dtype.kind == 'u' else 'll'})"
    single, number = kind == "float", float(value)
    if math.isnan(number):
        return "__int_as_float(0x7fc00000)" if single else "__longlong_as_double(0x7ff8000000000000ll)"
    if math.isinf(number):
        text = "__int_as_float(0x7f800000)" if single else "__longlong_as_double(0x7ff0000000000000ll)"
        return text if number > 0 else f"(-{text})"
    return f"({number.hex()}{'f' if single else ''})"


def _operation(e: Expr, args: list[str]) -> str:
    if e.fn == "cast":
        (x,) = args
        before = e.args[0].dtype
        if e.dtype.kind == "b":
            return f"{x} != 0"
        if e.dtype == HALF and before != HALF:
            return f"gpugrad::scalar::round_half(float({x}))"
        return f"({register(e.dtype)})({x})"
    kind = e.args[-1].dtype.kind
    if kind != "f" and e.fn not in _FOR_INTEGERS:
        raise NotExpressible(f"CUDA code for {e.fn} of {e.args[-1].dtype}")
    return f"gpugrad::scalar::{_NAMES.get(e.fn, e.fn)}({', '.join(args)})"


def lines(roots: Sequence[Expr], inputs: Callable[[int], str]) -> tuple[list[str], list[str]]:
    """Return CUDA lines that compute expressions, and the name or number that stands for each.

    inputs: from the position of an input to its name, of the type that `register` tells.
    Raises NotExpressible.
    """
    names: dict[int, str] = {}
    out: list[str] = []
    for e in in_order(roots):
        if e.fn == "input":
            register(e.dtype)
            names[id(e)] = inputs(e.value)
        elif e.fn == "const":
            names[id(e)] = literal(e.value, e.dtype)
        else:
            names[id(e)] = name = f"t{len(out)}"
            out.append(f"const {register(e.dtype)} {name} = {_operation(e, [names[id(a)] for a in e.args])};")
    return out, [names[id(e)] for e in roots]


def _block(text: Iterable[str], depth: int) -> str:
    return "".join(f"{'  ' * depth}{line}\n" for line in text)


def _includes(file: str, dtypes: Iterable[Any]) -> str:
    return ("#include <cuda_fp16.h>\n" if HALF in dtypes else "") + kernels.source(file)


def _all_dtypes(roots: Iterable[Expr]) -> set[Any]:
    return {e.dtype for e in in_order(roots)}


# ------------------------------------------------------------------------------------------------- building, launching


class _Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    block: int
    arguments: tuple[Any, ...]

    def run(self) -> None:
        self.kernel(self.grid, (self.block,), self.arguments)


class Bound:
    """Launches with all that they need, to be called any number of times; keeps every buffer alive.

    Each call goes to the stream that is current then. each: the launches, of which the first has the operands among its
    arguments and the others have totals in tables. launches: how many there are.
    """

    def __init__(self, launches: Sequence[_Launch], kept: Any = None) -> None:
        self.each = tuple(launches)
        self.kept = kept  # arrays of which the launches have the addresses only
        self.launches = len(self.each)

    def __call__(self) -> None:
        for launch in self.each:
            launch.run()


@functools.cache
def _built(cupy: Any, text: str, name: str) -> Any:
    return cupy.RawKernel(text, name, options=OPTIONS)


def _number(value: Any, dtype: Any) -> tuple[Any, Any]:
    """Return what a kernel takes for a number from the host or the device: an address, null for none, and a value."""
    if not backend.is_cuda_array(value):
        return numpy.uintp(0), numpy.dtype(dtype).type(value)
    if value.dtype != dtype or value.size != 1:
        raise ValueError(f"a number of dtype {dtype} is wanted, not an array {value.dtype}{value.shape}")
    return value, numpy.dtype(dtype).type(0)


def _step(array: Array, dtype: Any, rows: int, columns: int, what: str) -> int:
    """Return how many elements apart the rows of a (rows, columns) operand are."""
    if array.dtype != dtype or array.size != rows * columns:
        raise ValueError(f"{what}: ({rows}, {columns}) {dtype} is wanted, not {array.shape} {array.dtype}")
    if array.flags.c_contiguous:
        return columns
    if array.ndim == 2 and array.shape == (rows, columns) and (columns == 1 or array.strides[1] == array.itemsize):
        return int(array.strides[0] // array.itemsize)
    if array.ndim == 1 and columns == 1:
        return int(array.strides[0] // array.itemsize)
    raise ValueError(f"{what}: columns next to each other are wanted, not strides {array.strides} of {array.shape}")


def _totals_type() -> Any:
    fields: list[Any] = [("from", numpy.uintp, (TOTAL_MANY,)), ("to", numpy.uintp, (TOTAL_MANY,))]
    fields += [("factor", numpy.float64, (TOTAL_MANY,)), ("chunks", numpy.int64, (TOTAL_MANY,))]
    fields += [("columns", numpy.int64, (TOTAL_MANY,)), ("wide", numpy.int32, (TOTAL_MANY,))]
    return numpy.dtype([*fields, ("begin", numpy.int32, (TOTAL_MANY + 1,)), ("count", numpy.int32)])


class _Total(NamedTuple):
    """Numbers to add up: partial[at + chunk * columns + column] over the chunks, times factor, to an array."""

    at: int
    chunks: int
    columns: int
    factor: float
    to: Array


def _totals(partial: Array, totals: Sequence[_Total]) -> list[_Launch]:
    """Return the launches that add up partial sums, TOTAL_MANY results at a time."""
    out = []
    kernel = _built(backend.cupy(), kernels.source("totals.cu"), "add_totals")
    for start in range(0, len(totals), TOTAL_MANY):
        some = totals[start : start + TOTAL_MANY]
        table = numpy.zeros((), dtype=_totals_type())
        table["count"] = len(some)
        for k, total in enumerate(some):
            table["from"][k] = partial.data.ptr + 8 * total.at
            table["to"][k] = total.to.data.ptr
            table["factor"][k], table["chunks"][k], table["columns"][k] = total.factor, total.chunks, total.columns
            table["wide"][k] = total.to.dtype == DOUBLE
            table["begin"][k + 1] = table["begin"][k] - (-total.columns // TOTAL_COLUMNS)
        out.append(_Launch(kernel, (int(table["begin"][len(some)]),), TOTAL_THREADS, (table,)))
    return out


def _result(array: Array, columns: int, what: str) -> Array:
    if array.dtype not in (SINGLE, DOUBLE) or array.size != columns or not array.flags.c_contiguous:
        raise ValueError(
            f"{what}: {columns} float32 or float64 next to each other are wanted, not {array.dtype}{array.shape}"
        )
    return array


# ------------------------------------------------------------------------------------------------------- RowPass


class RowForm(NamedTuple):
    """How rows lie in a warp (row_pass.cuh): elements of a pack of each matrix, lanes of a row, rows of a set, sets.

    blocks: how many of them a multiprocessor must have registers for; the compiler takes what that leaves.
    """

    packs: tuple[int, ...]
    group: int
    set: int
    sets: int
    blocks: int

    @property
    def rows_a_block(self) -> int:
        return ROW_THREADS // self.group * self.set * self.sets


def _group(units: Sequence[int], least: int) -> int:
    """Return how many lanes share rows of so many packs: as many as possible with no more than a third idle."""
    widest = max(units)
    sizes = [g for g in (1, 2, 4, 8, 16, 32) if g == 1 or g // 2 < widest]
    sizes = [g for g in sizes if g >= min(least, sizes[-1])]
    slots = {g: sum(-(-u // g) * g for u in units) for g in sizes}
    full = [g for g in sizes if slots[g] * 3 <= sum(units) * 4]
    return full[-1] if full else min(reversed(sizes), key=slots.__getitem__)


def row_form(kernel: RowPass, wide: Sequence[bool]) -> RowForm | None:
    """Return how the rows of a kernel lie in a warp, None where they are too wide.

    wide: of each matrix, whether its rows are aligned.
    """
    if not kernel.matrices:
        return None
    dtype = numpy.dtype(kernel.matrices[0][0])
    words = kernels.WIDE[dtype].itemsize // 4
    packs, units = [], []
    for (_, columns), aligned in zip(kernel.matrices, wide, strict=True):
        pack = 16 // dtype.itemsize if aligned and columns * dtype.itemsize % 16 == 0 else 1
        packs.append(pack)
        units.append(columns // pack)
    group = _group(units, 4 if min(packs) > 1 else 8)
    each = [-(-u // group) * pack for u, pack in zip(units, packs, strict=True)]  # elements a lane holds of a row
    row = sum(-(-e * (dtype.itemsize if pack > 1 else 4 * words) // 4) for e, pack in zip(each, packs, strict=True))
    vectors = sum(each[m] for m in kernel.products) * words
    slots = sum(each[m] for m, _ in kernel.back)
    if row + vectors + slots * words > REGISTERS or (slots + len(kernel.sums)) * ROW_THREADS * 8 > SHARED:
        return None
    loads = sum(e // pack for e, pack in zip(each, packs, strict=True))
    most = max(min(HELD // row, LOADS // loads), 1)  # rows that a lane holds at a time
    rows = min(group, SET)
    while rows > most:
        rows //= 2
    sets = min(4, most // rows)
    blocks = 3 if row + vectors + slots * words <= REGISTERS // 2 else 2
    return RowForm(tuple(packs), group, rows, sets, blocks)


def row_pass_text(kernel: RowPass, form: RowForm) -> str:
    """Return the CUDA text of a RowPass in a form; its entry point is `row_pass`. Raises NotExpressible."""
    dtype = numpy.dtype(kernel.matrices[0][0])
    columns = [numpy.dtype(d) for d in kernel.columns]
    scalars = [numpy.dtype(d) for d in kernel.scalars]
    wide = register(dtype)
    first_scalar = len(kernel.products) + len(columns)

    def name(position: int) -> str:
        if position < len(kernel.products):
            return f"z[{position}]"
        if position < first_scalar:
            k = position - len(kernel.products)
            return _loaded(f"given.c{k}", columns[k])
        k = position - first_scalar
        return f"s{k}"

    roots = (*kernel.sums, *(e for _, e in kernel.back), *kernel.outputs)
    body, names = lines(roots, name)
    sums, rest = names[: len(kernel.sums)], names[len(kernel.sums) :]
    back, outputs = rest[: len(kernel.back)], rest[len(kernel.back) :]
    out_dtypes = [e.dtype for e in kernel.outputs]
    dtypes = {dtype, *columns, *scalars, *_all_dtypes(roots)}

    chain = [*body, *(f"if (counted) sums[{s}] += {value};" for s, value in enumerate(sums))]
    chain += [f"r[{b}] = there ? {wide}({value}) : {wide}(0);" for b, value in enumerate(back)]
    chain += [f"if (counted) o{k}[row * o{k}_step] = {value};" for k, value in enumerate(outputs)]
    members, parameters, setting = [], [], []

    def pointer(kind: str, what: str, const: str = "const ") -> None:
        members.append(f"{const}{kind}* {what};")
        members.append(f"long long {what}_step;")
        parameters.append(f"{const}{kind}* {what}, long long {what}_step")
        setting.extend([f"work.{what} = {what};", f"work.{what}_step = {what}_step;"])

    def vector(m: int) -> str:
        return f"gpugrad::rows::Share<A, {form.packs[m]}, {kernel.matrices[m][1]}, GROUP>"

    for m, (_, count) in enumerate(kernel.matrices):
        members.append(f"gpugrad::rows::Rows<T, {form.packs[m]}, {count}, GROUP, SET * SETS> m{m};")
        parameters.append(f"const T* m{m}, long long m{m}_step")
        setting.extend([f"work.m{m}.from = m{m};", f"work.m{m}.step = m{m}_step;"])
    for p, m in enumerate(kernel.products):
        members.append(f"{vector(m)} w{p};")
        parameters.append(f"const T* w{p}, long long w{p}_step")
        setting.append(f"work.w{p}.load(w{p}, w{p}_step);")
    for k, d in enumerate(columns):
        pointer(CUDA[d], f"c{k}")
    for k, d in enumerate(scalars):
        members.append(f"{register(d)} s{k};")
        parameters.append(f"const {CUDA[d]}* s{k}_at, {CUDA[d]} s{k}")
        setting.append(f"work.s{k} = s{k}_at ? ({register(d)})(*s{k}_at) : ({register(d)})(s{k});")
    for k, d in enumerate(out_dtypes):
        pointer(CUDA[d], f"o{k}", "")
    totals = []
    for b, (m, _) in enumerate(kernel.back):
        members.append(f"{vector(m)} g{b};")
        setting.append(f"work.g{b}.clear();")
        totals += [
            f"{vector(m)}::total(slots, partial + (long long)blockIdx.x * {kernel.matrices[m][1]});",
            f"slots += {vector(m)}::COUNT * gpugrad::rows::THREADS;",
            f"partial += (long long)gridDim.x * {kernel.matrices[m][1]};",
        ]
    folds = []
    for b, (m, _) in enumerate(kernel.back):
        folds += [f"g{b}.fold(slots);", f"slots += {vector(m)}::COUNT * gpugrad::rows::THREADS;"]
    slots = " + ".join(f"{vector(m)}::COUNT" for m, _ in kernel.back) or "0"
    loads = [f"m{m}.load(h, row, there);" for m in range(len(kernel.matrices))]
    reads = [f"given.c{k} = c{k}[row * c{k}_step];" for k in range(len(columns))]
    dots = [f"z[{p}] = m{m}.dot(h, w{p});" for p, m in enumerate(kernel.products)]
    adds = [f"m{m}.add(h, r[{b}], g{b});" for b, (m, _) in enumerate(kernel.back)]
    device = "__device__ __forceinline__ void"
    return f"""{_includes("row_pass.cuh", dtypes)}
using T = {CUDA[dtype]};

struct Work {{
  static constexpr int GROUP = {form.group}, SET = {form.set}, SETS = {form.sets};
  static constexpr int PRODUCTS = {len(kernel.products)}, SUMS = {len(kernel.sums)}, BACK = {len(kernel.back)};
  using A = {wide};
  struct Given {{
{_block((f"{CUDA[d]} c{k};" for k, d in enumerate(columns)), 2)}  }};
{_block(members, 1)}  static constexpr int SLOTS = {slots};

  {device} load(int h, long long row, bool there) {{
{_block(loads, 2)}  }}
  {device} read(long long row, Given& given) const {{
{_block(reads, 2)}  }}
  template <int K> {device} dots(int h, A (&z)[K]) {{
{_block(dots, 2)}  }}
  template <int Z, int S, int R> {device} chain(const A (&z)[Z], const Given& given, long long row, bool there,
                                                bool counted, double (&sums)[S], A (&r)[R]) const {{
{_block(chain, 2)}  }}
  template <int R> {device} add(int h, const A (&r)[R]) {{
{_block(adds, 2)}  }}
  {device} fold(double* slots) {{
{_block(folds, 2)}  }}
  {device} totals(const double* slots, double* partial) {{
{_block(totals, 2)}  }}
}};

extern "C" __global__ void __launch_bounds__(gpugrad::rows::THREADS, {form.blocks}) row_pass(
    double* partial, long long rows{"".join(f", {p}" for p in parameters)}) {{
  Work work;
{_block(setting, 1)}  gpugrad::rows::row_pass(work, partial, rows);
}}
"""


def _loaded(name: str, dtype: Any) -> str:
    return f"float({name})" if dtype == HALF else name


class RowPassCode:
    """What launches a RowPass; made by `row_pass`."""

    def __init__(self, kernel: RowPass) -> None:
        self.kernel = kernel
        self.dtype = numpy.dtype(kernel.matrices[0][0])
        self._columns = [numpy.dtype(d) for d in kernel.columns]
        self._scalars = [numpy.dtype(d) for d in kernel.scalars]
        self._size = len(kernel.sums) + sum(kernel.matrices[m][1] for m, _ in kernel.back)
        self._texts: dict[tuple[bool, ...], tuple[RowForm, str]] = {}

    def form(self, wide: Sequence[bool]) -> tuple[RowForm, str]:
        """Return form and text for matrices that are aligned or not."""
        key = tuple(wide)
        if key not in self._texts:
            form = row_form(self.kernel, key)
            assert form is not None  # row_pass asked
            self._texts[key] = form, row_pass_text(self.kernel, form)
        return self._texts[key]

    def blocks(self, rows: int, form: RowForm) -> int:
        """Return how many blocks a pass over so many rows has; on no device depends it."""
        return max(1, min(-(-rows // max(form.rows_a_block, ROWS_A_BLOCK)), BLOCKS))

    def partial(self, rows: int) -> Array:
        """Return a buffer for what blocks leave in a pass over so many rows, or fewer."""
        blocks = max(1, min(-(-rows // ROWS_A_BLOCK), BLOCKS))
        return backend.cupy().empty(max(blocks * self._size, 1), dtype=DOUBLE)

    def bind(
        self,
        matrices: Sequence[Array],
        weights: Sequence[Array],
        columns: Sequence[Array],
        scalars: Sequence[Any],
        outputs: Sequence[Array],
        results: Sequence[tuple[str, int, float, Array]],
        partial: Array | None = None,
    ) -> Bound:
        """Return the launches of a pass over these arrays: the pass, and one that writes the results.

        Arrays as `RowPass` has them, of any distance between rows. scalars: numbers, or arrays of one element of their
        dtype on the device, which the kernel reads. outputs: arrays (rows,) to be written. results: ("sum" or "back",
        which, factor, array) each: the total in float64 times the factor is written to the array, of float32 or
        float64. partial: what `partial` returned for as many rows or more; None allocates it.
        Raises ValueError for operands that do not fit.
        """
        kernel = self.kernel
        rows = int(matrices[0].shape[0])
        steps = [
            _step(x, self.dtype, rows, n, f"matrix {m}")
            for m, (x, (_, n)) in enumerate(zip(matrices, kernel.matrices, strict=True))
        ]
        size = self.dtype.itemsize
        wide = [not x.data.ptr % 16 and not step * size % 16 for x, step in zip(matrices, steps, strict=True)]
        form, text = self.form(wide)
        blocks = self.blocks(rows, form)
        if partial is None:
            partial = self.partial(rows)
        arguments: list[Any] = [partial, rows]
        for x, step in zip(matrices, steps, strict=True):
            arguments += [x, step]
        for p, (w, m) in enumerate(zip(weights, kernel.products, strict=True)):
            arguments += [w, _step(w, self.dtype, kernel.matrices[m][1], 1, f"weight {p}")]
        for k, (c, dtype) in enumerate(zip(columns, self._columns, strict=True)):
            arguments += [c, _step(c, dtype, rows, 1, f"column {k}")]
        for value, dtype in zip(scalars, self._scalars, strict=True):
            arguments += _number(value, dtype)
        for k, (o, e) in enumerate(zip(outputs, kernel.outputs, strict=True)):
            arguments += [o, _step(o, e.dtype, rows, 1, f"output {k}")]
        launches = [_Launch(_built(backend.cupy(), text, "row_pass"), (blocks,), ROW_THREADS, tuple(arguments))]
        places, at = {}, len(kernel.sums) * blocks
        for b, (m, _) in enumerate(kernel.back):
            places[b] = at
            at += blocks * kernel.matrices[m][1]
        totals = []
        for kind, index, factor, to in results:
            count = 1 if kind == "sum" else kernel.matrices[kernel.back[index][0]][1]
            start = index * blocks if kind == "sum" else places[index]
            totals.append(_Total(start, blocks, count, float(factor), _result(to, count, f"{kind} {index}")))
        return Bound(launches + _totals(partial, totals), (partial, totals))

    def __call__(
        self,
        matrices: Sequence[Array],
        weights: Sequence[Array],
        columns: Sequence[Array],
        scalars: Sequence[Any],
        outputs: Sequence[Array],
        results: Sequence[tuple[str, int, float, Array]],
        partial: Array | None = None,
    ) -> None:
        """Launch a pass at once; operands as `bind` takes them."""
        self.bind(matrices, weights, columns, scalars, outputs, results, partial)()


@functools.lru_cache(maxsize=256)
def row_pass(kernel: RowPass) -> RowPassCode | None:
    """Return what launches a RowPass on the device; None for one that CUDA code is not written for.

    That is one without a matrix, with matrices of several dtypes or not of floating point numbers, with an operation
    on integers that expressions.cuh has not (their power, say), with a sum or product back that is not of floating
    point numbers, or too wide: rows, weights and gradients of a lane take REGISTERS registers at the most. With one
    product and one gradient 1,024 columns of float32, or 512 of float64, are not too wide.
    """
    dtypes = {numpy.dtype(d) for d, _ in kernel.matrices}
    if len(dtypes) != 1 or not dtypes <= set(kernels.DTYPES) or any(n < 1 for _, n in kernel.matrices):
        return None
    if any(e.dtype.kind != "f" for e in (*kernel.sums, *(e for _, e in kernel.back))):
        return None
    made = RowPassCode(kernel)
    for wide in (True, False):
        if row_form(kernel, [wide] * len(kernel.matrices)) is None:
            return None
        try:
            made.form([wide] * len(kernel.matrices))
        except (NotExpressible, KeyError):
            return None
    return made


# ---------------------------------------------------------------------------------------------------------- Loop


def loop_pack(kernel: Loop) -> int:
    """Return how many elements a thread works on in the wide form: 16 bytes of the narrowest floating point numbers."""
    full = [numpy.dtype(d) for layout, d in kernel.inputs if layout == "full"] + [e.dtype for e in kernel.outputs]
    sizes = [d.itemsize for d in full if d.kind == "f"] or [d.itemsize for d in full] or [4]
    return min(16 // min(sizes), 8)


def loop_text(kernel: Loop, pack: int) -> str:
    """Return the CUDA text of a Loop by packs of so many elements; its entry point is `loop`. Raises NotExpressible."""
    inputs = [(layout, numpy.dtype(d)) for layout, d in kernel.inputs]
    roots = (*kernel.outputs, *(e for e, _ in kernel.sums))
    reads = {"full": "i{}[k]", "row": "i{}[k]", "column": "i{}", "scalar": "this->s{}"}

    def name(position: int) -> str:
        layout, dtype = inputs[position]
        text = reads[layout].format(position)
        return text if layout == "scalar" else _loaded(text, dtype)

    body, names = lines(roots, name)
    outputs, terms = names[: len(kernel.outputs)], names[len(kernel.outputs) :]
    by_rows = any(over == "columns" for _, over in kernel.sums)
    parameters = ["double* partial", "long long rows", "long long cols", f"int {'across' if by_rows else 'rest'}"]
    members, setting, held = [], [], []
    across: list[str] = []
    load, store, put = [], [], []
    for k, (layout, dtype) in enumerate(inputs):
        kind = CUDA[dtype]
        if layout == "scalar":
            members.append(f"{register(dtype)} s{k};")
            parameters.append(f"const {kind}* i{k}, {kind} i{k}_value")
            setting.append(f"given.s{k} = i{k} ? ({register(dtype)})(*i{k}) : ({register(dtype)})(i{k}_value);")
            continue
        members += [f"const {kind}* i{k}_at;", f"long long i{k}_step;"]
        parameters.append(f"const {kind}* i{k}, long long i{k}_step")
        setting += [f"given.i{k}_at = i{k};", f"given.i{k}_step = i{k}_step;"]
        if layout == "column":
            held.append(f"{kind} i{k};")
            load.append(f"i{k} = this->i{k}_at[row * this->i{k}_step];")
        else:
            held.append(f"gpugrad::Pack<{kind}, N> i{k};")
            offset = "column" if layout == "row" else f"row * this->i{k}_step + column"
            (across if layout == "row" else load).append(f"i{k}.load(this->i{k}_at + {offset});")
    for k, e in enumerate(kernel.outputs):
        kind = CUDA[e.dtype]
        members += [f"{kind}* o{k}_at;", f"long long o{k}_step;"]
        parameters.append(f"{kind}* o{k}, long long o{k}_step")
        setting += [f"given.o{k}_at = o{k};", f"given.o{k}_step = o{k}_step;"]
        held.append(f"gpugrad::Pack<{kind}, N> o{k};")
        body.append(f"o{k}[k] = {outputs[k]};")
        store.append(f"o{k}.store(this->o{k}_at + row * this->o{k}_step + column);")
    counts = {"all": 0, "rows": 0, "columns": 0}
    for (e, over), term in zip(kernel.sums, terms, strict=True):
        number = counts[over]
        counts[over] += 1
        body.append(
            {"all": f"all[{number}]", "rows": f"down[{number}][k]", "columns": f"along[{number}]"}[over]
            + f" += {term};"
        )
        if over == "columns":
            kind = CUDA[e.dtype]
            members.append(f"{kind}* r{number};")
            parameters.append(f"{kind}* r{number}")
            setting.append(f"given.r{number} = r{number};")
            put.append(f"this->r{number}[row] = {kind}(along[{number}]);")
    width = f"16 / {16 // pack}" if pack > 1 else "1"
    dtypes = {*(d for _, d in inputs), *_all_dtypes(roots)}
    narrow = "double" if DOUBLE in dtypes and SINGLE not in dtypes and HALF not in dtypes else "float"
    device = "__device__ __forceinline__ void"
    arrays = "double (&all)[R], double (&down)[S][N], double (&along)[C]"
    call = (
        "row_sums<Work, N>(given, partial, rows, cols, across)"
        if by_rows
        else "loop<Work, N>(given, partial, rows, cols, rest)"
    )
    return f"""{_includes("loop.cuh", dtypes)}
using T = {narrow};  // the narrowest that is computed in
constexpr int N = {width};

struct Given {{
  static constexpr int ALL = {counts["all"]}, ROWS = {counts["rows"]}, COLUMNS = {counts["columns"]};
{_block(members, 1)}}};

template <int N> struct Work : Given {{
{_block(held, 1)}
  {device} across(long long column) {{
{_block(across, 2)}  }}
  {device} load(long long row, long long column) {{
{_block(load, 2)}  }}
  template <int R, int S, int C> {device} element(int k, {arrays}) {{
{_block(body, 2)}  }}
  {device} store(long long row, long long column) const {{
{_block(store, 2)}  }}
  template <int C> {device} put(long long row, const double (&along)[C]) const {{
{_block(put, 2)}  }}
}};

extern "C" __global__ void __launch_bounds__(gpugrad::BLOCK) loop({", ".join(parameters)}) {{
  Given given;
{_block(setting, 1)}  gpugrad::{call};
}}
"""


class LoopCode:
    """What launches a Loop; made by `loop`."""

    def __init__(self, kernel: Loop) -> None:
        self.kernel = kernel
        self._inputs = [(layout, numpy.dtype(d)) for layout, d in kernel.inputs]
        self.pack = loop_pack(kernel)
        self._overs = [over for _, over in kernel.sums]
        self._texts: dict[int, str] = {}

    def text(self, pack: int) -> str:
        """Return the text by packs of so many elements: `pack`, or 1."""
        if pack not in self._texts:
            self._texts[pack] = loop_text(self.kernel, pack)
        return self._texts[pack]

    def sums(self, rows: int, columns: int) -> list[Array]:
        """Return arrays for the sums: shape () over everything, (columns,) over the rows, (rows,) over the columns."""
        shapes = {"all": (), "rows": (columns,), "columns": (rows,)}
        return [backend.cupy().empty(shapes[over], dtype=e.dtype) for e, over in self.kernel.sums]

    def bind(
        self,
        inputs: Sequence[Any],
        outputs: Sequence[Array],
        rows: int,
        columns: int,
        sums: Sequence[Array] | None = None,
    ) -> tuple[Bound, list[Array]]:
        """Return the launches of a loop over these arrays, and the arrays that the sums are written to.

        inputs: as `Loop` has them: "full" of shape (rows, columns), or any shape of as many elements in C order; "row"
        (columns,); "column" (rows,) or (rows, 1), of any distance between rows; "scalar" a number, or an array of one
        element on the device. outputs: arrays to be written, as "full". sums: what `sums` returned; None allocates.
        Two launches where there is a sum over everything or the rows, else one, none for no elements.
        Raises ValueError for operands that do not fit.
        """
        made = self.sums(rows, columns) if sums is None else list(sums)
        if not rows * columns:
            return Bound([_Launch(_Fill(), (), 0, (a,)) for a in made if a.size]), made
        full, aligned, flat = [], True, not {"rows", "columns"} & set(self._overs)
        arguments: list[Any] = []
        for k, ((layout, dtype), value) in enumerate(zip(self._inputs, inputs, strict=True)):
            if layout == "scalar":
                arguments += _number(value, dtype)
                continue
            across = {"full": columns, "row": columns, "column": 1}[layout]
            step = _step(value, dtype, 1 if layout == "row" else rows, across, f"input {k}")
            arguments += [value, step]
            flat &= layout == "full" and (step == columns or rows == 1)
            if layout != "column":
                full.append((value, step if layout == "full" and rows > 1 else 0))
        for k, (out, e) in enumerate(zip(outputs, self.kernel.outputs, strict=True)):
            step = _step(out, e.dtype, rows, columns, f"output {k}")
            arguments += [out, step]
            flat &= step == columns or rows == 1
            full.append((out, step if rows > 1 else 0))
        for array, step in full:
            access = min(16, self.pack * array.itemsize)
            aligned &= not array.data.ptr % access and (flat or not step * array.itemsize % access)
        pack = self.pack if aligned and (flat or columns % self.pack == 0) else 1
        rest = 0
        if flat:  # any matrix of the elements will do
            count = rows * columns
            rows, columns, rest = count // pack, pack, count % pack
            steps = {"full": pack}
            arguments = self._restepped(arguments, steps["full"])
        by_rows = "columns" in self._overs
        if by_rows:
            across = 1
            while across < WARP and across < columns // pack:
                across *= 2
            grid: tuple[int, ...] = (max(1, min(-(-rows // (BLOCK // across)), BLOCKS)),)
            last = across
        else:
            packs = columns // pack
            across = min(packs, BLOCK)
            side = -(-packs // across)
            each = ROWS_A_THREAD if "rows" in self._overs else 1
            most = max(1, (BLOCKS if self._overs else BLOCKS_WITHOUT) // side)
            grid = (side, max(1, min(-(-rows // (BLOCK // across * each)), most)))
            last = rest
        blocks = math.prod(grid)
        for array, over in zip(made, self._overs, strict=True):
            if over == "columns":
                arguments.append(array)
        count_all, count_rows = self._overs.count("all"), self._overs.count("rows")
        chunks = grid[-1]
        size = count_all * blocks + count_rows * chunks * columns
        partial = backend.cupy().empty(max(size, 1), dtype=DOUBLE) if size else numpy.uintp(0)
        kernel = _built(backend.cupy(), self.text(pack), "loop")
        launches = [_Launch(kernel, grid, BLOCK, (partial, rows, columns, numpy.int32(last), *arguments))]
        totals, seen = [], {"all": 0, "rows": 0}
        for array, over in zip(made, self._overs, strict=True):
            if over == "columns":
                continue
            number = seen[over]
            seen[over] += 1
            if over == "all":
                totals.append(_Total(number * blocks, blocks, 1, 1.0, _result(array, 1, "sum")))
            else:
                at = count_all * blocks + number * chunks * columns
                totals.append(_Total(at, chunks, columns, 1.0, _result(array, columns, "sum")))
        if totals:
            launches += _totals(partial, totals)
        return Bound(launches, (partial, totals)), made

    def _restepped(self, arguments: list[Any], step: int) -> list[Any]:
        """Arguments with the distance between rows of a matrix of other shape: two arguments an operand."""
        out = list(arguments)
        kinds = [layout for layout, _ in self._inputs] + ["full"] * len(self.kernel.outputs)
        for k, layout in enumerate(kinds):
            if layout == "full":
                out[2 * k + 1] = step
        return out

    def __call__(
        self,
        inputs: Sequence[Any],
        outputs: Sequence[Array],
        rows: int,
        columns: int,
        sums: Sequence[Array] | None = None,
    ) -> list[Array]:
        """Launch a loop at once and return its sums; operands as `bind` takes them."""
        bound, made = self.bind(inputs, outputs, rows, columns, sums)
        bound()
        return made


class _Fill:
    """Stands for a kernel where there is nothing to add up: writes zero."""

    def __call__(self, _grid: Any, _block: Any, arguments: tuple[Any, ...]) -> None:
        arguments[0].fill(0)


@functools.lru_cache(maxsize=1024)
def loop(kernel: Loop) -> LoopCode | None:
    """Return what launches a Loop on the device; None for one that CUDA code is not written for.

    That is one with an operation on integers that expressions.cuh has not, with sums that are not of float32 or
    float64, or with sums over the rows and over the columns at once.
    """
    overs = {over for _, over in kernel.sums}
    if {"rows", "columns"} <= overs or any(e.dtype not in (SINGLE, DOUBLE) for e, _ in kernel.sums):
        return None
    made = LoopCode(kernel)
    try:
        made.text(made.pack)
    except (NotExpressible, KeyError):
        return None
    return made
