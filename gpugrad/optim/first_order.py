"""Step rules that use the gradient alone: gradient descent, SGD with momentum, Adam, AdamW.

An optimiser keeps its state (momentum, moments) in arrays beside the parameters, on their device, and
updates that state in place. Parameters and gradients handed in are never written to.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy
import optree

from gpugrad import backend, kernels, op
from gpugrad.backend import Array, Namespace
from gpugrad.errors import DeviceMismatch, ShapeMismatch
from gpugrad.tensor import Tensor

__all__ = ["SGD", "Adam", "AdamW", "GradientDescent", "Optimizer"]

DOUBLE = numpy.dtype("float64")
PyTree = Any
Schedule = Callable[[int], float]
Evaluate = Callable[[list[Array]], tuple[Any, list[Array]]]


class Layout:
    """How a pytree of parameters comes apart into arrays, and how arrays make such a pytree again.

    Every leaf becomes an array on one device: a Python number a 0-d float64 array beside the others.
    device: where host arrays and numbers are to be moved for the run. number: the dtype in which an objective on a GPU
    sees what was a Python number.
    """

    def __init__(self, params: PyTree, device: backend.Device = backend.CPU, number: Any = DOUBLE) -> None:
        paths, leaves, self.spec = optree.tree_flatten_with_path(params)
        if not leaves:
            raise ValueError(f"params holds no parameters: got {params!r}; expected an array or a pytree of arrays")
        self.names = ["params" + "".join(f"[{key!r}]" for key in path) for path in paths]
        arrays = [plain(leaf) for leaf in leaves]
        anchor = next((k for k, array in enumerate(arrays) if backend.is_array(array) and not _is_number(array)), None)
        home = backend.CPU if anchor is None else backend.device_of(arrays[anchor])
        for name, array in zip(self.names, arrays, strict=True):
            if _is_number(array):
                continue
            if not backend.is_array(array):
                raise TypeError(f"{name} is a {type(array).__name__}; expected a floating array, Tensor or number")
            if backend.device_of(array) != home:
                raise DeviceMismatch(
                    f"{name} is on {backend.device_of(array)!s}, {self.names[anchor or 0]} on {home!s}; "
                    "put all parameters on one device"
                )
            if array.dtype.kind != "f":
                raise TypeError(f"{name} has dtype {array.dtype}; expected float16, float32 or float64: cast it first")
        self._build = [_builder(leaf) for leaf in leaves]
        self._number = number
        self._is_number = [_is_number(leaf) for leaf in leaves]
        self.device = device if home.kind == "cpu" else home
        self.xp: Namespace = backend.namespace_of_device(self.device)
        self.array_type: type = self.xp.ndarray
        # leaves that live on the host and are computed with on a GPU
        self._abroad = [
            k for k, array in enumerate(arrays) if self.device.kind == "cuda" and not backend.is_cuda_array(array)
        ]
        with backend.activate(self.device):
            started = [self._as_array(array) for array in arrays]
        self.shapes = [array.shape for array in started]
        self.dtypes = [array.dtype for array in started]
        # Half precision is for storage: its squares underflow, so the arithmetic runs in float32.
        self.work = [numpy.dtype("float32") if dtype == "float16" else dtype for dtype in self.dtypes]

    def _as_array(self, leaf: Any) -> Array:
        return (
            leaf if isinstance(leaf, self.array_type) else self.xp.asarray(leaf, dtype=getattr(leaf, "dtype", DOUBLE))
        )

    def arrays(self, params: PyTree) -> list[Array]:
        """Take apart parameters of this structure."""
        leaves, spec = optree.tree_flatten(params)
        if spec != self.spec:
            raise ValueError(
                f"params have structure {spec}, but the optimiser's state belongs to {self.spec}; "
                "make a new optimiser for new parameters"
            )
        return [self._as_array(plain(leaf)) for leaf in leaves]

    def gradients(self, grads: PyTree) -> list[Array]:
        """Take apart gradients: arrays with the parameters' shapes, in the dtype the step computes in."""
        leaves, spec = optree.tree_flatten(grads)
        if len(leaves) != len(self.shapes) or spec != self.spec:
            raise ValueError(f"gradients have structure {spec}; expected that of the parameters, {self.spec}")
        out = []
        for k, leaf in enumerate(leaves):
            array = plain(leaf)
            if not isinstance(array, self.array_type):
                if backend.is_cuda_array(array) or isinstance(array, numpy.ndarray):
                    raise DeviceMismatch(
                        f"the gradient of {self.names[k]} is on {backend.device_of(array)!s}, the parameter on "
                        f"{self.device!s}; return gradients on the parameters' device"
                    )
                array = self.xp.asarray(array, dtype=self.work[k])
            if array.shape != self.shapes[k]:
                raise ShapeMismatch(
                    f"the gradient of {self.names[k]} has shape {array.shape}; expected {self.shapes[k]}"
                )
            out.append(array if array.dtype == self.work[k] else array.astype(self.work[k]))
        return out

    def rebuild(self, arrays: list[Array], *, copy: bool = False) -> PyTree:
        """Make a pytree like the parameters. What lives on the host is read back from the device, in one transfer."""
        arrays = [array.copy() for array in arrays] if copy else list(arrays)
        if self._abroad:
            read = backend.fetch(self.xp, *(arrays[k] for k in self._abroad))
            for k, array in zip(self._abroad, read, strict=True):
                arrays[k] = array.astype(self.dtypes[k])
        return optree.tree_unflatten(
            self.spec, [build(array) for build, array in zip(self._build, arrays, strict=True)]
        )

    def inside(self, arrays: list[Array]) -> PyTree:
        """Make the pytree that an objective is given during a run: on a GPU nothing of it leaves the device."""
        if self.device.kind == "cpu":
            return self.rebuild(arrays)
        leaves = [
            array.astype(self._number, copy=False) if number else build(array)
            for array, build, number in zip(arrays, self._build, self._is_number, strict=True)
        ]
        return optree.tree_unflatten(self.spec, leaves)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, (int, float, numpy.floating)) and not isinstance(leaf, bool)


