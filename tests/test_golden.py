"""Every function against values from an independent source, at float64."""

import types

import numpy as np
import pytest
from devices import CPU, assert_allclose, host
from devices import test_device_is_there as test_device_is_there
from golden import DERIVATIVES, ELEMENTWISE, FUNCTIONS, OTHERS

import gpugrad as gg
from gpugrad import backend
from gpugrad.op import registry

# Public names in gpugrad.ops that are no mathematical functions, and why.
NOT_FUNCTIONS = {
    "tensor": "makes a Tensor",
    "asarray": "makes a Tensor",
    "linalg.positive_definite": "a domain for tests",
    "linalg.well_conditioned": "a domain for tests",
}


def as_argument(value, device=CPU):
    """A list or a float as an array on a device, a tuple as a sequence of them; integers and strings stay."""
    if isinstance(value, tuple) and not all(isinstance(v, int) for v in value):
        return [as_argument(v, device) for v in value]
    return device.put(value) if isinstance(value, (list, float)) else value


def static(params, device):
    """Static parameters, with the index arrays among them on the device."""
    if isinstance(params, tuple):
        return tuple(static(part, device) for part in params)
    return device.put(params) if isinstance(params, np.ndarray) else params


def first_row_positive(vectors):
    return np.where(vectors[0] < 0, -1.0, 1.0)


def normalised(name, result):
    """Decompositions up to the signs that are a matter of convention: the first row of vectors is made positive."""
    kind = name.rpartition(".")[2]
    if kind == "qr":
        sign = first_row_positive(result[0])
        return result[0] * sign, sign[:, None] * result[1]
    if kind == "eigh":
        return result[0], result[1] * first_row_positive(result[1])
    if kind == "svd":
        sign = first_row_positive(result[0])
        return result[0] * sign, result[1], sign[:, None] * result[2]
    return result if isinstance(result, tuple) else (result,)


def public_functions():
    """Names of the public functions of arrays that are not themselves ops, from the modules."""
    found = {}
    for prefix, module in (("", gg), ("linalg.", gg.linalg)):
        for name, value in vars(module).items():
            home = str(getattr(value, "__module__", ""))
            mine = home == "gpugrad.ops.linalg" if prefix else home.startswith("gpugrad.ops.")
            if isinstance(value, types.FunctionType) and mine and not name.startswith("_"):
                found[prefix + name] = value
    # gpugrad.einsum is gpugrad.linalg.einsum: once is enough
    seen = {id(value) for name, value in found.items() if "." not in name}
    return {name: value for name, value in found.items() if "." not in name or id(value) not in seen}


def resolve(name):
    target = gg
    for part in name.split("."):
        target = getattr(target, part)
    return target


def check_value(name, function, line, device=CPU):
    _, arguments, expected, *params = line
    given = {key: static(value, device) for key, value in params[0].items()} if params else {}
    if name == "to_device":
        given = {"device": backend.Device(device), "source": backend.Device(device)}
    result = function(*(as_argument(a, device) for a in arguments), **given)
    expected = expected if isinstance(expected, tuple) else (expected,)
    results = normalised(name, tuple(map(host, result)) if isinstance(result, tuple) else host(result))
    assert len(results) == len(expected)
    for got, wanted in zip(results, expected, strict=True):
        wanted = np.array(wanted)
        assert np.shape(got) == wanted.shape
        # a library function may be off by an ulp or two (CUDA's by up to four), a sum or a factorisation by some more
        scalar = name in registry and registry[name].kind == "elementwise"
        allowed = (1e-15 if device.on_cpu else 2e-15) if scalar else 3e-15 if device.on_cpu else 1e-14
        assert_allclose(got, wanted, rtol=allowed, atol=0 if scalar else allowed * np.max(np.abs(wanted), initial=0))


def case_id(line):
    return f"{line[0]}-{'-'.join(str(a) for a in line[1])}"[:60].replace(" ", "")


@pytest.mark.parametrize("line", ELEMENTWISE + OTHERS, ids=case_id)
def test_op(line, device):
    check_value(line[0], registry[line[0]].function, line, device)


@pytest.mark.parametrize("line", FUNCTIONS, ids=case_id)
def test_function(line, device):
    check_value(line[0], resolve(line[0]), line, device)


@pytest.mark.parametrize("line", DERIVATIVES, ids=case_id)
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
def test_derivative(line, recorded, device):
    """Slopes from the first-order sweep, and from the one that is recorded for higher derivatives."""
    name, arguments, expected = line
    tensors = [gg.tensor(a, device=device, requires_grad=True) for a in arguments]
    registry[name].function(*tensors).backward(create_graph=recorded)
    for t, wanted in zip(tensors, expected, strict=True):
        got = 0.0 if t.grad is None else t.grad.item()
        assert got == pytest.approx(wanted, rel=1e-15 if device.on_cpu else 3e-15, abs=0)


@pytest.mark.parametrize("line", FUNCTIONS, ids=case_id)
def test_function_gradient(line, device):
    """Functions made of ops keep their derivatives, to second order."""
    name, arguments, _, *params = line
    given = [as_argument(a, device) for a in arguments]
    moving = [i for i, a in enumerate(given) if isinstance(a, list) or getattr(a, "dtype", None) == np.float64]

    def call(*arrays):
        taken = list(given)
        for i, a in zip(moving, arrays, strict=True):
            taken[i] = a
        result = resolve(name)(*taken, **(params[0] if params else {}))
        # vectors are defined up to their signs alone, and these are squared
        return tuple(part * part for part in result) if isinstance(result, tuple) else result

    symmetric = name == "linalg.eigh"
    gg.check_grads(
        (lambda a: call(0.5 * (a + gg.matrix_transpose(a)))) if symmetric else call, [given[i] for i in moving], order=2
    )


