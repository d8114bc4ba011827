"""Limited-memory BFGS with a strong-Wolfe line search.

The parameters are one flat vector here, and the pairs of the memory are rows of one float64 matrix. An evaluation is
followed by one matrix product, which gives every inner product that the line search, the choice of the pair and the
next direction can ask for (Chen, Wang & Zhou 2014). They are read together with the value: one transfer an evaluation.
The two-loop recursion runs on those numbers; vectors are touched again when its coefficients combine them.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy

from gpugrad import backend
from gpugrad.backend import Array
from gpugrad.optim.first_order import Evaluate, Iterate, Layout, Precision, Stop, max_norm

__all__ = ["lbfgs", "strong_wolfe"]

SUFFICIENT = 1e-4  # c1 of the Wolfe conditions
CURVATURE = 0.9  # c2, as Nocedal & Wright advise for quasi-Newton directions


class Point(NamedTuple):
    """A place on the line: step, objective, slope along the direction, and what belongs to the place.

    products: inner products of the memory's rows with s, y and g here (see `_Memory`), on the host.
    """

    alpha: float
    fun: float
    slope: float
    x: Array = None
    grad: Array = None
    grad_norm: float = math.nan
    products: Any = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.fun) and math.isfinite(self.slope)


def _cubic(a: Point, b: Point) -> float:
    """Minimiser of the cubic through two points and their slopes (Nocedal & Wright, eq. 3.59), or NaN."""
    if not (a.finite and b.finite):
        return math.nan
    d1 = a.slope + b.slope - 3 * (a.fun - b.fun) / (a.alpha - b.alpha)
    square = d1 * d1 - a.slope * b.slope
    if not 0 <= square < math.inf:
        return math.nan
    d2 = math.copysign(math.sqrt(square), b.alpha - a.alpha)
    below = b.slope - a.slope + 2 * d2
    return b.alpha - (b.alpha - a.alpha) * (b.slope + d2 - d1) / below if below else math.nan


def strong_wolfe(
    phi: Callable[[float], Point],
    start: Point,
    alpha: float,
    *,
    c1: float = SUFFICIENT,
    c2: float = CURVATURE,
    noise: float = 0.0,
    max_evaluations: int = 25,
) -> Point | None:
    """Find a step with phi(a) <= phi(0) + c1 a phi'(0) and |phi'(a)| <= c2 |phi'(0)| (Nocedal & Wright, alg. 3.5, 3.6).

    noise: rounding error of phi. Where phi does not differ from phi(0) by more, the slope condition alone decides:
    close to a minimum phi no longer tells points apart, but its slope does (Hager & Zhang 2005, section 2).
    Where no step meets both conditions the lowest point with sufficient decrease is returned; None if there is none.
    """

    def low(point: Point) -> bool:
        return point.fun <= start.fun + c1 * point.alpha * start.slope

    def good(point: Point) -> bool:
        level = low(point) or abs(point.fun - start.fun) <= noise
        return point.finite and level and abs(point.slope) <= -c2 * start.slope

    lo, hi = start, None
    left = max_evaluations
    while hi is None:  # algorithm 3.5: lengthen the step until an interval holds a good point
        if not left:
            return lo if lo.alpha else None
        point = phi(alpha)
        left -= 1
        if good(point):
            return point
        if not point.finite or not low(point) or (lo.alpha and point.fun >= lo.fun):
            hi = point
        elif point.slope >= 0:
            lo, hi = point, lo
        else:
            guess = _cubic(lo, point)
            lo = point
            alpha = min(max(guess, 2 * alpha), 10 * alpha) if guess > alpha else 10 * alpha
    before = math.inf
    while left:  # algorithm 3.6, zoom: lo is the lowest point so far, and phi falls from lo towards hi
        width = hi.alpha - lo.alpha
        guess = (_cubic(lo, hi) - lo.alpha) / width
        if not hi.finite:
            share = 0.2
        elif math.isfinite(guess) and abs(width) <= 0.7 * before:
            share = min(max(guess, 0.05), 0.95)
        else:  # interpolation does not make the interval shrink
            share = 0.5
        before = abs(width)
        alpha = lo.alpha + share * width
        if alpha in (lo.alpha, hi.alpha):
            break
        point = phi(alpha)
        left -= 1
        if good(point):
            return point
        if not point.finite or not low(point) or point.fun >= lo.fun:
            hi = point
        else:
            if point.slope * width >= 0:
                hi = lo
            lo = point
    return lo if lo.alpha else None


class _Flat:
    """The parameters as one vector, and the vector as parameters."""

    def __init__(self, layout: Layout) -> None:
        self.xp, self.layout = layout.xp, layout
        sizes = [math.prod(shape) for shape in layout.shapes]
        ends = numpy.cumsum(sizes).tolist()
        self.slices = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.size = sum(sizes)
        self.dtype = numpy.result_type(*layout.work)

    def ravel(self, arrays: list[Array]) -> Array:
        """Copy arrays into a new vector: whoever made them may use their memory again."""
        vector = self.xp.empty(self.size, dtype=self.dtype)
        for where, array in zip(self.slices, arrays, strict=True):
            vector[where] = array.reshape(-1)
        return vector

    def split(self, vector: Array) -> list[Array]:
        """Views of a vector in the parameters' shapes, cast where their dtype is narrower."""
        return [
            vector[where].reshape(shape).astype(dtype, copy=False)
            for where, shape, dtype in zip(self.slices, self.layout.shapes, self.layout.dtypes, strict=True)
        ]


