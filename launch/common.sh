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
