"""The machine code of kernels: compiled as CuPy would at run time, for any architecture, with no GPU.

NVRTC gets the text and the options that CuPy 14.2 gives it (-ftz=true, C++17, CuPy's and NVIDIA's headers), and in
addition makes ptxas tell registers and spills. nvdisasm shows the instructions.

Reading CuPy's headers takes longer than compiling a kernel, and nvdisasm longer to start than to run. So texts that
are the same up to their kernels go to NVRTC as one, and all kernels of an architecture to nvdisasm as one.
"""

import io
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cuda_proof import emulator
from cuda_proof.emulator import INDEXER, NDARRAY, SCALAR

ARCHITECTURES = (75, 80, 90, 100, 120)

_ENTRY = re.compile(
    r"Function properties for (?P<name>\w+)\s+(?:ptxas\s+\.\s+)?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
)
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;\n]*)", re.MULTILINE)


class Text(NamedTuple):
    """A kernel as NVRTC gets it. `label` tells it from others: two layouts of one kernel have the same name."""

    label: str
    name: str
    source: str
    options: tuple[str, ...] = ()


class MachineCode(NamedTuple):
    """What became of one kernel for one architecture; sizes in bytes.

    loop: instructions of the shortest loop that reads global memory, all its branches included; 0 if there is none.
    """

    label: str
    architecture: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    loop: int
    instructions: Counter

    def count(self, operation: str, *modifiers: str) -> int:
        """Count the instructions of an operation that have all of the modifiers: count("LDG", "128")."""
        total = 0
        for name, number in self.instructions.items():
            first, *rest = name.split(".")
            total += number * (first == operation and set(modifiers) <= set(rest))
        return total


def disassembler() -> str | None:
    """Return the path of nvdisasm: on the path, or from NVIDIA's wheel; None if it is in neither."""
    found = shutil.which("nvdisasm")
    if found:
        return found
    wheels = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/**/bin/nvdisasm"))
    return str(wheels[0]) if wheels else None


def missing() -> str | None:
    """Say why kernels cannot be compiled and disassembled here, or None when they can."""
    problem = emulator.missing()
    if problem is None and disassembler() is None:
        problem = "there is no nvdisasm (pip install nvidia-cuda-nvdisasm)"
    if problem is None:
        try:
            from cupy_backends.cuda.libs import nvrtc

            nvrtc.getVersion()
        except (ImportError, RuntimeError) as error:
            problem = f"NVRTC cannot be loaded (pip install nvidia-cuda-nvrtc): {error}"
    return problem


