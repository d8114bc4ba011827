#!/usr/bin/env bash
# Check gpugrad on a GPU and measure it, from a plain checkout: no network, nothing to install. Under 8 minutes.
#
#     bench/gpu.sh [FOLDER]          results go to FOLDER, by default bench/results/gpu-<card>-<date>
#
# Stages: gpugrad selftest, pytest -m gpu (side by side: both only compare numbers), then python -m bench.gpu alone.
# All three run whatever the others find. Exit status: 0 all passed, 1 something did not, 3 there is no GPU.
# PYTHON takes another interpreter, TESTS other files than all with tests for a GPU; SELFTEST_OPTIONS, BENCH_OPTIONS and
# PYTEST_ADDOPTS go to the stages.
set -uo pipefail
exec </dev/null

case ${1:-} in
    -*) echo "usage: bench/gpu.sh [FOLDER]" >&2; exit 2 ;;
    '' | /*) ;;
    *) set -- "$PWD/$1" ;; # from where the user is
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

complain() { printf 'bench/gpu.sh: %s\n' "$*" >&2; }

need() {
    local absent
    absent=$("$python" - "$@" <<'EOF'
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))
EOF
    ) || { complain "cannot run $python"; exit 1; }
    if [[ -n $absent ]]; then
        complain "$python has no ${absent// /, }"
        exit 1
    fi
}
need numpy optree array_api_compat safetensors threadpoolctl tqdm
card=$("$python" - <<'EOF'
import re, sys
from gpugrad import backend
if problem := backend.cuda_problem():
    print(f"bench/gpu.sh: {problem}", file=sys.stderr)
    sys.exit(3)
name = backend.cupy().cuda.runtime.getDeviceProperties(0)["name"].decode(errors="replace")
print(re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))
EOF
) || exit # 3: no GPU; 1: it cannot be asked
need pytest

folder=${1:-bench/results/gpu-$card-$(date +%F)}
mkdir -p "$folder" || exit 1
SECONDS=0

{
    printf 'date      %s\n' "$(date -u +%FT%TZ)"
    printf 'commit    %s\n' "$(git describe --always --dirty 2>/dev/null || echo unknown)"
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit \
        --format=csv 2>/dev/null || echo "nvidia-smi did not answer"
    "$python" -m gpugrad info
    "$python" - <<'EOF'
from importlib import metadata
for name in ("pytest", "torch", "jax", "triton"):
    try:
        print(f"{name:<13} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        print(f"{name:<13} not installed")
EOF
} >"$folder/env.txt" 2>&1
head -n 4 "$folder/env.txt"

# Seconds of the three stages; the first two run side by side.
limit_selftest=220 limit_tests=225 limit_bench=230

selftest() {
    # shellcheck disable=SC2086
    timeout "$limit_selftest" "$python" -m gpugrad selftest --device cuda --json "$folder/selftest.json" \
        ${SELFTEST_OPTIONS:-} >"$folder/selftest.txt" 2>&1
}

# The files with tests for a GPU that can be imported here: a test package may be missing where nothing can be installed.
files_with_gpu_tests() {
    "$python" - <<'EOF'
import ast, importlib.util, pathlib, re, sys

sys.path.insert(0, "tests")
here = {path.stem for path in pathlib.Path("tests").glob("*.py")} | {"cuda_proof"}
for path in sorted(pathlib.Path("tests").glob("test_*.py")):
    text = path.read_text(encoding="utf-8")
    if path.name == "test_gpu.py" or not re.search(r"mark\.gpu\b|\bdevice\b.*[,)]|every_device", text):
        continue
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    absent = sorted(name for name in names - here if importlib.util.find_spec(name) is None)
    if absent:
        print(f"left out {path}: needs {', '.join(absent)}", file=sys.stderr)
    else:
        print(path)
EOF
}

tests() {
    local status=0 files=() parallel=()
    local options=(-m gpu -q -p no:cacheprovider -W default -rfE --tb=short)
    export GPUGRAD_REQUIRE_GPU=1
    {
        # the self-test is a stage of its own
        # shellcheck disable=SC2086
        timeout "$limit_tests" "$python" -m pytest "${options[@]}" ${TESTS:-tests/test_gpu.py} \
            --deselect tests/test_gpu.py::test_selftest || status=$?
        [[ -n ${TESTS:-} ]] || mapfile -t files < <(files_with_gpu_tests)
        if "$python" -c 'import xdist' 2>/dev/null; then
            parallel=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
        fi
        local left=$((limit_tests - SECONDS)) more=0
        if [[ ${#files[@]} -gt 0 && $left -gt 0 ]]; then
            timeout "$left" "$python" -m pytest "${options[@]}" "${parallel[@]}" "${files[@]}" || more=$?
            [[ $more -eq 5 ]] && more=0 # none of them has a test for a GPU
        fi
        [[ $status -eq 0 ]] && status=$more
    } >"$folder/tests.txt" 2>&1
    return "$status"
}

bench() {
    # shellcheck disable=SC2086
    timeout "$limit_bench" "$python" -m bench.gpu --json "$folder/bench.json" ${BENCH_OPTIONS:-} \
        >"$folder/bench.txt" 2>&1
}

failed=0
tell() { # stage, status, log
    local text=passed
    case $2 in
        0) ;;
        124 | 137) text="UNFINISHED in its time" ;;
        *) text="FAILED, status $2" ;;
    esac
    [[ $2 -eq 0 ]] || failed=1
    printf '%-9s %s: %s\n' "$1" "$text" "$3"
}

selftest &
first=$!
tests &
second=$!
trap 'kill "$first" "$second" 2>/dev/null' EXIT
wait "$first"
status_selftest=$?
wait "$second"
status_tests=$?
trap - EXIT
status_bench=0
bench || status_bench=$?

tail -n 1 "$folder/selftest.txt"
tail -n 1 "$folder/tests.txt"
sed -n '/^targets/,$p' "$folder/bench.txt"
{
    tell selftest "$status_selftest" "$folder/selftest.txt"
    tell tests "$status_tests" "$folder/tests.txt"
    tell bench "$status_bench" "$folder/bench.txt"
    printf '%d s\n' "$SECONDS"
} >"$folder/summary.txt"
cat "$folder/summary.txt"
exit "$failed"
