"""Scalar expressions: what an elementwise formula does to one element, from which both executors print code.

The formula of an op is written once, in its record: ``forward(xp, x, ...)``. NumPy and CuPy run it on arrays; called
with `SYMBOLIC` for xp and an `Expr` for each array, the same lines build an expression instead:

    softplus    maximum(x, 0) + log1p(exp(-abs(x)))
                Expr add(maximum(in0, 0.0), log1p(exp(neg(abs(in0)))))

Every `Expr` has the dtype that NumPy would give it, and its arguments are cast to what the operation computes in, so
that printing needs no rules of promotion. Equal expressions are one object: common subexpressions are found as they
are built, and constants are folded.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy

from gpugrad.backend import CPU, Abstract
from gpugrad.op import Op

BOOL = numpy.dtype(bool)

# Name of the operation, and the NumPy function that says its dtype and folds it. All others are not expressible.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": numpy.add,
    "sub": numpy.subtract,
    "mul": numpy.multiply,
    "div": numpy.divide,
    "pow": numpy.power,
    "neg": numpy.negative,
    "abs": numpy.abs,
    "sign": numpy.sign,
    "maximum": numpy.maximum,
    "minimum": numpy.minimum,
    "sqrt": numpy.sqrt,
    "exp": numpy.exp,
    "expm1": numpy.expm1,
    "log": numpy.log,
    "log1p": numpy.log1p,
    "log2": numpy.log2,
    "log10": numpy.log10,
    "logaddexp": numpy.logaddexp,
    "sin": numpy.sin,
    "cos": numpy.cos,
    "tan": numpy.tan,
    "asin": numpy.arcsin,
    "acos": numpy.arccos,
    "atan": numpy.arctan,
    "atan2": numpy.arctan2,
    "sinh": numpy.sinh,
    "cosh": numpy.cosh,
    "tanh": numpy.tanh,
    "hypot": numpy.hypot,
    "copysign": numpy.copysign,
    "floor": numpy.floor,
    "lt": numpy.less,
    "le": numpy.less_equal,
    "gt": numpy.greater,
    "ge": numpy.greater_equal,
    "eq": numpy.equal,
    "ne": numpy.not_equal,
    "and": numpy.logical_and,
    "or": numpy.logical_or,
    "not": numpy.logical_not,
    "isnan": numpy.isnan,
    "isfinite": numpy.isfinite,
    "where": numpy.where,
}
COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
# Further names under which formulas reach these.
ALIASES = {
    "negative": "neg",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "power": "pow",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arctan2": "atan2",
    "absolute": "abs",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "equal": "eq",
    "not_equal": "ne",
    "logical_and": "and",
    "logical_or": "or",
    "logical_not": "not",
}


class NotExpressible(Exception):
    """A formula did something that is no operation on one element; the op then runs as it is, not fused."""


class Expr(Abstract):
    """One operation on scalars: `fn` applied to `args`, of a dtype.

    fn is a name in FUNCTIONS, "cast", "const" (value: the number) or "input" (value: which). weak: stands for a Python
    number, which does not widen what it meets.
    """

    __slots__ = ("args", "dtype", "fn", "value", "weak")
    place = CPU  # whatever the device, a formula is the same
    __array_ufunc__ = None  # NumPy scalars leave binary operators to us

    fn: str
    args: tuple["Expr", ...]
    dtype: numpy.dtype[Any]
    value: Any
    weak: bool

    shape = ()
    ndim = 0
    size = 1

    def __repr__(self) -> str:
        if self.fn == "const":
            return repr(self.value.item())
        if self.fn == "input":
            return f"in{self.value}"
        return f"{self.fn}({', '.join(map(repr, self.args))})"

    def astype(self, dtype: Any, copy: bool = True) -> "Expr":
        """Cast, as an array does."""
        return cast(self, numpy.dtype(dtype))

    def apply(self, op: Op, args: Any, params: dict[str, Any]) -> "Expr":
        """Do what an op called within a formula does: its own formula."""
        return evaluate_formula(op.forward, args, params)

    def __bool__(self) -> bool:
        raise NotExpressible("the formula asks for the truth of a value")

    def __float__(self) -> float:
        raise NotExpressible("the formula asks for a value")

    __int__ = __index__ = __float__  # all raise

    def __neg__(self) -> "Expr":
        return apply("neg", self)

    def __pos__(self) -> "Expr":
        return self

    def __abs__(self) -> "Expr":
        return apply("abs", self)

    def __invert__(self) -> "Expr":
        if self.dtype != BOOL:
            raise NotExpressible("~ of integers")
        return apply("not", self)

    __hash__ = object.__hash__


def _operator(fn: str) -> tuple[Callable[[Expr, Any], Expr], Callable[[Expr, Any], Expr]]:
    return lambda x, y: apply(fn, x, y), lambda x, y: apply(fn, y, x)


def _logical(fn: str) -> tuple[Callable[[Expr, Any], Expr], Callable[[Expr, Any], Expr]]:
    def call(x: Any, y: Any) -> Expr:
        if any(numpy.result_type(getattr(v, "dtype", type(v))) != BOOL for v in (x, y)):
            raise NotExpressible(f"{fn} of integers")
        return apply(fn, x, y)

    return call, lambda x, y: call(y, x)


for _name, _fn in {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow"}.items():
    _there, _back = _operator(_fn)
    setattr(Expr, f"__{_name}__", _there)
    setattr(Expr, f"__r{_name}__", _back)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Expr, f"__{_name}__", _operator(_name)[0])
for _name in ("and", "or"):
    _there, _back = _logical(_name)
    setattr(Expr, f"__{_name}__", _there)
    setattr(Expr, f"__r{_name}__", _back)


_interned: dict[Any, Expr] = {}
_MANY = 200_000


def _make(fn: str, args: tuple[Expr, ...], dtype: Any, value: Any = None, weak: bool = False) -> Expr:
    if fn == "const":
        key: Any = (fn, dtype, weak, value.tobytes())
    else:
        key = (fn, dtype, weak, value, *map(id, args))
    found = _interned.get(key)
    if found is None:
        if len(_interned) > _MANY:
            _interned.clear()  # equal expressions of one program may now be two: slower, not wrong
        found = _interned[key] = object.__new__(Expr)
        found.fn, found.args, found.dtype, found.value, found.weak = fn, args, dtype, value, weak
    return found


def argument(position: int, dtype: Any, weak: bool = False) -> Expr:
    """Return the expression for input number `position`."""
    return _make("input", (), numpy.dtype(dtype), position, weak)


def constant(value: Any, dtype: Any = None) -> Expr:
    """Return the expression for a number: a Python number is weak unless a dtype is given."""
    weak = dtype is None and type(value) in (bool, int, float)
    array = numpy.asarray(value, dtype=dtype)
    if array.ndim or array.dtype.kind not in "fiub":
        raise NotExpressible(f"a constant of shape {array.shape}, dtype {array.dtype}")
    return _make("const", (), array.dtype, array[()], weak)


def _expr(value: Any) -> Expr:
    return value if type(value) is Expr else constant(value)


def cast(x: Any, dtype: numpy.dtype[Any]) -> Expr:
    """Return x converted to a dtype."""
    x = _expr(x)
    if x.dtype == dtype:
        return x if not x.weak else _strong(x, dtype)
    if dtype.kind not in "fiub" or x.dtype.kind not in "fiub":
        raise NotExpressible(f"a cast from {x.dtype} to {dtype}")
    if x.fn == "const":
        if x.weak and x.dtype.kind in "iu" and dtype.kind in "iu" and x.value != x.value.astype(dtype):
            raise NotExpressible(f"{x.value} as {dtype}")  # NumPy compares with such a number, but no loop does
        with numpy.errstate(all="ignore"):
            return constant(x.value, dtype)
    if x.weak and x.fn == "input":
        return _make("cast", (x,), dtype)
    if x.fn == "cast" and x.args[0].dtype == BOOL:
        return cast(x.args[0], dtype)  # 0 and 1 are exact everywhere
    return _make("cast", (x,), dtype)


def _strong(x: Expr, dtype: Any) -> Expr:
    return constant(x.value, dtype) if x.fn == "const" else _make("cast", (x,), dtype)


@functools.cache
def _loop(fn: str, kinds: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the dtype an operation computes in and that of its result, as NumPy has them."""
    samples = [k(1) if isinstance(k, type) else numpy.ones(1, k) for k in kinds]
    if fn == "where":
        samples[0] = numpy.ones(1, bool)
        out = numpy.result_type(*(s if isinstance(s, (int, float)) else s.dtype for s in samples[1:]))
        return out, out
    with numpy.errstate(all="ignore"):
        try:
            out = numpy.asarray(FUNCTIONS[fn](*samples)).dtype
        except TypeError as error:  # such as - of booleans
            raise NotExpressible(str(error)) from None
    if fn in COMPARISONS:
        return numpy.result_type(*(s if isinstance(s, (int, float)) else s.dtype for s in samples)), BOOL
    if fn in ("isnan", "isfinite"):
        return kinds[0], BOOL
    if fn in ("and", "or", "not"):
        return BOOL, BOOL
    return out, out


