#!/bin/sh
# What `docker compose run gpu ...` starts: `bench` proves and measures the card, all else is a command of gpugrad.
set -eu
if [ "${1-}" = bench ]; then
    exec bash /source/bench/gpu.sh "/results/gpu-$(date +%F-%H%M%S)"
fi
exec gpugrad "$@"
