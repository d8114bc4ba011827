"""The text of a kernel: LLVM IR for a Loop or a RowPass, over one range of rows.

Both functions take first the range, then every operand, then the room for their sums: for an array a pointer and the
bytes between neighbours on its first axis, for a number the number. Sums go to a row of `partials` (float64, zero on
entry) that belongs to the range alone, so that ranges can run in any order on any thread.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpugrad.compile import cpu_math
from gpugrad.compile.cpu_ir import ELEMENTS, Code, Unsupported, Vector, kind_of, size_of
from gpugrad.compile.kernels import Loop, RowPass
from gpugrad.compile.scalar import Expr, in_order

# Rows of a RowPass at a time: so few that they are still in the first-level cache when they are added up. Rows that are
# too long for that are read from the second level again, and are best many. All found by measurement.
TILE_ROWS = 32
FEWEST_ROWS = 8
TILE_BYTES = 8 << 10
WIDE_TILE_BYTES = 128 << 10
FEW_BLOCKS = 2  # registers that a row fills, up to which the products of several rows are made together
MOST_COLUMNS = 1 << 14  # of a matrix; beyond, tiles leave the second-level cache and products are BLAS's work
MOST_PRODUCTS = 16
FOLD_ROWS = 64  # whose float32 sums are then added to the float64 ones


@dataclass(frozen=True)
class Text:
    """A kernel's IR, and what its parameters are: ("array", kind, ndim), ("number", kind, 0) or ("index", "i8", 0)."""

    ir: str
    parameters: tuple[tuple[str, str, int], ...]


class _Writer:
    """Parameters in the making, beside the code."""

    def __init__(self, indices: Sequence[str], register: int) -> None:
        self.code = Code()
        self.register = register  # bytes of a vector register
        self.declared: list[str] = []
        self.parameters: list[tuple[str, str, int]] = []
        for name in indices:
            self.declared.append(f"i64 %{name}")
            self.parameters.append(("index", "i8", 0))

    def index(self, name: str) -> Vector:
        return Vector(self.code, "i8", 1, f"%{name}")

    def array(self, kind: str, ndim: int) -> tuple[str, Vector]:
        """Declare an array; return its pointer and its stride."""
        n = len(self.parameters)
        self.declared += [f"ptr %p{n}", f"i64 %s{n}"]
        self.parameters.append(("array", kind, ndim))
        return f"%p{n}", Vector(self.code, "i8", 1, f"%s{n}")

    def number(self, kind: str) -> Vector:
        """Declare a number."""
        n = len(self.parameters)
        self.declared.append(f"{ELEMENTS[kind]} %x{n}")
        self.parameters.append(("number", kind, 0))
        return Vector(self.code, kind, 1, f"%x{n}")

    def text(self, name: str) -> Text:
        return Text(self.code.function(name, self.declared, 8 * self.register), tuple(self.parameters))


def _widest(roots: Sequence[Expr]) -> int:
    """Return the bytes of the widest number computed with; what is 8 bytes only as an input or a mask costs little."""
    return max((e.dtype.itemsize for e in in_order(roots) if e.fn not in ("const", "input")), default=4)


# ------------------------------------------------------------------------------------------------------------- Loop


def loop_lanes(kernel: Loop, register: int) -> int:
    """Return how many elements a Loop's code does at once where columns are many: two registers of its results."""
    return 2 * register // max(4, _widest((*kernel.outputs, *(e for e, _ in kernel.sums))))


def check(kernel: Loop) -> None:
    """Raise Unsupported if a Loop holds what is not printed here."""
    for _, dtype in kernel.inputs:
        kind_of(dtype)
    cpu_math.check((*kernel.outputs, *(e for e, _ in kernel.sums)))


def loop_room(kernel: Loop, columns: int) -> int:
    """Return how many float64 a row of `partials` has."""
    down = [e for e, over in kernel.sums if over == "rows"]
    singles = sum(kind_of(e.dtype) == "f4" for e in down)
    return sum(over == "all" for _, over in kernel.sums) + (len(down) + singles) * columns


