"""The functions of `scalar.FUNCTIONS` on vectors: polynomials without branches, for float32 and float64.

Errors are below 2 units in the last place; special values are NumPy's; results below the smallest normal number
underflow gradually. Polynomials are minimax fits made with mpmath (Remez), rounded. Only
sines, cosines and tangents of numbers beyond `_FAR` call the C library, for every lane.

float32 trigonometry, powers and hypot are computed in float64, or reduced in it. In float64, where a rounding on the
way would show, what it lost is kept as a second number, "low", that is added at the end.

Exponentials round to an integer by adding 1.5 * 2**23 (2**52) and reading the low bits: code that may be reordered
("reassoc") folds that away, one more reason why no fast-math flag is ever set.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from gpugrad.compile.cpu_ir import Code, Operand, Unsupported, Vector, kind_of, size_of
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
# (sin(r)/r - 1) / z, (cos(r) - 1 + z/2) / z**2, (tan(r)/r - 1) / z, in z = r*r, |r| < pi/4 and a little
_SIN = {
    "f4": (-0.1666666716, 0.008333331905, -0.0001983993279, 2.723056468e-06),
    "f8": (
        -0.16666666666666666, 0.008333333333330948, -0.00019841269836756337, 2.755731610123463e-06,
        -2.505113154474904e-08, 1.5918106187983314e-10,
    ),
}  # fmt: skip
_COS = {
    "f4": (0.04166666418, -0.001388822682, 2.453200432e-05),
    "f8": (
        0.041666666666666664, -0.0013888888888887395, 2.480158729876412e-05, -2.7557317270828396e-07,
        2.087614606630559e-09, -1.1382617045435524e-11,
    ),
}  # fmt: skip
_TAN = (
    0.3333333324, 0.1333335151, 0.05396265198, 0.02193494296, 0.008491415624, 0.00471740967, -0.0003573338236,
    0.001960284994,
)  # fmt: skip
# (asin(x)/x - 1) / z on |x| < 1/2 and (atan(x)/x - 1) / z on |x| < sqrt(2) - 1, in z = x*x; both evaluated in float64
_ASIN = {
    "f4": (0.1666666629, 0.07500103154, 0.04459662569, 0.0311319187, 0.01700577531, 0.03392111646),
    "f8": (
        0.16666666666666669, 0.07499999999998241, 0.04464285714672273, 0.030381944111001966,
        0.022372174007367695, 0.017352368412977215, 0.013971564491006528, 0.011475832144092564,
        0.010344046499704577, 0.0053685168706045765, 0.01763736832116647, -0.015212861701865395,
        0.02899887987186246,
    ),
}  # fmt: skip
_ATAN = {
    "f4": (-0.3333333328, 0.1999997826, -0.1428419719, 0.1107210788, -0.08629576524, 0.05059457449),
    "f8": (
        -0.3333333333333333, 0.19999999999995763, -0.14285714284712484, 0.11111111018648524,
        -0.09090904705388284, 0.07692185934435601, -0.06664547467533681, 0.05858441670588353,
        -0.05086887906687434, 0.03927077827921471, -0.019222116903855765,
    ),
}  # fmt: skip
# (atanh(s)/s - 1 - z/3) / z**2 in z = s*s, for powers
_ATANH = (
    0.2, 0.1428571428571469, 0.11111111110824477, 0.09090909168428743, 0.07692297407645651, 0.06667406140798006,
    0.05853021322534751, 0.058625595283319114,
)  # fmt: skip
# pi/2 as a sum: the first three have 33 bits, so that their products with whole numbers below 2**20 are exact
_HALF_PI = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487111665e-21, 8.4784276603689e-32)
_HALF_PI_REST = 6.077100506506192e-11  # after the first part
_QUARTER_PI = (0.7853981633974483, 3.061616997868383e-17)  # the first of 50 bits: its small multiples are exact
_THIRD_LOW = 1.850371707708594e-17  # what rounding 1/3 leaves out
# up to where trigonometric functions are reduced by multiples of pi/2 here; float32 counts them in float32
_FAR = {"f4": 2.0**17, "f8": 2.0**20}


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


def _exact(x: Vector, y: Vector, z: Vector) -> Vector:
    """Return x * y + z in one rounding on every processor."""
    return x.code.intrinsic("fma", x, y, z)


def _sum(x: Operand, y: Vector) -> tuple[Vector, Vector]:
    """Return x + y and what rounding it lost."""
    x = y.like(x)
    s = x + y
    part = s - x
    return s, (x - (s - part)) + (y - part)


def _quick_sum(x: Operand, y: Vector) -> tuple[Vector, Vector]:
    """Return x + y and what rounding it lost, where x is 0 or |x| >= |y|."""
    x = y.like(x)
    s = x + y
    return s, y - (s - x)


def _quotient(x: Vector, x_low: Operand, y: Vector, y_low: Operand) -> tuple[Vector, Vector]:
    """Return (x + x_low) / (y + y_low) as a sum."""
    q = x / y
    return q, (_exact(-q, y, x) + (x.like(x_low) - q * y_low)) / y


def _power_of_2(k: Vector, f: _Format) -> Vector:
    return ((k + f.bias) << f.mantissa).from_bits()


def _reduced(x: Vector, f: _Format) -> tuple[Vector, Vector]:
    """Return integers k and r in -ln(2)/2 .. ln(2)/2 with x = k*ln(2) + r."""
    fma = x.code.fma
    t = fma(x, _LOG2E, f.magic)
    n = t - f.magic
    return t.bits() - f.magic_bits, fma(n, -f.ln2[1], fma(n, -f.ln2[0], x))


def exp(x: Vector, shift: int = 0, low: Vector | None = None) -> Vector:
    """Return exp(x + low) * 2**shift."""
    f = _FORMATS[x.kind]
    k, r = _reduced(_clamped(x, f.exp_range), f)
    if low is not None:
        r = r + low
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


def _power(x: Vector, y: Vector) -> Vector:
    """Return x**y for x >= 0 in float64: exp(y * log(x)) with a logarithm of 65 bits."""
    form, code = _FORMATS["f8"], x.code
    k, f = _log_parts(x)
    s, s_low = _quotient(f, 0, *_quick_sum(2, f))
    # log(1+f) = 2*atanh(s) = 2*(s + s*t), t = z * (1/3 + z * ...)
    z = s * s
    z_low = _exact(s, s, -z) + s * s_low * 2
    c, c_low = _quick_sum(1 / 3, z * _polynomial(z, _ATANH))
    c_low = c_low + _THIRD_LOW
    t = z * c
    t_low = _exact(z, c, -t) + code.fma(z, c_low, z_low * c)
    u = s * t
    u_low = _exact(s, t, -u) + code.fma(s, t_low, s_low * t)
    h, low = _quick_sum(s, u)
    low = (low + (s_low + u_low)) * 2
    log, lost = _quick_sum(k * form.ln2[0], h * 2)
    low = lost + code.fma(k, form.ln2[1], low)
    log = _log_limits(x, log)
    p = y * log
    p_low = _exact(y, log, -p) + y * low
    return exp(p, low=code.select(_abs(p) < 800, p_low, 0))  # neither limits nor what is 0 or inf have a low part


def pow(x: Vector, y: Vector) -> Vector:
    """Return x**y; float32 through float64 logarithms, with the limits of the C standard."""
    code = x.code
    a, b = x.to("f8"), y.to("f8")
    size = _abs(a)
    r = _power(size, b) if x.kind == "f8" else exp(log(size) * b)
    r = code.select(size.eq(1) & b.eq(b), 1, r)
    r = code.select(x.eq(1) | y.eq(0), 1, r)
    whole = code.intrinsic("floor", b).eq(b)
    half = b * 0.5
    odd = whole & code.intrinsic("floor", half).ne(half)
    r = code.select(odd, code.intrinsic("copysign", r, a), r)
    never = (a < 0) & (a > -_INF) & (whole ^ True)
    return code.select(never, math.nan, r).to(x.kind)


def hypot(x: Vector, y: Vector) -> Vector:
    code = x.code
    a, b = _abs(x).to("f8"), _abs(y).to("f8")
    if x.kind == "f4":
        r = code.intrinsic("sqrt", a * a + b * b).to("f4")
    else:
        a, b = code.select(a > b, a, b), code.select(a > b, b, a)
        large, small = a > 2.0**500, a < 2.0**-500
        scale = code.select(large, 2.0**-600, code.select(small, 2.0**600, a.like(1)))
        back = code.select(large, 2.0**600, code.select(small, 2.0**-600, a.like(1)))
        a, b = a * scale, b * scale
        r = code.intrinsic("sqrt", code.fma(a, a, b * b)) * back
    return code.select(_abs(x).eq(_INF) | _abs(y).eq(_INF), _INF, r)


def _quadrant(x: Vector) -> tuple[Vector, Vector, Vector]:
    """Return integers q and r + low in -pi/4 .. pi/4 with x = q * pi/2 + r + low, up to _FAR.

    For float32 r is in float64, low is nothing, and |r| may be a little above pi/4.
    """
    form, fma = _FORMATS[x.kind], x.code.fma
    t = fma(x, 2 / math.pi, form.magic)
    n, q = t - form.magic, t.bits()
    if x.kind == "f4":
        n = n.to("f8")
        r = fma(n, -_HALF_PI_REST, fma(n, -_HALF_PI[0], x.to("f8")))
        return q, r, r.like(0)
    r, low = _sum(fma(n, -_HALF_PI[0], x), n * -_HALF_PI[1])
    r, lower = _sum(r, n * -_HALF_PI[2])
    return q, *_quick_sum(r, fma(n, -_HALF_PI[3], low + lower))


def _sin_cos(r: Vector, r_low: Vector | None) -> tuple[Vector, Vector, Vector, Vector]:
    """Return sin(r + r_low) and cos(r + r_low) in -pi/4 .. pi/4, each as a sum."""
    fma = r.code.fma
    z = r * r
    half = z * -0.5
    rest_of_sin = fma(z * r, _polynomial(z, _SIN[r.kind]), fma(r_low, half, r_low) if r_low is not None else 0)
    rest_of_cos = z * z * _polynomial(z, _COS[r.kind])
    if r_low is not None:
        rest_of_cos = fma(r, -r_low, rest_of_cos)
    c, low = _quick_sum(1, half)
    return *_quick_sum(r, rest_of_sin), *_quick_sum(c, low + rest_of_cos)


def _waves(x: Vector) -> tuple[Vector, Vector, Vector]:
    """Return the number of a quadrant, and sine and cosine as if it were the first."""
    q, r, low = _quadrant(x)
    s, _, c, _ = _sin_cos(r.to("f4"), None) if x.kind == "f4" else _sin_cos(r, low)
    return q, s, c


def _turned(y: Vector, q: Vector) -> Vector:
    """Return y, or -y in the third and fourth quadrant."""
    return (y.bits() ^ ((q & 2) << (8 * size_of(y.kind) - 2))).from_bits()


def _or_libm(name: str, x: Vector, y: Vector) -> Vector:
    """Return y up to _FAR, and beyond what the C library says."""
    code = x.code
    name += "f" if x.kind == "f4" else ""
    return code.rarely(_abs(x) > _FAR[x.kind], lambda: code.each_lane(name, x), y)


def sin(x: Vector) -> Vector:
    code = x.code
    q, s, c = _waves(x)
    y = _turned(code.select((q & 1).eq(0), s, c), q)
    return _or_libm("sin", x, code.select(_abs(x) < _FORMATS[x.kind].tiny, x, y))


def cos(x: Vector) -> Vector:
    q, s, c = _waves(x)
    return _or_libm("cos", x, _turned(x.code.select((q & 1).eq(0), c, s), q + 1))


def tan(x: Vector) -> Vector:
    code = x.code
    q, r, low = _quadrant(x)
    even = (q & 1).eq(0)
    if x.kind == "f4":
        z = r * r
        y = code.fma(z * r, _polynomial(z, _TAN), r)
        y = code.select(even, y, -1 / y).to("f4")
    else:
        s, s_low, c, c_low = _sin_cos(r, low)
        above, above_low = code.select(even, s, -c), code.select(even, s_low, -c_low)
        below, below_low = code.select(even, c, s), code.select(even, c_low, s_low)
        y, rest = _quotient(above, above_low, below, below_low)
        y = y + rest
    return _or_libm("tan", x, code.select(_abs(x) < _FORMATS[x.kind].tiny, x, y))


def _arc(x: Vector) -> tuple[Vector, Vector, Vector, Vector]:
    """Return what asin and acos share, in float64: whether |x| > 1/2, a and the low part of its arcsine, |x|.

    a is |x|, or sqrt((1 - |x|) / 2), whose arcsine is half that of sqrt(1 - x*x), the other side of the triangle.
    """
    code = x.code
    size = _abs(x).to("f8")
    large = size > 0.5
    z = code.select(large, 0.5 - size * 0.5, size * size)
    root = code.intrinsic("sqrt", z)
    a = code.select(large, root, size)
    low = a * z * _polynomial(z, _ASIN[x.kind])
    if x.kind == "f8":
        lost = _exact(-root, root, z) / (root * 2)
        low = low + code.select(large & root.ne(0), lost, 0)
    return large, a, low, size


def asin(x: Vector) -> Vector:
    code = x.code
    large, a, low, _ = _arc(x)
    high, lost = _quick_sum(2 * _QUARTER_PI[0], a * -2)
    near_1 = high + (lost + code.fma(low, -2, 2 * _QUARTER_PI[1]))
    return code.intrinsic("copysign", code.select(large, near_1, a + low).to(x.kind), x)


def acos(x: Vector) -> Vector:
    code = x.code
    large, a, low, _ = _arc(x)
    below = x < 0
    # pi/2 -+ (a + low), 2 * (a + low), pi - 2 * (a + low)
    base = code.select(large, code.select(below, 4.0, a.like(0)), 2.0)
    scale = code.select(large, code.select(below, -2.0, a.like(2)), code.select(below, 1.0, a.like(-1)))
    high, lost = _quick_sum(base * _QUARTER_PI[0], a * scale)
    return (high + (lost + code.fma(low, scale, base * _QUARTER_PI[1]))).to(x.kind)


def _angle(y: Vector, x: Vector, back: Vector | None, kind: str) -> Vector:
    """Return the angle of (x, y) for y, x >= 0, x > 0 or y > 0, or of (-x, y) where `back`; for results of a kind."""
    code = x.code
    steep = y > x
    a, b = code.select(steep, y, x), code.select(steep, x, y)
    middle = b > a * (math.sqrt(2) - 1)
    above, below = code.select(middle, b - a, b), code.select(middle, a + b, a)
    q = above / below
    low = None
    if kind == "f8":
        q, low = _quotient(
            above, code.select(middle, _quick_sum(-a, b)[1], 0), below, code.select(middle, _quick_sum(a, b)[1], 0)
        )
    z = q * q
    rest = code.fma(z * q, _polynomial(z, _ATAN[kind]), code.fma(low, -z, low) if low is not None else 0)
    # base and which way round: from 0 on, back from pi/2, back from pi; by eighths of the circle
    base = code.select(middle, 1.0, q.like(0))
    base = code.select(steep, 2 - base, base)
    minus = steep
    if back is not None:
        base = code.select(back, 4 - base, base)
        minus = steep ^ back
    if kind == "f4":
        q = q + rest
        return code.fma(base, math.pi / 4, code.select(minus, -q, q))
    q, rest = code.select(minus, -q, q), code.select(minus, -rest, rest)
    high, lost = _quick_sum(base * _QUARTER_PI[0], q)
    return high + (lost + code.fma(base, _QUARTER_PI[1], rest))


def atan(x: Vector) -> Vector:
    size = _below(_abs(x).to("f8"), 2.0**64)
    return x.code.intrinsic("copysign", _angle(size, size.like(1), None, x.kind).to(x.kind), x)


def atan2(y: Vector, x: Vector) -> Vector:
    code = x.code
    a, b = _abs(y).to("f8"), _abs(x).to("f8")
    endless = a.eq(_INF) | b.eq(_INF)
    # of infinities only the direction counts, NaN * 0 stays NaN; of two zeros, only the sign of x
    a = code.select(endless, code.select(a.eq(_INF), 1, a * 0), a)
    b = code.select(endless, code.select(b.eq(_INF), 1, b * 0), b)
    b = code.select(a.eq(0) & b.eq(0), 1, b)
    if x.kind == "f8":
        most = code.select(a > b, a, b)
        scale = code.select(most > 2.0**900, 2.0**-100, code.select(most < 2.0**-900, 2.0**100, most.like(1)))
        a, b = a * scale, b * scale
    return code.intrinsic("copysign", _angle(a, b, x.bits() < 0, x.kind).to(x.kind), y)


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
    "sin": sin,
    "cos": cos,
    "tan": tan,
    "asin": asin,
    "acos": acos,
    "atan": atan,
    "atan2": atan2,
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
