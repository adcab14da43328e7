#!/usr/bin/env bash
# Trains on Cloud TPU VMs through queued resources; `tpu_vm.sh --help` explains.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm.sh COMMAND --name=NAME --project=PROJECT --zone=ZONE [OPTIONS] [-- TRAIN ARGUMENTS]

Trains on Cloud TPU VMs (v4, v5e, v5p, v6e) through queued resources. TPU7x is rented through GKE: launch/gke.py.

commands:
  up       create, wait, train, and follow to the end; after a preemption create again and resume; delete at the end
  create   ask for the machines; they are billed from the moment they are ACTIVE
  wait     wait until they are ACTIVE
  train    start the trainer on every worker and return; a trainer that runs already is left alone
  attach   wait for the trainer; exit code 0 finished, 143 interrupted, 2 an error of the command line or data
  status   what state the machines and the trainer are in
  logs     follow the trainer's output on one worker
  stop     SIGTERM to the trainer on every worker: it saves and ends; the machines stay, and cost
  delete   give the machines back

options:
  --name=NAME                 name of the queued resource and of its nodes
  --project=PROJECT --zone=ZONE
  --accelerator-type=TYPE     create, up: v5litepod-256, v6e-256 (chips), v5p-128, v4-64 (cores, two a chip)
  --slices=N                  create, up, train: slices joined over the data-centre network (1)
  --runtime-version=VERSION   create, up: the machines' software (chosen by the type)
  --spot | --reserved         create, up: capacity that may be taken away, or your reservation's (default: on demand)
  --valid-until-duration=6h   create, up: give up when there are no machines by then
  --service-account=EMAIL     create, up: the account the machines act as (project's default)
  --image=IMAGE               train, up: image of launch/docker/Dockerfile.trainer, with its tag or digest
  --compile-cache=gs://...    train, up: where compiled programs are kept (WORKDIR/compile_cache)
  --env=KEY=VALUE             train, up: environment of the trainer; may be repeated
  --shm-size=32g              train, up: shared memory of the container
  --stop-seconds=300          train, stop, up: how long the trainer may save after SIGTERM
  --retries=20                up: how often to start again after a crash or preemption
  --poll-seconds=60           wait, up: pause between looks
  --keep                      up: leave the machines running (and billed) at the end
  --node=0 --worker=0         logs: whose output
  --dry-run                   print what would be done, and do nothing

TRAIN ARGUMENTS are those of `vilam3 train`; --workdir and data must be in gs://. The same command again resumes.

example:
  launch/tpu_vm.sh up --name=m3 --project=my-project --zone=us-east5-a --accelerator-type=v5p-128 --spot \
    --image=us-east5-docker.pkg.dev/my-project/vilam3/trainer:1 -- \
    --config=configs/stage2a_align.py:vila_m3_8b --workdir=gs://my-bucket/stage2a --config.data.path=gs://my-bucket/data \
    --config.init.llm=gs://my-bucket/llm --config.model.tokenizer=gs://my-bucket/llm/tokenizer
TEXT
}

CONTAINER=vilam3
QUEUED=(gcloud compute tpus queued-resources)
command="" name="" project="" zone="" accelerator="" slices=1 runtime="" tier="" valid_until="" account=""
image="" cache="" environment=() shm_size=32g stop_seconds=300 retries=20 poll_seconds=60 keep=0 node=0 worker=0
DRY_RUN=0
train=()

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --name=*) name=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --accelerator-type=*) accelerator=${1#*=} ;;
      --slices=*) slices=${1#*=} ;;
      --runtime-version=*) runtime=${1#*=} ;;
      --spot | --reserved)
        [ -z "$tier" ] || [ "$tier" = "$1" ] || fail "--spot and --reserved exclude each other; give one"
        tier=$1
        ;;
      --valid-until-duration=*) valid_until=${1#*=} ;;
      --service-account=*) account=${1#*=} ;;
      --image=*) image=${1#*=} ;;
      --compile-cache=*) cache=${1#*=} ;;
      --env=*) environment+=("${1#*=}") ;;
      --shm-size=*) shm_size=${1#*=} ;;
      --stop-seconds=*) stop_seconds=${1#*=} ;;
      --retries=*) retries=${1#*=} ;;
      --poll-seconds=*) poll_seconds=${1#*=} ;;
      --keep) keep=1 ;;
      --node=*) node=${1#*=} ;;
      --worker=*) worker=${1#*=} ;;
      --dry-run) DRY_RUN=1 ;;
      --)
        shift
        train=("$@")
        return
        ;;
      -*) fail "$1: no such option, or its =VALUE is missing; see --help" ;;
      *)
        [ -z "$command" ] || fail "$1: a second command after $command; arguments of the trainer come after --"
        command=$1
        ;;
    esac
    shift
  done
}

