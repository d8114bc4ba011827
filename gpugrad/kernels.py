"""gpugrad's own CUDA kernels: finds the sources in cuda_kernels/, builds them on first use, and launches them.

Pointwise kernels are CuPy ElementwiseKernels in several forms made from one line of CUDA each:

- ``strided``: CuPy's own index code; any strides, broadcasting, 0-d, empty.
- ``packed``: contiguous arrays at 16-byte addresses; a thread works on 16 bytes of the data type, in accesses of 16
  bytes, the last thread on what is left. ``packed-at``: a number comes as an array of one element, which stays on the
  device. ``packed-row``: one array is a row that all rows of the others share (a bias).

Kernels that add up over the batch, and the optimiser updates, are RawKernels (`.cu` files).

Every launch function returns None for arguments that its kernels do not take (other dtypes, shapes that do not
fit); the caller then computes the plain formula. Half precision is computed in float32; cotangents of half-precision
data are float32. Nothing here waits for the device.
"""

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from gpugrad import backend
from gpugrad.backend import Array

BLOCK = 256  # threads of a raw kernel, and the numbers below: as in sums.cuh and optim.cu
MANY, CHUNK = 64, 2048
BLOCKS = 4096  # of a summing kernel: enough for any device, few enough that their sums cost nothing
ROWS_A_THREAD = 16

HALF, SINGLE, DOUBLE = numpy.dtype("float16"), numpy.dtype("float32"), numpy.dtype("float64")
DTYPES = (HALF, SINGLE, DOUBLE)
WIDE: dict[Any, Any] = {HALF: SINGLE, SINGLE: SINGLE, DOUBLE: DOUBLE}  # what each is computed in
_CUDA = {HALF: "__half", SINGLE: "float", DOUBLE: "double"}


def folder() -> Path:
    """Return the folder of CUDA sources: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    for place in (here / "cuda_kernels", here.parent / "cuda_kernels"):
        if (place / "math.cuh").is_file():
            return place
    raise FileNotFoundError(f"the CUDA sources are in neither {here / 'cuda_kernels'} nor {here.parent}; reinstall")


@functools.cache
def source(name: str) -> str:
    """Return the text of a CUDA source with what it includes put in its place: CuPy caches by the text."""
    seen: set[str] = set()

    def read(file: str) -> str:
        if file in seen:
            return ""
        seen.add(file)
        text = (folder() / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'^#include "(.+)"$', lambda found: read(found[1]), text, flags=re.MULTILINE)

    return read(name)


class Pointwise(NamedTuple):
    """A kernel that works element by element.

    file: where its functions are. inputs: names of arrays; a trailing ``:A`` marks the accumulate type, otherwise it is
    the data's type T. numbers: inputs that may be single numbers, of type A. rows: inputs that may be rows, of type T.
    outputs: as inputs. body: CUDA text from the names to the outputs, with `A` standing for the accumulate type; a flag
    `masked` in it is one more input.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    numbers: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()

    @property
    def masks(self) -> bool:
        """Whether the kernel takes the flag."""
        return "masked" in self.body

    @property
    def data(self) -> int:
        """Position of the first input of the data's type: the array that tells shape and dtype."""
        return next(k for k, name in enumerate(self.inputs) if not name.endswith(":A"))

    @property
    def forms(self) -> tuple[str, ...]:
        if self.rows:
            return ("strided", "packed-row")
        return ("strided", "packed", "packed-at", "packed-row") if self.numbers else ("strided", "packed")


