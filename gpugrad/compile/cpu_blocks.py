"""Fused loops on plain NumPy, where numba is not installed: block by block, into buffers that stay in cache.

An operation of the loop is one NumPy call over a block of at most `BLOCK` elements, small enough for the second-level
cache and large enough that a call is work and not overhead. Temporaries are reused as soon as they are read for the
last time. Sums over blocks are added in order in float64.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from gpugrad import threads as _threads
from gpugrad.compile.kernels import Loop
from gpugrad.compile.scalar import FUNCTIONS, Expr, in_order

BLOCK = 1 << 16
STRIPES = 16

Array = numpy.ndarray[Any, Any]
_FULL, _ROW, _COLUMN = 3, 1, 2  # along which axes a value varies, as bits: columns, rows
_VARIES = {"full": _FULL, "row": _ROW, "column": _COLUMN, "scalar": 0}


class _Buffers(threading.local):
    """Temporaries of this thread, by dtype: a block each."""

    def __init__(self) -> None:
        self.kept: dict[Any, list[Array]] = {}

    def take(self, dtype: Any) -> Array:
        kept = self.kept.setdefault(dtype, [])
        return kept.pop() if kept else numpy.empty(BLOCK, dtype)

    def give(self, buffer: Array) -> None:
        self.kept[buffer.dtype].append(buffer)


_buffers = _Buffers()


class BlockedLoop:
    """A `Loop` as a list of NumPy calls. Called as ``run(inputs, outputs, threads, rows, columns) -> sums``."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.roots = [*loop.outputs, *(e for e, _ in loop.sums)]
        self.order = [e for e in in_order(self.roots) if e.fn not in ("input", "const")]
        self.varies: dict[int, int] = {}
        for e in in_order(self.roots):
            if e.fn == "input":
                self.varies[id(e)] = _VARIES[loop.inputs[e.value][0]]
            else:
                self.varies[id(e)] = functools.reduce(lambda a, b: a | b, (self.varies[id(a)] for a in e.args), 0)
        self.last: dict[int, int] = {}
        for k, e in enumerate(self.order):
            for a in e.args:
                self.last[id(a)] = k
        for e in self.roots:
            self.last[id(e)] = len(self.order)

    def __call__(
        self, inputs: Sequence[Array], outputs: Sequence[Array], threads: int, rows: int, columns: int
    ) -> list[Any]:
        step_rows = max(1, min(rows, BLOCK // max(columns, 1)))
        step_columns = min(columns, BLOCK)
        blocks = [
            (r, min(r + step_rows, rows), c, min(c + step_columns, columns))
            for r in range(0, rows, max(step_rows, 1))
            for c in range(0, columns, max(step_columns, 1))
        ]
        sums = [numpy.zeros({"all": (), "rows": (columns,), "columns": (rows,)}[over]) for _, over in self.loop.sums]
        count = max(1, min(STRIPES, len(blocks)))
        bounds = [len(blocks) * k // count for k in range(count + 1)]

        def stripe(k: int) -> list[list[Array]]:
            with numpy.errstate(all="ignore"):
                return [self._block(inputs, outputs, *block) for block in blocks[bounds[k] : bounds[k + 1]]]

        found = _threads.in_order(stripe, count, threads, [])
        for block, parts in zip(blocks, (parts for s in found for parts in s), strict=True):
            for (_, over), total, part in zip(self.loop.sums, sums, parts, strict=True):
                at: Any = {"all": (), "rows": slice(block[2], block[3]), "columns": slice(block[0], block[1])}[over]
                total[at] += part
        return sums

    def _block(
        self, inputs: Sequence[Array], outputs: Sequence[Array], top: int, bottom: int, left: int, right: int
    ) -> list[Array]:
        shape = (bottom - top, right - left)
        values: dict[int, Any] = {}
        held: dict[int, Array] = {}
        at = (slice(top, bottom), slice(left, right))
        direct: dict[int, Array] = {}
        for e, out in zip(self.loop.outputs, outputs, strict=True):
            if e.fn not in ("input", "const") and self.varies[id(e)] == _FULL:
                direct.setdefault(id(e), out[at])

        def value(e: Expr) -> Any:
            if e.fn == "const":
                return e.value
            if e.fn != "input":
                return values[id(e)]
            array = inputs[e.value]
            layout = self.loop.inputs[e.value][0]
            if layout == "full":
                return array[at]
            return array[left:right] if layout == "row" else array[top:bottom, None] if layout == "column" else array

        for k, e in enumerate(self.order):
            args = [value(a) for a in e.args]
            if self.varies[id(e)] != _FULL:
                values[id(e)] = args[0].astype(e.dtype) if e.fn == "cast" else FUNCTIONS[e.fn](*args)
            else:
                into = direct.get(id(e))
                if into is None:
                    held[id(e)] = _buffers.take(e.dtype)
                    into = held[id(e)][: shape[0] * shape[1]].reshape(shape)
                values[id(e)] = into
                if e.fn == "cast":
                    numpy.copyto(into, args[0], casting="unsafe")
                elif e.fn == "where":
                    _select(into, *args)
                else:
                    FUNCTIONS[e.fn](*args, out=into)
            for a in e.args:
                if self.last[id(a)] == k and id(a) in held:
                    _buffers.give(held.pop(id(a)))
        for e, out in zip(self.loop.outputs, outputs, strict=True):
            if direct.get(id(e)) is None or out[at].__array_interface__ != direct[id(e)].__array_interface__:
                out[at] = value(e)
        parts = []
        for e, over in self.loop.sums:
            full = numpy.broadcast_to(value(e), shape)
            axis = {"all": None, "rows": 0, "columns": 1}[over]
            parts.append(full.sum(axis=axis, dtype=numpy.float64))
        for buffer in held.values():
            _buffers.give(buffer)
        return parts


_BITS: dict[Any, Any] = {numpy.dtype("f4"): numpy.dtype("i4"), numpy.dtype("f8"): numpy.dtype("i8")}


def _select(into: Array, condition: Any, x: Any, y: Any) -> None:
    """Write x where condition holds, else y: by mask on the bits, since NumPy's own way branches at every element."""
    bits = _BITS.get(into.dtype)
    if bits is None or numpy.shape(condition) != into.shape:
        numpy.copyto(into, y)
        numpy.copyto(into, x, where=condition)
        return
    mask = condition.astype(bits)
    numpy.negative(mask, out=mask)
    chosen, other = (numpy.asarray(v, into.dtype).view(bits) for v in (x, y))
    out = into.view(bits)
    numpy.bitwise_xor(chosen, other, out=out)
    out &= mask
    out ^= other


@functools.cache
def loop(kernel: Loop) -> Callable[..., list[Any]]:
    """Return what runs a fused loop on NumPy."""
    return BlockedLoop(kernel)
