#!/bin/bash
# Two processes of four simulated devices each train on a mesh of 2 x 2 x 2; one of them is told to
# stop, both stop after the same step; then one process of eight devices, on a mesh of 8 x 1 x 1,
# takes the run to its end:
#
#     experiments/launch/laptop.sh runs/laptop [--config.<key>=<value> ...]
set -euo pipefail
workdir=${1:?"usage: $0 WORKDIR [--config.<key>=<value> ...]"}
shift
if [ -e "$workdir" ]; then
    echo "error: $workdir is there already; this recipe takes a new folder" >&2
    exit 2
fi
python=${PYTHON:-python}
export JAX_PLATFORMS=cpu
command=("$python" -m pretraining.train --config=configs/masked_lm.py:tiny --workdir="$workdir"
    --config.train.steps=100 --config.log.every=1 --config.model.heads=2 "$@")

echo "--- two processes, data 2 x fsdp 2 x tensor 2"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
processes=()
trap 'kill "${processes[@]}" 2>/dev/null || true' EXIT
for process in 0 1; do
    XLA_FLAGS=--xla_force_host_platform_device_count=4 "${command[@]}" \
        --config.mesh.fsdp=2 --config.mesh.tensor=2 \
        --coordinator="127.0.0.1:$port" --process_count=2 --process_index=$process &
    processes+=($!)
done
until grep -qs '^{"step": 20,' "$workdir/metrics.jsonl"; do
    for process in "${processes[@]}"; do
        kill -0 "$process" # ends this script if that one has ended
    done
    sleep 0.1
done
kill -TERM "${processes[1]}" # process 0 receives no signal
for process in "${processes[@]}"; do
    status=0
    wait "$process" || status=$?
    if [ $status != 143 ]; then
        echo "a process ended with $status instead of 143" >&2
        exit 1
    fi
done

echo "--- one process, data 8"
XLA_FLAGS=--xla_force_host_platform_device_count=8 "${command[@]}"