# check_accelerator: sets `chips` of a slice and the runtime version.
check_accelerator() {
  local family size per_chip known
  [ -n "$accelerator" ] || fail "--accelerator-type is missing, for example --accelerator-type=v5p-128"
  case $accelerator in
    v5litepod-*) family=v5litepod per_chip=1 known=v2-alpha-tpuv5-lite ;;
    v5p-*) family=v5p per_chip=2 known=v2-alpha-tpuv5 ;;
    v6e-*) family=v6e per_chip=1 known=v2-alpha-tpuv6e ;;
    v4-*) family=v4 per_chip=2 known=tpu-ubuntu2204-base ;;
    v5e-*) fail "--accelerator-type=$accelerator: TPU VMs call it v5litepod-${accelerator#v5e-}" ;;
    tpu7x*) fail "--accelerator-type=$accelerator: TPU7x is rented through GKE only; use launch/gke.py" ;;
    *) fail "--accelerator-type=$accelerator: v5litepod-N, v6e-N (N chips), v5p-N or v4-N (N cores)" ;;
  esac
  size=${accelerator#"$family"-}
  [[ $size =~ ^[1-9][0-9]*$ ]] || fail "--accelerator-type=$accelerator: the size must be a number, such as $family-128"
  if [ "$per_chip" = 1 ]; then
    [[ $size =~ ^(1|4|8|16|32|64|128|256)$ ]] ||
      fail "--accelerator-type=$accelerator: $family has 1, 4, 8, 16, 32, 64, 128 or 256 chips"
  else
    [[ $size =~ ^(8|16|32|64)$ ]] || [ $((size % 128)) = 0 ] ||
      fail "--accelerator-type=$accelerator: $family counts cores, two a chip: 8, 16, 32, 64 or a multiple of 128"
  fi
  chips=$((size / per_chip))
  runtime=${runtime:-$known}
}

