"""What the ops ask of CuPy exists there: checked against CuPy itself, which imports without a GPU."""

import importlib.util
import inspect
from typing import Any

import numpy as np
import pytest

import gpugrad as gg
from gpugrad.op import registry

if importlib.util.find_spec("cupy") is None:
    pytest.skip("CuPy is not installed (no GPU is needed: pip install cupy-cuda13x)", allow_module_level=True)


class Spy:
    """NumPy that writes down which of its functions are called, and how."""

    def __init__(self, target: Any, path: str, calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> None:
        self._target, self._path, self._calls = target, path, calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        return Spy(found, f"{self._path}.{name}", self._calls) if callable(found) or inspect.ismodule(found) else found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls.append((self._path, args, kwargs))
        return self._target(*args, **kwargs)


def calls_of(name: str) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Run the forward of an op on its own domain and return what it called."""
    op, calls = registry[name], []
    rng = np.random.default_rng(0)
    if op.kind == "elementwise":
        cases = [([rng.uniform(low, high, 3) for low, high in op.domain], {})]
        cases += [([a.astype(np.float16) for a in args], params) for args, params in cases]
    else:
        cases = [
            ([np.asarray(gg.ops.linalg.positive_definite(rng.uniform(c.low, c.high, s)) if c.through else
                         rng.uniform(c.low, c.high, s)) for s in c.shapes], dict(c.params))
            for c in op.domain
        ]  # fmt: skip
    for args, params in cases:
        op.forward(Spy(np, "xp", calls), *args, **params)
    return calls


@pytest.mark.parametrize("name", [n for n, op in registry.items() if op.kind != "nondiff"])
def test_cupy_has_what_the_op_calls(name: str) -> None:
    import array_api_compat.cupy as xp

    for path, args, kwargs in calls_of(name):
        function: Any = xp
        for part in path.split(".")[1:]:
            assert hasattr(function, part), f"{name} calls {path}, which CuPy has not"
            function = getattr(function, part)
        try:
            signature = inspect.signature(function)
        except (ValueError, TypeError):
            continue  # a compiled ufunc shows no signature
        signature.bind(*args, **kwargs)
