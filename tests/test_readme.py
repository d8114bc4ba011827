"""The README's examples print exactly what the README says they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpugrad

README = Path(__file__).parents[1] / "README.md"
TAG = "<!-- ci: example -->"
# The tag, a python block directly under it, then the text block with what it prints; prose may stand between the two.
EXAMPLE = re.compile(
    rf"^{re.escape(TAG)}\n```python\n(?P<code>.*?)^```\n(?:(?!```)[^\n]*\n)*```text\n(?P<printed>.*?)^```$", re.M | re.S
)


def examples(text: str) -> list[tuple[int, str, str]]:
    """(line, code, what it prints) of every tagged example."""
    return [
        (text[: found.start()].count("\n") + 1, found["code"], found["printed"]) for found in EXAMPLE.finditer(text)
    ]


def readme() -> str:
    return README.read_text(encoding="utf-8")


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(gpugrad.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("code", "printed"), [pytest.param(code, printed, id=f"line {line}") for line, code, printed in examples(readme())]
)
def test_example_prints_what_it_says(code, printed, tmp_path):
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_every_tag_has_its_two_blocks():
    tags = readme().splitlines().count(TAG)
    assert tags > 0
    assert len(examples(readme())) == tags


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("test", 'python -m pip install ".[test]" && pytest'),
        ("main", 'python -m pip install ".[data,plot]" && gpugrad fit flights'),
    ],
)
def test_the_commands_that_ci_runs_are_tagged(name, command):
    assert re.search(rf"^<!-- ci: {name} -->\n```\w*\n{re.escape(command)}\n```$", readme(), re.M)


def test_examples_are_found_where_they_are():
    text = f"""intro
{TAG}
```python
print(1)
```

It prints

```text
1
```
```python
untagged()
```
{TAG}
```python
print(2)
```
```text
2
```
"""
    assert examples(text) == [(2, "print(1)\n", "1\n"), (15, "print(2)\n", "2\n")]
