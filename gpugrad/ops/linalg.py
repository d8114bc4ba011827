"""Linear algebra: products, solvers and decompositions, over stacks of matrices (..., m, n).

The rules of the decompositions are those of Giles, "An extended collection of matrix derivative results" (2008), and
Townsend, "Differentiating the singular value decomposition" (2016), for real matrices.
"""

import functools
import math
import string
from typing import Any, NamedTuple

import numpy

from gpugrad import backend
from gpugrad.backend import where_it_is
from gpugrad.declare import Function, bilinear, case, linear, primitive
from gpugrad.errors import ShapeMismatch
from gpugrad.ops.elementwise import abs as _abs
from gpugrad.ops.elementwise import where
from gpugrad.ops.index import scatter
from gpugrad.ops.reduce import max as _max
from gpugrad.ops.reduce import min as _min
from gpugrad.ops.reduce import narrowed, product_of_others, restore, wide_sum, widened
from gpugrad.ops.reduce import sum as _sum
from gpugrad.ops.shape import axes_of, eye_like, matrix_transpose, permute_dims, tril

# ----------------------------------------------------------------------------------------------- products


def _matmul_dx(g: Any, _x: Any, y: Any) -> Any:
    if y.ndim == 1:
        return g.reshape((*g.shape, 1)) * y if _x.ndim > 1 else g * y
    if _x.ndim == 1 and y.ndim == 2:
        return matmul(y, g)
    if _x.ndim == 1:
        return (g.reshape((*g.shape[:-1], 1, g.shape[-1])) * y).sum(axis=-1)
    return matmul(g, matrix_transpose(y))


def _as_matrix(x: Any) -> Any:
    """Stack the rows of all matrices into one; -1 could not tell the number of empty rows."""
    return x.reshape((math.prod(x.shape[:-1]), x.shape[-1]))


def _matmul_dy(g: Any, x: Any, _y: Any) -> Any:
    if x.ndim == 1:
        return x.reshape((-1, 1)) * g.reshape((*g.shape[:-1], 1, g.shape[-1])) if _y.ndim > 1 else g * x
    if _y.ndim == 1:
        # flattened, it is one matrix-vector product, and no table of the size of x
        return matmul(g.reshape((math.prod(g.shape),)), _as_matrix(x))
    if _y.ndim == 2 and x.ndim > 2:
        return matmul(matrix_transpose(_as_matrix(x)), _as_matrix(g))
    return matmul(matrix_transpose(x), g)


matmul: Function = bilinear(
    "matmul",
    forward=lambda xp, x, y: xp.matmul(x, y),
    transposes=(_matmul_dx, _matmul_dy),
    domain=(
        case((3, 4), (4, 2)),
        case((3, 4), (4,)),
        case((4,), (4, 2)),
        case((4,), (4,)),
        case((2, 3, 4), (4, 5)),
        case((2, 3, 4), (4,)),
        case((4,), (2, 4, 5)),
        case((2, 1, 3, 4), (5, 4, 2)),
        case((0, 4), (4, 2)),
        case((3, 0), (0,)),
        case((2, 3, 0), (0, 4)),
        case((2, 3, 4), (4, 0)),
    ),
    doc="Matrix product: (..., m, k), (..., k, n) -> (..., m, n); 1-d arguments as in NumPy.",
)


def _without(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i not in axes)


