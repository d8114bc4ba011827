"""Every op of the registry against NumPy's (or CuPy's) own formula for it, eager and captured.

All of it comes from the op's record: a new op has its row without anybody writing one. Values are compared with
formulas in float64 that owe nothing to gpugrad, gradients with their differences along a random direction.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import gpugrad as gg
from gpugrad import backend
from gpugrad.cli.selftest_ops import Call, _signed, calls_of, reference
from gpugrad.op import Op, registry

from .measure import Setting, Work, in_turns
from .peers import Run, host

CHECKED = 256  # elements of an elementwise op that are compared; Python's own mathematics is slow
STEP = 1e-6  # of the differences
ALLOWED = 1e-3  # error of a float32 result, relative to its largest element
LARGER = (64, 16, 4, 1)  # by what the sizes in an op's record are multiplied, the first that it takes


class Drawn(NamedTuple):
    """How an op is called, and on what: float32 arrays, cotangents of its outputs (None without gradient)."""

    call: Callable[..., Any]
    op: Op
    params: dict[str, Any]
    arrays: list[Any]
    cotangents: list[Any] | None


def ops(setting: Setting) -> list[Work]:
    """A row for every op: its formula on plain arrays, recorded, with its gradient, and captured with it."""
    return [_row(setting, op) for op in registry.values()]


def _row(setting: Setting, op: Op) -> Work:
    where = setting.where
    calls = [call for call in calls_of(op, quick=True) if all(0 not in shape for shape in call.shapes)]
    elements = 8_192 if setting.quick else 131_072

    def make() -> Drawn:
        drawn = _truth(op) if op.kind == "nondiff" else _draw(calls[0], elements)
        there = [backend.to_device(a, where) for a in drawn.arrays]
        cotangents = drawn.cotangents and [backend.to_device(c, where) for c in drawn.cotangents]
        return drawn._replace(arrays=there, cotangents=cotangents)

    def plain(drawn: Drawn) -> Run:
        xp = backend.namespace(drawn.arrays[0])
        run = functools.partial(op.forward, xp, *drawn.arrays, **drawn.params)
        return lambda: (_tuple(run()), None)

    def recorded(drawn: Drawn) -> Run:
        tensors = [gg.tensor(a, requires_grad=a.dtype.kind == "f") for a in drawn.arrays]
        return lambda: (_tuple(drawn.call(*tensors)), None)

    def both(drawn: Drawn) -> Callable[..., Any]:
        def run(arrays: Any, cotangents: Any) -> Any:
            out, pull = gg.vjp(lambda *a: _tuple(drawn.call(*a)), *arrays)
            return out, pull(tuple(cotangents))

        return run

    def eager(drawn: Drawn) -> Run:
        return functools.partial(both(drawn), drawn.arrays, drawn.cotangents)

    def captured(drawn: Drawn) -> Run:
        return functools.partial(gg.compile(both(drawn)), drawn.arrays, drawn.cotangents)

    build = {"gpugrad": recorded, "numpy" if where.kind == "cpu" else "cupy": plain}
    if op.kind != "nondiff":
        build |= {"gpugrad, with gradient": eager, "gpugrad, with gradient, compiled": captured}
    work = Work("ops", op.name, make, build, _verify, bound="copy", measure=_measured)
    if setting.quick and op.kind != "nondiff" and op.name not in ("add", "exp", "swish", "sum"):
        work.left_out["gpugrad, with gradient, compiled"] = "--quick compiles four ops only"
    return work


def _measured(work: Work, setting: Setting) -> dict[str, Any]:
    """Measure an op, and tell what it was called on: the bytes of arguments and outputs, the shapes."""
    drawn: Drawn = work.make()
    outputs = _tuple(drawn.call(*drawn.arrays))
    row = in_turns(
        dataclasses.replace(work, make=lambda: drawn), dataclasses.replace(setting, seconds=setting.seconds / 16)
    )
    row["moved_bytes"] = sum(int(a.nbytes) for a in (*drawn.arrays, *outputs))
    row["shapes"] = " ".join("x".join(map(str, a.shape)) or "()" for a in drawn.arrays)
    return row


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _draw(call: Call, elements: int) -> Drawn:
    """Draw arguments, larger than the record's own where the op takes them and float32 has the digits for it."""
    op = call.op
    if op.kind == "elementwise":
        shapes: list[Any] = [((elements,),) * len(call.shapes)]
    else:
        shapes = [tuple(tuple(k * n for n in shape) for shape in call.shapes) for k in LARGER]
        shapes = [s for s in shapes if sum(map(np.prod, s)) <= elements] or shapes[-1:]
    for attempt in shapes:
        larger = Call(op, attempt, call.intervals, call.params, call.through)
        arrays = [np.asarray(a, np.float32) for a in larger.inside(larger.draw())]
        # a decomposition with its signs settled
        function = larger if op.outputs > 1 else functools.partial(_called, op, call.params)
        try:
            with np.errstate(all="ignore"):
                drawn = Drawn(function, op, call.params, arrays, _cotangents(function, arrays))
                if attempt == shapes[-1] or _well_conditioned(drawn):
                    return drawn
        except Exception:  # whatever an op says to sizes that do not go with its other parameters
            if attempt == shapes[-1]:
                raise
    raise AssertionError("the last attempt returns or raises")


def _cotangents(function: Callable[..., Any], arrays: list[Any]) -> list[Any]:
    rng = np.random.default_rng(1)
    outputs = map(np.asarray, _tuple(function(*arrays)))
    return [np.asarray(rng.uniform(0.5, 1.5, part.shape), part.dtype) for part in outputs]