def _kind(x: Expr) -> Any:
    return {"f": float, "i": int, "u": int, "b": bool}[x.dtype.kind] if x.weak else x.dtype


def apply(fn: str, *values: Any) -> Expr:
    """Return an operation on expressions and numbers, with its arguments cast to what it computes in.

    Raises NotExpressible for dtypes it has no loop for.
    """
    args = tuple(map(_expr, values))
    if any(a.dtype.kind not in "fiub" for a in args):
        raise NotExpressible(f"{fn} of {[str(a.dtype) for a in args]}")
    loop, out = _loop(fn, tuple(map(_kind, args)))
    if out == numpy.dtype(object) or out.kind == "c":
        raise NotExpressible(f"{fn} gives {out}")
    if loop == BOOL and fn in ("add", "mul", "maximum", "minimum"):
        fn = {"add": "or", "mul": "and", "maximum": "or", "minimum": "and"}[fn]
    weak = all(a.weak for a in args) and fn in ("add", "sub", "mul", "div", "pow", "neg", "abs")
    if fn == "where":
        args = (
            cast(args[0], BOOL) if args[0].dtype == BOOL else apply("ne", args[0], 0),
            *(cast(a, loop) for a in args[1:]),
        )
    elif not weak:
        args = tuple(cast(a, loop) for a in args)
    if all(a.fn == "const" for a in args):
        with numpy.errstate(all="ignore"):
            folded = FUNCTIONS[fn](*(a.value for a in args))
        return _make("const", (), out, numpy.asarray(folded, dtype=out)[()], weak)
    simpler = _simpler(fn, args)
    return _make(fn, args, out, None, weak) if simpler is None else simpler


