"""The machine code of every CUDA kernel, form, type and layout for five architectures: what a card would be given.

Compiled by NVRTC with CuPy's own text and options. `pytest -s` prints a line a kernel.
"""

import pytest
from cuda_proof import emulator, machine_code
from cuda_proof.machine_code import ARCHITECTURES

from gpugrad import kernels
from gpugrad.kernels import DOUBLE, HALF, SINGLE, WIDE, Kernel

if missing := machine_code.missing():
    pytest.skip(missing, allow_module_level=True)

import cupy

LAYOUTS = ("contiguous", "0-d", "strided", "broadcast", "64-bit")
# 64 registers let 1,024 threads share a multiprocessor's 65,536, half or more of what any card can hold; the sums hold
# two packs and their totals, and 80 let three blocks of 256 in.
REGISTERS = {"elementwise": 64, "raw": 80}


def texts(kernel, built=None):
    """The texts of a kernel, one a layout, and which kernel each is of."""
    built = built or kernel.object()
    if kernel.kind == "raw":
        yield machine_code.raw(f"{kernel.name} {kernel.dtype}", built)
        return
    spec = kernels.POINTWISE[kernel.name]
    scalars = {"width", "count", "masked"} | (set() if kernel.form == "packed-at" else set(spec.numbers))
    for layout in LAYOUTS if kernel.form == "strided" else LAYOUTS[:1]:
        label = f"{kernel.name} {kernel.form} {kernel.dtype} {layout}"
        yield machine_code.elementwise(label, built, layout, scalars)


