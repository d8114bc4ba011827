"""Every op against PyTorch in float64: values and gradients, on the cases of test_laws."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from test_laws import CALLS, outputs_of

import gpugrad as gg
from gpugrad.op import registry

pytestmark = pytest.mark.oracle

try:
    import torch
except ImportError:  # the mark skips, with the reason
    torch = None


def _axis(function):
    """A reduction by NumPy's names."""

    def call(x, *, axis=None, keepdims=False):
        axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        return function(x, dim=axes, keepdim=keepdims) if axes else x

    return call


def _one_by_one(function):
    """A reduction that takes one axis at a time."""

    def call(x, *, axis=None, keepdims=False):
        axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        for a in sorted((a % x.ndim for a in axes), reverse=True):
            x = function(x, dim=a, keepdim=keepdims)
        return x

    return call


def _getitem(x, *, index):
    def part(i):
        return torch.as_tensor(i) if isinstance(i, np.ndarray) else i

    if isinstance(index, tuple) and any(isinstance(i, slice) and (i.step or 1) < 0 for i in index):
        # no negative steps there: flip first
        assert index[0] == slice(None, None, -2)
        return x.flip(0)[(slice(None, None, 2), *index[1:])]
    return x[tuple(map(part, index)) if isinstance(index, tuple) else part(index)]


def _scatter(g, *, shape, index):
    out = torch.zeros(shape, dtype=g.dtype)
    if isinstance(index[0], slice):
        rows = torch.arange(shape[0])[index[0]]
        return out.index_put((rows,), g)
    return out.index_put(tuple(map(torch.as_tensor, index)), g, accumulate=True)


def _pad(x, *, pad_width, constant_values=0):
    flat = [n for pair in reversed(pad_width) for n in pair]
    return torch.nn.functional.pad(x, flat, value=constant_values)


def _roll(x, *, shift, axis=None):
    return torch.roll(x, shift, axis)


def _flip(x, *, axis=None):
    axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    return torch.flip(x, axes)


def _table():
    """Name of an op -> the same in PyTorch, arrays positional and parameters by keyword."""
    t, nn, la = torch, torch.nn.functional, torch.linalg
    same = (
        "add subtract multiply divide pow negative abs sign square reciprocal maximum minimum exp expm1 log log1p log2 "
        "log10 sqrt sigmoid logaddexp hypot sin cos tan asin acos atan atan2 sinh cosh tanh less less_equal greater "
        "greater_equal not_equal logical_and logical_or logical_not isnan isfinite outer matmul argmax argmin all any"
    )
    table = {name: getattr(t, name) for name in same.split()}
    table |= {
        "equal": t.eq,
        "clip": t.clamp,
        "where": lambda c, x, y: t.where(c != 0, x, y),
        "masked_product": t.mul,
        "selected": lambda x, c: t.where(c != 0, x, 0.0),
        "ndtr": t.special.ndtr,
        "relu": nn.relu,
        "swish": lambda x, beta: x * t.sigmoid(beta * x),
        "bias_relu": lambda x, b: nn.relu(x + b),
        "bias_swish": lambda x, b, beta: (x + b) * t.sigmoid(beta * (x + b)),
        "squared_error": lambda x, y: (x - y) ** 2,
        "logistic_loss": lambda x, y: nn.softplus(x) - y * x,
        "log_sigmoid": nn.logsigmoid,
        "softplus": nn.softplus,
        "gelu": nn.gelu,
        "elu": nn.elu,
        "leaky_relu": nn.leaky_relu,
        "getitem": _getitem,
        "scatter": _scatter,
        "reshape": lambda x, *, shape: t.reshape(x, shape),
        "permute_dims": lambda x, *, axes: t.permute(x, axes),
        "broadcast_to": lambda x, *, shape: t.broadcast_to(x, shape),
        "concat": lambda *x, axis=0: t.cat(x, dim=axis),
        "flip": _flip,
        "roll": _roll,
        "pad": _pad,
        "triu": lambda x, *, k=0: t.triu(x, diagonal=k),
        "tril": lambda x, *, k=0: t.tril(x, diagonal=k),
        "astype": lambda x, *, dtype: x.to(getattr(t, dtype)),
        "sum": _axis(t.sum),
        "mean": _axis(t.mean),
        "logsumexp": _axis(t.logsumexp),
        "prod": _one_by_one(t.prod),
        "max": _axis(t.amax),
        "min": _axis(t.amin),
        "cumulative_sum": lambda x, *, axis=0: t.cumsum(x, dim=axis),
        "softmax": lambda x, *, axis=-1: t.softmax(x, dim=axis),
        "log_softmax": lambda x, *, axis=-1: t.log_softmax(x, dim=axis),
        "tensordot": lambda x, y, *, axes=2: t.tensordot(x, y, dims=axes),
        "vecdot": lambda x, y, *, axis=-1: la.vecdot(x, y, dim=axis),
        "einsum": lambda *x, terms, out: t.einsum(",".join(terms) + "->" + out, *x),
        "diagonal": lambda x, *, offset=0: t.diagonal(x, offset, -2, -1),
        "vector_norm2": lambda x, *, axis=None, keepdims=False: la.vector_norm(x, dim=axis, keepdim=keepdims),
        "solve": la.solve,
        "inv": la.inv,
        "det": la.det,
        "slogdet": la.slogdet,
        "cholesky": lambda x, *, upper=False: la.cholesky(x, upper=upper),
        "qr": la.qr,
        "eigh": la.eigh,
        "svd": lambda x: la.svd(x, full_matrices=False),
        "pinv": lambda x, *, rtol=None: la.pinv(x),
    }
    return table