def _contracted(axes: Any, x: Any, y: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(axes, int):
        return tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    first, second = axes
    return axes_of(first, x.ndim), axes_of(second, y.ndim)


def _tensordot_dx(g: Any, _x: Any, y: Any, *, axes: Any) -> Any:
    of_x, of_y = _contracted(axes, _x, y)
    free_x, free_y = _without(_x.ndim, of_x), _without(y.ndim, of_y)
    # g has the free axes of x, then those of y; the product with y brings the contracted ones, in y's own order
    out = tensordot(g, y, axes=(tuple(range(len(free_x), g.ndim)), free_y))
    order = free_x + tuple(of_x[of_y.index(b)] for b in sorted(of_y))
    return permute_dims(out, axes=tuple(order.index(i) for i in range(_x.ndim)))


def _tensordot_dy(g: Any, x: Any, _y: Any, *, axes: Any) -> Any:
    of_x, of_y = _contracted(axes, x, _y)
    free_x, free_y = _without(x.ndim, of_x), _without(_y.ndim, of_y)
    out = tensordot(x, g, axes=(free_x, tuple(range(len(free_x)))))
    order = tuple(of_y[of_x.index(a)] for a in sorted(of_x)) + free_y
    return permute_dims(out, axes=tuple(order.index(i) for i in range(_y.ndim)))


tensordot: Function = bilinear(
    "tensordot",
    forward=lambda xp, x, y, *, axes=2: xp.tensordot(x, y, axes=axes),
    transposes=(_tensordot_dx, _tensordot_dy),
    domain=(
        case((2, 3, 4), (3, 4, 5)),
        case((2, 3), (4,), axes=0),
        case((2, 3, 4), (5, 4, 2), axes=((2, 0), (1, 2))),
        case((2, 3, 4), (4, 2, 5), axes=((0, -1), (1, 0))),
    ),
    doc="Sum of products over axes: the last n of x with the first n of y, or a pair of sequences.",
)
vecdot = bilinear(
    "vecdot",
    forward=lambda xp, x, y, *, axis=-1: wide_sum(xp, x * y, axis, False),
    transposes=(
        lambda g, _x, y, *, axis: _beside(g, axis) * y,
        lambda g, x, _y, *, axis: _beside(g, axis) * x,
    ),
    domain=(case((4,), (4,)), case((3, 4), (4,)), case((3, 4), (3, 4), axis=-2)),
    doc="Dot product along axis (counted from the end): (..., n), (..., n) -> (...).",
)


def _beside(g: Any, axis: int) -> Any:
    at = g.ndim + 1 + axis if axis < 0 else axis
    return g.reshape((*g.shape[:at], 1, *g.shape[at:]))


outer = bilinear(
    "outer",
    forward=lambda xp, x, y: xp.outer(x, y),
    transposes=(lambda g, _x, y: matmul(g, y), lambda g, x, _y: matmul(x, g)),
    domain=(case((3,), (4,)),),
    doc="Outer product of vectors: (m,), (n,) -> (m, n).",
)


def _einsum_rule(i: int, g: Any, _y: Any, *x: Any, terms: tuple[str, ...], out: str) -> Any:
    mine = terms[i]
    unique = "".join(dict.fromkeys(mine))
    others = [(t, a) for k, (t, a) in enumerate(zip(terms, x, strict=True)) if k != i]
    reached = set(out).union(*(t for t, _ in others))
    labels = "".join(c for c in unique if c in reached)
    result = _einsum([g, *(a for _, a in others)], terms=(out, *(t for t, _ in others)), out=labels)
    sizes = dict(zip(mine, x[i].shape, strict=True))
    # labels summed out of this term alone: the cotangent is the same all along them
    lengths = iter(result.shape)
    result = result.reshape(tuple(next(lengths) if c in reached else 1 for c in unique))
    spread = tuple(k for k, c in enumerate(unique) if sizes[c] == 1 != result.shape[k])
    if spread:  # an axis of length 1 that was broadcast
        result = result.sum(axis=spread, keepdims=True)
    if len(unique) == len(mine):
        return result  # the sweep spreads it
    # a label twice in one term reads a diagonal: the cotangent goes back onto it
    result = result + x[i].dtype.type(0) * _einsum([x[i]], terms=(mine,), out=unique)
    positions = numpy.indices(tuple(sizes[c] for c in unique), sparse=True)
    index = tuple(positions[unique.index(c)] for c in mine)
    return scatter(result, shape=x[i].shape, index=_index_like(index, x[i]))


def _index_like(index: tuple[Any, ...], x: Any) -> tuple[Any, ...]:
    where_ = backend.device_of(getattr(x, "_data", x))
    return tuple(backend.to_device(i, where_) for i in index)


_einsum = primitive(
    "einsum",
    forward=lambda xp, *x, terms, out: xp.einsum(",".join(terms) + "->" + out, *x, optimize=len(x) > 1),
    vjp=_einsum_rule,
    variadic=True,
    domain=(
        case((2, 3), (3, 4), terms=("ij", "jk"), out="ik"),
        case((2, 3), terms=("ij",), out="i"),
        case((3, 3), terms=("ii",), out=""),
        case((3, 3), (3,), terms=("ii", "i"), out="i"),
        case((2, 3), (2, 4), (3, 4), terms=("ij", "ik", "jk"), out=""),
        case((2, 3), (1,), terms=("ij", "i"), out="ij"),
    ),
    doc="Sum of products in Einstein's notation.",
)


def einsum(subscripts: str, /, *operands: Any) -> Any:
    """Sum of products in Einstein's notation, e.g. ``einsum("...ij,jk->...ik", a, b)``.

    Raises ShapeMismatch where the number of subscripts does not fit the operands or their axes.
    """
    left, arrow, out = subscripts.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        raise ShapeMismatch(f"einsum: {len(terms)} terms in {subscripts!r} for {len(operands)} operands")
    free = [c for c in string.ascii_letters if c not in subscripts]
    longest = 0
    for k, (term, operand) in enumerate(zip(terms, operands, strict=True)):
        named = len(term.replace("...", ""))
        if named > operand.ndim or (named < operand.ndim and "..." not in term):
            raise ShapeMismatch(f"einsum: term {term!r} does not fit shape {operand.shape}")
        extra = operand.ndim - named
        longest = max(longest, extra)
        terms[k] = term.replace("...", "".join(free[:extra][::-1]))
    dots = "".join(free[:longest][::-1])
    if not arrow:
        joined = "".join(terms)
        out = dots + "".join(c for c in sorted(set(joined) - set(dots)) if joined.count(c) == 1)
    return _einsum(operands, terms=tuple(terms), out=out.replace("...", dots))


# ------------------------------------------------------------------------------------ diagonal and trace


def _embed(g: Any, _x: Any, *, offset: int) -> Any:
    n = g.shape[-1]
    rows = numpy.arange(n) + max(-offset, 0)
    columns = numpy.arange(n) + max(offset, 0)
    index = (Ellipsis, *_index_like((rows, columns), g))
    return scatter(g, shape=_x.shape, index=index)


diagonal = linear(
    "diagonal",
    forward=lambda xp, x, *, offset=0: xp.diagonal(x, offset, -2, -1),
    transpose=_embed,
    domain=(case((3, 4)), case((2, 3, 3), offset=1), case((4, 3), offset=-2)),
    masks=True,
    doc="Diagonal of the matrices: (..., m, n) -> (..., k).",
)


def trace(x: Any, /, *, offset: int = 0) -> Any:
    """Sum of the diagonal: (..., m, n) -> (...)."""
    return _sum(diagonal(x, offset=offset), axis=-1)


# ----------------------------------------------------------------------------------------------- norms


def _norm2_vjp(g: Any, y: Any, x: Any, *, axis: Any, keepdims: bool) -> Any:
    length = restore(y, x, axis, keepdims)
    return restore(g, x, axis, keepdims) * where(length == 0, 0, x / where(length == 0, 1, length))


def _norm2(xp: Any, x: Any, *, axis: Any = None, keepdims: bool = False) -> Any:
    wide = widened(x)
    scale = xp.max(xp.abs(wide), axis=axis, keepdims=True) if x.size else 0
    scale = xp.where((scale == 0) | ~xp.isfinite(scale), 1, scale)  # squares neither overflow nor vanish
    y = scale * xp.sqrt(wide_sum(xp, xp.square(wide / scale), axis, True))
    if not keepdims:
        y = y.reshape(tuple(n for i, n in enumerate(x.shape) if i not in axes_of(axis, x.ndim)))
    return narrowed(y, x)


vector_norm2 = primitive(
    "vector_norm2",
    forward=_norm2,
    vjp=_norm2_vjp,
    domain=(case((4,)), case((3, 4), axis=0), case((3, 4), axis=(0, 1), keepdims=True)),
    doc="Euclidean norm over axis; slope 0 at the origin.",
)


@where_it_is
def norm(x: Any, /, *, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:  # NumPy's name
    """Norm over axis: of vectors (one axis), or of matrices (two).

    ord: None or 2 the Euclidean, 1, inf, -inf or p for vectors; None or "fro", "nuc", 1, 2, inf for matrices. With
    axis None: the Euclidean norm of all elements, or `ord` of the vector or matrix that x is. Slope 0 at the origin.
    """
    if ord is None:
        return vector_norm2(x, axis=axis, keepdims=keepdims)
    axes = axes_of(axis, x.ndim)
    if len(axes) == 1:
        if ord == 2:
            return vector_norm2(x, axis=axes, keepdims=keepdims)
        size = _abs(x)
        if ord in (math.inf, -math.inf):
            return (_max if ord > 0 else _min)(size, axis=axes, keepdims=keepdims)
        if ord == 1:
            return _sum(size, axis=axes, keepdims=keepdims)
        if ord == 0:
            return _sum((x != 0).astype(x.dtype), axis=axes, keepdims=keepdims)
        top = _max(size, axis=axes, keepdims=True)
        flat = top == 0
        return _p_norm(size, where(flat, 1, top), flat, ord, axes, keepdims)
    if len(axes) != 2:
        raise ShapeMismatch(f"norm: ord={ord!r} over axes {axes} of shape {x.shape}; expected one axis or two")
    if ord == "fro":
        return vector_norm2(x, axis=axes, keepdims=keepdims)
    if ord in (1, -1, math.inf, -math.inf):
        down, across = axes if ord in (1, -1) else axes[::-1]
        sums = _sum(_abs(x), axis=down, keepdims=True)
        y = (_max if ord > 0 else _min)(sums, axis=across, keepdims=True)
    elif ord in ("nuc", 2, -2):
        rest = _without(x.ndim, axes)
        s = svd(permute_dims(x, axes=rest + axes)).S
        y = _sum(s, axis=-1) if ord == "nuc" else _max(s, axis=-1) if ord == 2 else _min(s, axis=-1)
        y = y.reshape(tuple(1 if i in axes else n for i, n in enumerate(x.shape)))
    else:
        raise ValueError(f"norm: ord={ord!r} is not a matrix norm; expected 'fro', 'nuc', 1, -1, 2, -2, inf or -inf")
    return y if keepdims else y.reshape(tuple(n for i, n in enumerate(x.shape) if i not in axes))


def _p_norm(size: Any, scale: Any, flat: Any, p: float, axes: tuple[int, ...], keepdims: bool) -> Any:
    total = _sum((size / scale) ** p, axis=axes, keepdims=True)
    y = where(flat, 0, scale * where(flat, 1, total) ** (1 / p))
    return y if keepdims else y.reshape(tuple(n for i, n in enumerate(size.shape) if i not in axes))


# -------------------------------------------------------------------------------------------- solvers


def positive_definite(x: Any) -> Any:
    """Map any square matrices to well-conditioned symmetric positive definite ones (for the tests' domains)."""
    return matmul(x, matrix_transpose(x)) + 2.0 * _eye(x)


def well_conditioned(x: Any) -> Any:
    """Map any square matrices to invertible ones with distinct singular values (for the tests' domains)."""
    eye = _eye(x)
    return x + eye * (1.0 + 2.0 * eye.cumsum(axis=0).sum(axis=0)[::-1])


def _eye(x: Any) -> Any:
    return eye_like(x, x.shape[-1])


def _column(b: Any) -> Any:
    return b.reshape((*b.shape, 1))


def _row(s: Any) -> Any:
    return s.reshape((*s.shape[:-1], 1, s.shape[-1]))


def _through_single(forward: Any) -> Any:
    """Make a decomposition compute float16 in float32 and round its results: LAPACK has no float16."""

    @functools.wraps(forward)
    def wide(xp: Any, *arrays: Any, **params: Any) -> Any:
        if not any(a.dtype == numpy.float16 for a in arrays):
            return forward(xp, *arrays, **params)
        result = forward(xp, *map(widened, arrays), **params)
        return (
            tuple(part.astype(numpy.float16) for part in result)
            if isinstance(result, tuple)
            else narrowed(result, arrays[0])
        )

    return wide


@_through_single
def _solve(xp: Any, a: Any, b: Any) -> Any:
    # the standard: b is a vector only when it has one axis
    matrix = b[..., None] if b.ndim == 1 else b
    batch = numpy.broadcast_shapes(a.shape[:-2], matrix.shape[:-2])  # CuPy does not broadcast them
    a = xp.broadcast_to(a, batch + a.shape[-2:])
    matrix = xp.broadcast_to(matrix, batch + matrix.shape[-2:])
    return xp.linalg.solve(a, matrix)[..., 0] if b.ndim == 1 else xp.linalg.solve(a, matrix)


def _solve_da(g: Any, y: Any, a: Any, _b: Any) -> Any:
    u = _solve_db(g, y, a, _b)
    if _b.ndim == 1:
        return -matmul(_column(u), _row(y))
    return -matmul(u, matrix_transpose(y))


def _solve_db(g: Any, _y: Any, a: Any, _b: Any) -> Any:
    at = matrix_transpose(a)
    return solve(at, _column(g)).reshape(g.shape) if _b.ndim == 1 else solve(at, g)


solve: Function = primitive(
    "solve",
    forward=_solve,
    vjp=(_solve_da, _solve_db),
    domain=(
        case((3, 3), (3, 2), through=None, low=0.5, high=1.5),
        case((3, 3), (3,), low=0.5, high=1.5),
        case((2, 3, 3), (2, 3, 2), low=0.5, high=1.5),
        case((2, 3, 3), (3,), low=0.5, high=1.5),
    ),
    doc="Solve a x = b: (..., n, n), (..., n, k) or (n,) -> shape of b.",
)


inv: Function = primitive(
    "inv",
    forward=_through_single(lambda xp, x: xp.linalg.inv(x)),
    vjp=lambda g, y, _x: -matmul(matrix_transpose(y), matmul(g, matrix_transpose(y))),
    domain=(case((3, 3), through=well_conditioned), case((2, 3, 3), through=well_conditioned)),
    doc="Inverse of square matrices: (..., n, n) -> (..., n, n).",
)


def _det_vjp(g: Any, y: Any, x: Any) -> Any:
    g = g.reshape((*g.shape, 1, 1))
    if backend.is_array(x):
        # The cofactors from the singular values of the others hold for singular matrices too.
        u, s, vh = svd(x)
        orientation = det(matmul(u, vh))
        return g * orientation.reshape((*orientation.shape, 1, 1)) * matmul(u * _row(product_of_others(s)), vh)
    return g * y.reshape(g.shape) * matrix_transpose(inv(x))


det: Function = primitive(
    "det",
    forward=_through_single(lambda xp, x: xp.linalg.det(x)),
    vjp=_det_vjp,
    domain=(case((3, 3), through=well_conditioned), case((2, 3, 3), through=well_conditioned)),
    doc="Determinant of square matrices: (..., n, n) -> (...). A second derivative needs an invertible matrix.",
)


class SlogdetResult(NamedTuple):
    """Sign and natural logarithm of the absolute value of a determinant."""

    sign: Any
    logabsdet: Any


_slogdet = primitive(
    "slogdet",
    forward=_through_single(lambda xp, x: tuple(xp.linalg.slogdet(x))),
    vjp=lambda g, _y, x: _slog_vjp(g, x),
    outputs=2,
    domain=(case((3, 3), through=well_conditioned), case((2, 3, 3), through=well_conditioned)),
    doc="Sign and log |det| of square matrices: (..., n, n) -> (...), (...).",
)


def _slog_vjp(g: Any, x: Any) -> Any:
    _, g_log = g  # the sign is constant
    if g_log is None:
        return 0 * x
    return g_log.reshape((*g_log.shape, 1, 1)) * matrix_transpose(inv(x))


def slogdet(x: Any, /) -> SlogdetResult:
    """Sign and log |det| of square matrices: (..., n, n) -> (...), (...), without overflow."""
    return SlogdetResult(*_slogdet(x))


# -------------------------------------------------------------------------------------- decompositions


def _half_lower(x: Any) -> Any:
    """Lower triangle with the diagonal halved."""
    return tril(x) - 0.5 * x * _eye(x)


def _symmetric(x: Any) -> Any:
    return 0.5 * (x + matrix_transpose(x))


def _cholesky_vjp(g: Any, y: Any, _x: Any, *, upper: bool) -> Any:
    low, gl = (matrix_transpose(y), matrix_transpose(g)) if upper else (y, g)
    inner = _half_lower(matmul(matrix_transpose(low), tril(gl)))
    left = solve(matrix_transpose(low), inner)
    return _symmetric(matrix_transpose(solve(matrix_transpose(low), matrix_transpose(left))))


@_through_single
def _cholesky(xp: Any, x: Any, *, upper: bool = False) -> Any:
    low = xp.linalg.cholesky(x)
    return xp.swapaxes(low, -1, -2) if upper else low


cholesky = primitive(
    "cholesky",
    forward=_cholesky,
    vjp=_cholesky_vjp,
    domain=(case((3, 3), through=positive_definite), case((2, 3, 3), through=positive_definite, upper=True)),
    doc="Cholesky factor L of symmetric positive definite x = L L^T (upper: U of U^T U): (..., n, n) -> (..., n, n).",
)


class QRResult(NamedTuple):
    """x = Q R."""

    Q: Any
    R: Any


def _qr_vjp(g: Any, y: Any, _x: Any) -> Any:
    gq, gr = g
    q, r = y
    if r.shape[-2] != r.shape[-1]:
        raise ShapeMismatch(f"qr: no gradient for a wide matrix {_x.shape}; it needs at least as many rows as columns")
    # Walter, Lehmann & Lamour 2012; M couples both cotangents
    m = 0 * matmul(r, matrix_transpose(r))
    if gr is not None:
        m = m + matmul(r, matrix_transpose(gr))
    if gq is not None:
        m = m - matmul(matrix_transpose(gq), q)
    lower = tril(m, k=-1)
    inner = matmul(q, lower + matrix_transpose(lower) + m * _eye(m))
    if gq is not None:
        inner = inner + gq
    return matrix_transpose(solve(r, matrix_transpose(inner)))


_qr = primitive(
    "qr",
    forward=_through_single(lambda xp, x: tuple(xp.linalg.qr(x))),
    vjp=_qr_vjp,
    outputs=2,
    domain=(case((3, 3), through=well_conditioned), case((4, 3)), case((2, 4, 3))),
    doc="Reduced QR decomposition: (..., m, n) -> Q (..., m, k), R (..., k, n).",
)


def qr(x: Any, /) -> QRResult:
    """Reduced QR decomposition x = Q R: (..., m, n) -> (..., m, k), (..., k, n), k = min(m, n)."""
    return QRResult(*_qr(x))


class EighResult(NamedTuple):
    """x = V diag(w) V^T."""

    eigenvalues: Any
    eigenvectors: Any


def _gaps(w: Any) -> Any:
    """1 / (w_j - w_i), and 0 on the diagonal."""
    d = _row(w) - _column(w)
    eye = _eye(d)
    return where(eye, 0, 1 / where(eye, 1, d))


def _eigh_vjp(g: Any, y: Any, _x: Any) -> Any:
    gw, gv = g
    w, v = y
    vt = matrix_transpose(v)
    inner = _eye(v) * _row(gw) if gw is not None else 0 * v
    if gv is not None:
        inner = inner + _gaps(w) * matmul(vt, gv)
    return _symmetric(matmul(v, matmul(inner, vt)))


_eigh = primitive(
    "eigh",
    forward=_through_single(lambda xp, x: tuple(xp.linalg.eigh(x))),
    vjp=_eigh_vjp,
    outputs=2,
    domain=(case((3, 3), through=lambda x: _symmetric(well_conditioned(x))),),
    doc="Eigenvalues (ascending) and eigenvectors of symmetric matrices: (..., n, n) -> (..., n), (..., n, n).",
)


def eigh(x: Any, /) -> EighResult:
    """Eigenvalues (ascending) and eigenvectors of symmetric matrices: (..., n, n) -> (..., n), (..., n, n).

    Eigenvectors have a gradient only where eigenvalues are distinct.
    """
    return EighResult(*_eigh(x))


class SVDResult(NamedTuple):
    """x = U diag(S) Vh."""

    U: Any
    S: Any
    Vh: Any


def _svd_vjp(g: Any, y: Any, _x: Any) -> Any:
    gu, gs, gvh = g
    u, s, vh = y
    v, ut = matrix_transpose(vh), matrix_transpose(u)
    inner = _eye(matmul(vh, v)) * _row(gs) if gs is not None else 0 * matmul(vh, v)
    if gu is None and gvh is None:
        return matmul(u, matmul(inner, vh))
    gaps = _gaps(s * s)
    outside = 0
    if gu is not None:
        j = gaps * matmul(ut, gu)
        inner = inner + (j + matrix_transpose(j)) * _row(s)
        if u.shape[-2] > u.shape[-1]:
            rest = gu - matmul(u, matmul(ut, gu))
            outside = matmul(rest / _row(s), vh)
    if gvh is not None:
        gv = matrix_transpose(gvh)
        k = gaps * matmul(vh, gv)
        inner = inner + _column(s) * (k + matrix_transpose(k))
        if v.shape[-2] > v.shape[-1]:
            rest = gv - matmul(v, matmul(vh, gv))
            outside = outside + matmul(u, matrix_transpose(rest / _row(s)))
    return matmul(u, matmul(inner, vh)) + outside


_svd = primitive(
    "svd",
    forward=_through_single(lambda xp, x: tuple(xp.linalg.svd(x, full_matrices=False))),
    vjp=_svd_vjp,
    outputs=3,
    domain=(case((3, 3), through=well_conditioned), case((4, 3)), case((3, 4)), case((2, 4, 3))),
    doc="Thin singular value decomposition: (..., m, n) -> U (..., m, k), S (..., k), Vh (..., k, n).",
)


def svd(x: Any, /) -> SVDResult:
    """Thin singular value decomposition x = U diag(S) Vh: (..., m, n) -> (..., m, k), (..., k), (..., k, n).

    Singular vectors have a gradient only where singular values are distinct.
    """
    return SVDResult(*_svd(x))


def _pinv_vjp(g: Any, y: Any, x: Any, *, rtol: Any) -> Any:
    # Golub & Pereyra 1973, transposed; for a rank that does not change
    gt, yt = matrix_transpose(g), matrix_transpose(y)
    main = -matmul(yt, matmul(g, yt))
    left = matmul(gt - matmul(x, matmul(y, gt)), matmul(y, yt))
    right = matmul(matmul(yt, y), gt - matmul(matmul(gt, y), x))
    return main + left + right


@_through_single
def _pinv(xp: Any, x: Any, *, rtol: float | None = None) -> Any:
    # the standard's default; NumPy's own is below the rounding of float32
    if rtol is None:
        rtol = max(x.shape[-2:]) * float(numpy.finfo(x.dtype).eps)
    return xp.linalg.pinv(x, rtol=rtol)


pinv = primitive(
    "pinv",
    forward=_pinv,
    vjp=_pinv_vjp,
    domain=(
        case((3, 3), through=well_conditioned),
        case((4, 2)),
        case((2, 4)),
        case((2, 4, 2)),
        case((4, 2), rtol=1e-3),
    ),
    doc="Moore-Penrose pseudo-inverse: (..., m, n) -> (..., n, m).",
)


@where_it_is
def lstsq(a: Any, b: Any, /, *, rtol: float | None = None) -> Any:
    """Least-squares solution of a x = b of smallest norm: (m, n), (m,) or (m, k) -> (n,) or (n, k).

    rtol: singular values below rtol times the largest count as zero. Differentiable where the rank does not change.
    """
    return matmul(pinv(a, rtol=rtol), b)
