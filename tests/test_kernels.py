"""The sources of the CUDA kernels: where they are, that each stands alone, and that the table of kernels is whole."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gpugrad import kernels
from gpugrad.compile import cuda_code

FOLDER = kernels.folder()
SOURCES = sorted(p for p in FOLDER.iterdir() if p.suffix in (".cu", ".cuh"))


def test_includes_are_put_in_their_place_once():
    for path in SOURCES:
        text = kernels.source(path.name)
        assert '#include "' not in text
        assert "#pragma once" not in text
        assert text.count("struct accumulate { using type = float; }") <= 1


def test_every_source_is_used():
    used = {spec.file for spec in kernels.POINTWISE.values()} | set(kernels.RAW.values()) | set(cuda_code.SOURCES)
    included = {name for path in SOURCES for name in re.findall(r'#include "(.+)"', path.read_text(encoding="utf-8"))}
    assert used | included == {path.name for path in SOURCES}


def test_every_entry_point_is_in_the_table():
    found = {
        name
        for path in SOURCES
        for name in re.findall(
            r"(?:__global__|GPUGRAD_KERNEL)[^;{]*?\s(\w+)\(const (?!__)|__launch_bounds__\(THREADS\)\s+(\w+)\(",
            path.read_text(encoding="utf-8"),
        )
    }
    assert {a or b for a, b in found} == {*kernels.RAW, "add_totals"}


def test_numbers_shared_with_the_sources():
    assert f"BLOCK = {kernels.BLOCK}," in kernels.source("sums.cuh")
    assert f"MANY = {kernels.MANY}, CHUNK = {kernels.CHUNK}," in kernels.source("optim.cu")
    assert f"THREADS = {cuda_code.ROW_THREADS}, WARP = {cuda_code.WARP}," in kernels.source("row_pass.cuh")
    many, threads, columns = cuda_code.TOTAL_MANY, cuda_code.TOTAL_THREADS, cuda_code.TOTAL_COLUMNS
    assert f"MANY = {many}, THREADS = {threads}, COLUMNS = {columns}," in kernels.source("totals.cu")
    # with the other arguments, what a launch may bring on any architecture
    assert kernels._table_type().itemsize < 4096 - 128


def test_every_kernel_says_what_it_is():
    """Every source states its bound, its limits or how it is built; every kernel comes in every form and type."""
    for path in SOURCES:
        header = path.read_text(encoding="utf-8").partition("#include")[0]
        assert header.startswith("// "), path.name
        if path.suffix == ".cu":
            assert "Build alone: nvcc" in header, path.name
    every = list(kernels.every())
    assert len(every) == len(set(every))
    for name, spec in kernels.POINTWISE.items():
        mine = {(k.form, k.dtype) for k in every if k.name == name}
        assert mine == {(form, dtype) for form in spec.forms for dtype in kernels.DTYPES}
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in [*kernels.POINTWISE, "swish_backward_sum", "bias_relu_backward", "bias_swish_backward"]:
        assert f"`{name}`" in readme, name
    for path in SOURCES:
        assert f"`{path.name}`" in readme, path.name


def test_no_atomics_and_no_narrow_indices():
    for path in SOURCES:
        code = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
        assert "atomic" not in code, path.name


def test_what_kernels_do_not_take_is_left_to_the_formulas():
    """Host arrays, other dtypes and numbers: None, and no import of CuPy."""
    x = np.ones(3, np.float32)
    assert kernels.relu(x) is None
    assert kernels.swish(x, 1.0) is None
    assert kernels.swish_backward_sum(x, x, 1.0) is None
    assert kernels.bias_relu_backward(x, x) is None
    assert kernels.squared_error(2.0, x) is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", [path.name for path in SOURCES if path.suffix == ".cu"])
@pytest.mark.parametrize("kind", ["float", "double", "__half"])
def test_a_file_builds_alone(name: str, kind: str, tmp_path: Path):
    half = ["-include", "cuda_fp16.h"] if kind == "__half" else []
    command = ["nvcc", "-cubin", "-std=c++17", "-arch=sm_75", f"-DGPUGRAD_T={kind}", *half, str(FOLDER / name)]
    subprocess.run([*command, "-o", str(tmp_path / "out.cubin")], check=True, capture_output=True, text=True)
