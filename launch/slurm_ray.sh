#!/usr/bin/env bash
# Annotates on a Slurm cluster with Ray; `slurm_ray.sh --help` explains.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/slurm_ray.sh --nodes=N --time=LIMIT [OPTIONS] -- ANNOTATE ARGUMENTS

Submits a batch job that starts a Ray cluster on its nodes and runs an expert over a data set on it. Shortly before its
time limit the job stops and queues again, until all is annotated. The same command again goes on where it was.

options:
  --nodes=N
  --gpus-per-node=N           (0)
  --cpus-per-node=N           CPU cores of a node (8)
  --time=LIMIT                of one turn, such as 12:00:00; the run takes as many turns as it needs
  --partition=NAME --account=NAME --qos=NAME
  --job-name=NAME             also of its log, NAME-JOBID.log (vilam3-annotate)
  --python=PATH               python of the environment with vilam3-experts and its extra `ray`, on a shared disk (.venv/bin/python)
  --env=KEY=VALUE             environment of the run; may be repeated
  --stop-seconds=120          how long before the limit the run is told to stop
  --retries=20                how often to queue again after a crash
  --dry-run                   print the batch job, and submit nothing

ANNOTATE ARGUMENTS are those of `vilam3-experts annotate`; data, weights and store must be on a disk that all nodes share
(absolute paths), or in gs://. Watch with squeue and the log. scancel JOBID ends.

example:
  launch/slurm_ray.sh --nodes=4 --gpus-per-node=8 --cpus-per-node=64 --time=12:00:00 --partition=h100 -- \
    --expert=VISTA3D --data=/shared/ct --weights=/shared/vista3d --out=/shared/annotations
TEXT
}

REPO=$(cd "$(dirname "$0")/.." && pwd)
nodes="" gpus=0 cpus=8 limit="" partition="" account="" qos="" job_name=vilam3-annotate
python="$REPO/.venv/bin/python" environment=() stop_seconds=120 retries=20
DRY_RUN=0
annotate=()

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --nodes=*) nodes=${1#*=} ;;
      --gpus-per-node=*) gpus=${1#*=} ;;
      --cpus-per-node=*) cpus=${1#*=} ;;
      --time=*) limit=${1#*=} ;;
      --partition=*) partition=${1#*=} ;;
      --account=*) account=${1#*=} ;;
      --qos=*) qos=${1#*=} ;;
      --job-name=*) job_name=${1#*=} ;;
      --python=*) python=${1#*=} ;;
      --env=*) environment+=("${1#*=}") ;;
      --stop-seconds=*) stop_seconds=${1#*=} ;;
      --retries=*) retries=${1#*=} ;;
      --dry-run) DRY_RUN=1 ;;
      --)
        shift
        annotate=("$@")
        return
        ;;
      *) fail "$1: no such option, or its =VALUE is missing; arguments of annotate come after --; see --help" ;;
    esac
    shift
  done
}

check() {
  local place value setting option
  need_number --nodes "$nodes"
  need_number --cpus-per-node "$cpus"
  need_number --stop-seconds "$stop_seconds"
  [[ $gpus =~ ^[0-9]+$ ]] || fail "--gpus-per-node=$gpus: must be a whole number"
  [[ $retries =~ ^[0-9]+$ ]] || fail "--retries=$retries: must be a whole number"
  need_limit "$limit" "$stop_seconds"
  for option in partition account qos job_name; do
    need_name "$option" "${!option}"
  done
  [ -n "$job_name" ] || fail "--job-name= is empty; leave it out or give a name"
  [ -n "$(flag_value expert "${annotate[@]}")" ] || fail "--expert=NAME is missing after --; see \`vilam3-experts list\`"
  for place in data out weights audit; do
    value=$(flag_value "$place" "${annotate[@]}")
    [[ -z $value && $place != data && $place != out ]] || need_shared "--$place" "$value"
  done
  for option in engine address; do
    [ -z "$(flag_value "$option" "${annotate[@]}")" ] || fail "--$option: leave it out after --; it is the launcher's to say"
  done
  for setting in "${environment[@]}"; do
    [[ $setting =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env=$setting: must be KEY=VALUE"
  done
  if [ "$DRY_RUN" != 1 ]; then
    need_program sbatch
    [ -x "$python" ] || fail "--python=$python: no such program; install into a virtual environment on a shared disk first"
  fi
}

# batch: the job's script, on standard output.
batch() {
  local setting
  cat <<HEAD
#!/bin/bash
#SBATCH --job-name=$job_name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$limit
#SBATCH --signal=B:USR1@$stop_seconds
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=$job_name-%j.log
HEAD
  [ "$gpus" = 0 ] || printf '#SBATCH --gpus-per-node=%s\n' "$gpus"
  [ -z "$partition" ] || printf '#SBATCH --partition=%s\n' "$partition"
  [ -z "$account" ] || printf '#SBATCH --account=%s\n' "$account"
  [ -z "$qos" ] || printf '#SBATCH --qos=%s\n' "$qos"
  cat <<'BODY'
set -uo pipefail
umask 077
# USR1 is the time limit. TERM is scancel or a preemption.
told=0 taken=0 driver=""
trap 'told=1; [ -z "$driver" ] || kill -TERM "$driver"' USR1
trap 'taken=1; [ -z "$driver" ] || kill -TERM "$driver"' TERM

BODY
  for setting in "${environment[@]}"; do printf 'export %s\n' "$(quoted "$setting")"; done
  # The head has no room for workers: those of its machine are in a node of their own, like all others.
  cat <<BODY
# Whoever shares the network may not join the cluster.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=\$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN
# Jobs on one machine must not meet.
port=\$((20000 + SLURM_JOB_ID % 20000))
scratch="/tmp/vilam3-ray-\$SLURM_JOB_ID"
address="\$SLURMD_NODENAME:\$port"
ray=($(quoted "$python") -m ray.scripts.scripts)

"\${ray[@]}" start --head --block --port="\$port" --num-cpus=0 --num-gpus=0 --temp-dir="\$scratch" \\
  --include-dashboard=false --disable-usage-stats &
head=\$!
srun --kill-on-bad-exit=0 --cpus-per-task=$cpus --gpu-bind=none \\
  "\${ray[@]}" start --block --address="\$address" --num-cpus=$cpus --num-gpus=$gpus --disable-usage-stats &
nodes=\$!
BODY
  cat <<BODY
$(quoted "$python" -m vilam3_experts annotate "${annotate[@]}" --engine=ray) --address="\$address" &
driver=\$!
wait "\$driver"
code=\$?
while kill -0 "\$driver" 2>/dev/null; do # a signal ends \`wait\`, not the driver, which is stopping
  wait "\$driver"
  code=\$?
done
if [ \$((told + taken)) -gt 0 ]; then
  # The status of a driver that ended while the signal was handled is still to be fetched.
  wait "\$driver" 2>/dev/null
  late=\$?
  [ "\$late" -ne 127 ] && code=\$late
fi
kill -TERM "\$nodes" "\$head" 2>/dev/null
wait "\$nodes" "\$head"
rm -rf "\$scratch"
BODY
  requeue annotate "\$told -eq 1" "told to stop"
}

parse "$@"
check
submit batch
