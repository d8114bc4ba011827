"""Fused kernels to try: passes over rows, and loops."""

import numpy as np

from gpugrad.compile.kernels import Loop, RowPass
from gpugrad.compile.scalar import SYMBOLIC, argument, cast

S = SYMBOLIC


def sigmoid(z):
    t = S.exp(-S.abs(z))
    return S.where(z >= 0, 1, t) / (1 + t)


def logistic(columns, dtype="float32"):
    z, y = argument(0, dtype), argument(1, dtype)
    loss = S.maximum(z, 0) + S.log1p(S.exp(-S.abs(z))) - y * z
    return RowPass(((dtype, columns),), (0,), (dtype,), (), (loss,), ((0, sigmoid(z) - y),))


def squares(columns, dtype="float32"):
    z, y = argument(0, dtype), argument(1, dtype)
    return RowPass(((dtype, columns),), (0,), (dtype,), (), ((z - y) * (z - y),), ((0, 2 * (z - y)),))


def several(dtype="float32"):
    """Two matrices, three products, two gradients of one matrix, columns of all kinds, numbers, outputs, two sums."""
    z0, z1, z2, y = (argument(k, dtype) for k in range(4))
    label, weight = argument(4, "int64"), argument(5, "bool")
    bias, slope = argument(6, dtype), argument(7, "float64")
    eta = z0 + S.tanh(z1) * z2 + bias + label
    r = S.where(weight, eta - y, 0)
    return RowPass(
        matrices=((dtype, 12), (dtype, 7)),
        products=(0, 1, 0),
        columns=(dtype, "int64", "bool"),
        scalars=(dtype, "float64"),
        sums=(r * r, cast(weight, np.dtype(dtype))),
        back=((0, r), (1, cast(slope * z1, np.dtype(dtype))), (0, r * z1)),
        outputs=(eta, label * 3, eta > y),
    )


def transposed(dtype="float32"):
    """No product and no sum: X^T y."""
    return RowPass(((dtype, 5),), (), (dtype,), (), (), ((0, argument(0, dtype)),))


FULL = {"float32": (("full", "float32"), ("row", "float32"), ("column", "float32"), ("scalar", "float32"))}
FULL |= {"float64": tuple((layout, "float64") for layout, _ in FULL["float32"])}


def every_layout(sums, dtype="float32"):
    """All four layouts, two outputs, and sums over what is named."""
    x, row, column, number = (argument(k, dtype) for k in range(4))
    e = S.exp(-x * x) * row + column * number
    terms = {"all": e, "rows": x * row, "columns": x * column}
    return Loop(FULL[dtype], (e, S.tanh(x)), tuple((terms[over] * k, over) for k, over in enumerate(sums, 1)))


def flat(dtype="float32"):
    """What may be worked on as a vector."""
    x, y = argument(0, dtype), argument(1, dtype)
    return Loop((("full", dtype), ("full", dtype)), (x * y + 1,), ((x * y, "all"),))