def wide_accesses(kernel):
    """How many loads and stores of 16 bytes a kernel that claims them needs for a pack of each of its arrays."""

    def packs(declared):
        return sum(kernel.pack * d.itemsize // 16 for _, d in kernels._typed(declared, kernel.dtype))

    if kernel.name in kernels.RAW:  # g and x or y come in, dx goes out
        return (packs(("g:A", "x")), packs(("dx:A",))) if kernel.name.endswith("_wide") else (0, 0)
    spec = kernels.POINTWISE[kernel.name]
    if kernel.form == "strided":
        return 0, 0
    rows = spec.rows
    if kernel.form == "packed-row" and not rows:
        rows = tuple(f"{name}:A" for name in spec.numbers)
    return packs(spec.inputs + rows), packs(spec.outputs)


def takes_exponential(kernel):
    """Whether a kernel computes an exponential in float32, which has an instruction."""
    family = kernel.name.startswith(("swish", "bias_swish", "logistic")) and kernel.name != "swish_backward_kept"
    return family and WIDE[kernel.dtype] == SINGLE


def faults(kernel, code):
    """What is wrong with the machine code of a kernel, in words."""
    found = []
    if code.spill_stores or code.spill_loads or code.stack:
        found.append(f"{code.spill_stores + code.spill_loads} bytes spilled, {code.stack} on the stack")
    if code.count("LDL") or code.count("STL"):
        found.append("uses local memory")
    operations = {name.partition(".")[0] for name in code.instructions}
    if any(name.startswith(("ATOM", "RED")) and name != "REDUX" for name in operations):
        found.append("has atomics")
    if code.registers > REGISTERS[kernel.kind]:
        found.append(f"{code.registers} registers, more than {REGISTERS[kernel.kind]}")
    loads, stores = wide_accesses(kernel)
    if code.count("LDG", "128") < loads or code.count("STG", "128") < stores:
        found.append(
            f"{code.count('LDG', '128')} loads, {code.count('STG', '128')} stores of 16 bytes, not {loads}, {stores}"
        )
    if takes_exponential(kernel) and not code.count("MUFU", "EX2"):
        found.append("no MUFU.EX2")
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_machine_code(dtype, architecture):
    mine = {}
    for kernel in kernels.every():
        if kernel.dtype == dtype:
            mine |= {text.label: (kernel, text) for text in texts(kernel)}
    codes = machine_code.compile_all([text for _, text in mine.values()], architecture)
    assert codes.keys() == mine.keys()
    wrong = []
    for label, code in codes.items():
        wrong += [f"{label}: {fault}" for fault in faults(mine[label][0], code)]
        loads, stores, exponentials = (code.count(*o) for o in (("LDG", "128"), ("STG", "128"), ("MUFU", "EX2")))
        print(
            f"sm_{architecture} {label:50} {code.registers:3} registers {code.shared:6} B shared {loads:2} LDG.128 "
            f"{stores:2} STG.128 {exponentials:2} EX2 {code.instructions.total():5} instructions"
        )
    assert not wrong, "\n".join(wrong)


class Stop(Exception):
    """Ends a compilation when its text and options are known."""


def test_text_and_options_are_what_cupy_gives_to_nvrtc(monkeypatch):
    """Through CuPy's own path from a text to NVRTC, of which only the questions to a GPU are left out."""
    compiler = cupy.cuda.compiler
    seen = {}

    class Program:
        def __init__(self, source, *_, **__):
            seen["source"] = source

        def compile(self, options, *_):
            seen["options"] = options
            raise Stop

    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    monkeypatch.setattr(compiler, "_preprocess", lambda *_: "")
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    monkeypatch.setattr(compiler, "_NVRTCProgram", Program)
    compile_with_cache = emulator.private("cupy._core.core", "compile_with_cache")

    raw = Kernel("adam", "raw", SINGLE).object()
    with pytest.raises(Stop):
        compile_with_cache(raw.code, raw.options, arch="90", prepend_cupy_headers=False)
    text = machine_code.raw("adam", raw)
    assert seen == {"source": text.source, "options": machine_code.options(90, text.options)}

    pointwise = Kernel("relu", "strided", HALF).object()
    text = machine_code.elementwise("relu", pointwise)
    headers = "".join(f"#include <{name}>\n" for name in emulator.private("cupy._core.core", "_cupy_header_list"))
    with pytest.raises(Stop):
        compile_with_cache(text.source.removeprefix(headers), pointwise.kwargs["options"], arch="90")
    assert seen == {"source": text.source, "options": machine_code.options(90, text.options)}
    assert "-ftz=true" in seen["options"]


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_several_kernels_in_one_program_come_out_as_alone(dtype):
    kernel = Kernel("swish_backward", "strided", dtype)
    together = machine_code.compile_all(texts(kernel), 90)
    for text in texts(kernel):
        (alone,) = machine_code.compile_all([text], 90).values()
        assert together[text.label] == alone


# ------------------------------------------------------------------------------------------------ planted faults


def planted(kernel, old, new):
    """Build a kernel with a piece of its text replaced; fails if the text has not that piece."""
    assert kernel.kind == "elementwise"
    inputs, outputs, body = kernel.operation()
    before = kernel.source()
    assert old in before + body, f"nothing to replace: {old!r}"
    return cupy.ElementwiseKernel(
        inputs, outputs, body.replace(old, new), "planted", preamble=before.replace(old, new), options=kernel.options
    )


# The form of swish in float32, what to replace in its text, by what, and what is to be said of it.
FAULTS = {
    "loads by elements": (
        "packed",
        "words[w] = reinterpret_cast<const Word*>(from)[w];",
        "for (int k = 0; k < 4; ++k) (*this)[k] = from[k];",
        "0 loads",
    ),
    "stores by elements": (
        "packed",
        "reinterpret_cast<Word*>(to)[w] = words[w];",
        "for (int k = 0; k < 4; ++k) to[k] = reinterpret_cast<const T*>(words)[k];",
        "0 stores",
    ),
    "an atomic": ("strided", "y = gpugrad::swish<A>", "atomicAdd(&y, x); y = gpugrad::swish<A>", "has atomics"),
    "an atomic that is read": (
        "strided",
        "y = gpugrad::swish<A>",
        "y = atomicAdd(&y, x) + gpugrad::swish<A>",
        "has atomics",
    ),
    "a table on the stack": (
        "strided",
        "y = gpugrad::swish<A>",
        "volatile float held[64]; held[int(x) & 63] = x; y = held[int(2 * x) & 63] + gpugrad::swish<A>",
        "on the stack",
    ),
    "no exponential": ("strided", "return expf(x);", "return 1 + x;", "no MUFU.EX2"),
}


@pytest.mark.parametrize("architecture", [75, 90, 120])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_in_the_machine_code_is_found(fault, architecture):
    form, old, new, told = FAULTS[fault]
    kernel = Kernel("swish", form, SINGLE)
    wrong = list(texts(kernel, planted(kernel, old, new)))[:1]
    (code,) = machine_code.compile_all(wrong, architecture).values()
    assert any(told in fault for fault in faults(kernel, code)), faults(kernel, code)


def test_too_many_registers_are_found():
    kernel = Kernel("swish", "strided", SINGLE)
    (code,) = machine_code.compile_all(list(texts(kernel))[:1], 90).values()
    assert any("registers" in fault for fault in faults(kernel, code._replace(registers=65)))