EINSUMS = [
    ("ij,ij->ij", (2, 3), (2, 3)),
    ("...ij,...jk->...ik", (5, 2, 3), (3, 4)),
    ("ij->", (2, 3)),
    ("i,j,k->kij", (2,), (3,), (4,)),
    ("iij->j", (3, 3, 2)),
    ("ii->i", (3, 3)),
    ("ij,jj->i", (2, 3), (3, 3)),
    ("...i->...", (2, 3, 4)),
    ("ij,ji", (2, 3), (3, 2)),
    ("b,bij,bj->bi", (2,), (2, 3, 4), (2, 4)),
    ("ij,kl->", (2, 3), (4, 5)),
    (" i j , j k -> i k ", (2, 3), (3, 2)),
    ("...,...->...", (2, 3), (3,)),
    ("ij,i->ij", (2, 3), (1,)),
]


@pytest.mark.parametrize(("subscripts", "shapes"), [(row[0], row[1:]) for row in EINSUMS], ids=[r[0] for r in EINSUMS])
def test_einsum(subscripts, shapes, rng, device):
    """Values as numpy.einsum gives them, and their gradients."""
    arrays = [rng.normal(size=shape) for shape in shapes]
    there = [device.put(a) for a in arrays]
    assert_allclose(gg.einsum(subscripts, *there), np.einsum(subscripts, *arrays), rtol=1e-13, atol=1e-15)
    gg.check_grads(lambda *a: gg.einsum(subscripts, *a), there)


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 3, 3), (3, 2)), ((3, 3), (2, 3, 2)), ((2, 3, 3), (3,)), ((2, 1, 3, 3), (4, 3, 2)), ((0, 3, 3), (3, 1))],
)
def test_solve_broadcasts(a, b, rng, device):
    """Stacks against single matrices; a vector only when it has one axis."""
    a, b = rng.normal(size=a) + 4 * np.eye(3), rng.normal(size=b)
    gg.check_grads(gg.linalg.solve, [device.put(a), device.put(b)])
    wanted = np.linalg.solve(a, b[:, None])[..., 0] if b.ndim == 1 else np.linalg.solve(a, b)
    assert_allclose(gg.linalg.solve(device.put(a), device.put(b)), wanted, rtol=1e-13)


@pytest.mark.parametrize("name", ["eigh", "cholesky"])
def test_gradient_in_a_symmetric_matrix_is_symmetric(name, rng, device):
    """A step along it leaves the matrix symmetric."""
    x = rng.normal(size=(3, 3))
    x = device.put(x @ x.T + np.diag([1.0, 3.0, 5.0]))
    out, pull = gg.vjp(lambda a: tuple(getattr(gg.linalg, name)(a)) if name == "eigh" else (gg.linalg.cholesky(a),), x)
    (g,) = pull(tuple(device.put(rng.normal(size=part.shape)) for part in out))
    assert_allclose(g, g.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("axis", [(0, 2), (2, 0), (1, 2), (-1, 0)])
@pytest.mark.parametrize("order", ["fro", "nuc", 1, -1, 2, -2, np.inf, -np.inf])
def test_matrix_norms(order, axis, rng, device):
    x = rng.normal(size=(4, 2, 3))
    for keepdims in (False, True):
        got = gg.linalg.norm(device.put(x), ord=order, axis=axis, keepdims=keepdims)
        assert_allclose(got, np.linalg.norm(x, ord=order, axis=axis, keepdims=keepdims), rtol=1e-13)
    gg.check_grads(lambda x: gg.linalg.norm(x, ord=order, axis=axis), [device.put(x)])


@pytest.mark.parametrize("order", [None, 1, 2, 3, 0.5, 2.5, np.inf, -np.inf, -1])
def test_vector_norms(order, rng, device):
    x = rng.uniform(0.5, 2, size=(4, 5)) * rng.choice([-1, 1], size=(4, 5))
    there = device.put(x)
    assert_allclose(gg.linalg.norm(there, ord=order, axis=1), np.linalg.norm(x, ord=order, axis=1), rtol=1e-13)
    gg.check_grads(lambda x: gg.linalg.norm(x, ord=order, axis=1), [there])


def test_every_op_has_a_golden_line():
    assert sorted(set(registry) - {line[0] for line in ELEMENTWISE + OTHERS}) == []
    elementwise = {name for name, op in registry.items() if op.kind == "elementwise"}
    assert sorted(elementwise - {line[0] for line in DERIVATIVES}) == []


def test_every_public_function_has_a_golden_line():
    missing = {n for n, f in public_functions().items() if not hasattr(f, "op")} - {line[0] for line in FUNCTIONS}
    assert sorted(missing - set(NOT_FUNCTIONS)) == []


def test_golden_names_something_that_exists():
    assert {line[0] for line in ELEMENTWISE + OTHERS + DERIVATIVES} - set(registry) == set()
    for line in FUNCTIONS:
        assert callable(resolve(line[0]))


def test_no_golden_line_stands_twice():
    for table in (ELEMENTWISE, OTHERS, FUNCTIONS, DERIVATIVES):
        keys = [repr((line[0], line[1], line[3:])) for line in table]
        assert len(keys) == len(set(keys))
