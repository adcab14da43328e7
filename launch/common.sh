# Shared by the launchers; sourced, not run.
# shellcheck shell=bash

# fail MESSAGE: one line that names what is wrong and the fix; exit code 2, as `vilam3` has for users' errors.
fail() {
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# say MESSAGE: progress, kept off standard output, which belongs to the dry run.
say() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
}

# quoted WORD...: the words as a shell would need them typed.
quoted() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      line+=" $word"
    else
      line+=" ${word@Q}"
    fi
  done
  printf '%s' "${line# }"
}

# run COMMAND...: runs it; a dry run (DRY_RUN=1) prints it instead.
run() {
  if [ "${DRY_RUN:-0}" = 1 ]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# need_program NAME: a dry run needs none.
need_program() {
  if [ "${DRY_RUN:-0}" != 1 ] && ! command -v "$1" >/dev/null; then
    fail "$1 is not installed or not on PATH; install it, or look first with --dry-run"
  fi
}

# need_number OPTION VALUE: a whole number of at least 1.
need_number() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1=$2: must be a whole number of at least 1"
}

# flag_value NAME ARGUMENT...: value of the last --NAME=VALUE or --NAME VALUE among the arguments, or nothing.
flag_value() {
  local name=$1 value="" previous="" argument
  shift
  for argument in "$@"; do
    case $argument in
      "--$name="*) value=${argument#*=} ;;
      *) [ "$previous" = "--$name" ] && value=$argument ;;
    esac
    previous=$argument
  done
  printf '%s' "$value"
}

# need_config ARGUMENT...: the trainer's arguments must name a recipe.
need_config() {
  [ $# -gt 0 ] || fail "no arguments for the trainer; put them after --, such as -- --config=FILE:ARG --workdir=DIR"
  [ -n "$(flag_value config "$@")" ] ||
    fail "--config=FILE[:ARG] is missing after --, for example --config=configs/stage4_expert.py:vila_m3_8b"
}

# The trainer's settings that are paths.
PLACES=(config.data.path config.data.annotations config.model.tokenizer config.init.everything config.init.vision_tower
  config.init.text_tower config.init.projector config.init.llm)

# need_bucket ARGUMENT...: whatever the trainer reads or writes must be in a bucket.
need_bucket() {
  local place value workdir
  workdir=$(flag_value workdir "$@")
  [ -n "$workdir" ] || fail "--workdir=gs://BUCKET/FOLDER is missing after --; the run's checkpoints go there"
  [[ $workdir == gs://?* ]] ||
    fail "--workdir=$workdir: must be gs://BUCKET/FOLDER; no machine sees another's disk, and the disks go with the machines"
  for place in "${PLACES[@]}"; do
    value=$(flag_value "$place" "$@")
    [[ -z $value || $value == gs://?* ]] ||
      fail "--$place=$value: must be gs://BUCKET/FOLDER; the machines see nothing else of yours"
  done
}

# seconds LIMIT: of Slurm's MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]].
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

# need_shared KEY VALUE: a path that means the same on every node.
need_shared() {
  [[ $2 == /* || $2 == gs://?* ]] ||
    fail "$1=$2: must be an absolute path on a disk that all nodes share, or gs://BUCKET/FOLDER"
  [[ $2 != /tmp/* ]] || fail "$1=$2: every node has a /tmp of its own; use a shared disk or gs://BUCKET/FOLDER"
}

# need_limit LIMIT STOP_SECONDS: a time limit as Slurm has it, with time left to stop.
need_limit() {
  [[ $1 =~ ^([0-9]+-)?[0-9]+(:[0-5][0-9]){0,2}$ ]] ||
    fail "--time=$1: needs a time limit as Slurm has it, such as 12:00:00 or 2-00:00:00"
  [ "$(seconds "$1")" = 0 ] || [ "$(seconds "$1")" -gt "$2" ] || # 0: no limit
    fail "--time=$1: must be longer than the $2 seconds of --stop-seconds, which are for the end"
}

# need_name OPTION VALUE: a name as Slurm has it, or nothing.
need_name() {
  [[ $2 =~ ^[A-Za-z0-9_.,-]*$ ]] || fail "--${1/_/-}=$2: has characters that Slurm's names have not"
}

# requeue SUBJECT ASKED WORDS: the end of a batch script, on standard output; queues the job again by `code` and `taken`.
# Uses job_name and retries of the launcher.
#   SUBJECT: what the job runs. ASKED: the test that it was asked to stop. WORDS: what it was asked.
requeue() {
  # shellcheck disable=SC2154  # set by the launcher
  cat <<BODY

# Turns that reach the time limit are in Slurm's own count, so crashes are counted in a file beside the log.
crashes="$job_name-\$SLURM_JOB_ID.crashes"
if [ \$code -eq 0 ]; then
  rm -f "\$crashes"
  echo "finished"
elif [ \$code -eq 2 ]; then
  echo "$1 refused its arguments or data; queueing again cannot help"
elif [ \$taken -eq 1 ]; then
  echo "ended from outside; Slurm queues a preempted job again by itself"
elif [ $2 ]; then
  echo "$3; queueing again"
  scontrol requeue "\$SLURM_JOB_ID"
elif echo "\$code" >>"\$crashes" && [ "\$(wc -l <"\$crashes")" -le $retries ]; then
  echo "ended with code \$code; queueing again"
  scontrol requeue "\$SLURM_JOB_ID"
else
  echo "ended with code \$code; given up after $retries turns that crashed"
fi
exit "\$code"
BODY
}

# submit FUNCTION: hands the script that it prints to sbatch; a dry run shows it.
submit() {
  if [ "$DRY_RUN" = 1 ]; then
    printf "sbatch <<'BATCH'\n"
    "$1"
    printf 'BATCH\n'
  else
    "$1" | sbatch
  fi
}
