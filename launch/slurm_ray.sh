#!/usr/bin/env bash
# Annotates on a Slurm cluster with Ray; see `slurm_ray.sh --help`.
set -euo pipefail
# shellcheck source=launch/slurm.sh
. "$(dirname "$0")/slurm.sh"

usage() {
  cat <<'TEXT'
usage: launch/slurm_ray.sh --nodes=N --time=LIMIT [OPTIONS] -- ANNOTATE ARGUMENTS

Submits a batch job that starts a Ray cluster on its nodes and runs an expert over a dataset. Before the time limit the
job stops and is requeued, until everything is annotated. Submitting the same command again resumes the run.

options:
  --nodes=N
  --gpus-per-node=N           (0)
  --cpus-per-node=N           CPU cores per node (8)
  --time=LIMIT                of one turn, such as 12:00:00; a run takes as many turns as it needs
  --partition=NAME --account=NAME --qos=NAME
  --job-name=NAME             also of the log, NAME-JOBID.log (vilam3-annotate)
  --python=PATH               Python of an environment with vilam3-experts and its extra `ray`, on a shared disk (.venv/bin/python)
  --env=KEY=VALUE             environment of the run; repeatable
  --stop-seconds=120          seconds before the limit at which the run is told to stop
  --retries=20                how often to requeue after a crash
  --dry-run                   print the batch job without submitting it

ANNOTATE ARGUMENTS are those of `vilam3-experts annotate`; data, weights and store must be absolute paths on a disk that
all nodes share, or gs:// paths. Watch with squeue and the log. scancel JOBID ends the job.

example:
  launch/slurm_ray.sh --nodes=4 --gpus-per-node=8 --cpus-per-node=64 --time=12:00:00 --partition=h100 -- \
    --expert=VISTA3D --data=/shared/ct --weights=/shared/vista3d --out=/shared/annotations
TEXT
}

gpus_per_node=0 cpus_per_node=8 job_name=vilam3-annotate stop_seconds=120

check() {
  local option
  need_number --cpus-per-node "$cpus_per_node"
  need_number --gpus-per-node "$gpus_per_node" 0
  [ -n "$(flag_value expert)" ] || fail "--expert=NAME is missing after --; see \`vilam3-experts list\`"
  need_shared --data "$(flag_value data)"
  need_shared --out "$(flag_value out)"
  check_paths need_shared weights audit
  for option in engine address; do
    [ -z "$(flag_value "$option")" ] || fail "--$option: omit it after --; the launcher sets it"
  done
  check_slurm
}

# batch: prints the batch script.
batch() {
  local gpus=()
  [ "$gpus_per_node" = 0 ] || gpus=(--gpus-per-node="$gpus_per_node")
  header --ntasks-per-node=1 --cpus-per-task="$cpus_per_node" "${gpus[@]}" --signal="B:USR1@$stop_seconds" --no-kill
  cat <<'BODY'
umask 077
# USR1 signals the time limit; TERM is scancel or a preemption.
told=0 taken=0 driver=""
trap 'told=1; [ -z "$driver" ] || kill -TERM "$driver"' USR1
trap 'taken=1; [ -z "$driver" ] || kill -TERM "$driver"' TERM

BODY
  exports "${environment[@]}"
  # The head node runs no workers; those on its machine belong to a second Ray node, as on every other machine.
  cat <<BODY
# The token keeps other users of the network out of the cluster.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=\$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN
# Jobs on one machine need different ports.
port=\$((20000 + SLURM_JOB_ID % 20000))
scratch="/tmp/vilam3-ray-\$SLURM_JOB_ID"
address="\$SLURMD_NODENAME:\$port"
ray=($(quoted "$python") -m ray.scripts.scripts)

"\${ray[@]}" start --head --block --port="\$port" --num-cpus=0 --num-gpus=0 --temp-dir="\$scratch" \\
  --include-dashboard=false --disable-usage-stats &
head=\$!
srun --kill-on-bad-exit=0 --cpus-per-task=$cpus_per_node --gpu-bind=none \\
  "\${ray[@]}" start --block --address="\$address" --num-cpus=$cpus_per_node --num-gpus=$gpus_per_node --disable-usage-stats &
nodes=\$!
$(quoted "$python" -m vilam3_experts annotate "${arguments[@]}" --engine=ray) --address="\$address" &
driver=\$!
wait "\$driver"
code=\$?
while kill -0 "\$driver" 2>/dev/null; do # a signal interrupts \`wait\`, not the driver, which is still stopping
  wait "\$driver"
  code=\$?
done
if [ \$((told + taken)) -gt 0 ]; then
  # If the driver ended while the signal was handled, its status has not been collected yet.
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

parse_options "$SLURM_OPTIONS cpus-per-node" "$@"
check
submit batch