def loop_text(kernel: Loop, name: str, register: int, lanes: int, narrow: bool) -> Text:
    """Return the function of a Loop for rows r0..r1 and columns c0..c1 of the index space.

    partials holds the sums "all", a number each, then the sums over rows, `columns` numbers each, and room for those in
    the making; per_row, (sums, rows), the sums over columns. narrow: for at most `lanes` columns, all of them.
    Otherwise operands without gaps between rows are taken as one long row where layouts allow.
    """
    return _LoopWriter(kernel, register, lanes, narrow).text(name)


class _LoopWriter(_Writer):
    """The function of a Loop in the making."""

    def __init__(self, kernel: Loop, register: int, lanes: int, narrow: bool) -> None:
        super().__init__(("r0", "r1", "c0", "c1", "columns"), register)
        code = self.code
        self.lanes = lanes
        self.roots = (*kernel.outputs, *(e for e, _ in kernel.sums))
        self.kinds = [kind_of(dtype) for _, dtype in kernel.inputs]
        self.layouts = [layout for layout, _ in kernel.inputs]
        self.arrays: dict[int, tuple[str, Vector]] = {}
        self.fixed: dict[int, Vector] = {}  # the same in all rows, or in this one
        scalars: dict[int, Vector] = {}
        for k, layout in enumerate(self.layouts):
            if layout == "scalar":
                scalars[k] = self.number(self.kinds[k])
            else:
                self.arrays[k] = self.array(self.kinds[k], 2 if layout == "full" else 1)
        self.outputs = [self.array(kind_of(e.dtype), 2) for e in kernel.outputs]
        self.partial, _ = self.array("f8", 1)
        self.per_row, self.per_row_stride = self.array("f8", 2)
        self.columns = self.index("columns")
        self.overs = [over for _, over in kernel.sums]
        self.down = [s for s, over in enumerate(self.overs) if over == "rows"]
        self.singles = [s for s in self.down if kind_of(kernel.sums[s][0].dtype) == "f4"]
        # where sums are held in a register; float32 ones over rows are held in memory and folded after some rows
        self.held = {s: code.allocate("f8", lanes) for s, over in enumerate(self.overs) if narrow or over != "rows"}
        for k, x in scalars.items():
            self.fixed[k] = x.splat(lanes)

        self._clear("all", "rows")
        if narrow:
            mask = code.mask(self.columns, lanes)
            for k, (pointer, _) in self.arrays.items():
                if self.layouts[k] == "row":
                    self.fixed[k] = code.load(pointer, self.kinds[k], lanes, mask)
            with code.loop(self.index("r0"), self.index("r1"), 1) as row:
                self._row(row, lambda: self._step(code.number(0, "i8"), mask))
            for s in self.down:
                code.store(code.load(self.held[s], "f8", lanes), self._of_columns(s), mask)
        else:
            self._wide(kernel)
        everything = [self.held[s] for s, over in enumerate(self.overs) if over == "all"]
        for n, place in enumerate(everything):
            code.store(code.total(code.load(place, "f8", lanes)), code.at(self.partial, 8 * n))

    def _of_columns(self, s: int, kind: str = "f8") -> str:
        """Return where a sum over rows is in partials; as float32, where it is made."""
        n = self.down.index(s) if kind == "f8" else len(self.down) + self.singles.index(s)
        return self.code.at(self.partial, 8 * self.overs.count("all"), self.columns * (8 * n))

    def _clear(self, *overs: str) -> None:
        for s, place in self.held.items():
            if self.overs[s] in overs:
                self.code.store(self.code.number(0, "f8", self.lanes), place)

    def _wide(self, kernel: Loop) -> None:
        code, lanes = self.code, self.lanes
        r0, r1, c0, c1 = (self.index(n) for n in ("r0", "r1", "c0", "c1"))
        rows, stop = r1 - r0, c1
        if {"row", "column"}.isdisjoint(self.layouts) and {"rows", "columns"}.isdisjoint(self.overs):
            dense = (c1 - c0).eq(self.columns)
            for k, (_, stride) in self.arrays.items():
                dense = dense & stride.eq(self.columns * size_of(self.kinds[k]))
            for (_, stride), e in zip(self.outputs, kernel.outputs, strict=True):
                dense = dense & stride.eq(self.columns * e.dtype.itemsize)
            stop = code.select(dense, rows * self.columns, c1)
            rows = code.select(dense, 1, rows)
        whole = c0 + ((stop - c0) & -lanes)
        mask = code.mask(stop - whole, lanes)

        def along(step: Callable[[Vector, Vector | None], None]) -> None:
            with code.loop(c0, whole, lanes) as j:
                step(j, None)
            with code.when(whole < stop):
                step(whole, mask)

        def fold(j: Vector, mask: Vector | None) -> None:
            for s in self.singles:
                part, place = code.at(self._of_columns(s, "f4"), j * 4), code.at(self._of_columns(s), j * 8)
                x = code.load(part, "f4", lanes, mask).to("f8")
                code.store(code.number(0, "f4", lanes), part, mask)
                code.store(code.load(place, "f8", lanes, mask) + x, place, mask)

        if not self.singles:
            with code.loop(r0, r0 + rows, 1) as row:
                self._row(row, lambda: along(self._step))
            return
        with code.loop(r0, r1, FOLD_ROWS) as start:
            left = r1 - start
            with code.loop(start, start + code.select(left < FOLD_ROWS, left, FOLD_ROWS), 1) as row:
                self._row(row, lambda: along(self._step))
            along(fold)

    def _row(self, row: Vector, work: Callable[[], None]) -> None:
        """Write the work on one row."""
        code = self.code
        self.here = {
            k: code.at(pointer, row * stride) if self.layouts[k] == "full" else pointer
            for k, (pointer, stride) in self.arrays.items()
        }
        self.there = [code.at(pointer, row * stride) for pointer, stride in self.outputs]
        for k, layout in enumerate(self.layouts):
            if layout == "column":
                pointer, stride = self.arrays[k]
                self.fixed[k] = code.load(code.at(pointer, row * stride), self.kinds[k]).splat(self.lanes)
        self._clear("columns")
        work()
        across = [self.held[s] for s, over in enumerate(self.overs) if over == "columns"]
        for n, place in enumerate(across):
            total = code.total(code.load(place, "f8", self.lanes))
            code.store(total, code.at(self.per_row, self.per_row_stride * n, row * 8))

    def _step(self, j: Vector, mask: Vector | None) -> None:
        """Write the work on the columns from j on, as many as lanes, of them those in the mask."""
        code, lanes = self.code, self.lanes

        def inputs(k: int) -> Vector:
            if k in self.fixed:
                return self.fixed[k]
            return code.load(code.at(self.here[k], j * size_of(self.kinds[k])), self.kinds[k], lanes, mask)

        # every load before any store: an output may be an input's own memory
        values = cpu_math.evaluate(code, self.roots, functools.cache(inputs), lanes)
        for x, pointer in zip(values, self.there, strict=False):
            code.store(x, code.at(pointer, j * size_of(x.kind)), mask)
        for s, x in enumerate(values[len(self.there) :]):
            single = s in self.singles and s not in self.held
            x = x.to("f4" if single else "f8")
            if s in self.held:
                if mask is not None:
                    x = code.select(mask, x, 0)
                code.store(code.load(self.held[s], "f8", lanes) + x, self.held[s])
            else:
                place = code.at(self._of_columns(s, x.kind), j * size_of(x.kind))
                code.store(code.load(place, x.kind, lanes, mask) + x, place, mask)


