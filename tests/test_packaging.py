"""The project's own files agree with each other and with what is built from them."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import gpugrad

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
VERSION = PROJECT["project"]["version"]


def package_files() -> dict[str, Path]:
    """Every file that belongs in the wheel, by its path there."""
    wanted = {"README.md", "py.typed"}, {".py", ".cu", ".cuh", ".h"}
    folders = {"gpugrad": ROOT / "gpugrad"} | {f"gpugrad/{name}": ROOT / name for name in ("bench", "cuda_kernels")}
    return {
        f"{prefix}/{file.relative_to(folder).as_posix()}": file
        for prefix, folder in folders.items()
        for file in folder.rglob("*")
        if file.name in wanted[0] or file.suffix in wanted[1]
    }


def test_version_is_one():
    assert gpugrad.__version__ == VERSION
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_package_is_listed():
    folders = {path.rpartition("/")[0] for path in package_files() if path.endswith(".py")}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folder.replace("/", ".") for folder in folders)


def test_extras():
    users = {"autograd", "bench", "cuda12", "cuda13", "cuda13-local", "data", "jax", "jit", "plot", "sklearn", "torch"}
    assert set(EXTRAS) == users | {"dev", "kernels", "test"}
    named = {
        extra
        for requirements in EXTRAS.values()
        for requirement in requirements
        if (match := re.fullmatch(r"gpugrad\[(.+)\]", requirement))
        for extra in match[1].split(",")
    }
    assert named <= set(EXTRAS)


def test_docs_name_only_extras_that_exist():
    for page in pages():
        for extras in re.findall(r"(?:gpugrad|\.)\[([a-z0-9,-]+)\]", page.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= set(EXTRAS), f"{page.relative_to(ROOT)} names [{extras}]"


def test_docs_name_no_path_of_one_machine():
    private = re.compile(r"(?<![\w.:~/-])/(?:home|mnt|root|srv|tmp|Users|work)/\w\S*")
    for page in pages():
        assert private.findall(page.read_text(encoding="utf-8")) == [], page.relative_to(ROOT)


def pages() -> list[Path]:
    folders = ("bench", "cuda_kernels", "docker", "docs", "gpugrad")
    return [
        *ROOT.glob("*.md"),
        ROOT / "CITATION.cff",
        *(page for name in folders for page in (ROOT / name).rglob("*.md")),
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a wheel and an sdist of this tree; the wheel is built from the sdist."""
    pytest.importorskip("build", reason="needs the dev extra")
    work = tmp_path_factory.mktemp("packaging")
    names = (".git", ".venv", "venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, work / "source", ignore=shutil.ignore_patterns(*names))
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(work / "dist"), "."], cwd=work / "source", check=True
    )
    return work / "dist"


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"gpugrad-{VERSION}-py3-none-any.whl"
    info = f"gpugrad-{VERSION}.dist-info"
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert names == set(package_files()) | {f"{info}/{name}" for name in about}
    assert "gpugrad = gpugrad.cli:main" in entry_points


@pytest.mark.slow
def test_sdist_is_the_whole_source(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    sources = {file.relative_to(ROOT).as_posix() for file in package_files().values()}
    tests = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("*.py")}
    about = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md", "pyproject.toml"}
    assert sources | tests | about | {".ci/run"} <= names
    assert [name for name in names if re.search(r"(^|/)(__pycache__|build|dist|\..*_cache)/|\.py[co]$", name)] == []