check() {
  local setting folder
  case $command in
    "") fail "no command; one of up, create, wait, train, attach, status, logs, stop, delete" ;;
    up | create | wait | train | attach | status | logs | stop | delete) ;;
    *) fail "$command: no such command; one of up, create, wait, train, attach, status, logs, stop, delete" ;;
  esac
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=$name: needs small letters, digits and -, at most 40, beginning with a letter"
  [[ $project =~ ^[a-z][-a-z0-9:.]{4,}[a-z0-9]$ ]] || fail "--project=$project: needs the id of a Google Cloud project"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$zone: needs a zone, such as us-east5-a"
  need_number --slices "$slices"
  need_number --stop-seconds "$stop_seconds"
  need_number --poll-seconds "$poll_seconds"
  [[ $retries =~ ^[0-9]+$ ]] || fail "--retries=$retries: must be a whole number"
  [[ $shm_size =~ ^[1-9][0-9]*[kmg]$ ]] || fail "--shm-size=$shm_size: must be like 32g"
  case $command in up | create) check_accelerator ;; esac
  case $command in
    up | train)
      [[ $image =~ ^[a-z0-9][^[:space:]]*(:[A-Za-z0-9_.-]+|@sha256:[0-9a-f]{64})$ ]] ||
        fail "--image=$image: needs an image with its tag or digest, such as us-east5-docker.pkg.dev/PROJECT/vilam3/trainer:1"
      need_config "${train[@]}"
      need_bucket "${train[@]}"
      for setting in "${environment[@]}"; do
        [[ $setting =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env=$setting: must be KEY=VALUE"
      done
      folder=$(flag_value workdir "${train[@]}")
      cache=${cache:-${folder%/}/compile_cache}
      [[ $cache == gs://?* ]] || fail "--compile-cache=$cache: must be gs://BUCKET/FOLDER"
      ;;
    *) [ ${#train[@]} = 0 ] || fail "$command takes no arguments for the trainer; they belong to train and up" ;;
  esac
  need_program gcloud
}

# on_workers WHICH_NODE WHICH_WORKER COMMAND: exit code of the first worker that failed.
on_workers() {
  run "${QUEUED[@]}" ssh "$name" --project="$project" --zone="$zone" --node="$1" --worker="$2" \
    --batch-size=all --quiet --command="$3"
}

# state: what the queued resource is; NONE if there is none, UNKNOWN if Google Cloud gave no answer.
state() {
  local answer errors  # apart: gcloud warns of its own age where it answers, too
  errors=$(mktemp)
  if answer=$("${QUEUED[@]}" describe "$name" --project="$project" --zone="$zone" --format='value(state.state)' 2>"$errors"); then
    printf '%s' "$answer"
  elif grep -q NOT_FOUND "$errors"; then
    printf 'NONE'
  else
    cat "$errors" >&2
    printf 'UNKNOWN'
  fi
  rm -f "$errors"
}

create() {
  local flags=(--accelerator-type="$accelerator" --runtime-version="$runtime")
  if [ "$slices" = 1 ]; then
    flags+=(--node-id="$name")
  else
    flags+=(--node-count="$slices" --node-prefix="$name")
  fi
  [ -z "$tier" ] || flags+=("$tier")
  [ -z "$valid_until" ] || flags+=(--valid-until-duration="$valid_until")
  [ -z "$account" ] || flags+=(--service-account="$account")
  say "$((chips * slices)) chips, billed from ACTIVE until \`delete\`; \`vilam3 plan\` says how long and how dear a run is"
  run "${QUEUED[@]}" create "$name" --project="$project" --zone="$zone" "${flags[@]}"
}

delete() {
  run "${QUEUED[@]}" delete "$name" --project="$project" --zone="$zone" --force --quiet
}

await() {
  local now last=""
  if [ "$DRY_RUN" = 1 ]; then
    printf '# every %s s, until it says ACTIVE:\n' "$poll_seconds"
    run "${QUEUED[@]}" describe "$name" --project="$project" --zone="$zone" --format='value(state.state)'
    return
  fi
  while true; do
    now=$(state)
    [ "$now" = "$last" ] || say "$name is $now"
    last=$now
    case $now in
      ACTIVE) return ;;
      NONE) fail "$name does not exist in $zone; create it first" ;;
      FAILED | SUSPENDING | SUSPENDED) return 1 ;;
    esac
    sleep "$poll_seconds"
  done
}

start() {
  local docker=(sudo docker run --detach --name="$CONTAINER" --privileged --network=host --ulimit=memlock=-1
    --shm-size="$shm_size" --stop-timeout="$stop_seconds" --log-opt=max-size=1g
    --env="JAX_COMPILATION_CACHE_DIR=$cache")
  # Cloud TPU VMs tell JAX of each other through their metadata server; --distributed makes it ask.
  local trainer=("$image" vilam3 train --distributed "${train[@]}") setting registry command_line run_id script
  # JAX's own port for its coordinator is shut by the firewall that some projects get between slices.
  [ "$slices" = 1 ] || docker+=(--env=JAX_COORDINATOR_PORT=8476)
  for setting in "${environment[@]}"; do docker+=(--env="$setting"); done
  command_line=$(quoted "${docker[@]}" "${trainer[@]}")
  run_id=$(printf '%s' "$command_line" | cksum | cut -d' ' -f1)
  docker+=(--label="vilam3.run=$run_id" "${trainer[@]}")

  script="set -e; "
  # A container with these very arguments goes on; one with others is not ours to end.
  script+="case \"\$(sudo docker inspect --format='{{.State.Running}} {{index .Config.Labels \"vilam3.run\"}}' $CONTAINER 2>/dev/null)\" in "
  script+="'true $run_id') echo 'already training'; exit 0;; "
  script+="true*) echo 'another run is training here; stop it first' >&2; exit 3;; esac; "
  registry=${image%%/*}
  case $registry in
    *.pkg.dev | gcr.io | *.gcr.io) script+="sudo gcloud auth configure-docker $(quoted "$registry") --quiet; " ;;
  esac
  script+="sudo docker pull --quiet $(quoted "$image"); sudo docker rm --force $CONTAINER >/dev/null 2>&1 || true; "
  script+=$(quoted "${docker[@]}")
  on_workers all all "$script"
}

# attach: the exit code of the trainer; 2 (refused arguments or data) if one worker says so, whatever the others died of.
attach() {
  local said code=0
  # Docker may fail, and say nothing: that is no end of the trainer.
  said=$(on_workers all all "code=\$(sudo docker wait $CONTAINER) && [ -n \"\$code\" ] || exit 1; echo \"trainer ended with \$code\"; exit \$code") || code=$?
  printf '%s\n' "$said"
  ! grep -q '^trainer ended with 2$' <<<"$said" || code=2
  return "$code"
}

# finish CODE: the end of `up`.
finish() {
  if [ "$keep" = 1 ]; then
    say "$name is left running and is billed until: launch/tpu_vm.sh delete --name=$name --project=$project --zone=$zone"
  else
    delete
  fi
  exit "$1"
}

# ready: machines that are ACTIVE, whatever there was before; fails where there are none yet.
ready() {
  case $(state) in
    UNKNOWN | DELETING) return 1 ;;
    NONE) ;;
    FAILED | SUSPENDING | SUSPENDED)
      say "$name was taken away; asking again"
      delete || return 1
      ;;
    *)
      await
      return
      ;;
  esac
  create || fail "$name could not be asked for; gcloud says above why"
  await && return
  if [ "$(state)" = FAILED ]; then
    say "no machines: \`status\` would say why"
    finish 1
  fi
  return 1
}

up() {
  local attempt code
  if [ "$DRY_RUN" = 1 ]; then
    create
    await
    start
    attach
    printf '# after a preemption or crash: the same again, at most %s times; then\n' "$retries"
    [ "$keep" = 1 ] || delete
    return
  fi
  trap 'say "stopped looking; training goes on and $name is billed; the same command looks again, delete ends it"; exit 130' INT
  for ((attempt = 0; attempt <= retries; attempt++)); do
    if [ "$attempt" -gt 0 ]; then
      say "start $((attempt + 1)) of at most $((retries + 1))"
      sleep "$poll_seconds"
    fi
    code=0
    ready || continue
    start || code=$?
    [ "$code" != 3 ] || fail "another run is training on $name; stop it first"
    [ "$code" = 0 ] || continue
    attach || code=$?
    case $code in
      0)
        say "finished"
        finish 0
        ;;
      2)
        say "the trainer refused its arguments or data (see above, or \`logs\`); starting again cannot help"
        finish 2
        ;;
      143) say "interrupted; it saved and will resume" ;;
      *) say "ended with code $code" ;;
    esac
  done
  say "given up after $((retries + 1)) starts"
  finish 1
}

parse "$@"
check
case $command in
  up) up ;;
  create) create ;;
  wait) await || fail "$name will not become ACTIVE; \`status\` says why, \`delete\` and \`create\` ask again" ;;
  train) start ;;
  attach) attach ;;
  status)
    run "${QUEUED[@]}" describe "$name" --project="$project" --zone="$zone" --format='yaml(state)'
    on_workers all all "hostname; sudo docker ps --all --filter=name=$CONTAINER --format='{{.Status}}'"
    ;;
  logs) on_workers "$node" "$worker" "sudo docker logs --tail=200 --follow $CONTAINER" ;;
  stop) on_workers all all "sudo docker stop --time=$stop_seconds $CONTAINER" ;;
  delete) delete ;;
esac