# ---------------------------------------------------------------------------------------------------------- RowPass


@dataclass
class _Matrix:
    """A data matrix of a RowPass in the making."""

    kind: str
    columns: int
    pointer: str
    stride: Vector
    products: list[int]
    back: list[int]

    def lanes(self, register: int) -> int:
        return register // size_of(self.kind)


def padded(columns: int) -> int:
    """Return the room that a vector of `columns` sums has in partials: whole registers."""
    return -(-columns // 16) * 16


def row_pass_text(kernel: RowPass, name: str, register: int) -> Text:
    """Return the function of a RowPass for rows lo..hi.

    In tiles of rows that stay in the first-level cache: products with the weights, then the pointwise work over the
    rows of the tile, then the sums of rows times factors, which are folded into float64 after every tile. partials
    holds the sums, a number each, then the vectors of `back`, each `padded`.
    """
    roots = (*kernel.sums, *(e for _, e in kernel.back), *kernel.outputs)
    cpu_math.check(roots)
    if any(columns > MOST_COLUMNS or kind_of(dtype)[0] != "f" for dtype, columns in kernel.matrices):
        raise Unsupported("matrices of integers, or wider than is worth it")
    if any(kernel.products.count(m) > MOST_PRODUCTS for m in range(len(kernel.matrices))):
        raise Unsupported("many products with one matrix: that is BLAS's work")
    w = _Writer(("lo", "hi"), register)
    code = w.code
    matrices = [
        _Matrix(
            kind_of(dtype), columns, *w.array(kind_of(dtype), 2),
            [p for p, its in enumerate(kernel.products) if its == m],
            [b for b, (its, _) in enumerate(kernel.back) if its == m],
        )
        for m, (dtype, columns) in enumerate(kernel.matrices)
    ]  # fmt: skip
    weights = [w.array(matrices[m].kind, 1)[0] for m in kernel.products]
    column_kinds = [kind_of(dtype) for dtype in kernel.columns]
    column_arrays = [w.array(kind, 1) for kind in column_kinds]
    scalars = [w.number(kind_of(dtype)) for dtype in kernel.scalars]
    output_kinds = [kind_of(e.dtype) for e in kernel.outputs]
    output_arrays = [w.array(kind, 1) for kind in output_kinds]
    partial, _ = w.array("f8", 1)
    lo, hi = w.index("lo"), w.index("hi")

    lanes = 2 * register // max(4, _widest(roots))
    row_bytes = sum(m.columns * size_of(m.kind) for m in matrices)
    tile = TILE_ROWS if row_bytes > register else 2 * TILE_ROWS  # of short rows more: less to do around each tile
    fitting = TILE_BYTES if FEWEST_ROWS * row_bytes <= TILE_BYTES else WIDE_TILE_BYTES
    while tile > FEWEST_ROWS and tile * row_bytes > fitting:
        tile //= 2
    lanes = min(lanes, tile)

    z = [code.allocate(matrices[m].kind, tile) for m in kernel.products]
    # a factor wider than its matrix makes the sum as wide
    factor_kinds = [
        max(matrices[m].kind, kind_of(e.dtype)) if e.dtype.kind == "f" else matrices[m].kind for m, e in kernel.back
    ]
    factors = [code.allocate(kind, tile) for kind in factor_kinds]
    gathered = [code.allocate(kind, tile) for kind in column_kinds]
    results = [code.allocate(kind, tile) for kind in output_kinds]
    sums = [code.allocate("f8", lanes) for _ in kernel.sums]
    for place in sums:
        code.store(code.number(0, "f8", lanes), place)
    offsets = []
    offset = len(sums)
    for place_of, _ in kernel.back:
        offsets.append(offset)
        offset += padded(kernel.matrices[place_of][1])
    wide_scalars = [x.splat(lanes) for x in scalars]

    with code.loop(lo, hi, tile) as i:
        left = hi - i
        n = code.select(left < tile, left, tile)
        for matrix in matrices:
            if matrix.products:
                start = code.at(matrix.pointer, i * matrix.stride)
                mine = matrix.products
                _products(w, matrix, start, n, [weights[p] for p in mine], [z[p] for p in mine])
        pointers = [
            _gathered(code, pointer, stride, kind, i, n, tile, room)
            for (pointer, stride), kind, room in zip(column_arrays, column_kinds, gathered, strict=True)
        ]
        with code.loop(0, n, lanes) as k:

            def inputs(position: int) -> Vector:
                if position < len(z):
                    kind = matrices[kernel.products[position]].kind
                    return code.load(code.at(z[position], k * size_of(kind)), kind, lanes)
                position -= len(z)
                if position < len(pointers):
                    kind = column_kinds[position]
                    return code.load(code.at(pointers[position], k * size_of(kind)), kind, lanes)
                return wide_scalars[position - len(pointers)]

            values = cpu_math.evaluate(code, roots, functools.cache(inputs), lanes)
            inside = code.mask(n - k, lanes)
            for x, place in zip(values, sums, strict=False):
                x = code.select(inside, x.to("f8"), 0)
                code.store(code.load(place, "f8", lanes) + x, place)
            rest = values[len(sums) :]
            for x, kind, room in zip(rest, factor_kinds, factors, strict=False):
                code.store(x.to(kind), code.at(room, k * size_of(kind)))
            for x, kind, room in zip(rest[len(factors) :], output_kinds, results, strict=True):
                code.store(x, code.at(room, k * size_of(kind)))
        for (pointer, stride), kind, room in zip(output_arrays, output_kinds, results, strict=True):
            memory = "u1" if kind == "b1" else kind
            with code.loop(0, n, 1) as k:
                x = code.load(code.at(room, k * size_of(memory)), memory)
                code.store(x, code.at(pointer, (i + k) * stride))
        for matrix in matrices:
            for kind in sorted({factor_kinds[b] for b in matrix.back}):
                mine = [b for b in matrix.back if factor_kinds[b] == kind]
                places = [code.at(partial, 8 * offsets[b]) for b in mine]
                start = code.at(matrix.pointer, i * matrix.stride)
                _row_sums(w, matrix, start, n, kind, [factors[b] for b in mine], places)
    for s, place in enumerate(sums):
        code.store(code.total(code.load(place, "f8", lanes)), code.at(partial, 8 * s))
    return w.text(name)


def _gathered(code: Code, pointer: str, stride: Vector, kind: str, i: Vector, n: Vector, tile: int, room: str) -> str:
    """Return where a tile's elements of a column are side by side and as many as a tile: as they are, or copied."""
    memory = "u1" if kind == "b1" else kind
    size = size_of(memory)
    start = code.at(pointer, i * stride)
    ready = stride.eq(size) & n.eq(tile)
    count = code.select(ready, 0, n)
    with code.loop(0, count, 1) as k:
        code.store(code.load(code.at(start, k * stride), memory), code.at(room, k * size))
    name = code.fresh()
    code.lines.append(f"  {name} = select {ready.typed}, ptr {start}, ptr {room}")
    return name


def _blocks(m: _Matrix, lanes: int) -> list[tuple[int, Vector | None]]:
    """Return the first column and the mask of each register's worth of columns."""
    code = m.stride.code
    whole = m.columns // lanes * lanes
    blocks: list[tuple[int, Vector | None]] = [(c, None) for c in range(0, whole, lanes)]
    if whole < m.columns:
        blocks.append((whole, code.mask(m.columns - whole, lanes)))
    return blocks


def _products(w: _Writer, m: _Matrix, start: str, n: Vector, weights: Sequence[str], rooms: Sequence[str]) -> None:
    """Write z[p][k] = row k of the tile . weight p; memory is read in its order, which the processor foresees best."""
    code, lanes, size = w.code, m.lanes(w.register), size_of(m.kind)
    blocks = _blocks(m, lanes)
    at_once = lanes if len(blocks) <= FEW_BLOCKS else 1  # rows whose sums are made of lanes together
    while at_once > 1 and at_once * len(weights) > 16:
        at_once //= 2
    chains = max(1, 4 // len(weights))  # of additions that do not wait for each other
    even = m.columns // (chains * lanes) if len(blocks) > FEW_BLOCKS else 0

    def add(sums: list[Vector | None], pointer: str, offset: Vector | int, mask: Vector | None) -> list[Vector | None]:
        """Return the sums of every weight with a register's worth of columns added."""
        x = code.load(code.at(pointer, offset), m.kind, lanes, mask)
        ws = [code.load(code.at(p, offset), m.kind, lanes, mask) for p in weights]
        return [
            x * weight if before is None else code.fma(x, weight, before)
            for before, weight in zip(sums, ws, strict=True)
        ]

    def row(pointer: str) -> list[Vector]:
        """Return the product of a row with every weight, in lanes still to be added up."""
        sums: list[Vector | None] = [None] * len(weights)
        if even:
            places = [[code.allocate(m.kind, lanes) for _ in weights] for _ in range(chains)]
            for place in (place for chain in places for place in chain):
                code.store(code.number(0, m.kind, lanes), place)
            step = chains * lanes * size
            with code.loop(0, code.number(even * step, "i8"), step) as offset:
                for c, chain in enumerate(places):
                    before: list[Vector | None] = [code.load(place, m.kind, lanes) for place in chain]
                    for x, place in zip(add(before, pointer, offset + c * lanes * size, None), chain, strict=True):
                        code.store(x, place) if x is not None else None
            sums = [
                functools.reduce(Vector.__add__, (code.load(chain[p], m.kind, lanes) for chain in places))
                for p in range(len(weights))
            ]
        for c, mask in blocks[even * chains :]:
            sums = add(sums, pointer, c * size, mask)
        return [x for x in sums if x is not None]

    def rows(k: Vector, count: int) -> None:
        products = [row(code.at(start, (k + r) * m.stride)) for r in range(count)]
        for p, room in enumerate(rooms):
            code.store(_totals(code, [sums[p] for sums in products], lanes), code.at(room, k * size))

    packed = _packed(m, n, lanes)
    if packed is not None:
        repeated = [_repeated(code.load(p, m.kind, m.columns), lanes) for p in weights]
        with code.loop(0, packed, lanes) as k:
            xs = _packed_rows(m, start, k, lanes)
            for weight, room in zip(repeated, rooms, strict=True):
                code.store(_totals(code, [x * weight for x in xs], m.columns), code.at(room, k * size))
    begin = n.like(0) if packed is None else packed
    done = begin
    if at_once > 1:
        done = begin + ((n - begin) & -at_once)
        with code.loop(begin, done, at_once) as k:
            rows(k, at_once)
    with code.loop(done, n, 1) as k:
        rows(k, 1)


def _packed(m: _Matrix, n: Vector, lanes: int) -> Vector | None:
    """Return how many rows of a tile are read several to a register: where they are short and without gaps."""
    if m.columns >= lanes or m.columns & (m.columns - 1):
        return None
    code = n.code
    return code.select(m.stride.eq(m.columns * size_of(m.kind)), n & -lanes, 0)


def _packed_rows(m: _Matrix, start: str, k: Vector, lanes: int) -> list[Vector]:
    """Return as many rows as lanes from row k on, in registers that are full."""
    code, size = k.code, size_of(m.kind)
    pointer = code.at(start, k * (m.columns * size))
    return [code.load(code.at(pointer, v * lanes * size), m.kind, lanes) for v in range(m.columns)]


def _repeated(x: Vector, lanes: int) -> Vector:
    """Return the lanes of x again and again."""
    return x.splat(lanes) if x.lanes == 1 else x.code.shuffle(x, x, [k % x.lanes for k in range(lanes)])


def _totals(code: Code, vectors: list[Vector], share: int) -> Vector:
    """Return the sums of `share` neighbouring lanes, of all vectors (a power of 2) in order, as the lanes of one."""
    while len(vectors) > 1:
        share //= 2
        joined = []
        for x, y in zip(vectors[::2], vectors[1::2], strict=True):
            # of every group of partial sums the first half, then the second, of x and then of y
            groups = range(0, 2 * x.lanes, 2 * share)
            first = [g + k for g in groups for k in range(share)]
            joined.append(code.shuffle(x, y, first) + code.shuffle(x, y, [f + share for f in first]))
        vectors = joined
    x = vectors[0]
    while share > 1:
        share //= 2
        first = [g + k for g in range(0, x.lanes, 2 * share) for k in range(share)]
        x = code.shuffle(x, x, first) + code.shuffle(x, x, [f + share for f in first])
    return x


def _row_sums(
    w: _Writer, m: _Matrix, start: str, n: Vector, kind: str, factors: Sequence[str], places: Sequence[str]
) -> None:
    """Write places[q] += sum over rows k of the tile of factor q[k] * row k; places are in float64."""
    code, size = w.code, size_of(m.kind)
    lanes = w.register // size_of(m.kind)
    blocks = _blocks(m, lanes)
    together = max(1, 8 // len(factors))
    packed = _packed(m, n, lanes) if kind == m.kind else None
    begin = n.like(0) if packed is None else packed
    if packed is not None:
        _packed_sums(m, start, packed, lanes, factors, places)

    def some(group: Sequence[tuple[Vector | int, Vector | None]]) -> None:
        """Add up columns that are in registers at once; group: their first column and mask."""
        unroll = max(1, min(4, 8 // (len(group) * len(factors))))
        sums = [[[code.allocate(kind, lanes) for _ in group] for _ in factors] for _ in range(unroll)]
        for place in (place for by_factor in sums for by_block in by_factor for place in by_block):
            code.store(code.number(0, kind, lanes), place)
        offsets = [c * size for c, _ in group]

        def rows(k: Vector, count: int) -> None:
            for u in range(count):
                r = k + u
                pointer = code.at(start, r * m.stride)
                rs = [code.load(code.at(f, r * size_of(kind)), kind).splat(lanes) for f in factors]
                for b, (offset, (_, mask)) in enumerate(zip(offsets, group, strict=True)):
                    x = code.load(code.at(pointer, offset), m.kind, lanes, mask).to(kind)
                    for q, factor in enumerate(rs):
                        place = sums[u][q][b]
                        code.store(code.fma(x, factor, code.load(place, kind, lanes)), place)

        done = begin
        if unroll > 1:
            done = begin + ((n - begin) & -unroll)
            with code.loop(begin, done, unroll) as k:
                rows(k, unroll)
        with code.loop(done, n, 1) as k:
            rows(k, 1)
        for q, pointer in enumerate(places):
            for b, (c, _) in enumerate(group):
                total = code.load(sums[0][q][b], kind, lanes)
                for u in range(1, unroll):
                    total = total + code.load(sums[u][q][b], kind, lanes)
                place = code.at(pointer, c * 8)
                code.store(code.load(place, "f8", lanes) + total.to("f8"), place)

    groups = [blocks[g : g + together] for g in range(0, len(blocks), together)]
    if len(groups) <= 3:
        for group in groups:
            some(group)
        return
    even = m.columns // (together * lanes)
    with code.loop(0, code.number(even * together * lanes, "i8"), together * lanes) as c:
        some([(c + b * lanes, None) for b in range(together)])
    for group in groups[even:]:
        some(group)


def _packed_sums(
    m: _Matrix, start: str, count: Vector, lanes: int, factors: Sequence[str], places: Sequence[str]
) -> None:
    """Do the work of `_row_sums` on rows that are read several to a register."""
    code, size, columns = m.stride.code, size_of(m.kind), m.columns
    chains = max(1, min(4, columns))
    sums = [[code.allocate(m.kind, lanes) for _ in range(chains)] for _ in factors]
    for place in (place for by_factor in sums for place in by_factor):
        code.store(code.number(0, m.kind, lanes), place)
    with code.loop(0, count, lanes) as k:
        xs = _packed_rows(m, start, k, lanes)
        for factor, held in zip(factors, sums, strict=True):
            rs = code.load(code.at(factor, k * size), m.kind, lanes)
            for v, x in enumerate(xs):
                r = code.shuffle(rs, rs, [v * (lanes // columns) + lane // columns for lane in range(lanes)])
                place = held[v % chains]
                code.store(code.fma(x, r, code.load(place, m.kind, lanes)), place)
    for pointer, held in zip(places, sums, strict=True):
        total = functools.reduce(Vector.__add__, (code.load(place, m.kind, lanes) for place in held))
        while total.lanes > columns:
            half = total.lanes // 2
            total = code.shuffle(total, total, range(half)) + code.shuffle(total, total, range(half, total.lanes))
        code.store(code.load(pointer, "f8", columns) + total.to("f8"), pointer)