POINTWISE = {
    "relu": Pointwise("relu.cuh", ("x",), ("y",), "y = gpugrad::relu<A>(x);"),
    "relu_backward": Pointwise("relu.cuh", ("g:A", "x"), ("dx:A",), "dx = gpugrad::relu_backward<A>(g, x);"),
    "swish": Pointwise(
        "swish.cuh", ("x",), ("y",), "y = gpugrad::swish<A>(x, gpugrad::Sigmoid<A>(beta * A(x)).s);", ("beta",)
    ),
    "swish_keep": Pointwise(
        "swish.cuh",
        ("x",),
        ("y", "m:A"),
        "const A z = beta * A(x); const gpugrad::Sigmoid<A> of(z);"
        " y = gpugrad::swish<A>(x, of.s); m = gpugrad::kept(z, of);",
        ("beta",),
    ),
    "swish_backward": Pointwise(
        "swish.cuh",
        ("g:A", "x"),
        ("dx:A",),
        "const A z = beta * A(x); dx = gpugrad::times<A>(g, gpugrad::swish_dx(z, gpugrad::Sigmoid<A>(z)), masked);",
        ("beta",),
    ),
    "swish_backward_kept": Pointwise(
        "swish.cuh",
        ("g:A", "x", "m:A"),
        ("dx:A",),
        "const A z = beta * A(x);"
        " dx = gpugrad::times<A>(g, gpugrad::swish_dx(z, gpugrad::from_kept<A>(z, m)), masked);",
        ("beta",),
    ),
    "swish_backward_both": Pointwise(
        "swish.cuh",
        ("g:A", "x"),
        ("dx:A", "dbeta:A"),
        "const A z = beta * A(x); const gpugrad::Sigmoid<A> of(z);"
        " dx = gpugrad::times<A>(g, gpugrad::swish_dx(z, of), masked);"
        " dbeta = gpugrad::times<A>(g, gpugrad::swish_dbeta<A>(x, of), masked);",
        ("beta",),
    ),
    "bias_relu": Pointwise("relu.cuh", ("x",), ("y",), "y = gpugrad::relu<A>(A(x) + A(b));", rows=("b",)),
    "bias_swish": Pointwise(
        "swish.cuh",
        ("x",),
        ("y",),
        "const A v = A(x) + A(b); y = gpugrad::swish<A>(v, gpugrad::Sigmoid<A>(beta * v).s);",
        ("beta",),
        rows=("b",),
    ),
    "squared_error": Pointwise(
        "losses.cuh",
        ("eta", "target"),
        ("loss", "slope:A"),
        "A l, s; gpugrad::squared_error<A>(eta, target, l, s); loss = l; slope = s;",
    ),
    "logistic_loss": Pointwise(
        "losses.cuh",
        ("eta", "target"),
        ("loss", "slope:A"),
        "A l, s; gpugrad::logistic_loss<A>(eta, target, l, s); loss = l; slope = s;",
    ),
}

# The entry points of the `.cu` files. wide: by packs; narrow: by single elements.
RAW = {
    "swish_sum_wide": "swish_sum.cu",
    "swish_sum_narrow": "swish_sum.cu",
    "bias_relu_wide": "bias.cu",
    "bias_relu_narrow": "bias.cu",
    "bias_swish_wide": "bias.cu",
    "bias_swish_narrow": "bias.cu",
    "add_partials": "add_partials.cu",
    "add_all_partials": "add_partials.cu",
    "sgd": "optim.cu",
    "adam": "optim.cu",
}


@functools.cache  # asked for at every launch
def _typed(names: tuple[str, ...], dtype: Any) -> list[tuple[str, Any]]:
    return [(name.removesuffix(":A"), WIDE[dtype] if name.endswith(":A") else dtype) for name in names]