def _is(x: Expr, number: float) -> bool:
    return x.fn == "const" and bool(x.value == number)


def _simpler(fn: str, args: tuple[Expr, ...]) -> Expr | None:
    """Return an equal expression with less in it, if there is one; equal for NaN and infinities too."""
    if fn == "mul":
        for x, y in (args, args[::-1]):
            if _is(y, 1):
                return x
            if _is(y, -1):
                return apply("neg", x)
    elif fn == "div" and _is(args[1], 1):
        return args[0]
    elif (fn in ("neg", "not") and args[0].fn == fn) or (fn == "abs" and args[0].fn == "abs"):
        return args[0].args[0] if fn != "abs" else args[0]
    elif fn == "abs" and args[0].fn == "neg" and args[0].dtype.kind != "u":
        return apply("abs", args[0].args[0])
    elif fn == "pow" and args[1].fn == "const" and args[1].value in (1, 2, 3, 0.5, -1):
        x, power = args[0], float(args[1].value)
        if x.dtype.kind == "f":
            return {
                1.0: lambda: x,
                2.0: lambda: apply("mul", x, x),
                3.0: lambda: apply("mul", apply("mul", x, x), x),
                0.5: lambda: apply("sqrt", x),
                -1.0: lambda: apply("div", 1, x),
            }[power]()
    elif fn == "where":
        condition, x, y = args
        if condition.fn == "const":
            return x if condition.value else y
        if x is y:
            return x
        if condition.fn == "not":
            return apply("where", condition.args[0], y, x)
    elif fn in ("and", "or"):
        for x, y in (args, args[::-1]):
            if y.fn == "const":
                return (x if y.value else y) if fn == "and" else (y if y.value else x)
        if args[0] is args[1]:
            return args[0]
    return None