def plain(leaf: Any) -> Any:
    """Return the array inside a Tensor; anything else as it is."""
    # Not `.data`, which copies what is on a GPU.
    return leaf._data if isinstance(leaf, Tensor) else leaf


def _builder(leaf: Any) -> Callable[[Array], Any]:
    """Return what turns an array into the same kind of leaf."""
    if isinstance(leaf, Tensor):
        return _tracked_tensor if leaf.requires_grad else _tensor
    if isinstance(leaf, numpy.floating):
        kind = type(leaf)
        return lambda array: kind(array.item())
    return (lambda array: array.item()) if _is_number(leaf) else (lambda array: array)


def _tensor(array: Array) -> Tensor:
    if isinstance(array, numpy.ndarray):
        array = array.view()
        array.flags.writeable = False
    boxed: Tensor = op.box(array, None)
    return boxed


def _tracked_tensor(array: Array) -> Tensor:
    boxed: Tensor = op.box(_tensor(array)._data, op.leaf(array))
    return boxed


def to_host(xp: Namespace, *values: Any) -> list[float]:
    """Read scalars from the device, all in one transfer: where an optimiser waits for it."""
    return [float(value) for value in backend.fetch(xp, *values)]


def max_norm(xp: Namespace, grads: list[Array]) -> Any:
    """Largest absolute entry over all leaves, left on the device; NaN if there is one."""
    peaks = [xp.max(xp.abs(grad)) for grad in _joined(xp, grads) if grad.size]
    if len(peaks) == 1:
        return peaks[0]
    return xp.max(xp.stack([peak.astype(xp.float64) for peak in peaks])) if peaks else 0.0


def squared_norm(xp: Namespace, grads: list[Array]) -> Any:
    """Sum of squares over all leaves, in float64, left on the device."""
    total: Any = 0.0
    for grad in _joined(xp, grads):
        total = total + xp.sum(xp.square(grad, dtype=xp.float64))
    return total


def _joined(xp: Namespace, arrays: list[Array]) -> list[Array]:
    """Return arrays on a GPU as one: there a launch costs more than a copy of what parameters usually are."""
    if xp is numpy or len(arrays) == 1:
        return arrays
    return [xp.concat([array.reshape(-1) for array in arrays])]


def check_rate(lr: Any, what: str = "lr") -> float:
    """Return a learning rate as a float. Raises ValueError unless it is finite and not negative."""
    rate = float(lr)
    if not 0 <= rate < math.inf:
        raise ValueError(f"{what} is {rate}; expected a finite number, not negative")
    return rate