class _Memory:
    """The latest pairs s = x' - x, y = g' - g, and the inverse Hessian they stand for.

    Rows of `rows`: s, y and g of the place looked at, the direction, then s and y of each pair in its slot. Beside
    them, on the host, the pairs' inner products: s_i . y_j (0 where i is newer), y_i . y_j, and both with the gradient.
    """

    def __init__(self, flat: _Flat, size: int) -> None:
        self.xp, self.flat = flat.xp, flat
        self.eps = float(numpy.finfo(flat.dtype).eps)
        self.rows = flat.xp.zeros((4 + 2 * size, flat.size), dtype=numpy.float64)
        self.direction = self.rows[3]
        self.sy, self.yy = numpy.zeros((2, size, size))
        self.sg, self.yg = numpy.zeros((2, size))
        self.scale = 1.0
        self.used: deque[int] = deque()  # slots, oldest pair first
        self.free = list(reversed(range(size)))
        self.filled = 0  # slots that have held a pair

    def look(self, alpha: float, x: Array, value: Any, grad: Array, before: Point | None) -> Point:
        """Return the point at x with its inner products: one transfer. before: where the line begins."""
        xp, rows = self.xp, self.rows[: 4 + 2 * self.filled]
        if before is not None:
            xp.subtract(x, before.x, out=rows[0], dtype=rows.dtype)
            xp.subtract(grad, before.grad, out=rows[1], dtype=rows.dtype)
        rows[2] = grad
        fun, peak, products = backend.fetch(xp, value, max_norm(xp, [grad]), xp.matmul(rows, rows[:3].T))
        return Point(alpha, float(fun), float(products[3, 2]), x, grad, float(peak), products)

    def clear(self) -> None:
        self.free.extend(reversed(self.used))
        self.used.clear()

    def add(self, before: Point, after: Point) -> None:
        """Keep the pair of a step, unless its curvature is not safely positive; and the gradient's products."""
        own, pairs = after.products[:4], after.products[4:]
        known = len(pairs) // 2
        self.sg[:known], self.yg[:known] = pairs[0::2, 2], pairs[1::2, 2]
        ss, sy, yy = own[0, 0], own[0, 1], own[1, 1]
        if not sy > self.eps * math.sqrt(ss) * math.sqrt(yy):
            return
        slot = self.free.pop() if self.free else self.used.popleft()
        s, y = self.rows[4 + 2 * slot], self.rows[5 + 2 * slot]
        self.xp.subtract(after.x, before.x, out=s, dtype=s.dtype)
        self.xp.subtract(after.grad, before.grad, out=y, dtype=y.dtype)
        self.sy[slot] = 0.0
        self.sy[:known, slot] = pairs[0::2, 1]
        self.yy[:known, slot] = self.yy[slot, :known] = pairs[1::2, 1]
        self.sy[slot, slot], self.yy[slot, slot] = sy, yy
        self.sg[slot], self.yg[slot] = own[0, 2], own[1, 2]
        self.scale = sy / yy
        self.used.append(slot)
        self.filled = max(self.filled, slot + 1)

    def turn(self, here: Point) -> float:
        """Set the direction to -H g (Nocedal & Wright, algorithm 7.4, scaled as in eq. 7.20); return its slope."""
        used = list(self.used)
        square = float(here.products[2, 2])
        if not used:
            self.direction[...] = -here.grad
            return -square
        upper, yy = self.sy[used][:, used], self.yy[used][:, used]
        sg, yg, scale = self.sg[used], self.yg[used], self.scale
        # d = -scale * (g + sum of a_k y_k) + sum of b_k s_k. The loops over vectors are triangular systems here.
        a = numpy.linalg.solve(upper, -sg)
        rest = upper.diagonal() * a + scale * (yg + yy @ a)
        b = numpy.linalg.solve(upper.T[::-1, ::-1], rest[::-1])[::-1]  # reversed it is upper too: LAPACK swaps no rows
        weights = numpy.zeros((self.filled, 2))
        weights[used, 0], weights[used, 1] = b, -scale * a
        xp = self.xp
        xp.dot(xp.asarray(weights.reshape(-1)), self.rows[4 : 4 + 2 * self.filled], out=self.direction)
        self.direction -= xp.multiply(here.grad, scale, dtype=self.rows.dtype)
        return float(b @ sg - scale * (square + a @ yg))


