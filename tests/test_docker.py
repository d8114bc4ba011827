"""The image's files agree with the project's. Whether the image works is docker/check.sh's to say."""

import re
import tomllib
from pathlib import Path

import pytest

requirements = pytest.importorskip("packaging.requirements", reason="comes with pytest")

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
LEFT_OUT = {"nvidia-cuda-crt", "nvidia-cuda-nvdisasm"}  # for proving kernels without a GPU


def pins(name):
    """The versions that a file of docker/ fixes, by package."""
    lines = [line for line in (DOCKER / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    fixed = dict(line.split("==") for line in lines)
    assert len(fixed) == len(lines), f"{name} names a package twice"
    assert list(fixed) == sorted(fixed, key=str.lower), f"{name} is not in order"
    return fixed


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("libraries.txt", PROJECT["project"]["dependencies"] + EXTRAS["data"] + EXTRAS["jit"] + EXTRAS["plot"]),
        ("cuda.txt", EXTRAS["cuda13"] + EXTRAS["kernels"]),
        ("test.txt", EXTRAS["test"]),
    ],
)
def test_what_the_project_asks_for_is_there(file, wanted):
    fixed = pins(file)
    for requirement in map(requirements.Requirement, wanted):
        if requirement.name not in LEFT_OUT | {"gpugrad"}:
            assert requirement.specifier.contains(fixed[requirement.name]), f"{requirement} in {file}"


def test_no_package_is_fixed_twice():
    packages = [package for name in ("libraries.txt", "cuda.txt", "test.txt") for package in pins(name)]
    assert len(packages) == len(set(packages))


def test_what_builds_gpugrad():
    (version,) = re.findall(r"\bsetuptools==(\S+)", DOCKERFILE)
    (requirement,) = map(requirements.Requirement, PROJECT["build-system"]["requires"])
    assert requirement.specifier.contains(version)


def test_targets_are_there():
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    pages = DOCKER / "compose.yaml", DOCKER / "Dockerfile", ROOT / "docs" / "containers.md"
    uses = re.compile(r"(?:--target (?=\S+ -t )|target: (?=\S+ \}))([a-z]+)")
    named = {name for page in pages for name in uses.findall(page.read_text(encoding="utf-8"))}
    assert {"bench", "cpu", "gpu"} == named <= targets


def test_no_address_of_a_package_index():
    for page in (*DOCKER.glob("*.txt"), *DOCKER.glob("*.sh"), DOCKER / "Dockerfile"):
        assert "://" not in page.read_text(encoding="utf-8"), page.name