def _well_conditioned(drawn: Drawn) -> bool:
    """Tell whether float32 has the digits for it: a singular value near another one has a slope near infinity."""
    results = []
    for dtype in (np.float32, np.float64):
        out, pull = gg.vjp(lambda *a: _tuple(drawn.call(*a)), *(a.astype(dtype) for a in drawn.arrays))
        cotangents = tuple(c.astype(o.dtype) for c, o in zip(drawn.cotangents or (), out, strict=True))
        results.append([*out, *pull(cotangents)])
    return all(_off(a, b) < 2e-4 for a, b in zip(*results, strict=True))


def _called(op: Op, params: dict[str, Any], *arrays: Any) -> Any:
    return op.function(arrays, **params) if op.variadic else op.function(*arrays, **params)


def _signed_plain(op: Op, outputs: Any) -> list[Any]:
    return [np.asarray(part) for part in _signed(op.name, outputs)]


def _formula(op: Op) -> Callable[..., Any]:
    """Return what an op is compared with, its own formula where nothing else is known."""
    return reference(op) or functools.partial(op.forward, np)


def _checked(op: Op, arrays: list[Any], dtype: Any) -> list[Any]:
    """Return the part of the arguments that is compared."""
    return [a[:CHECKED].astype(dtype) if op.kind == "elementwise" else a.astype(dtype) for a in arrays]


def _truth(op: Op) -> Drawn:
    """Arguments for an op that has no derivative: numbers, or truths where it takes them."""
    rng = np.random.default_rng(0)
    count = 1 if op.variadic or op.name in ("argmax", "argmin", "all", "any") else len(op.vjps)
    arrays = [rng.standard_normal(8_192).astype(np.float32) for _ in range(count)]
    if op.name.startswith("logical") or op.name in ("all", "any"):
        arrays = [a > 0 for a in arrays]
    return Drawn(functools.partial(_called, op, {}), op, {}, arrays, None)


def _direction(rng: np.random.Generator, at: Any) -> Any:
    """Draw a direction to move in; a symmetric matrix stays symmetric, since only one half of it may be read."""
    d = rng.standard_normal(at.shape)
    symmetric = at.ndim == 2 and at.shape[0] == at.shape[1] and np.array_equal(at, at.T)
    return d + d.T if symmetric else d


def _off(got: Any, right: Any) -> float:
    """Return the largest error relative to the largest element."""
    if np.shape(got) != np.shape(right):
        return np.inf
    mine, right = np.asarray(got, np.float64), np.asarray(right, np.float64)
    if not np.all(np.isfinite(right)):
        return np.inf
    return float(np.max(np.abs(mine - right), initial=0) / max(np.max(np.abs(right), initial=0), 1e-30))


def _verify(drawn: Drawn) -> Callable[[str, Any], str | None]:
    """Compare outputs with the formula in float64, and gradients with its differences.

    Element by element where the op works so. Else along two directions: a random one, and one in which all parts of
    the gradient that is checked add up, so that none hides behind the others.
    """
    op, formula, params = drawn.op, _formula(drawn.op), drawn.params
    pointwise = op.kind == "elementwise"
    if op.kind == "nondiff":
        at = [backend.to_device(a, backend.CPU) for a in drawn.arrays]
    else:
        at = _checked(op, [host(a) for a in drawn.arrays], np.float64)
    right = _signed_plain(op, formula(*at, **params))
    weights = [host(c)[:CHECKED] if pointwise else host(c) for c in drawn.cotangents or ()]

    def difference(directions: list[Any]) -> list[Any]:
        """Return the slope of each output along a direction, times its cotangent."""
        ends = []
        for sign in (1, -1):
            moved = [a + sign * STEP * d for a, d in zip(at, directions, strict=True)]
            ends.append(_signed_plain(op, formula(*moved, **params)))
        return [w * (b - a) / (2 * STEP) for w, b, a in zip(weights, *ends, strict=True)]

    def verify(_name: str, got: Any) -> str | None:
        outputs, gradients = got
        outputs = _signed_plain(op, tuple(host(part) for part in outputs))
        for i, (mine, exact) in enumerate(zip(outputs, right, strict=True)):
            error = _off(mine[:CHECKED] if pointwise and mine.ndim else mine, exact)
            if not error <= ALLOWED:
                return f"output {i} is off by {error:.2g} relative to its largest element"
        if gradients is None:
            return None
        if pointwise:
            errors = []
            for i, g in enumerate(gradients):
                (slope,) = difference([np.full_like(a, i == k) for k, a in enumerate(at)])
                errors.append(_off(host(g)[:CHECKED], slope))
        else:
            errors = [
                _along(difference, list(map(host, gradients)), directions) for directions in _directions(at, gradients)
            ]
        if not max(errors) <= 2 * ALLOWED:
            return f"the gradient is off by {max(errors):.2g} relative to its largest element"
        return None

    return verify


def _directions(at: list[Any], gradients: Any) -> list[list[Any]]:
    rng = np.random.default_rng(1)
    drawn = [_direction(rng, a) for a in at]
    return [drawn, [np.abs(d) * np.sign(host(g)) for d, g in zip(drawn, gradients, strict=True)]]


def _along(difference: Callable[[list[Any]], list[Any]], gradients: list[Any], directions: list[Any]) -> float:
    """Return the error of gradients along a direction, relative to the sum of their parts."""
    wanted = sum(float(np.sum(part)) for part in difference(directions))
    terms = [g * d for g, d in zip(gradients, directions, strict=True)]
    size = max(sum(float(np.abs(t).sum()) for t in terms), abs(wanted), 1e-30)
    return abs(sum(float(np.sum(t)) for t in terms) - wanted) / size
