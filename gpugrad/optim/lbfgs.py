"""Limited-memory BFGS with a strong-Wolfe line search.

The parameters are one flat vector here. Vectors are kept in the parameters' dtype, inner products and the
two-loop recursion run in float64. Between evaluations everything stays on the device: an evaluation costs one
transfer of three numbers, an iteration two more (the slope of the direction, the curvature of the new pair).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy

from gpugrad.backend import Array
from gpugrad.optim.first_order import Evaluate, Iterate, Layout, Precision, Stop, max_norm, to_host

__all__ = ["lbfgs", "strong_wolfe"]

SUFFICIENT = 1e-4  # c1 of the Wolfe conditions
CURVATURE = 0.9  # c2, as Nocedal & Wright advise for quasi-Newton directions


class Point(NamedTuple):
    """A place on the line: step, objective, slope along the direction, and what belongs to the place."""

    alpha: float
    fun: float
    slope: float
    x: Array = None
    grad: Array = None
    grad_norm: float = math.nan

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
    """The latest pairs s = x' - x, y = g' - g, and the inverse Hessian they stand for."""

    def __init__(self, flat: _Flat, size: int) -> None:
        xp = self.xp = flat.xp
        self.eps = float(numpy.finfo(flat.dtype).eps)
        self.s = xp.empty((size, flat.size), dtype=flat.dtype)
        self.y = xp.empty((size, flat.size), dtype=flat.dtype)
        self.rho = [0.0] * size
        self.scale = 1.0
        self.used: deque[int] = deque()
        self.free = list(range(size))
        self.work = xp.empty(flat.size, dtype=xp.float64)

    def dot(self, a: Array, b: Array) -> Array:
        """Inner product accumulated in float64, left on the device."""
        if a.dtype == b.dtype == self.work.dtype:
            return self.xp.dot(a, b)
        return self.xp.sum(self.xp.multiply(a, b, out=self.work, dtype=self.work.dtype))

    def clear(self) -> None:
        self.free.extend(self.used)
        self.used.clear()

    def add(self, before: Point, after: Point) -> None:
        """Keep the pair of a step, unless its curvature is not safely positive."""
        slot = self.free.pop() if self.free else self.used.popleft()
        s, y = self.s[slot], self.y[slot]
        self.xp.subtract(after.x, before.x, out=s)
        self.xp.subtract(after.grad, before.grad, out=y)
        sy, ss, yy = to_host(self.xp, self.dot(s, y), self.dot(s, s), self.dot(y, y))
        if sy > self.eps * math.sqrt(ss) * math.sqrt(yy):
            self.rho[slot], self.scale = 1 / sy, sy / yy
            self.used.append(slot)
        else:
            self.free.append(slot)

    def direction(self, grad: Array) -> Array:
        """Return -H g in float64 (Nocedal & Wright, algorithm 7.4, scaled as in eq. 7.20)."""
        xp = self.xp
        d = xp.negative(grad, dtype=xp.float64)
        weights = []
        for k in reversed(self.used):
            weight = self.rho[k] * self.dot(self.s[k], d)
            d -= xp.multiply(self.y[k], weight, out=self.work)
            weights.append(weight)
        if self.used:
            d *= self.scale
        for k, weight in zip(self.used, reversed(weights), strict=True):
            weight = weight - self.rho[k] * self.dot(self.y[k], d)
            d += xp.multiply(self.s[k], weight, out=self.work)
        return d


def lbfgs(layout: Layout, start: list[Array], evaluate: Evaluate, *, memory: int = 10) -> Iterator[Iterate | Stop]:
    """L-BFGS (Liu & Nocedal 1989; Nocedal & Wright, algorithm 7.5)."""
    flat = _Flat(layout)
    xp, pairs = flat.xp, _Memory(flat, memory)

    def look(x: Array, alpha: float, direction: Array | None) -> Point:
        value, grads = evaluate(flat.split(x))
        grad = flat.ravel(grads)
        slope = 0.0 if direction is None else pairs.dot(grad, direction)
        fun, slope, grad_norm = to_host(xp, value, slope, max_norm(xp, [grad]))
        return Point(alpha, fun, slope, x, grad, grad_norm)

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
        direction = pairs.direction(here.grad)
        (slope,) = to_host(xp, pairs.dot(here.grad, direction))
        if pairs.used and not -math.inf < slope < 0:  # rounding has spoilt the memory: start afresh
            pairs.clear()
            continue
        if not -math.inf < slope < 0:
            yield Stop(False, f"the gradient has no finite square, max|gradient| is {here.grad_norm:.3g}: rescale")
            return
        here = here._replace(alpha=0.0, slope=slope)

        def phi(alpha: float, here: Point = here, direction: Array = direction) -> Point:
            x = xp.multiply(direction, alpha)
            x += here.x
            return look(x.astype(flat.dtype, copy=False), alpha, direction)

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