def lbfgs(layout: Layout, start: list[Array], evaluate: Evaluate, *, memory: int = 10) -> Iterator[Iterate | Stop]:
    """L-BFGS (Liu & Nocedal 1989; Nocedal & Wright, algorithm 7.5)."""
    flat = _Flat(layout)
    xp, pairs = flat.xp, _Memory(flat, memory)

    def look(x: Array, alpha: float, before: Point | None) -> Point:
        value, grads = evaluate(flat.split(x))
        return pairs.look(alpha, x, value, flat.ravel(grads), before)

    def iterate(point: Point) -> Iterate:
        return Iterate(flat.split(point.x), point.fun, point.grad_norm, point.alpha)

    here = look(flat.ravel(start), 0.0, None)
    yield iterate(here)
    precision = Precision(layout, here.fun, here.grad_norm)
    lowest, lowest_norm, idle = here.fun, here.grad_norm, 0
    while True:
        if here.grad_norm == 0:
            yield Stop(True, "converged: the gradient is zero")
            return
        slope = pairs.turn(here)
        if pairs.used and not -math.inf < slope < 0:  # rounding has spoilt the memory: start afresh
            pairs.clear()
            continue
        if not -math.inf < slope < 0:
            yield Stop(False, f"the gradient has no finite square, max|gradient| is {here.grad_norm:.3g}: rescale")
            return
        here = here._replace(alpha=0.0, slope=slope)

        def phi(alpha: float, here: Point = here) -> Point:
            x = xp.multiply(pairs.direction, alpha)
            x += here.x
            return look(x.astype(flat.dtype, copy=False), alpha, here)

        # Without curvature the first step has no natural length: move by at most one unit.
        alpha = 1.0 if pairs.used else min(1.0, 1 / math.sqrt(-slope))
        found = strong_wolfe(phi, here, alpha, noise=2 * pairs.eps * abs(here.fun))
        if found is None:
            verdict = precision.verdict(iterate(here), -0.5 * alpha * slope)
            if verdict.success or not pairs.used:
                yield verdict
                return
            pairs.clear()
            continue
        pairs.add(here, found)
        here = found
        yield iterate(here)
        idle = 0 if here.fun < lowest or here.grad_norm < lowest_norm else idle + 1
        lowest, lowest_norm = min(lowest, here.fun), min(lowest_norm, here.grad_norm)
        if idle == 3:  # neither value nor slope tells the points apart any more
            yield precision.verdict(iterate(here), -0.5 * here.alpha * slope)
            return