class Kernel(NamedTuple):
    """One kernel as CuPy is given it: its name, form and data type. `form` is "raw" for those of the `.cu` files."""

    name: str
    form: str
    dtype: Any

    @property
    def kind(self) -> str:
        return "raw" if self.form == "raw" else "elementwise"

    @property
    def pack(self) -> int:
        """Elements a thread works on in the packed forms: 16 bytes of the data."""
        return 16 // int(self.dtype.itemsize)

    def object(self) -> Any:
        """Return the cupy.ElementwiseKernel or cupy.RawKernel, built once. Compiling waits until the first launch."""
        return _built(backend.cupy(), self)

    def source(self) -> str:
        """Return the CUDA text: all of a raw kernel, what stands before an elementwise kernel."""
        if self.kind == "elementwise":
            return source(POINTWISE[self.name].file)
        before = "#include <cuda_fp16.h>\n" if self.dtype == HALF else ""
        return f"{before}#define GPUGRAD_T {_CUDA[self.dtype]}\n{source(RAW[self.name])}"

    @property
    def options(self) -> tuple[str, ...]:
        """Compiler options beside CuPy's own."""
        return ("-std=c++17",)

    def operation(self) -> tuple[str, str, str]:
        """Return inputs, outputs and loop body of an elementwise kernel, in CuPy's notation."""
        spec, wide = POINTWISE[self.name], WIDE[self.dtype]
        inputs, outputs = _typed(spec.inputs, self.dtype), _typed(spec.outputs, self.dtype)
        numbers = [(name, wide) for name in spec.numbers]
        rows = [(name, self.dtype) for name in spec.rows]
        flags = ["int32 masked"] if spec.masks else []
        alias = f"typedef {_CUDA[wide]} A;"
        if self.form == "strided":
            declared = ", ".join([f"{dtype} {name}" for name, dtype in inputs + rows + numbers] + flags)
            return declared, ", ".join(f"{dtype} {name}" for name, dtype in outputs), f"{alias} {spec.body}"
        by_value = numbers
        at, along = [], list(rows)
        if self.form == "packed-at":
            by_value, at = [], numbers
        elif self.form == "packed-row" and not rows:
            by_value, along = [], numbers
        arrays = inputs + along
        declared = ", ".join(
            [f"raw {dtype} {name}_" for name, dtype in arrays + at]
            + [f"{dtype} {name}" for name, dtype in by_value]
            + [*flags, "int64 width", "int64 count"]
        )
        pack = self.pack
        types = {name: _element(dtype) for name, dtype in arrays + outputs}
        load = " ".join(
            f"gpugrad::Pack<{types[name]}, {pack}> {name}s;"
            f" {name}s.load(&{name}_[{'gpugrad::column(first, width)' if (name, dtype) in along else 'first'}]);"
            for name, dtype in arrays
        )
        one = " ".join(f"const {types[name]} {name} = {name}s[k];" for name, _ in arrays)
        single = " ".join(
            f"const {types[name]} {name} = {name}_[{'gpugrad::column(e, width)' if (name, dtype) in along else 'e'}];"
            for name, dtype in arrays
        )
        results = " ".join(f"{types[name]} {name};" for name, _ in outputs)
        body = f"""{alias}
        {" ".join(f"const A {name} = {name}_[0];" for name, _ in at)}
        const long long first = (long long)i * {pack};
        if (first + {pack} <= count) {{
          {load}
          {" ".join(f"gpugrad::Pack<{types[name]}, {pack}> {name}s;" for name, _ in outputs)}
          #pragma unroll
          for (int k = 0; k < {pack}; ++k) {{
            {one} {results} {spec.body} {" ".join(f"{name}s[k] = {name};" for name, _ in outputs)}
          }}
          {" ".join(f"{name}s.store(&{name}_[first]);" for name, _ in outputs)}
        }} else {{
          for (long long e = first; e < count; ++e) {{
            {single} {results} {spec.body} {" ".join(f"{name}_[e] = {name};" for name, _ in outputs)}
          }}
        }}"""
        return declared, ", ".join(f"raw {dtype} {name}_" for name, dtype in outputs), body


def _element(dtype: Any) -> str:
    return "float16" if dtype == HALF else _CUDA[dtype]  # the class that CuPy's arrays hold


def every() -> Iterator[Kernel]:
    """Yield every kernel in every form and data type: what tests, selftest and benchmarks go through."""
    for name, spec in POINTWISE.items():
        for form in spec.forms:
            yield from (Kernel(name, form, dtype) for dtype in DTYPES)
    for name in RAW:
        # what partial sums end in, is never half
        yield from (Kernel(name, "raw", dtype) for dtype in (DTYPES[1:] if "partials" in name else DTYPES))


@functools.cache
def _built(cupy: Any, kernel: Kernel) -> Any:
    name = f"gpugrad_{kernel.name}_{kernel.form}".replace("-", "_")
    if kernel.kind == "raw":
        return cupy.RawKernel(kernel.source(), kernel.name, options=kernel.options)
    inputs, outputs, body = kernel.operation()
    return cupy.ElementwiseKernel(inputs, outputs, body, name, preamble=kernel.source(), options=kernel.options)


# ---------------------------------------------------------------------------------------------- pointwise launches


def _packable(*arrays: Array) -> bool:
    return all(a.flags.c_contiguous and not a.data.ptr % 16 for a in arrays)


def _number(value: Any, x: Array) -> bool:
    """Tell whether a value goes to a kernel on x as one number, from the host or from the device."""
    if isinstance(value, numpy.floating):
        return bool(value.dtype.itemsize <= x.dtype.itemsize)  # else it widens the result, which is NumPy's rule
    if not hasattr(value, "dtype"):
        return isinstance(value, (int, float))
    return bool(value.size == 1 and value.ndim <= x.ndim and value.dtype == WIDE[x.dtype])


