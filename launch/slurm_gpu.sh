#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster; see `slurm_gpu.sh --help`.
set -euo pipefail
# shellcheck source=launch/slurm.sh
. "$(dirname "$0")/slurm.sh"

usage() {
  cat <<'TEXT'
usage: launch/slurm_gpu.sh --nodes=N --gpus-per-node=N --time=LIMIT [OPTIONS] -- TRAIN ARGUMENTS

Submits a batch job that trains on GPUs of a Slurm cluster. Before the time limit the trainer saves and the job is
requeued, until the run is finished. Submitting the same command again resumes the run.

options:
  --nodes=N --gpus-per-node=N
  --time=LIMIT                of one turn, such as 12:00:00; a run takes as many turns as it needs
  --processes=gpu|node        one process per GPU, or one per node (gpu)
  --cpus-per-process=N        CPU cores per process, used by the data loader (8)
  --partition=NAME --account=NAME --qos=NAME
  --job-name=NAME             also of the log, NAME-JOBID.log (vilam3)
  --python=PATH               Python of an environment with vilam3-jax and its extra `cuda`, on a shared disk (.venv/bin/python)
  --env=KEY=VALUE             environment of the trainer; repeatable
  --compile-cache=DIR         cache of compiled programs (WORKDIR/compile_cache)
  --stop-seconds=300          seconds before the limit at which the trainer is told to save
  --retries=20                how often to requeue after a crash
  --dry-run                   print the batch job without submitting it

TRAIN ARGUMENTS are those of `vilam3 train`; --workdir and data must be absolute paths on a disk that all nodes share, or
gs:// paths. Watch with squeue and the log. scancel --signal=TERM JOBID saves and requeues; scancel JOBID ends the job.

example:
  launch/slurm_gpu.sh --nodes=4 --gpus-per-node=8 --time=12:00:00 --partition=h100 -- \
    --config=configs/stage2a_align.py:vila_m3_8b --workdir=/shared/m3/stage2a --config.data.path=/shared/m3/data \
    --config.init.llm=/shared/m3/llm --config.model.tokenizer=/shared/m3/llm/tokenizer --config.mesh.data=1 --config.mesh.fsdp=-1
TEXT
}

gpus_per_node="" processes=gpu cpus_per_process=8 compile_cache="" job_name=vilam3 stop_seconds=300

check() {
  local workdir
  need_number --gpus-per-node "$gpus_per_node"
  need_number --cpus-per-process "$cpus_per_process"
  case $processes in
    gpu | node) ;;
    *) fail "--processes=$processes: must be gpu or node" ;;
  esac
  need_config
  workdir=$(flag_value workdir)
  need_shared --workdir "$workdir"
  compile_cache=${compile_cache:-${workdir%/}/compile_cache}
  need_shared --compile-cache "$compile_cache"
  check_paths need_shared "${PATH_FLAGS[@]}"
  check_slurm
}

# batch: prints the batch script.
batch() {
  local tasks=$gpus_per_node settings=("JAX_COMPILATION_CACHE_DIR=$compile_cache" "${environment[@]}")
  if [ "$processes" = node ]; then
    tasks=1
    # By default JAX assigns one GPU to each Slurm task.
    settings+=("JAX_LOCAL_DEVICE_IDS=$(seq --separator=, 0 $((gpus_per_node - 1)))")
  fi
  header --ntasks-per-node="$tasks" --gpus-per-node="$gpus_per_node" --cpus-per-task="$cpus_per_process" \
    --signal="TERM@$stop_seconds"
  cat <<'BODY'
# The signal of the time limit goes to the trainers only. TERM here is scancel or a preemption.
taken=0
trap 'taken=1' TERM

BODY
  exports "${settings[@]}"
  # Every task must see all GPUs of its node, unbound, because JAX selects one by the task's local index.
  # A trainer that ends must not kill those that are still saving.
  cat <<BODY

srun --kill-on-bad-exit=0 --wait=$((2 * stop_seconds)) --cpus-per-task=$cpus_per_process --gpu-bind=none \\
  $(quoted "$REPO/launch/run.sh" "$python" -m vilam3_jax.cli train "${arguments[@]}")
code=\$?
BODY
  requeue "the trainer" "\$code -eq 143" "told to save"
}

parse_options "$SLURM_OPTIONS processes cpus-per-process compile-cache" "$@"
check
submit batch