def options(architecture: int, own: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the options that CuPy gives to NVRTC for a kernel with options of its own."""
    assemble = emulator.private("cupy._core.core", "assemble_cupy_compiler_options")
    return (*assemble(own), "-ftz=true", f"-arch=sm_{architecture}", "--device-as-default-execution-space")


def raw(label: str, kernel: Any) -> Text:
    """Return the text of a `cupy.RawKernel`."""
    return Text(label, kernel.name, kernel.code, tuple(kernel.options))


def elementwise(label: str, kernel: Any, layout: str = "contiguous", scalars: Iterable[str] = ()) -> Text:
    """Return the text of a `cupy.ElementwiseKernel` whose parameters have types, for a layout of its arrays.

    layout: how the arrays that are not raw lie when they reach the generated code: "contiguous" (one axis), "0-d",
    "strided" (two axes in no order), "broadcast" (three axes, the first input in C order and the rest not), or
    "64-bit" (as strided, beyond 2**31 bytes). scalars: the parameters that come by value.
    """
    axes = {"contiguous": 1, "0-d": 0, "strided": 2, "broadcast": 3, "64-bit": 2}[layout]
    narrow, described = layout != "64-bit", []
    for place, parameter in enumerate(kernel.params[:-1]):
        if parameter.name in scalars:
            described.append((SCALAR, parameter.dtype, 0, True, True))
        elif parameter.raw:
            described.append((NDARRAY, parameter.dtype, 1, True, narrow))
        else:
            ordered = axes <= 1 or (layout == "broadcast" and place == 0)
            described.append((NDARRAY, parameter.dtype, axes, ordered, narrow))
    loops = not all(parameter.raw for parameter in kernel.params[:-1] if parameter.name not in scalars)
    described.append((INDEXER, None, axes if loops else 1, True, narrow))
    types = emulator.private("cupy._core._kernel", "_TypeMap")(())
    own = tuple(kernel.kwargs.get("options", ()))
    return Text(label, kernel.name, emulator.elementwise_source(kernel, described, types), own)


def compile_all(texts: Iterable[Text], architecture: int) -> dict[str, MachineCode]:
    """Compile kernels for an architecture and return their machine code by label; CuPy's CompileException on errors."""
    programs = defaultdict(list)
    for text in texts:
        before, start, kernel = text.source.partition(f'extern "C" __global__ void {text.name}(')
        programs[before, text.options].append((text, start and kernel))
    told, code = {}, {}
    for (before, own), members in programs.items():
        names = {}
        for number, (text, kernel) in enumerate(members):
            names[text.label] = text.name
            if kernel:  # as CuPy generates it; a name of its own lets several be in one program
                names[text.label] = f"{text.name}_{number}"
                before += f'extern "C" __global__ void {names[text.label]}({kernel}'
        cubin, log = _compile(before, architecture, own)
        properties = {entry["name"]: entry for entry in _ENTRY.finditer(log)}
        functions = _functions(cubin)
        for label, name in names.items():
            if name not in properties:
                raise RuntimeError(f"ptxas told nothing about {name}: {log}")
            told[label], code[label] = properties[name], functions[name]
    found = {}
    for label, listing in _disassemble(code, architecture).items():
        numbers = (int(told[label][key]) for key in ("registers", "stack", "stores", "loads"))
        shared = re.search(r"(\d+) bytes smem", told[label]["rest"])
        instructions = Counter(operation for _, operation, _ in listing)
        sizes = int(shared[1]) if shared else 0, _reading_loop(listing)
        found[label] = MachineCode(label, architecture, *numbers, *sizes, instructions)
    return found


def _compile(source: str, architecture: int, own: tuple[str, ...]) -> tuple[bytes, str]:
    program = emulator.private("cupy.cuda.compiler", "_NVRTCProgram")(source, "kernel.cu", method="cubin")
    log = io.StringIO()
    cubin, _ = program.compile((*options(architecture, own), "--ptxas-options=-v"), log)
    return cubin + b"\0", log.getvalue()  # CuPy's binding takes the last byte for the end of a string


def _functions(cubin: bytes) -> dict[str, bytes]:
    """Return the code of each function in a cubin, which is an ELF file, by name."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names_at = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, table + size * k) for k in range(number)]
    names = sections[names_at][4]
    found = {}
    for name, _, _, _, offset, length in sections:
        start = names + name
        title = cubin[start : cubin.index(b"\0", start)].decode()
        if title.startswith(".text."):
            found[title.removeprefix(".text.")] = cubin[offset : offset + length]
    return found


Listing = list[tuple[int, str, str]]  # address, operation, operands


def _disassemble(code: dict[str, bytes], architecture: int) -> dict[str, Listing]:
    """List the instructions of each function by their full names, as in LDG.E.128; predicated ones as others."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(code.values()))
        file.flush()
        command = [disassembler(), "-b", f"SM{architecture}", "-ndf", file.name]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"nvdisasm failed: {run.stderr.strip()}")
    lines = [(int(address, 16), operation, rest) for address, operation, rest in _INSTRUCTION.findall(run.stdout)]
    listings, start, end = {}, 0, 0
    for label, machine in code.items():
        first, end = start, end + len(machine)
        while start < len(lines) and lines[start][0] < end:
            start += 1
        listings[label] = lines[first:start]
    return listings


def _reading_loop(listing: Listing) -> int:
    """Count the instructions between a branch back and its target, of the shortest that has a load between."""
    loads = [address for address, operation, _ in listing if operation.startswith("LDG")]
    lengths = []
    for address, operation, rest in listing:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if operation.startswith("BRA") else None
        if target and any(int(target[1], 16) <= load < address for load in loads):
            lengths.append(sum(int(target[1], 16) <= a <= address for a, _, _ in listing))
    return min(lengths, default=0)
