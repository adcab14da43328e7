#!/usr/bin/env bash
# Trains with N processes on this machine, as N hosts would; on CPUs, collectives use gloo.
#
#   launch/local.sh 2 --config=configs/stage3_instruct.py:tiny --workdir=DIR --config.mesh.cpu_devices=4
#
# --dry-run prints the commands without running them. mesh.cpu_devices counts devices per process. SIGTERM and SIGINT
# are forwarded. If a process fails, the others are stopped and the script exits with its code.
set -euo pipefail
set -m # separate process groups, so that children get a SIGINT of the terminal only once, from this script

# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

words=()
for word in "$@"; do
    if [[ $word = --dry-run ]]; then DRY_RUN=1; else words+=("$word"); fi
done
set -- "${words[@]}"
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
count=$1
shift

python=${PYTHON:-python3}
train=("$python" -m vilam3_jax.train "$@")
if [[ ${DRY_RUN} = 1 ]]; then
    for ((number = 0; number < count; number++)); do
        run "${train[@]}" --coordinator_address=localhost:PORT --num_processes="$count" --process_id="$number"
    done
    exit 0
fi
"$python" -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' \
    vilam3_jax jax || fail "$python has no vilam3_jax or no jax; activate its environment, or set PYTHON"
grace=${GRACE_SECONDS:-150} # time for the others to exit; a process takes 100 s to notice that another died
address=localhost:$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

running=()
forward() {
    for pid in "${running[@]}"; do
        kill -s "$1" "$pid" 2>/dev/null || true
    done
}
trap 'forward TERM' TERM
trap 'forward INT' INT
trap 'forward KILL' EXIT

for ((number = 0; number < count; number++)); do
    "${train[@]}" \
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
        forward KILL
    fi
done
exit "$status"
