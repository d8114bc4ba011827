"""The functions of `scalar.FUNCTIONS` on vectors: polynomials without branches, for float32 and float64.

Errors are below 2 units in the last place; special values are NumPy's; results below the smallest normal number
underflow gradually. Polynomials are minimax fits made with mpmath (Remez), rounded. What is
rarely used (trigonometry, float64 powers) calls the C library for every lane.

Exponentials round to an integer by adding 1.5 * 2**23 (2**52) and reading the low bits: code that may be reordered
("reassoc") folds that away, one more reason why no fast-math flag is ever set.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from gpugrad.compile.cpu_ir import Code, Unsupported, Vector, kind_of
from gpugrad.compile.scalar import Expr, in_order

_LOG2E = 1 / math.log(2)
_LOG10E = 1 / math.log(10)
_INF = math.inf


class _Format:
    """Constants of a floating-point format."""

    def __init__(
        self,
        mantissa: int,
        bias: int,
        ln2: tuple[float, float],
        log10_2: tuple[float, float],
        log2e_low: float,
        log10e_low: float,
        exp_range: tuple[float, float],
        expm1_range: tuple[float, float],
        exp: tuple[float, ...],
        tanh: tuple[float, ...],
        sinh: int,
    ) -> None:
        self.mantissa, self.bias = mantissa, bias
        self.ln2, self.log10_2 = ln2, log10_2  # the first with so few bits that its product with an exponent is exact
        self.log2e_low, self.log10e_low = log2e_low, log10e_low  # what rounding to this format leaves out
        self.exp_range, self.expm1_range = exp_range, expm1_range
        self.exp, self.tanh = exp, tanh
        self.sinh = tuple(1 / math.factorial(2 * k + 3) for k in range(sinh))
        self.magic = 1.5 * 2.0**mantissa
        self.magic_bits = ((bias + mantissa) << mantissa) | (1 << (mantissa - 1))
        # of sqrt(1/2): where the mantissa's interval begins, so that logarithms near 1 are sums without cancellation
        self.sqrt_half = ((bias - 1) << mantissa) | int((math.sqrt(2) - 1) * 2**mantissa)
        self.smallest = 2.0 ** (1 - bias)
        self.tiny = 2.0 ** (-mantissa - 2)  # below it x*x is lost beside x


_FORMATS = {
    "f4": _Format(
        mantissa=23,
        bias=127,
        ln2=(0.693145751953125, 1.42860677e-06),
        log10_2=(0.301025390625, 4.60503907e-06),
        log2e_low=1.925963e-08,
        log10e_low=-1.010305e-08,
        exp_range=(-104.0, 89.5),
        expm1_range=(-25.0, 88.9),
        exp=(0.4999999345, 0.1666652057, 0.04166838841, 0.008368724088, 0.001381460317),
        tanh=(-0.333332784, 0.1333133075, -0.05372933512, 0.02060223931, -0.005660955885),
        sinh=5,
    ),
    "f8": _Format(
        mantissa=52,
        bias=1023,
        ln2=(0.6931471805601177, -1.7239444525614835e-13),
        log10_2=(0.3010299956640665, -8.532344317057107e-14),
        log2e_low=2.0355273740931033e-17,
        log10e_low=1.098319650216765e-17,
        exp_range=(-746.0, 711.0),
        expm1_range=(-50.0, 709.9),
        exp=(
            0.5000000000000011, 0.16666666666666408, 0.0416666666665304, 0.008333333333496756,
            0.0013888888943598295, 0.00019841269502359862, 2.4801493108142415e-05, 2.755758952672072e-06,
            2.7630251459192295e-07, 2.4999232847162354e-08,
        ),
        tanh=(
            -0.3333333333333331, 0.1333333333332896, -0.05396825396562572, 0.021869488456829105,
            -0.00886323412409003, 0.003592112129190558, -0.0014557138354999455, 0.0005893998328600218,
            -0.00023686526038553887, 9.129775930259837e-05, -2.9921745796681495e-05, 5.924550331216612e-06,
        ),
        sinh=9,
    ),
}  # fmt: skip
# (log(1+f) - f + f*f/2) / f**3 on sqrt(1/2) - 1 .. sqrt(2) - 1, for float32
_LOG_F = (
    0.3333331262, -0.2500000949, 0.2000211774, -0.1666800196, 0.1421957094, -0.1240548877, 0.1188795317,
    -0.1167618376, 0.06747712725,
)  # fmt: skip
# (2*atanh(s)/s - 2) / s**2 in s**2, s = f/(2+f), for float64
_LOG_S = (
    0.6666666666666734, 0.3999999999941395, 0.2857142874260246, 0.22222198545423166, 0.18183566060642817,
    0.15313999126794836, 0.14796529756595764,
)  # fmt: skip


def _polynomial(x: Vector, coefficients: Sequence[float]) -> Vector:
    """Return c[0] + c[1]*x + ..., by Horner's rule."""
    y = x.like(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = x.code.fma(y, x, c)
    return y


def _below(x: Vector, limit: float) -> Vector:
    """Return x or the limit, whichever is smaller; NaN stays."""
    return x.code.select(x > limit, limit, x)


def _clamped(x: Vector, limits: tuple[float, float]) -> Vector:
    x = _below(x, limits[1])
    return x.code.select(x < limits[0], limits[0], x)


def _abs(x: Vector) -> Vector:
    return x.code.intrinsic("fabs", x)


def _power_of_2(k: Vector, f: _Format) -> Vector:
    return ((k + f.bias) << f.mantissa).from_bits()


def _reduced(x: Vector, f: _Format) -> tuple[Vector, Vector]:
    """Return integers k and r in -ln(2)/2 .. ln(2)/2 with x = k*ln(2) + r."""
    fma = x.code.fma
    t = fma(x, _LOG2E, f.magic)
    n = t - f.magic
    return t.bits() - f.magic_bits, fma(n, -f.ln2[1], fma(n, -f.ln2[0], x))


def exp(x: Vector, shift: int = 0) -> Vector:
    """Return exp(x) * 2**shift."""
    f = _FORMATS[x.kind]
    k, r = _reduced(_clamped(x, f.exp_range), f)
    p = x.code.fma(r * r, _polynomial(r, f.exp), r) + 1
    if shift:
        k = k + shift
    half = k >> 1  # in two steps: 2**k itself may overflow, or be subnormal and lose the digits of p
    return p * _power_of_2(half, f) * _power_of_2(k - half, f)


def expm1(x: Vector) -> Vector:
    f, code = _FORMATS[x.kind], x.code
    k, r = _reduced(_clamped(x, f.expm1_range), f)
    p = code.fma(r * r, _polynomial(r, f.exp), r)
    half = _power_of_2(k - 1, f)
    y = code.fma(half, p, half - 0.5) * 2
    return code.select(_abs(x) < f.tiny, x, code.select(k.eq(0), p, y))


def _split(x: Vector, f: _Format) -> tuple[Vector, Vector]:
    """Return integers k and m in sqrt(1/2) .. sqrt(2) with x = m * 2**k, for normal positive x."""
    i = x.bits() - f.sqrt_half
    return i >> f.mantissa, ((i & ((1 << f.mantissa) - 1)) + f.sqrt_half).from_bits()


def _log1p_rest(f: Vector) -> Vector:
    """Return log(1+f) - f on sqrt(1/2) - 1 .. sqrt(2) - 1."""
    code = f.code
    square = f * f
    if f.kind == "f4":
        return code.fma(square * f, _polynomial(f, _LOG_F), square * -0.5)
    s = f / (f + 2)
    z = s * s
    half = square * 0.5
    return code.fma(s, code.fma(z, _polynomial(z, _LOG_S), half), -half)


def _log_parts(x: Vector) -> tuple[Vector, Vector]:
    """Return k as floats and f with x = (1+f) * 2**k, also for subnormal x."""
    f, code = _FORMATS[x.kind], x.code
    small = x < f.smallest
    k, m = _split(code.select(small, x * 2.0 ** (f.mantissa + 2), x), f)
    k = code.select(small, k - (f.mantissa + 2), k)
    return k.to(x.kind), m - 1


def _log_limits(x: Vector, y: Vector) -> Vector:
    """Return a logarithm's y where 0 < x < inf, else its limits; NaN below 0."""
    code = x.code
    y = code.select(x.eq(0), -_INF, code.select(x.eq(_INF), x, y))
    return code.select(x >= 0, y, math.nan)


def log(x: Vector) -> Vector:
    high, low = _FORMATS[x.kind].ln2
    fma = x.code.fma
    k, f = _log_parts(x)
    return _log_limits(x, fma(k, high, f + fma(k, low, _log1p_rest(f))))


def log2(x: Vector) -> Vector:
    """Return the logarithm to base 2, exact at powers of 2."""
    fma = x.code.fma
    k, f = _log_parts(x)
    high, low = _LOG2E, _FORMATS[x.kind].log2e_low
    return _log_limits(x, k + fma(f, high, fma(_log1p_rest(f), high, f * low)))


def log10(x: Vector) -> Vector:
    form, fma = _FORMATS[x.kind], x.code.fma
    k, f = _log_parts(x)
    rest = fma(_log1p_rest(f), _LOG10E, fma(f, form.log10e_low, k * form.log10_2[1]))
    return _log_limits(x, fma(k, form.log10_2[0], fma(f, _LOG10E, rest)))


def log1p(x: Vector) -> Vector:
    form, code = _FORMATS[x.kind], x.code
    u = x + 1
    k, m = _split(u, form)
    # what the sum u lost, on the scale of m; nothing from 2**64 on, where the scale itself would not be a number
    lost = (x - (u - 1)) * _power_of_2(-code.select(k > 64, 64, k), form)
    f = (m - 1) + lost
    n = k.to(x.kind)
    y = code.fma(n, form.ln2[0], f + code.fma(n, form.ln2[1], _log1p_rest(f)))
    return code.select(_abs(x) < form.tiny, x, _log_limits(u, y))


def logaddexp(x: Vector, y: Vector) -> Vector:
    code = x.code
    distance = _abs(code.select(x.eq(y), 0, x - y))  # also where both are infinite
    return code.select(x > y, x, y) + log1p(exp(-distance))


def tanh(x: Vector) -> Vector:
    f, code = _FORMATS[x.kind], x.code
    size = _abs(x)
    square = x * x
    small = code.fma(x * square, _polynomial(square, f.tanh), x)
    large = 1 - 2 / (exp(_below(size, 20.0) * 2) + 1)
    return code.select(size < 0.625, code.select(size < f.tiny, x, small), code.intrinsic("copysign", large, x))


def sinh(x: Vector) -> Vector:
    f, code = _FORMATS[x.kind], x.code
    size = _abs(x)
    square = x * x
    small = code.fma(x * square, _polynomial(square, f.sinh), x)
    half = exp(size, -1)
    large = half - 0.25 / half
    return code.select(size < 1.0, code.select(size < f.tiny, x, small), code.intrinsic("copysign", large, x))


def cosh(x: Vector) -> Vector:
    half = exp(_abs(x), -1)
    return half + 0.25 / half


def pow(x: Vector, y: Vector) -> Vector:
    """Return x**y; float32 through float64 logarithms, with the limits of the C standard."""
    code = x.code
    if x.kind == "f8":
        return code.each_lane("pow", x, y)
    a, b = x.to("f8"), y.to("f8")
    size = _abs(a)
    r = exp(log(size) * b)
    r = code.select(size.eq(1) & b.eq(b), 1, r)
    r = code.select(x.eq(1) | y.eq(0), 1, r)
    whole = code.intrinsic("floor", b).eq(b)
    half = b * 0.5
    odd = whole & code.intrinsic("floor", half).ne(half)
    r = code.select(odd, code.intrinsic("copysign", r, a), r)
    never = (a < 0) & (a > -_INF) & (whole ^ True)
    return code.select(never, math.nan, r).to("f4")


def hypot(x: Vector, y: Vector) -> Vector:
    code = x.code
    if x.kind == "f8":
        return code.each_lane("hypot", x, y)
    a, b = x.to("f8"), y.to("f8")
    r = code.intrinsic("sqrt", a * a + b * b).to("f4")
    return code.select(_abs(x).eq(_INF) | _abs(y).eq(_INF), _INF, r)


def maximum(x: Vector, y: Vector) -> Vector:
    larger = x.code.select(x > y, x, y)
    return x.code.select(x.isnan(), x, larger) if x.is_float else larger


def minimum(x: Vector, y: Vector) -> Vector:
    smaller = x.code.select(x < y, x, y)
    return x.code.select(x.isnan(), x, smaller) if x.is_float else smaller


def sign(x: Vector) -> Vector:
    code = x.code
    if x.kind[0] in "ub":
        return code.select(x.ne(0), 1, x)
    signs = code.select(x > 0, 1, code.select(x < 0, -1, x.like(0)))
    return code.select(x.isnan(), x, signs) if x.is_float else signs


def absolute(x: Vector) -> Vector:
    if x.is_float:
        return _abs(x)
    return x.code.select(x < 0, -x, x) if x.kind[0] == "i" else x


def _isfinite(x: Vector) -> Vector:
    return _abs(x) < _INF if x.is_float else x.code.number(True, "b1", x.lanes)


def _isnan(x: Vector) -> Vector:
    return x.isnan() if x.is_float else x.code.number(False, "b1", x.lanes)


def _intrinsic(name: str) -> Callable[..., Vector]:
    return lambda *args: args[0].code.intrinsic(name, *args)


def _libm(name: str) -> Callable[..., Vector]:
    return lambda *args: args[0].code.each_lane(name + ("f" if args[0].kind == "f4" else ""), *args)


# By the names in scalar.FUNCTIONS; arguments come in the kind that the function computes in.
FUNCTIONS: dict[str, Callable[..., Vector]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "pow": pow,
    "neg": lambda x: -x,
    "abs": absolute,
    "sign": sign,
    "maximum": maximum,
    "minimum": minimum,
    "sqrt": _intrinsic("sqrt"),
    "exp": exp,
    "expm1": expm1,
    "log": log,
    "log1p": log1p,
    "log2": log2,
    "log10": log10,
    "logaddexp": logaddexp,
    "sin": _libm("sin"),
    "cos": _libm("cos"),
    "tan": _libm("tan"),
    "asin": _libm("asin"),
    "acos": _libm("acos"),
    "atan": _libm("atan"),
    "atan2": _libm("atan2"),
    "sinh": sinh,
    "cosh": cosh,
    "tanh": tanh,
    "hypot": hypot,
    "copysign": _intrinsic("copysign"),
    "floor": lambda x: x.code.intrinsic("floor", x) if x.is_float else x,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x.eq(y),
    "ne": lambda x, y: x.ne(y),
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "not": lambda x: x ^ True,
    "isnan": _isnan,
    "isfinite": _isfinite,
    "where": lambda condition, x, y: x.code.select(condition, x, y),
}
_ARITHMETIC = frozenset({"add", "sub", "mul", "neg", "abs", "sign", "maximum", "minimum", "floor", "where"})


def check(roots: Sequence[Expr]) -> None:
    """Raise Unsupported where expressions hold a dtype or an operation on integers that is not printed."""
    for e in in_order(roots):
        kind_of(e.dtype)
        if e.dtype.kind in "iu" and e.fn not in ("const", "input", "cast") and e.fn not in _ARITHMETIC:
            raise Unsupported(f"{e.fn} of {e.dtype}")


def evaluate(code: Code, roots: Sequence[Expr], inputs: Callable[[int], Vector], lanes: int) -> list[Vector]:
    """Write expressions, each subexpression once; `inputs` gives the vector for an input's number."""
    done: dict[int, Vector] = {}
    for e in in_order(roots):
        kind = kind_of(e.dtype)
        args: Any = [done[id(a)] for a in e.args]
        if e.fn == "const":
            x = code.number(e.value, kind, lanes)
        elif e.fn == "input":
            x = inputs(e.value).to(kind)
        elif e.fn == "cast":
            x = args[0].to(kind)
        else:
            if e.weak:
                args = [a.to(kind) for a in args]
            x = FUNCTIONS[e.fn](*args)
        done[id(e)] = x
    return [done[id(e)] for e in roots]
