"""gpugrad: reverse-mode automatic differentiation for NumPy on the CPU and CuPy on the GPU.

The public names, and nothing else. `Tensor` holds an array and its place on the tape; `grad`, `value_and_grad` and
`vjp` transform functions; `Objective` is a loss summed over data, `minimize` drives it down.
"""

from gpugrad import errors, nn
from gpugrad.backend import device, get_device
from gpugrad.declare import bilinear, case, elementwise, linear, nondiff, primitive
from gpugrad.errors import (
    DataError,
    DeviceMismatch,
    DeviceUnavailable,
    GpugradError,
    GraphFreed,
    MutatedArray,
    NonFiniteLoss,
    NotDifferentiable,
    ShapeMismatch,
)
from gpugrad.gradcheck import check_grads
from gpugrad.objective import Objective
from gpugrad.ops import linalg
from gpugrad.ops.activation import elu, gelu, leaky_relu, log_sigmoid, relu, silu, softplus, swish
from gpugrad.ops.create import asarray, tensor
from gpugrad.ops.elementwise import (
    abs,
    acos,
    add,
    asin,
    atan,
    atan2,
    clip,
    cos,
    cosh,
    divide,
    equal,
    exp,
    expm1,
    greater,
    greater_equal,
    hypot,
    isfinite,
    isnan,
    less,
    less_equal,
    log,
    log1p,
    log2,
    log10,
    logaddexp,
    logical_and,
    logical_not,
    logical_or,
    maximum,
    minimum,
    multiply,
    negative,
    not_equal,
    pow,
    reciprocal,
    sigmoid,
    sign,
    sin,
    sinh,
    sqrt,
    square,
    subtract,
    tan,
    tanh,
    where,
)
from gpugrad.ops.index import repeat, take
from gpugrad.ops.linalg import einsum, matmul, outer, tensordot, vecdot
from gpugrad.ops.reduce import (
    all,
    any,
    argmax,
    argmin,
    cumulative_sum,
    log_softmax,
    logsumexp,
    max,
    mean,
    min,
    prod,
    softmax,
    std,
    sum,
    var,
)
from gpugrad.ops.shape import (
    astype,
    broadcast_to,
    concat,
    expand_dims,
    flip,
    matrix_transpose,
    pad,
    permute_dims,
    reshape,
    roll,
    squeeze,
    stack,
    tile,
    tril,
    triu,
)
from gpugrad.tape import Tape, no_grad
from gpugrad.tensor import Tensor
from gpugrad.transforms import grad, value_and_grad, vjp

__version__ = "0.1.0"
