"""CuPy's own modules, kept aside while the stand-in is in their place."""

import contextlib
import sys
import types

hidden: dict[str, types.ModuleType] = {}


def is_cupys(name: str) -> bool:
    """Tell whether a module is CuPy's, or array-api-compat's names for it."""
    return name.split(".")[0] in ("cupy", "cupyx", "cupy_backends") or name.startswith("array_api_compat.cupy")


def real(name: str) -> types.ModuleType:
    """Return one of CuPy's own modules."""
    return hidden[name] if name in hidden else sys.modules[name]


@contextlib.contextmanager
def as_it_was():
    """Let CuPy's own modules be found while its own objects are at work."""
    here = {name: sys.modules.pop(name) for name in list(sys.modules) if is_cupys(name)}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if is_cupys(name)]:
            hidden[name] = sys.modules.pop(name)
        sys.modules.update(here)
