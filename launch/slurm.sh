# Options and functions that the Slurm launchers share; source this file.
# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are read by the launchers
# shellcheck source=launch/common.sh
. "${BASH_SOURCE[0]%/*}/common.sh"

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SLURM_OPTIONS="nodes gpus-per-node time partition account qos job-name python stop-seconds retries"
nodes="" time="" partition="" account="" qos="" job_name="" python="$REPO/.venv/bin/python" stop_seconds="" retries=20

positional() {
  fail "$1: no such option, or its =VALUE is missing; put arguments of the command after --; see --help"
}

# seconds LIMIT: converts MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]].
seconds() {
  local days=0 clock=$1 parts
  [[ $clock != *-* ]] || days=${clock%%-*} clock=${clock#*-}
  IFS=: read -ra parts <<<"$clock"
  if [[ $1 == *-* || ${#parts[@]} = 3 ]]; then
    clock=$((10#${parts[0]} * 3600 + 10#${parts[1]:-0} * 60 + 10#${parts[2]:-0}))
  else
    clock=$((10#${parts[0]} * 60 + 10#${parts[1]:-0}))
  fi
  printf '%s' $((10#$days * 86400 + clock))
}

# need_shared KEY VALUE: the path must be valid on every node.
need_shared() {
  [[ $2 == /* || $2 == gs://?* ]] ||
    fail "$1=$2: must be an absolute path on a disk that all nodes share, or gs://BUCKET/FOLDER"
  [[ $2 != /tmp/* ]] || fail "$1=$2: /tmp is local to each node; use a shared disk or gs://BUCKET/FOLDER"
}

# check_slurm: checks the options that the launchers share.
check_slurm() {
  local option
  need_number --nodes "$nodes"
  need_number --stop-seconds "$stop_seconds"
  need_number --retries "$retries" 0
  [[ $time =~ ^([0-9]+-)?[0-9]+(:[0-5][0-9]){0,2}$ ]] ||
    fail "--time=$time: needs a Slurm time limit, such as 12:00:00 or 2-00:00:00"
  [ "$(seconds "$time")" = 0 ] || [ "$(seconds "$time")" -gt "$stop_seconds" ] || # 0: no limit
    fail "--time=$time: must be longer than the $stop_seconds seconds of --stop-seconds"
  for option in partition account qos job_name; do
    [[ ${!option} =~ ^[A-Za-z0-9_.,-]*$ ]] ||
      fail "--${option/_/-}=${!option}: contains characters that Slurm does not allow"
  done
  [ -n "$job_name" ] || fail "--job-name= is empty; omit it or give a name"
  need_program sbatch
  [ "$DRY_RUN" = 1 ] || [ -x "$python" ] ||
    fail "--python=$python: no such program; create a virtual environment on a shared disk first"
}

# header DIRECTIVE...: prints the start of the batch script.
header() {
  local option
  printf '#!/bin/bash\n'
  printf '#SBATCH %s\n' --job-name="$job_name" --nodes="$nodes" --time="$time" "$@" \
    --requeue --open-mode=append --output="$job_name-%j.log"
  for option in partition account qos; do
    [ -z "${!option}" ] || printf '#SBATCH --%s=%s\n' "$option" "${!option}"
  done
  printf 'set -uo pipefail\n'
}

# exports KEY=VALUE...: prints one export per setting.
exports() {
  local setting
  for setting in "$@"; do printf 'export %s\n' "$(quoted "$setting")"; done
}

# requeue SUBJECT TEST REQUEST: prints the end of the batch script, which requeues the job by `code` and `taken`.
#   SUBJECT: what the job runs. TEST: true if it was asked to stop. REQUEST: what it was asked to do.
requeue() {
  cat <<BODY

# Slurm's own count includes turns that reach the time limit, so crashes are counted in a file beside the log.
crashes="$job_name-\$SLURM_JOB_ID.crashes"
if [ \$code -eq 0 ]; then
  rm -f "\$crashes"
  echo "finished"
elif [ \$code -eq 2 ]; then
  echo "$1 refused its arguments or data; not requeued"
elif [ \$taken -eq 1 ]; then
  echo "terminated from outside; Slurm requeues preempted jobs"
elif [ $2 ]; then
  echo "$3; requeued"
  scontrol requeue "\$SLURM_JOB_ID"
elif echo "\$code" >>"\$crashes" && [ "\$(wc -l <"\$crashes")" -le $retries ]; then
  echo "exited with code \$code; requeued"
  scontrol requeue "\$SLURM_JOB_ID"
else
  echo "exited with code \$code; giving up after $retries retries"
fi
exit "\$code"
BODY
}

# submit FUNCTION: submits the batch script that FUNCTION prints; a dry run prints it.
submit() {
  if [ "$DRY_RUN" = 1 ]; then
    printf "sbatch <<'BATCH'\n"
    "$1"
    printf 'BATCH\n'
  else
    "$1" | sbatch
  fi
}
