#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster; `slurm_gpu.sh --help` explains.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/slurm_gpu.sh --nodes=N --gpus-per-node=N --time=LIMIT [OPTIONS] -- TRAIN ARGUMENTS

Submits a batch job that trains on GPUs of a Slurm cluster. Shortly before its time limit, and when the job is taken
away, the trainer saves and the job queues again, until the run is finished. The same command again resumes.

options:
  --nodes=N --gpus-per-node=N
  --time=LIMIT                of one turn, such as 12:00:00; the run takes as many turns as it needs
  --processes=gpu|node        one process a GPU, which JAX finds out by itself, or one a node (gpu)
  --cpus-per-process=N        CPU cores of a process; the data loader needs some (8)
  --partition=NAME --account=NAME --qos=NAME
  --job-name=NAME             also of its log, NAME-JOBID.log (vilam3)
  --python=PATH               python of the environment with vilam3-jax and its extra `cuda`, on a shared disk (.venv/bin/python)
  --env=KEY=VALUE             environment of the trainer; may be repeated
  --compile-cache=DIR         where compiled programs are kept (WORKDIR/compile_cache)
  --stop-seconds=300          how long before the limit the trainer is told to save
  --retries=20                how often to queue again after a crash
  --dry-run                   print the batch job, and submit nothing

TRAIN ARGUMENTS are those of `vilam3 train`; --workdir and data must be on a disk that all nodes share (absolute paths), or
in gs://. Watch with squeue and the log. scancel --signal=TERM JOBID saves and queues again; scancel JOBID ends.

example:
  launch/slurm_gpu.sh --nodes=4 --gpus-per-node=8 --time=12:00:00 --partition=h100 -- \
    --config=configs/stage2a_align.py:vila_m3_8b --workdir=/shared/m3/stage2a --config.data.path=/shared/m3/data \
    --config.init.llm=/shared/m3/llm --config.model.tokenizer=/shared/m3/llm/tokenizer --config.mesh.data=1 --config.mesh.fsdp=-1
TEXT
}

REPO=$(cd "$(dirname "$0")/.." && pwd)
nodes="" gpus="" limit="" processes=gpu cpus=8 partition="" account="" qos="" job_name=vilam3
python="$REPO/.venv/bin/python" environment=() cache="" stop_seconds=300 retries=20
DRY_RUN=0
train=()

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --nodes=*) nodes=${1#*=} ;;
      --gpus-per-node=*) gpus=${1#*=} ;;
      --time=*) limit=${1#*=} ;;
      --processes=*) processes=${1#*=} ;;
      --cpus-per-process=*) cpus=${1#*=} ;;
      --partition=*) partition=${1#*=} ;;
      --account=*) account=${1#*=} ;;
      --qos=*) qos=${1#*=} ;;
      --job-name=*) job_name=${1#*=} ;;
      --python=*) python=${1#*=} ;;
      --env=*) environment+=("${1#*=}") ;;
      --compile-cache=*) cache=${1#*=} ;;
      --stop-seconds=*) stop_seconds=${1#*=} ;;
      --retries=*) retries=${1#*=} ;;
      --dry-run) DRY_RUN=1 ;;
      --)
        shift
        train=("$@")
        return
        ;;
      *) fail "$1: no such option, or its =VALUE is missing; arguments of the trainer come after --; see --help" ;;
    esac
    shift
  done
}

check() {
  local place value setting option
  need_number --nodes "$nodes"
  need_number --gpus-per-node "$gpus"
  need_number --cpus-per-process "$cpus"
  need_number --stop-seconds "$stop_seconds"
  [[ $retries =~ ^[0-9]+$ ]] || fail "--retries=$retries: must be a whole number"
  need_limit "$limit" "$stop_seconds"
  case $processes in
    gpu | node) ;;
    *) fail "--processes=$processes: must be gpu or node" ;;
  esac
  for option in partition account qos job_name; do
    need_name "$option" "${!option}"
  done
  [ -n "$job_name" ] || fail "--job-name= is empty; leave it out or give a name"
  need_config "${train[@]}"
  need_shared --workdir "$(flag_value workdir "${train[@]}")"
  folder=$(flag_value workdir "${train[@]}")
  cache=${cache:-${folder%/}/compile_cache}
  need_shared --compile-cache "$cache"
  for place in "${PLACES[@]}"; do
    value=$(flag_value "$place" "${train[@]}")
    [ -z "$value" ] || need_shared "--$place" "$value"
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
  local tasks=$gpus setting
  [ "$processes" = gpu ] || tasks=1
  cat <<HEAD
#!/bin/bash
#SBATCH --job-name=$job_name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$limit
#SBATCH --signal=TERM@$stop_seconds
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$job_name-%j.log
HEAD
  [ -z "$partition" ] || printf '#SBATCH --partition=%s\n' "$partition"
  [ -z "$account" ] || printf '#SBATCH --account=%s\n' "$account"
  [ -z "$qos" ] || printf '#SBATCH --qos=%s\n' "$qos"
  cat <<BODY
set -uo pipefail
# The time limit's signal goes to the trainers alone. One that comes here too is scancel or a preemption.
taken=0
trap 'taken=1' TERM

export $(quoted "JAX_COMPILATION_CACHE_DIR=$cache")
BODY
  for setting in "${environment[@]}"; do printf 'export %s\n' "$(quoted "$setting")"; done
  if [ "$processes" = node ]; then
    # JAX takes a Slurm task for the owner of one GPU unless it is told.
    printf 'export JAX_LOCAL_DEVICE_IDS=%s\n' "$(seq --separator=, 0 $((gpus - 1)))"
  fi
  # Every task sees all GPUs of its node: JAX picks by the task's number there, so they must not be bound.
  # The first to end must not take along those that still save.
  cat <<BODY

srun --kill-on-bad-exit=0 --wait=$((2 * stop_seconds)) --cpus-per-task=$cpus --gpu-bind=none \\
  $(quoted "$REPO/launch/run.sh" "$python" -m vilam3_jax.cli train "${train[@]}")
code=\$?
BODY
  requeue "the trainer" "\$code -eq 143" "told to save"
}

parse "$@"
check
submit batch
