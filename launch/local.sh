#!/usr/bin/env bash
# Trains with N processes on this machine, as N hosts would; collectives go through gloo on processors.
#
#   launch/local.sh 2 --config=configs/stage3_instruct.py:tiny --workdir=DIR --config.mesh.cpu_devices=4
#
# mesh.cpu_devices counts the devices of one process. SIGTERM and SIGINT are passed on. If one process fails,
# the others end too, and so does this script with that process's code.
set -euo pipefail
set -m # children get their own process groups: a SIGINT of the terminal reaches them once, from here

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
count=$1
shift

python=${PYTHON:-python3}
grace=${GRACE_SECONDS:-150} # how long the others have to end by themselves: one that waits for a dead one takes 100
address=localhost:$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

running=()
pass_on() {
    for pid in "${running[@]}"; do
        kill -s "$1" "$pid" 2>/dev/null || true
    done
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on KILL' EXIT

for ((number = 0; number < count; number++)); do
    "$python" -m vilam3_jax.train "$@" \
        --coordinator_address="$address" --num_processes="$count" --process_id="$number" &
    running+=($!)
done

status=0
deadline=
while ((${#running[@]})); do
    sleep 0.2
    still=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            still+=("$pid")
        elif wait "$pid"; then
            :
        elif code=$? && ((status == 0)); then
            status=$code
            deadline=$((SECONDS + grace))
        fi
    done
    running=("${still[@]}")
    if [[ -n $deadline ]] && ((SECONDS > deadline)); then
        pass_on KILL
    fi
done
exit "$status"