def _check_decay(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; expected 0 <= {name} < 1")
    return float(value)


class Optimizer:
    """Base of the step rules: `step` handles pytrees, schedules and clipping, a subclass one array.

    lr: a number, or a schedule called with the number of steps taken so far (0 at the first).
    clip_norm: scale the gradient down where its Euclidean norm over all parameters exceeds this
    (Pascanu, Mikolov & Bengio 2013).
    """

    buffers = 0  # state arrays a parameter, zero at the start
    fused = False  # whether there is a CUDA kernel for the step

    def __init__(self, lr: float | Schedule, *, clip_norm: float | None = None) -> None:
        self.lr: float | Schedule = lr if callable(lr) else check_rate(lr)
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm is {clip_norm}; expected a positive number, or None for no clipping")
        self.clip_norm = clip_norm
        self.count = 0  # steps taken
        self.rate = math.nan  # learning rate of the latest step
        self.state: list[list[Array]] = []
        self._layout: Layout | None = None

    def step(self, params: PyTree, grads: PyTree) -> PyTree:
        """Return the parameters after one step; `params` and `grads` stay as they are.

        Raises ValueError or ShapeMismatch when the gradients do not fit the parameters.
        """
        layout = self._layout or Layout(params)
        with backend.activate(layout.device):
            arrays = layout.arrays(params)
            if self._layout is None:
                self.begin(layout, arrays)
            came = [(array.shape, array.dtype) for array in arrays]
            if came != list(zip(layout.shapes, layout.dtypes, strict=True)):
                raise ShapeMismatch(
                    f"this optimiser's state belongs to parameters of shapes {layout.shapes}, dtypes {layout.dtypes}; "
                    f"now came {came}; make a new optimiser for new parameters"
                )
            return layout.rebuild(self.advance(arrays, layout.gradients(grads)))

    def begin(self, layout: Layout, arrays: list[Array]) -> None:
        """Make the state for parameters of this layout, or go on with the state of an earlier run over the same."""
        before = self._layout
        if before is not None and (before.spec, before.shapes, before.dtypes, before.device) != (
            layout.spec,
            layout.shapes,
            layout.dtypes,
            layout.device,
        ):
            raise ValueError(
                f"this optimiser's state belongs to parameters {before.spec} with shapes {before.shapes}, now came "
                f"{layout.spec} with {layout.shapes} (dtypes {before.dtypes}, {layout.dtypes}; computed on "
                f"{before.device!s}, {layout.device!s}); make a new optimiser for new parameters"
            )
        if before is None:
            xp = layout.xp
            # the CUDA kernels want C order; NumPy is fastest with all arrays in the order of the parameter
            zeros = xp.zeros_like if layout.device.kind == "cpu" else lambda a, dtype: xp.zeros(a.shape, dtype=dtype)
            self.state = [
                [zeros(array, dtype=work) for _ in range(self.buffers)]
                for array, work in zip(arrays, layout.work, strict=True)
            ]
        self._layout = layout

    def advance(self, arrays: list[Array], grads: list[Array]) -> list[Array]:
        """One step on arrays already taken apart by the layout; returns new arrays."""
        layout = self._layout
        assert layout is not None
        xp = layout.xp
        self.rate = (
            check_rate(self.lr(self.count), f"the lr schedule at step {self.count}") if callable(self.lr) else self.lr
        )
        scale = None
        if self.clip_norm is not None:
            scale = self.clip_norm / xp.maximum(xp.sqrt(squared_norm(xp, grads)), self.clip_norm)
        self.count += 1
        if layout.device.kind == "cuda" and self.fused:
            return self._launched(arrays, grads, scale)
        if scale is not None:
            grads = [grad * scale.astype(grad.dtype) for grad in grads]
        new = []
        for array, grad, state, work in zip(arrays, grads, self.state, layout.work, strict=True):
            out = xp.empty_like(array, dtype=work)
            self._update(xp, array, grad, state, out)
            out += array
            new.append(out if work == array.dtype else out.astype(array.dtype))
        return new

    def _launched(self, arrays: list[Array], grads: list[Array], scale: Array | None) -> list[Array]:
        """Take the step by one CUDA kernel for all parameters of a dtype."""
        new = list(arrays)
        for dtype in dict.fromkeys(array.dtype for array in arrays):
            picked = [k for k, array in enumerate(arrays) if array.dtype == dtype]
            of_dtype = None if scale is None else scale.astype(grads[picked[0]].dtype)
            stepped = self._launch(
                [arrays[k] for k in picked], [grads[k] for k in picked], [self.state[k] for k in picked], of_dtype
            )
            for k, array in zip(picked, stepped, strict=True):
                new[k] = array
        return new

    def _launch(
        self, params: list[Array], grads: list[Array], states: list[list[Array]], scale: Array | None
    ) -> list[Array]:
        """Step over parameters of one dtype, with `scale` multiplied to the gradients; brings the state up to date."""
        raise NotImplementedError

    def _update(self, xp: Namespace, param: Array, grad: Array, state: list[Array], out: Array) -> None:
        """Write to `out` what is to be added to `param`, and bring `state` up to date."""
        raise NotImplementedError


class GradientDescent(Optimizer):
    """w <- w - lr * g."""

    fused = True

    def _launch(
        self, params: list[Array], grads: list[Array], states: list[list[Array]], scale: Array | None
    ) -> list[Array]:
        return kernels.sgd_update(
            params, grads, states, rate=self.rate, momentum=0.0, nesterov=False, weight_decay=0.0, scale=scale
        )

    def _update(self, xp: Namespace, param: Array, grad: Array, state: list[Array], out: Array) -> None:
        xp.multiply(grad, -self.rate, out=out)


class SGD(Optimizer):
    """Gradient descent with momentum: u <- momentum * u + g; w <- w - lr * u (Polyak 1964).

    nesterov: w <- w - lr * (g + momentum * u), Nesterov's step as Sutskever et al. 2013 rewrite it.
    weight_decay: adds weight_decay * w to g. The rate multiplies u, not g, as in PyTorch, so that
    changing lr midway also changes the steps owed to earlier gradients.
    """

    fused = True

    def __init__(
        self,
        lr: float | Schedule,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(lr, clip_norm=clip_norm)
        self.momentum = _check_decay("momentum", momentum)
        if nesterov and not momentum:
            raise ValueError("nesterov=True with momentum 0; expected a positive momentum, such as 0.9")
        self.nesterov = nesterov
        self.weight_decay = check_rate(weight_decay, "weight_decay")
        self.buffers = 1 if momentum else 0

    def _launch(
        self, params: list[Array], grads: list[Array], states: list[list[Array]], scale: Array | None
    ) -> list[Array]:
        return kernels.sgd_update(
            params,
            grads,
            states,
            rate=self.rate,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            scale=scale,
        )

    def _update(self, xp: Namespace, param: Array, grad: Array, state: list[Array], out: Array) -> None:
        if self.weight_decay:
            decayed = xp.multiply(param.astype(out.dtype, copy=False), self.weight_decay)
            decayed += grad
            grad = decayed
        if not self.momentum:
            xp.multiply(grad, -self.rate, out=out)
            return
        (velocity,) = state
        velocity *= self.momentum
        velocity += grad
        if not self.nesterov:
            xp.multiply(velocity, -self.rate, out=out)
            return
        xp.multiply(velocity, self.momentum, out=out)
        out += grad
        out *= -self.rate


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015, algorithm 1).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;
    w <- w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).
    """

    buffers = 2
    fused = True
    weight_decay = 0.0

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(lr, clip_norm=clip_norm)
        self.betas = (_check_decay("betas[0]", betas[0]), _check_decay("betas[1]", betas[1]))
        if not eps > 0:
            raise ValueError(f"eps is {eps}; expected a positive number, such as 1e-8")
        self.eps = float(eps)

    def _launch(
        self, params: list[Array], grads: list[Array], states: list[list[Array]], scale: Array | None
    ) -> list[Array]:
        return kernels.adam_update(
            params,
            grads,
            states,
            rate=self.rate,
            betas=self.betas,
            eps=self.eps,
            count=self.count,
            shrink=self.rate * self.weight_decay,
            scale=scale,
        )

    def _update(self, xp: Namespace, param: Array, grad: Array, state: list[Array], out: Array) -> None:
        first, second = state
        beta1, beta2 = self.betas
        first *= beta1
        xp.multiply(grad, 1 - beta1, out=out)
        first += out
        second *= beta2
        xp.square(grad, out=out)
        out *= 1 - beta2
        second += out
        # Both corrections are scalars: moved out of the arrays, they cost nothing.
        root = math.sqrt(1 - beta2**self.count)
        xp.sqrt(second, out=out)
        out += self.eps * root
        xp.divide(first, out, out=out)
        out *= -self.rate * root / (1 - beta1**self.count)


class AdamW(Adam):
    """Adam with weight decay apart from the gradient: w <- w - lr * weight_decay * w, then Adam's step.

    Loshchilov & Hutter 2019, algorithm 2; as in PyTorch the decay is multiplied by lr.
    """

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(lr, betas=betas, eps=eps, clip_norm=clip_norm)
        self.weight_decay = check_rate(weight_decay, "weight_decay")

    def _update(self, xp: Namespace, param: Array, grad: Array, state: list[Array], out: Array) -> None:
        super()._update(xp, param, grad, state, out)
        if self.weight_decay:
            out -= xp.multiply(param.astype(out.dtype, copy=False), self.rate * self.weight_decay)


class Iterate(NamedTuple):
    """Where a full-batch method is after an iteration.

    Parameters, objective, max norm of the gradient, step length; max norm of the parameters if they may be infinite.
    """

    arrays: list[Array]
    fun: float
    grad_norm: float
    step: float
    reach: float = 0.0


class Stop(NamedTuple):
    """Why a full-batch method cannot go on."""

    success: bool
    message: str


class Precision:
    """Judges a line search that finds no lower point: is this as far as rounding lets it go, or is it stuck?"""

    def __init__(self, layout: Layout, fun: float, grad_norm: float) -> None:
        self.xp, self.start_fun, self.start_norm = layout.xp, abs(fun), grad_norm
        self.eps = max(float(numpy.finfo(dtype).eps) for dtype in layout.work)

    def verdict(self, here: Iterate, decrease: float) -> Stop:
        """Say which. decrease: what a step was predicted to gain.

        The gradient must be small relative to objective and parameters (Dennis & Schnabel 1996, eq. 7.2.5) and the
        gain lost in rounding; or the gradient so small against that at the start that its square is.
        """
        reach = max(1.0, *to_host(self.xp, max_norm(self.xp, here.arrays)))
        relative = here.grad_norm * reach / max(abs(here.fun), self.start_fun, 1e-300)
        lost = decrease <= 100 * self.eps * abs(here.fun) and relative <= self.eps ** (1 / 3)
        if lost or here.grad_norm <= math.sqrt(self.eps) * self.start_norm:
            found = f"no lower point found, max|gradient| {here.grad_norm:.3g}"
            return Stop(True, f"converged as far as rounding allows: {found}")
        return Stop(
            False,
            f"the line search found no lower point, though max|gradient| is {here.grad_norm:.3g}: the objective is not "
            "smooth there, or the gradient is wrong (gpugrad.check_grads tells)",
        )


def fixed_rate(
    optimizer: Optimizer, layout: Layout, arrays: list[Array], evaluate: Evaluate
) -> Iterator[Iterate | Stop]:
    """Full-batch steps of an optimiser, for ever."""
    optimizer.begin(layout, arrays)
    xp, rate = layout.xp, 0.0
    while True:
        value, grads = evaluate(arrays)
        # A bounded objective may be finite at infinity, so the parameters are looked at as well.
        fun, grad_norm, reach = to_host(xp, value, max_norm(xp, grads), max_norm(xp, arrays))
        yield Iterate(arrays, fun, grad_norm, rate, reach)
        arrays = optimizer.advance(arrays, grads)
        rate = optimizer.rate


def backtracking(layout: Layout, start: list[Array], evaluate: Evaluate) -> Iterator[Iterate | Stop]:
    """Gradient descent with Armijo's rule (Nocedal & Wright, algorithm 3.1).

    The first trial is the last step, or twice that if the last step was taken at once. The constant 0.3 (Boyd &
    Vandenberghe 9.2 name 0.01 to 0.3) keeps steps off the stability limit 2/L, near which the iterates only zigzag.
    """
    xp = layout.xp
    rule = GradientDescent(0.0)
    rule.begin(layout, start)

    def look(arrays: list[Array], step: float) -> tuple[Iterate, list[Array], float]:
        value, grads = evaluate(arrays)
        fun, grad_norm, square = to_host(xp, value, max_norm(xp, grads), squared_norm(xp, grads))
        # A copy: the objective may use the memory again at the next trial.
        return Iterate(arrays, fun, grad_norm, step), [grad.copy() for grad in grads], square

    here, grads, square = look(start, 0.0)
    yield here
    precision = Precision(layout, here.fun, here.grad_norm)
    last = 1 / math.sqrt(square) if square > 0 else 0.0  # the first trial moves by one unit of length
    growth = 1.0
    while True:
        if here.grad_norm == 0:
            yield Stop(True, "converged: the gradient is zero")
            return
        step, growth = growth * last, 2.0
        while True:
            rule.lr = step
            there, ahead, ahead_square = look(rule.advance(here.arrays, grads), step)
            # Below the last digit the bound is the value itself, hence the first comparison.
            if there.fun < here.fun and there.fun <= here.fun - 0.3 * step * square and math.isfinite(there.grad_norm):
                break
            step, growth = 0.5 * step, 1.0
            if step * square <= 0.1 * precision.eps * abs(here.fun) or step < 1e-30 * last:
                yield precision.verdict(here, last * square)
                return
        here, grads, square, last = there, ahead, ahead_square, step
        yield here
