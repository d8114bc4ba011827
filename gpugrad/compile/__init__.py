"""Capture a function once, fuse its operations, replay it without the tape.

`compile` is the public face. A call is keyed by shapes, dtypes, device and structure of its arguments; the first with a
key captures (`capture`), drops what does nothing (`program`), fuses (`fuse`), plans memory (`plan`) and makes an
executable for the device (`cpu`, `cuda`); the others run it.
"""

from gpugrad.compile.function import Compiled, Unasked, compile

__all__ = ["Compiled", "Unasked", "compile"]
