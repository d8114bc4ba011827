"""The five ways to declare an op: elementwise, linear, bilinear, primitive, nondiff.

Each takes one formula where one is enough and returns the public function. In ``forward`` and in rules, ``xp`` is
the array module, positional parameters are arrays and keyword-only parameters are static. A rule says what it
keeps by its parameter names: one that begins with ``_`` is not saved. ``partials`` of an elementwise op get None
in its place; other rules get its shape and dtype. Rules call gpugrad functions and operators (not ``xp``), so
that they can be differentiated themselves.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gpugrad.op import Cuda, Node, Op, make_function, refuse, register

Rule = Callable[..., Any]
Function = Callable[..., Any]


class Case(NamedTuple):
    """One way to call an op that is not elementwise, for the laws that tests draw from its record."""

    shapes: tuple[Any, ...]
    params: Mapping[str, Any]
    through: Callable[..., Any] | None
    low: float
    high: float


def case(
    *shapes: Any, through: Callable[..., Any] | None = None, low: float = -2.0, high: float = 2.0, **params: Any
) -> Case:
    """Describe a call by the shapes of its random arguments (uniform in low..high) and its static parameters.

    An argument that is not a shape tuple is passed as it is. `through` is applied to each random argument first,
    to reach a domain such as the positive definite matrices.
    """
    return Case(shapes, params, through, low, high)


def elementwise(
    name: str,
    *,
    forward: Rule,
    partials: Rule | int | Sequence[Rule | int],
    domain: Sequence[tuple[float, float]],
    doc: str,
    masks: bool | Callable[[Node], bool] = False,
    residual: tuple[Rule, Sequence[Rule]] | None = None,
    cuda: Cuda | None = None,
) -> Callable[..., Any]:
    """Declare an op that works element by element, with broadcasting.

    forward(xp, x, ...) -> array, never one of its arguments. partials: one a positional argument, each
    partial(y, x, ...) = dy/dx as an array, or an integer where it is constant; forward and reverse rules both
    follow from them. domain: an interval an argument, strictly inside which the op is smooth (tests draw from it).
    masks: the op may drop some of its input (`where`), where infinite slopes must not spoil the rest; or a function
    of its Node that tells whether it does.
    residual: (forward that returns (array, intermediate), partials that take the intermediate last), where a
    first-order sweep is cheaper so.
    cuda: kernels for CUDA arrays; the formulas serve for all else and for higher orders.
    Raises ValueError for a name taken, or a number of partials that does not fit.
    """
    rules = (partials,) if callable(partials) or isinstance(partials, int) else tuple(partials)
    return _declare(name, "elementwise", forward, doc, rules, domain, masks=masks, residual=residual, cuda=cuda)


def linear(
    name: str,
    *,
    forward: Rule,
    transpose: Rule | Sequence[Rule],
    domain: Sequence[Case],
    doc: str,
    variadic: bool = False,
    masks: bool | Callable[[Node], bool] = False,
) -> Callable[..., Any]:
    """Declare an op that is linear in all its array arguments together.

    transpose(g, x, ..., *, params) -> cotangent of x; one an argument. A variadic op takes a sequence of arrays
    and one rule transpose(i, g, *x, params) for argument i.
    """
    rules = (transpose,) if callable(transpose) else tuple(transpose)
    return _declare(name, "linear", forward, doc, rules, domain, variadic=variadic, masks=masks)


def bilinear(
    name: str, *, forward: Rule, transposes: tuple[Rule, Rule], domain: Sequence[Case], doc: str
) -> Callable[..., Any]:
    """Declare an op linear in each of two array arguments. transposes: (g, x, y, *, params) -> cotangent, one each."""
    return _declare(name, "bilinear", forward, doc, transposes, domain)


def primitive(
    name: str,
    *,
    forward: Rule,
    vjp: Rule | Sequence[Rule],
    domain: Sequence[Case],
    doc: str,
    outputs: int = 1,
    variadic: bool = False,
    masks: bool | Callable[[Node], bool] = False,
) -> Callable[..., Any]:
    """Declare any other differentiable op.

    vjp(g, y, x, ..., *, params) -> cotangent of x; one an array argument. With several outputs, g and y are tuples
    and the g of an output that was not used is None.
    """
    rules = (vjp,) if callable(vjp) else tuple(vjp)
    return _declare(name, "primitive", forward, doc, rules, domain, outputs=outputs, variadic=variadic, masks=masks)


def nondiff(
    name: str, *, forward: Rule, reason: str, doc: str, domain: Sequence[Case] = (), pointwise: bool = False
) -> Callable[..., Any]:
    """Declare an op that has no derivative, and why. Asking for one raises NotDifferentiable with the reason.

    pointwise: it works element by element, with broadcasting.
    """
    if not reason:
        raise ValueError(f"op {name!r} is nondiff: say why in reason=")
    return _declare(name, "nondiff", forward, doc, (), domain, reason=reason, pointwise=pointwise)


def _declare(
    name: str,
    kind: str,
    forward: Rule,
    doc: str,
    rules: tuple[Any, ...],
    domain: Sequence[Any],
    *,
    outputs: int = 1,
    variadic: bool = False,
    masks: bool | Callable[[Node], bool] = False,
    reason: str = "",
    residual: tuple[Rule, Sequence[Rule]] | None = None,
    cuda: Cuda | None = None,
    pointwise: bool = False,
) -> Callable[..., Any]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    arrays = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    static = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    count = 1 if variadic else len(arrays)
    if kind != "nondiff" and len(rules) != count:
        raise ValueError(f"op {name!r}: {len(rules)} rules for {count} array argument(s)")
    if kind == "elementwise" and len(domain) != count:
        raise ValueError(f"op {name!r}: {len(domain)} intervals in domain for {count} array argument(s)")
    if not doc:
        raise ValueError(f"op {name!r} has no doc")
    op = Op(name=name, kind=kind, forward=forward, doc=doc, domain=tuple(domain), outputs=outputs, variadic=variadic)
    op.masks = masks
    op.residual = None if residual is None else (residual[0], tuple(residual[1]))
    op.cuda = cuda
    op.reason = reason
    op.pointwise = pointwise or kind == "elementwise"
    if kind == "elementwise":
        op.partials = rules
        op.needs = tuple(_kept(rule, first=0) if callable(rule) else () for rule in rules)
    elif kind == "nondiff":
        op.vjps = (refuse(op),) * max(count, 1)
        op.needs = ((),) * max(count, 1)
    elif variadic:
        op.vjps = rules if kind == "primitive" else (_without_output_variadic(rules[0]),)
        names = inspect.signature(rules[0]).parameters
        op.needs = ((0,) * ("y" in names) + (-1,) * ("x" in names),)
    else:
        with_output = kind == "primitive"
        op.vjps = rules if with_output else tuple(_without_output(rule) for rule in rules)
        op.needs = tuple(_kept(rule, first=0 if with_output else 1, skip=1) for rule in rules)
    if variadic:
        shown = [inspect.Parameter("arrays", inspect.Parameter.POSITIONAL_ONLY)]
    else:
        shown = [p.replace(kind=p.POSITIONAL_ONLY) if p.default is p.empty else p for p in arrays]
    shown += [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in static]
    op.function = make_function(op, count, inspect.Signature(shown))
    register(op)
    return op.function


def _kept(rule: Rule, *, first: int, skip: int = 0) -> tuple[int, ...]:
    """Return the positions a rule keeps, 0 the output and k the k-th argument, from its parameter names."""
    names = [p.name for p in inspect.signature(rule).parameters.values() if p.kind is not p.KEYWORD_ONLY][skip:]
    return tuple(first + i for i, name in enumerate(names) if not name.startswith("_"))


def _without_output(rule: Rule) -> Rule:
    return lambda g, _y, *arguments, **params: rule(g, *arguments, **params)


def _without_output_variadic(rule: Rule) -> Rule:
    return lambda i, g, _y, *arguments, **params: rule(i, g, *arguments, **params)