# Functions of the results that do not depend on the signs of vectors, a matter of convention.
INVARIANT = {"svd": lambda u, s, vh: (u * u, s, vh * vh), "eigh": lambda w, v: (w, v * v)}

# Ops that PyTorch has not, and why nothing there stands for them.
ABSENT = {
    "product_of_others": "the derivative of prod, which PyTorch computes inside its own rule",
    "to_device": "a move between devices; on one device it is the identity",
}
TABLE = _table() if torch else {}
DIFFERENTIABLE = [call for call in CALLS if call.op.name in TABLE]


@pytest.mark.parametrize("call", DIFFERENTIABLE or [None], ids=[call.id for call in DIFFERENTIABLE] or ["all"])
def test_value_and_gradient(call):
    rng = call.rng()
    arrays = call.draw(rng)
    invariant = INVARIANT.get(call.op.name, lambda *parts: parts)
    out, pull = gg.vjp(lambda *a: invariant(*outputs_of(call(*a))), *arrays)
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    wanted = invariant(*outputs_of(TABLE[call.op.name](*tensors, **call.params)))
    assert len(out) == len(wanted)
    for got, want in zip(out, wanted, strict=True):
        assert got.shape == tuple(want.shape)
        close(got, want)
    g = call.cotangents(out, rng)
    used = [(w, torch.tensor(c)) for w, c in zip(wanted, g, strict=True) if w.requires_grad]
    if used:
        torch.autograd.backward([w for w, _ in used], [c for _, c in used])
    for x, t, got in zip(arrays, tensors, pull(g), strict=True):
        close(got, torch.zeros(x.shape, dtype=torch.float64) if t.grad is None else t.grad)


def close(got, want):
    want = want.detach().numpy()
    assert_allclose(got, want, rtol=1e-11, atol=1e-12 * (1 + np.max(np.abs(want), initial=0)))


NONDIFF = sorted(name for name, op in registry.items() if op.kind == "nondiff")


@pytest.mark.parametrize("name", NONDIFF)
def test_value_of_nondiff(name, rng):
    data = rng.normal(size=(3, 4))
    data[0, 0], other = np.nan, rng.normal(size=(3, 4))
    other[1] = data[1]
    if name.startswith("arg"):
        data[0, 0] = 9.0
    if name.startswith("logical") or name in ("all", "any"):
        data, other = data > 0, other > 0
    op = registry[name]
    arguments = (data, other) if len(op.vjps) == 2 else (data,)
    wanted = TABLE[name](*map(torch.tensor, arguments)).numpy()
    got = op.function(*arguments)
    assert np.asarray(got).dtype.kind == wanted.dtype.kind
    assert np.array_equal(got, wanted)


def test_every_op_is_in_the_table_or_excused():
    assert sorted(set(registry) - set(TABLE) - set(ABSENT)) == []
    assert set(TABLE) & set(ABSENT) == set()
    assert sorted((set(TABLE) | set(ABSENT)) - set(registry)) == []
    assert all(reason.strip() for reason in ABSENT.values())


def test_table_can_fail():
    """Against the wrong function the comparison fails."""
    call = next(c for c in DIFFERENTIABLE if c.op.name == "exp" and c.shapes == ((3,),))
    right = TABLE["exp"]
    try:
        TABLE["exp"] = torch.expm1
        with pytest.raises(AssertionError):
            test_value_and_gradient(call)
    finally:
        TABLE["exp"] = right
