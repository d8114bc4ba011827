"""Every function against values from an independent source, at float64."""

import types

import numpy as np
import pytest
from golden import DERIVATIVES, ELEMENTWISE, FUNCTIONS, OTHERS
from numpy.testing import assert_allclose

import gpugrad as gg
from gpugrad.op import registry

# Public names in gpugrad.ops that are no mathematical functions, and why.
NOT_FUNCTIONS = {
    "tensor": "makes a Tensor",
    "asarray": "makes a Tensor",
    "linalg.positive_definite": "a domain for tests",
    "linalg.well_conditioned": "a domain for tests",
}


def as_argument(value):
    """A list or a float as an array, a tuple as a sequence of them; integers and strings stay."""
    if isinstance(value, tuple) and not all(isinstance(v, int) for v in value):
        return [as_argument(v) for v in value]
    return np.array(value) if isinstance(value, (list, float)) else value


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


def check_value(name, function, line):
    _, arguments, expected, *params = line
    result = function(*map(as_argument, arguments), **(params[0] if params else {}))
    expected = expected if isinstance(expected, tuple) else (expected,)
    results = normalised(name, tuple(result) if isinstance(result, tuple) else result)
    assert len(results) == len(expected)
    for got, wanted in zip(results, expected, strict=True):
        wanted = np.array(wanted)
        assert np.shape(got) == wanted.shape
        # a library function may be off by an ulp or two, a sum or a factorisation by some more of the whole
        scalar = name in registry and registry[name].kind == "elementwise"
        allowed = 1e-15 if scalar else 3e-15
        assert_allclose(got, wanted, rtol=allowed, atol=0 if scalar else allowed * np.max(np.abs(wanted), initial=0))


def case_id(line):
    return f"{line[0]}-{'-'.join(str(a) for a in line[1])}"[:60].replace(" ", "")


@pytest.mark.parametrize("line", ELEMENTWISE + OTHERS, ids=case_id)
def test_op(line):
    check_value(line[0], registry[line[0]].function, line)


@pytest.mark.parametrize("line", FUNCTIONS, ids=case_id)
def test_function(line):
    check_value(line[0], resolve(line[0]), line)


@pytest.mark.parametrize("line", DERIVATIVES, ids=case_id)
@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
def test_derivative(line, recorded):
    """Slopes from the first-order sweep, and from the one that is recorded for higher derivatives."""
    name, arguments, expected = line
    tensors = [gg.tensor(a, requires_grad=True) for a in arguments]
    registry[name].function(*tensors).backward(create_graph=recorded)
    for t, wanted in zip(tensors, expected, strict=True):
        got = 0.0 if t.grad is None else t.grad.item()
        assert got == pytest.approx(wanted, rel=1e-15, abs=0)


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
