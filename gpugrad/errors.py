"""The errors gpugrad raises on purpose. Each message says what came, what was wanted and the remedy."""

__all__ = [
    "CaptureError",
    "CaptureWarning",
    "DataError",
    "DeviceMemoryError",
    "DeviceMemoryWarning",
    "DeviceMismatch",
    "DeviceUnavailable",
    "GpugradError",
    "GraphFreed",
    "MutatedArray",
    "NonFiniteLoss",
    "NotDifferentiable",
    "ShapeMismatch",
]


class GpugradError(Exception):
    """Base of every error raised on purpose by gpugrad."""


class DeviceMismatch(GpugradError, ValueError):
    """Arrays of one operation live on different devices; gpugrad never copies between devices unasked."""


class DeviceUnavailable(GpugradError, RuntimeError):
    """The device asked for is not there: CuPy is missing, no driver answers, or the index is too large."""


class DeviceMemoryError(GpugradError, MemoryError):
    """One row of the data does not fit in the memory of the GPU; the message tells the sizes."""


class DeviceMemoryWarning(RuntimeWarning):
    """A block of rows did not fit in the memory of the GPU; an Objective goes on with smaller ones."""


class ShapeMismatch(GpugradError, ValueError):
    """Shapes that do not fit together."""


class NotDifferentiable(GpugradError, TypeError):
    """A gradient was asked through something that has none."""


class GraphFreed(GpugradError, RuntimeError):
    """The graph was already used by a reverse sweep that did not keep it."""


class MutatedArray(GpugradError, RuntimeError):
    """An array saved for the reverse sweep was changed in place before the sweep ran."""


class NonFiniteLoss(GpugradError, FloatingPointError):
    """A loss over data gave NaN or an infinity; the message names the first block and row."""


class CaptureError(GpugradError, RuntimeError):
    """A function that is being captured did what cannot be replayed, such as reading a value."""


class CaptureWarning(RuntimeWarning):
    """A function is not captured, or captured again and again: right, but slower than it could be."""


class DataError(GpugradError, ValueError):
    """A data file or table cannot be used: missing, empty, malformed, or without the columns asked for."""