def _is_row(value: Any, x: Array) -> bool:
    """Tell whether an array is one value a column of x."""
    return bool(value.ndim == 1 <= x.ndim and value.shape[0] == x.shape[-1])


def _broadcasts(value: Array, x: Array) -> bool:
    """Tell whether an array broadcasts to the shape of x."""
    return value.ndim <= x.ndim and all(n in (1, m) for n, m in zip(value.shape[::-1], x.shape[::-1], strict=False))


def _pointwise(name: str, arrays: tuple[Any, ...], number: Any = None, row: Any = None, masked: bool = False) -> Any:
    """Launch a pointwise kernel in the form that fits, on arrays of one shape; returns its outputs."""
    spec = POINTWISE[name]
    x = arrays[spec.data]
    dtype = getattr(x, "dtype", None)
    if dtype not in WIDE or not all(backend.is_cuda_array(a) and a.shape == x.shape for a in arrays):
        return None
    wide = WIDE[dtype]
    if [a.dtype for a in arrays] != [d for _, d in _typed(spec.inputs, dtype)]:
        return None
    form, values = "packed", [*arrays]
    if row is not None:
        if not backend.is_cuda_array(row) or row.dtype != dtype or not _is_row(row, x):
            return None
        form = "packed-row"
        values.append(row)
    if number is not None:
        if not backend.is_cuda_array(number):
            if not _number(number, x):
                return None
            number = wide.type(number)
        elif _number(number, x):
            number = number.reshape(())
            form = "packed-at" if row is None else "strided"
        elif row is None and number.dtype == wide and _is_row(number, x):
            form = "packed-row"
        elif row is None and number.dtype == wide and _broadcasts(number, x):
            form = "strided"
        else:
            return None
        values.append(number)
    if spec.masks:
        values.append(numpy.int32(masked))
    kernel = Kernel(name, form, dtype)
    whole = form != "packed-row" or x.shape[-1] % kernel.pack == 0
    packable = (
        form != "strided"
        and x.ndim
        and x.size
        and whole
        and _packable(*(v for v in values if backend.is_cuda_array(v)))
    )
    if not packable:
        return Kernel(name, "strided", dtype).object()(*values)
    outputs = [backend.cupy().empty(x.shape, dtype=d) for _, d in _typed(spec.outputs, dtype)]
    kernel.object()(*values, x.shape[-1], x.size, *outputs, size=-(-x.size // kernel.pack))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def relu(x: Array) -> Any:
    """max(x, 0), NaN for NaN; any shape."""
    return _pointwise("relu", (x,))


def relu_backward(g: Array, x: Array) -> Any:
    """g where x > 0, else 0; x may be relu(x)."""
    return _pointwise("relu_backward", (g, x))


def swish(x: Array, beta: Any) -> Any:
    """x * sigmoid(beta * x); beta a number, an array of one element or of shape (columns,)."""
    return _pointwise("swish", (x,), beta)


def swish_keep(x: Array, beta: Any) -> Any:
    """Return swish and sigmoid(-abs(beta * x)), from which `swish_backward_kept` needs no exponential."""
    return _pointwise("swish_keep", (x,), beta)


def swish_backward(g: Array, x: Array, beta: Any, masked: bool = False) -> Any:
    """g times the slope of swish in x; where `masked`, an exact zero on either side wins."""
    return _pointwise("swish_backward", (g, x), beta, masked=masked)


def swish_backward_kept(g: Array, x: Array, m: Array, beta: Any, masked: bool = False) -> Any:
    """As `swish_backward`, from what `swish_keep` kept."""
    return _pointwise("swish_backward_kept", (g, x, m), beta, masked=masked)


def swish_backward_both(g: Array, x: Array, beta: Any, masked: bool = False) -> Any:
    """g times the slopes of swish in x and in beta, each of x's shape."""
    return _pointwise("swish_backward_both", (g, x), beta, masked=masked)


def bias_relu(x: Array, b: Array) -> Any:
    """relu(x + b), b of shape (columns,)."""
    return _pointwise("bias_relu", (x,), row=b)


def bias_swish(x: Array, b: Array, beta: Any) -> Any:
    """swish(x + b, beta), b of shape (columns,), beta one number."""
    return _pointwise("bias_swish", (x,), beta, row=b)


def squared_error(eta: Array, target: Array) -> Any:
    """Return (eta - target)**2 and its slope in eta."""
    return _pointwise("squared_error", (eta, target))


def logistic_loss(eta: Array, target: Array) -> Any:
    """Return softplus(eta) - target * eta and its slope in eta."""
    return _pointwise("logistic_loss", (eta, target))


# ----------------------------------------------------------------------------------------------- launches with sums


def _launch(name: str, dtype: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    Kernel(name, "raw", dtype).object()(grid, (BLOCK,), arguments)


def _pointer(array: Any) -> Any:
    """Return what a raw kernel takes for an array that may be left out: null for None."""
    return numpy.uintp(0) if array is None else array


def _summed(name: str, arrays: tuple[Array, ...], others: tuple[Any, ...], rows: int, cols: int, one: bool) -> Any:
    """Launch a summing kernel over rows x cols elements, then what adds its blocks' sums up.

    Returns dx, of the shape of the arrays, and the sums: (cols,), or () if `one`.
    """
    cupy, g, x = backend.cupy(), *arrays
    wide = WIDE[x.dtype]
    dx = cupy.empty(x.shape, dtype=wide)
    pack = 16 // x.dtype.itemsize
    aligned = _packable(g, x, dx)
    if one:  # any matrix of the elements will do
        pack = pack if aligned and not x.size % pack else 1
        rows, cols = x.size // pack, pack
    elif not aligned or cols % pack:
        pack = 1
    across = min(cols // pack, BLOCK)
    down = BLOCK // across
    columns = -(-(cols // pack) // across)
    chunks = max(1, min(-(-rows // (down * ROWS_A_THREAD)), BLOCKS // columns))
    partial = cupy.empty((chunks, cols), dtype=DOUBLE)
    form = "wide" if pack > 1 else "narrow"
    _launch(f"{name}_{form}", x.dtype, (columns, chunks), g, x, *others, dx, partial, rows, cols)
    sums = cupy.empty(() if one else (cols,), dtype=wide)
    if one:
        _launch("add_all_partials", wide, (1,), partial, sums, chunks * cols)
    else:
        _launch("add_partials", wide, (-(-cols // (BLOCK // 8)),), partial, sums, chunks, cols)
    return dx, sums


def _matrix(g: Any, x: Any) -> tuple[Array, Array, int, int] | None:
    """Return a cotangent and its data as C-contiguous arrays, with rows and columns; None if they do not fit."""
    if not backend.is_cuda_array(g) or not backend.is_cuda_array(x) or getattr(x, "dtype", None) not in WIDE:
        return None
    if g.shape != x.shape or g.dtype != WIDE[x.dtype] or not x.ndim or not x.size:
        return None
    cupy = backend.cupy()
    cols = x.shape[-1]
    return cupy.ascontiguousarray(g), cupy.ascontiguousarray(x), x.size // cols, cols


def swish_backward_sum(g: Array, x: Array, beta: Any, masked: bool = False) -> Any:
    """Return g times the slope of swish in x, and the sum of g times its slope in beta over what beta spans.

    beta: one number (the sum has shape () or that of beta), or an array of shape (columns,). Same bits every time.
    """
    fit = _matrix(g, x)
    if fit is None:
        return None
    wide = WIDE[x.dtype]
    pointer, value, one = None, wide.type(0), _number(beta, x)
    if one and not backend.is_cuda_array(beta):
        value = wide.type(beta)
    elif one or (backend.is_cuda_array(beta) and beta.dtype == wide and _is_row(beta, x)):
        pointer = beta if one else backend.cupy().ascontiguousarray(beta)
    else:
        return None
    g, x, rows, cols = fit
    others = (_pointer(pointer), value, numpy.int32(not one), numpy.int32(masked))
    dx, sums = _summed("swish_sum", (g, x), others, rows, cols, one=one)
    return dx, sums.reshape(beta.shape) if backend.is_cuda_array(beta) else sums


def bias_relu_backward(g: Array, y: Array) -> Any:
    """Return the cotangents of x and b in y = relu(x + b): shapes (..., columns) and (columns,)."""
    fit = _matrix(g, y)
    return None if fit is None else _summed("bias_relu", fit[:2], (), *fit[2:], one=False)


def bias_swish_backward(g: Array, x: Array, b: Array, beta: Any, masked: bool = False) -> Any:
    """Return the cotangents of x and b in swish(x + b, beta); beta a Python or NumPy number."""
    fit = _matrix(g, x)
    if fit is None or not backend.is_cuda_array(b) or b.dtype != x.dtype or not _is_row(b, x):
        return None
    wide = WIDE[x.dtype]
    if backend.is_cuda_array(beta) or not _number(beta, x):
        return None
    b = backend.cupy().ascontiguousarray(b)
    return _summed("bias_swish", fit[:2], (b, wide.type(beta), numpy.int32(masked)), *fit[2:], one=False)


# ------------------------------------------------------------------------------------------------ optimiser updates


@functools.cache
def _table_type() -> Any:
    pointers = ("out", "weight", "gradient", "first", "second")
    fields = [(name, numpy.uintp, (MANY,)) for name in pointers]
    return numpy.dtype([*fields, ("size", numpy.int64, (MANY,)), ("begin", numpy.int32, (MANY + 1,)), ("count", "i4")])


def _update(
    name: str, weights: list[Array], gradients: list[Array], states: list[list[Array]], numbers: tuple[Any, ...]
) -> list[Array]:
    """Launch an update over arrays of one dtype, MANY at a time, and return the new weights."""
    cupy = backend.cupy()
    # not of what is contiguous: ascontiguousarray gives an array of no axes one
    weights = [w if w.flags.c_contiguous else cupy.ascontiguousarray(w) for w in weights]
    gradients = [g if g.flags.c_contiguous else cupy.ascontiguousarray(g) for g in gradients]
    out = [cupy.empty(w.shape, dtype=w.dtype) for w in weights]
    for start in range(0, len(weights), MANY):
        stop = min(start + MANY, len(weights))
        table = numpy.zeros((), dtype=_table_type())
        count = stop - start
        table["count"] = count
        for slot, k in enumerate(range(start, stop)):
            table["out"][slot] = out[k].data.ptr
            table["weight"][slot] = weights[k].data.ptr
            table["gradient"][slot] = gradients[k].data.ptr
            for field, state in zip(("first", "second"), states[k], strict=False):
                table[field][slot] = state.data.ptr
            table["size"][slot] = weights[k].size
            table["begin"][slot + 1] = table["begin"][slot] + -(-weights[k].size // CHUNK)
        blocks = int(table["begin"][count])
        if blocks:
            _launch(name, weights[0].dtype, (blocks,), table, *numbers)
    return out


def sgd_update(
    weights: list[Array],
    gradients: list[Array],
    velocities: list[list[Array]],
    *,
    rate: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    scale: Array | None,
) -> list[Array]:
    """Return the weights after a step of SGD, all of one dtype in one launch; velocities are brought up to date.

    velocities: a list of one array a weight, empty lists without momentum. Gradients and state are float32 for
    half-precision weights, else of the weights' dtype, all C-contiguous. scale: a 0-d array of that dtype that
    multiplies the gradients, or None.
    """
    wide = WIDE[weights[0].dtype].type
    numbers = (wide(rate), wide(momentum), wide(weight_decay), numpy.int32(nesterov), _pointer(scale))
    return _update("sgd", weights, gradients, velocities, numbers)


def adam_update(
    weights: list[Array],
    gradients: list[Array],
    moments: list[list[Array]],
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    count: int,
    shrink: float,
    scale: Array | None,
) -> list[Array]:
    """Return the weights after step number `count` (1 first) of Adam, all of one dtype in one launch.

    moments: first and second moment of each weight, brought up to date. shrink: lr * weight_decay for AdamW, else 0.
    Other arguments as `sgd_update` has them.
    """
    wide = WIDE[weights[0].dtype].type
    root = math.sqrt(1 - betas[1] ** count)
    numbers = (
        rate * root / (1 - betas[0] ** count),
        betas[0],
        1 - betas[0],
        betas[1],
        1 - betas[1],
        eps * root,
        shrink,
    )
    return _update("adam", weights, gradients, moments, (*map(wide, numbers), _pointer(scale)))