class _Symbolic:
    """What a formula gets for its array module: the functions of FUNCTIONS, and NumPy's constants and dtypes."""

    def __getattr__(self, name: str) -> Any:
        fn = ALIASES.get(name, name)
        if fn in FUNCTIONS:
            return functools.partial(_elementwise, fn)
        if name == "square":
            return lambda x: apply("mul", x, x)
        if name == "reciprocal":
            return lambda x: apply("div", 1, x) if _expr(x).dtype.kind == "f" else _refused(name)
        if name == "asarray":
            return lambda x, dtype=None: _expr(x) if dtype is None else cast(x, numpy.dtype(dtype))
        value = getattr(numpy, name, None)
        if isinstance(value, float) or (isinstance(value, type) and issubclass(value, numpy.generic)):
            return value
        return _refused(name)


def _elementwise(fn: str, *args: Any, **options: Any) -> Expr:
    if options:
        raise NotExpressible(f"{fn} with {sorted(options)}")
    return apply(fn, *args)


def _refused(name: str) -> Any:
    raise NotExpressible(f"{name} is no function of one element")


SYMBOLIC = _Symbolic()


def evaluate_formula(forward: Callable[..., Any], args: Sequence[Any], params: dict[str, Any]) -> Expr:
    """Return what a formula does to expressions and numbers. Raises NotExpressible."""
    try:
        out = forward(SYMBOLIC, *args, **params)
    except NotExpressible:
        raise
    except (AttributeError, TypeError, ValueError) as error:  # it asked for something that only arrays have
        raise NotExpressible(str(error)) from error
    if type(out) is not Expr and type(out) not in (bool, int, float) and not isinstance(out, numpy.generic):
        raise NotExpressible(f"the formula returned a {type(out).__name__}")
    return _expr(out)


def substitute(roots: Iterable[Expr], inputs: Callable[[Expr], Expr]) -> list[Expr]:
    """Return expressions with every input replaced by what `inputs` gives for it."""
    done: dict[int, Expr] = {}
    for e in in_order(roots):
        if e.fn == "input":
            done[id(e)] = inputs(e)
        elif e.fn == "const":
            done[id(e)] = e
        else:
            new = tuple(done[id(a)] for a in e.args)
            if all(a is b for a, b in zip(new, e.args, strict=True)):
                done[id(e)] = e
            elif e.fn == "cast":
                done[id(e)] = cast(new[0], e.dtype)
            else:
                done[id(e)] = apply(e.fn, *new)
    return [done[id(e)] for e in roots]


def in_order(roots: Iterable[Expr]) -> list[Expr]:
    """Return all expressions below `roots`, each once and after its arguments."""
    out: list[Expr] = []
    seen: set[int] = set()
    stack = [(e, False) for e in reversed(list(roots))]
    while stack:
        e, ready = stack.pop()
        if ready:
            out.append(e)
        elif id(e) not in seen:
            seen.add(id(e))
            stack.append((e, True))
            stack.extend((a, False) for a in reversed(e.args))
    return out


# About how many instructions a function becomes, where it is not one or two.
_COSTS = {
    **dict.fromkeys(("div", "sqrt", "sign", "floor"), 2),
    **dict.fromkeys(("exp", "expm1", "log", "log1p", "log2", "log10", "tanh"), 10),
    **dict.fromkeys(("sinh", "cosh", "logaddexp", "hypot"), 16),
    **dict.fromkeys(("sin", "cos", "tan", "asin", "acos", "atan", "atan2"), 24),
    "pow": 40,
}


def cost(roots: Iterable[Expr]) -> int:
    """Return about how much code expressions become: what compiling them takes grows with it, and faster than it."""
    return sum(_COSTS.get(e.fn, 1) for e in in_order(roots))


def run(roots: Sequence[Expr], inputs: Sequence[Any]) -> list[Any]:
    """Evaluate expressions on NumPy arrays that broadcast; what tests compare printed code with."""
    values: dict[int, Any] = {}
    with numpy.errstate(all="ignore"):
        for e in in_order(roots):
            if e.fn == "input":
                values[id(e)] = inputs[e.value]
            elif e.fn == "const":
                values[id(e)] = e.value
            elif e.fn == "cast":
                values[id(e)] = numpy.asarray(values[id(e.args[0])]).astype(e.dtype)
            else:
                values[id(e)] = FUNCTIONS[e.fn](*(values[id(a)] for a in e.args))
    return [values[id(e)] for e in roots]
