# Functions that the launchers share; source this file.
# shellcheck shell=bash
# shellcheck disable=SC2034  # variables are read by the launchers

DRY_RUN=0
environment=() # of --env
arguments=()   # after --

# fail MESSAGE: prints one line that names the fault and the fix; exits with 2, as `vilam3` does on user errors.
fail() {
  printf '%s: error: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# say MESSAGE: prints progress on stderr; stdout belongs to the dry run.
say() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
}

# quoted WORD...: prints the words quoted for a shell.
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

# run COMMAND...: runs the command, or prints it in a dry run.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# parse_options NAMES ARGUMENT...: sets the variable of each --NAME=VALUE (- becomes _), DRY_RUN, `environment` and
# `arguments`. The launcher's function `positional` gets all other words.
parse_options() {
  local known=" $1 " option
  shift
  while [ $# -gt 0 ]; do
    option=${1%%=*}
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --env=*)
        [[ $1 =~ ^--env=[A-Za-z_][A-Za-z0-9_]*= ]] || fail "$1: must be KEY=VALUE"
        environment+=("${1#*=}")
        ;;
      --*=*)
        option=${option#--}
        [[ $known == *" $option "* ]] || fail "$1: no such option; see --help"
        printf -v "${option//-/_}" '%s' "${1#*=}"
        ;;
      --)
        shift
        arguments=("$@")
        return
        ;;
      *) positional "$1" ;;
    esac
    shift
  done
}

# need_program NAME: the program must be installed, except for a dry run.
need_program() {
  if [ "$DRY_RUN" != 1 ] && ! command -v "$1" >/dev/null; then
    fail "$1 is not installed or not on PATH; install it, or use --dry-run"
  fi
}

# need_number OPTION VALUE [MINIMUM]: the value must be an integer of at least MINIMUM (1).
need_number() {
  [[ $2 =~ ^(0|[1-9][0-9]*)$ && $2 -ge ${3:-1} ]] || fail "$1=$2: must be an integer of at least ${3:-1}"
}

# flag_value NAME: prints the value of the last --NAME=VALUE or --NAME VALUE in `arguments`, if any.
flag_value() {
  local value="" previous="" argument
  for argument in "${arguments[@]}"; do
    case $argument in
      "--$1="*) value=${argument#*=} ;;
      *) [ "$previous" = "--$1" ] && value=$argument ;;
    esac
    previous=$argument
  done
  printf '%s' "$value"
}

# need_config: the trainer's arguments must name a recipe.
need_config() {
  [ ${#arguments[@]} -gt 0 ] || fail "the trainer has no arguments; put them after --, such as -- --config=FILE:ARG --workdir=DIR"
  [ -n "$(flag_value config)" ] ||
    fail "--config=FILE[:ARG] is missing after --, for example --config=configs/stage4_expert.py:vila_m3_8b"
}

# Settings of the trainer that are paths.
PATH_FLAGS=(config.data.path config.data.annotations config.model.tokenizer config.init.everything
  config.init.vision_tower config.init.text_tower config.init.projector config.init.llm)

# check_paths CHECK NAME...: calls CHECK --NAME VALUE for each of these flags that `arguments` holds.
check_paths() {
  local check=$1 flag value
  for flag in "${@:2}"; do
    value=$(flag_value "$flag")
    [ -z "$value" ] || "$check" "--$flag" "$value"
  done
}
