"""Special functions that NumPy has not."""

import math
from typing import Any

from gpugrad.declare import elementwise
from gpugrad.ops.elementwise import exp, in_float32

# Chebyshev coefficients of erfc(z) * exp(z*z) / t on z >= 0, t = 2/(2+z) in (0, 1], to 1e-17; computed with mpmath.
_ERFC = (
    0.57703373861646969, 0.35543692127049849, 0.065095158828786525, 0.0036711423958366392, -0.0011128447433526325,
    -0.0001607582991537808, 3.2780315741731371e-5, 5.442441645505016e-6, -1.5154665553171482e-6,
    -1.4297608181169865e-7, 8.2346088274194934e-8, -1.2962846852306563e-9, -4.1547216310151983e-9,
    6.3470582783628112e-10, 1.4320822712256224e-10, -6.1603901052045855e-11, 2.0612138554721696e-12,
    3.5714931488477044e-12, -8.5864228432517965e-13, -6.1456002137906306e-14, 7.4187257485966171e-14,
    -1.2895042755032326e-14, -2.3587263857106324e-15, 1.5729349381685911e-15, -2.2782966239546465e-16,
)  # fmt: skip


def _ndtr(xp: Any, x: Any) -> Any:
    t = 2 / (2 + xp.abs(x) * math.sqrt(0.5))
    u = 2 * t - 1
    a, b = 0 * u, 0 * u
    for c in reversed(_ERFC[1:]):  # Clenshaw's recurrence
        a, b = 2 * u * a - b + c, a
    tail = 0.5 * t * (u * a - b + _ERFC[0]) * xp.exp(-0.5 * x * x)
    return xp.where(x > 0, 1 - tail, tail)


ndtr = elementwise(
    "ndtr",
    forward=in_float32(_ndtr),
    partials=lambda _y, x: exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi)),
    domain=[(-3, 3)],
    doc="Distribution function of the standard normal, Phi(x) = erfc(-x / sqrt(2)) / 2.",
)
