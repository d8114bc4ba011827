"""The self-test of the ops: every one of the registry, its value and its gradients.

Values are compared with formulas that owe nothing to gpugrad (Python's `math`, or plain NumPy) in float64; gradients
with those of float64 on the CPU, and these with central differences.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import gpugrad as gg
from gpugrad import backend
from gpugrad.backend import CPU, Device
from gpugrad.cli.selftest_report import DOUBLE, HALF, SINGLE, Host, Run, host
from gpugrad.op import Op, registry


def _pointwise(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Make a formula of numbers one of arrays, element by element in Python, without NumPy's own mathematics."""

    def compute(*arrays: Host) -> Host:
        with np.errstate(invalid="ignore"):  # a comparison with NaN
            return np.asarray(np.frompyfunc(formula, len(arrays), 1)(*(a.astype(object) for a in arrays)), DOUBLE)

    return compute


def _ndtr(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


SCALAR: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.truediv,
    "pow": math.pow,
    "negative": operator.neg,
    "abs": abs,
    "sign": lambda x: (x > 0) - (x < 0),
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1 / x,
    "maximum": max,
    "minimum": min,
    "clip": lambda x, low, high: min(max(x, low), high),
    "where": lambda condition, x, y: x if condition else y,
    "masked_product": operator.mul,
    "selected": lambda x, condition: x if condition else 0.0,
    **{name: getattr(math, name) for name in ("exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "hypot")},
    **{name: getattr(math, name) for name in ("sin", "cos", "tan", "asin", "acos", "atan", "atan2")},
    **{name: getattr(math, name) for name in ("sinh", "cosh", "tanh")},
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "logaddexp": lambda x, y: math.log(math.exp(x) + math.exp(y)),
    "ndtr": _ndtr,
    "relu": lambda x: x if x > 0 else 0.0,
    "swish": lambda x, beta: x / (1 + math.exp(-beta * x)),
    "log_sigmoid": lambda x: -math.log1p(math.exp(-x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "gelu": lambda x: x * _ndtr(x),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "bias_relu": lambda x, b: max(x + b, 0.0),
    "bias_swish": lambda x, b, beta: (x + b) / (1 + math.exp(-beta * (x + b))),
    "squared_error": lambda eta, y: (eta - y) ** 2,
    "logistic_loss": lambda eta, y: math.log1p(math.exp(eta)) - y * eta,
    **{name: getattr(operator, short) for name, short in (("less", "lt"), ("less_equal", "le"))},
    **{name: getattr(operator, short) for name, short in (("greater", "gt"), ("greater_equal", "ge"))},
    **{name: getattr(operator, short) for name, short in (("equal", "eq"), ("not_equal", "ne"))},
    "logical_and": lambda x, y: x and y,
    "logical_or": lambda x, y: x or y,
    "logical_not": lambda x: not x,
    "isnan": math.isnan,
    "isfinite": math.isfinite,
}


def _others(x: Host) -> Host:
    return np.stack([np.prod(np.delete(x, i, axis=-1), axis=-1) for i in range(x.shape[-1])], axis=-1)


def _scattered(g: Host, shape: tuple[int, ...], index: Any) -> Host:
    out = np.zeros(shape)
    np.add.at(out, index, g)
    return out


def _log_sum(x: Host, axis: Any = None, keepdims: bool = False) -> Any:
    return np.log(np.sum(np.exp(x), axis=axis, keepdims=keepdims))


# Ops that are no function of NumPy's under the same name and with the same parameters.
WHOLE: dict[str, Callable[..., Any]] = {
    "reshape": lambda x, shape: x.reshape(shape),
    "concat": lambda *x, axis=0: np.concatenate(x, axis=axis),
    "astype": lambda x, dtype: x.astype(dtype),
    "to_device": lambda x, device, source: x,
    "getitem": lambda x, index: x[index],
    "scatter": _scattered,
    "product_of_others": _others,
    "cumulative_sum": lambda x, axis=0: np.cumsum(x, axis=axis),
    "logsumexp": _log_sum,
    "softmax": lambda x, axis=-1: np.exp(x - _log_sum(x, axis, True)),
    "log_softmax": lambda x, axis=-1: x - _log_sum(x, axis, True),
    "vecdot": lambda x, y, axis=-1: np.sum(x * y, axis=axis),
    "einsum": lambda *x, terms, out: np.einsum(",".join(terms) + "->" + out, *x),
    "diagonal": lambda x, offset=0: np.diagonal(x, offset, -2, -1),
    "vector_norm2": lambda x, axis=None, keepdims=False: np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims)),
    "cholesky": lambda x, upper=False: np.linalg.cholesky(x).mT if upper else np.linalg.cholesky(x),
    "svd": lambda x: tuple(np.linalg.svd(x, full_matrices=False)),
}


def reference(op: Op) -> Callable[..., Any] | None:
    """Return the formula an op is compared with, on float64 host arrays; None for an op nobody knows here."""
    if op.name in SCALAR:
        return _pointwise(SCALAR[op.name])
    return WHOLE.get(op.name) or getattr(np.linalg, op.name, None) or getattr(np, op.name, None)


def _signed(name: str, outputs: Any) -> tuple[Any, ...]:
    """Return the outputs of an op; of a decomposition with its signs, a matter of convention, settled."""
    if name == "qr":
        q, r = outputs
        sign = _sign_like(q)
        return q * sign, r * _turned(sign)
    if name == "eigh":
        w, v = outputs
        return w, v * _sign_like(v)
    if name == "svd":
        u, s, vh = outputs
        sign = _sign_like(u)
        return u * sign, s, vh * _turned(sign)
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)


def _sign_like(vectors: Any) -> Any:
    top = vectors[..., 0:1, :]
    return gg.sign(top) if isinstance(top, gg.Tensor) else np.sign(top)


def _turned(sign: Any) -> Any:
    return sign.reshape((*sign.shape[:-2], sign.shape[-1], 1))


@dataclass
class Call:
    """One way to call an op: shapes and intervals of its random arguments, static parameters."""

    op: Op
    shapes: tuple[tuple[int, ...], ...]
    intervals: tuple[tuple[float, float], ...]
    params: dict[str, Any]
    through: Any = None

    def __str__(self) -> str:
        shown = ", ".join(str(shape).replace(" ", "") for shape in self.shapes)
        extra = "".join(f", {k}={v}" for k, v in self.params.items())
        return f"{self.op.name} {shown}{extra}".replace("\n", "")

    def draw(self) -> list[Host]:
        """Random float64 host arrays strictly inside the intervals."""
        rng = np.random.default_rng(zlib.crc32(str(self).encode()))
        margins = [0.05 * (high - low) for low, high in self.intervals]
        bounds = [(low + m, high - m) for (low, high), m in zip(self.intervals, margins, strict=True)]
        return [np.asarray(rng.uniform(*b, size=s)) for b, s in zip(bounds, self.shapes, strict=True)]

    def inside(self, arrays: Sequence[Any]) -> list[Any]:
        """Bring drawn arrays into the op's domain."""
        return list(arrays) if self.through is None else [self.through(x) for x in arrays]

    def __call__(self, *arrays: Any, where: Device = CPU) -> tuple[Any, ...]:
        params = {name: _on(value, where) for name, value in self.params.items()}
        if self.op.name == "to_device":
            params["source"] = where  # there and, with the cotangent, back
        call = self.op.function
        return _signed(self.op.name, call(arrays, **params) if self.op.variadic else call(*arrays, **params))


def _on(value: Any, where: Device) -> Any:
    """Return a static parameter with the index arrays in it on the device."""
    if isinstance(value, tuple):
        return tuple(_on(part, where) for part in value)
    return backend.to_device(value, where) if isinstance(value, np.ndarray) else value


def calls_of(op: Op, quick: bool) -> list[Call]:
    """Return the ways an op is called here; () is a scalar, (131,) more than a block and prime."""
    if op.kind == "nondiff":
        return []
    if op.kind != "elementwise":
        cases = [Call(op, c.shapes, ((c.low, c.high),) * len(c.shapes), dict(c.params), c.through) for c in op.domain]
        return cases[:2] if quick else cases
    n = len(op.domain)
    shapes: list[Sequence[tuple[int, ...]]] = [[(131,)] * n]
    if n > 1:
        shapes.append([(3, 1)] + [(1, 2)] * (n - 1))
    if not quick:
        shapes += [[shape] * n for shape in ((), (0,), (2, 3))]
        if n > 1:
            shapes += [[()] + [(4,)] * (n - 1), [(4,)] * (n - 1) + [()], [(0, 3)] + [(1, 3)] * (n - 1)]
    return [Call(op, tuple(s), tuple(op.domain), {}) for s in shapes]


def _bound(call: Call, want: Any, inputs: Sequence[Host], slopes: Sequence[Host], eps: float) -> float:
    """Return the error allowed: some eps of the largest element and of what rounding of the inputs does to it."""
    factor = {"elementwise": 4, "linear": 8, "bilinear": 8}.get(call.op.kind, 50)
    x, slope = (max(np.max(np.abs(a), initial=0) for a in arrays) for arrays in (inputs, slopes))
    return float(factor * eps * (np.max(np.abs(want), initial=0) + x * slope + 0.01))


def _check_op(run: Run, call: Call, dtype: Any) -> None:
    """Compare values and gradients of one call on the device with float64 on the host."""
    eps = float(np.finfo(dtype).eps)
    low = [np.asarray(x).astype(dtype) for x in call.inside(call.draw())]
    high = [x.astype(DOUBLE) for x in low]
    exact, exact_pull = gg.vjp(call, *high)
    rng = np.random.default_rng(zlib.crc32(f"{call} {dtype}".encode()))
    cotangents = [np.asarray(rng.normal(size=np.shape(o))).astype(dtype) for o in exact]
    slopes = [host(g) for g in exact_pull(tuple(c.astype(DOUBLE) for c in cotangents))]
    formula = reference(call.op)
    wanted = exact if formula is None else _signed(call.op.name, formula(*high, **call.params))

    arrays = [run.put(x) for x in low]
    out, pull = gg.vjp(lambda *a: call(*a, where=run.where), *arrays)
    kind = np.dtype(call.params.get("dtype", dtype))
    for i, (got, want) in enumerate(zip(out, wanted, strict=True)):
        name = "value" if len(out) == 1 else f"output {i}"
        run.near(name, got, want, _bound(call, want, high, slopes, eps), kind)
    home = CPU if call.op.name == "to_device" else run.where
    given = [backend.to_device(c.astype(kind), home) for c in cotangents]
    for i, (got, want) in enumerate(zip(pull(tuple(given)), slopes, strict=True)):
        run.near(f"gradient in argument {i}", got, want, 2 * _bound(call, want, high, slopes, eps), dtype)


def ops(run: Run) -> None:
    ops = list(registry.values())
    for dtype in (DOUBLE, SINGLE, HALF):
        if run.quick and dtype == HALF:
            continue
        with run.group(f"ops, {dtype}"):
            for op in ops:
                for call in calls_of(op, run.quick):
                    with run.case(f"{call} {dtype}"):
                        _check_op(run, call, dtype)
                if op.kind == "nondiff":
                    with run.case(f"{op.name} {dtype}"):
                        _check_truth(run, op, dtype)
    with run.group("gradients against differences"):
        for op in ops:
            for call in calls_of(op, run.quick):
                with run.case(f"{call} {DOUBLE}"):
                    run.groups[-1].checks += 1
                    order = 1 if run.quick else 2
                    gg.check_grads(lambda *x, call=call: call(*call.inside(x)), call.draw(), order=order, rtol=1e-6)


def _check_truth(run: Run, op: Op, dtype: Any) -> None:
    """Compare what has no derivative: truths and indices, exact, with ties and special values among the arguments."""
    x = np.array([0.5, -1.0, 2.0, 0.0, 2.0, -np.inf, np.inf, np.nan], dtype)
    y = np.array([0.5, 1.0, -2.0, -0.0, 3.0, -np.inf, 1.0, np.nan], dtype)
    arguments = [x, y][: len(op.vjps)]
    if op.name.startswith("logical") or op.name in ("all", "any"):
        arguments = [np.tile([True, False], 4), np.repeat([True, False], 4)][: len(op.vjps)]
    elif op.name.startswith("arg"):
        arguments = [x[:5]]
    formula = reference(op)
    if formula is None:
        raise LookupError(f"no formula for {op.name} to compare with")
    want = np.asarray(formula(*arguments))
    run.near("value", op.function(*map(run.put, arguments)), want, 0.0)
