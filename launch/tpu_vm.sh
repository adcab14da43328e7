#!/usr/bin/env bash
# Trains on Cloud TPU VMs through queued resources; see `tpu_vm.sh --help`.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm.sh COMMAND --name=NAME --project=PROJECT --zone=ZONE [OPTIONS] [-- TRAIN ARGUMENTS]

Trains on Cloud TPU VMs (v4, v5e, v5p, v6e) through queued resources. For TPU7x use launch/gke.py.

commands:
  up       create, wait, train and attach; recreate and resume after a preemption; delete at the end
  create   request the machines; they are billed once they are ACTIVE
  wait     wait until they are ACTIVE
  train    start the trainer on every worker and return; does nothing if it already runs
  attach   wait for the trainer; exit code 0: finished, 143: interrupted, 2: error in the command line or data
  status   show the state of the machines and the trainer
  logs     follow the trainer's output on one worker
  stop     send SIGTERM to the trainer on every worker, which saves and exits; the machines stay and are billed
  delete   release the machines

options:
  --name=NAME                 name of the queued resource and of its nodes
  --project=PROJECT --zone=ZONE
  --accelerator-type=TYPE     create, up: v5litepod-256, v6e-256 (chips), v5p-128, v4-64 (cores, two per chip)
  --slices=N                  create, up, train: slices connected by the data-centre network (1)
  --runtime-version=VERSION   create, up: software of the machines (by type)
  --spot | --reserved         create, up: preemptible capacity, or that of a reservation (on demand)
  --valid-until-duration=6h   create, up: give up if no machines are available by then
  --service-account=EMAIL     create, up: account of the machines (project's default)
  --image=IMAGE               train, up: image of launch/docker/Dockerfile.trainer, with its tag or digest
  --compile-cache=gs://...    train, up: cache of compiled programs (WORKDIR/compile_cache)
  --env=KEY=VALUE             train, up: environment of the trainer; repeatable
  --shm-size=32g              train, up: shared memory of the container
  --stop-seconds=300          train, stop, up: time to save after SIGTERM
  --retries=20                up: restarts after crashes and preemptions
  --poll-seconds=60           wait, up: polling interval
  --keep                      up: keep the machines, and pay for them, at the end
  --node=0 --worker=0         logs: which worker
  --dry-run                   print the commands without running them

TRAIN ARGUMENTS are those of `vilam3 train`; --workdir and data must be gs:// paths. The same command again resumes.

example:
  launch/tpu_vm.sh up --name=m3 --project=my-project --zone=us-east5-a --accelerator-type=v5p-128 --spot \
    --image=us-east5-docker.pkg.dev/my-project/vilam3/trainer:1 -- \
    --config=configs/stage2a_align.py:vila_m3_8b --workdir=gs://my-bucket/stage2a --config.data.path=gs://my-bucket/data \
    --config.init.llm=gs://my-bucket/llm --config.model.tokenizer=gs://my-bucket/llm/tokenizer
TEXT
}

CONTAINER=vilam3
COMMANDS="up, create, wait, train, attach, status, logs, stop, delete"
QUEUED=(gcloud compute tpus queued-resources)
OPTIONS="name project zone accelerator-type slices runtime-version valid-until-duration service-account image
 compile-cache shm-size stop-seconds retries poll-seconds node worker"
command="" name="" project="" zone="" accelerator_type="" slices=1 runtime_version="" tier="" valid_until_duration=""
service_account="" image="" compile_cache="" shm_size=32g stop_seconds=300 retries=20 poll_seconds=60 keep=0 node=0
worker=0

# positional WORD: a flag without a value, or the command.
positional() {
  case $1 in
    --spot | --reserved)
      [ -z "$tier" ] || [ "$tier" = "$1" ] || fail "--spot and --reserved exclude each other; give one"
      tier=$1
      ;;
    --keep) keep=1 ;;
    -*) fail "$1: no such option, or its =VALUE is missing; see --help" ;;
    *)
      [ -z "$command" ] || fail "$1: a second command after $command; put the trainer's arguments after --"
      command=$1
      ;;
  esac
}

# check_accelerator: sets `chips`, the size of a slice, and `runtime_version`.
check_accelerator() {
  local family size per_chip default
  [ -n "$accelerator_type" ] || fail "--accelerator-type is missing, for example --accelerator-type=v5p-128"
  case $accelerator_type in
    v5litepod-*) family=v5litepod per_chip=1 default=v2-alpha-tpuv5-lite ;;
    v5p-*) family=v5p per_chip=2 default=v2-alpha-tpuv5 ;;
    v6e-*) family=v6e per_chip=1 default=v2-alpha-tpuv6e ;;
    v4-*) family=v4 per_chip=2 default=tpu-ubuntu2204-base ;;
    v5e-*) fail "--accelerator-type=$accelerator_type: TPU VMs call it v5litepod-${accelerator_type#v5e-}" ;;
    tpu7x*) fail "--accelerator-type=$accelerator_type: TPU7x is rented through GKE only; use launch/gke.py" ;;
    *) fail "--accelerator-type=$accelerator_type: v5litepod-N, v6e-N (N chips), v5p-N or v4-N (N cores)" ;;
  esac
  size=${accelerator_type#"$family"-}
  [[ $size =~ ^[1-9][0-9]*$ ]] || fail "--accelerator-type=$accelerator_type: the size must be a number, such as $family-128"
  if [ "$per_chip" = 1 ]; then
    [[ $size =~ ^(1|4|8|16|32|64|128|256)$ ]] ||
      fail "--accelerator-type=$accelerator_type: $family has 1, 4, 8, 16, 32, 64, 128 or 256 chips"
  else
    [[ $size =~ ^(8|16|32|64)$ ]] || [ $((size % 128)) = 0 ] ||
      fail "--accelerator-type=$accelerator_type: $family counts cores, two a chip: 8, 16, 32, 64 or a multiple of 128"
  fi
  chips=$((size / per_chip))
  runtime_version=${runtime_version:-$default}
}

# need_bucket KEY VALUE: the path must be in a bucket.
need_bucket() {
  [[ $2 == gs://?* ]] || fail "$1=$2: must be gs://BUCKET/FOLDER; the machines cannot read other paths"
}

check() {
  local workdir
  [ -n "$command" ] || fail "no command; choose one of $COMMANDS"
  [[ ", $COMMANDS," == *", $command,"* ]] || fail "$command: no such command; choose one of $COMMANDS"
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=$name: needs at most 40 lower-case letters, digits and -, starting with a letter"
  [[ $project =~ ^[a-z][-a-z0-9:.]{4,}[a-z0-9]$ ]] || fail "--project=$project: needs the ID of a Google Cloud project"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$zone: needs a zone, such as us-east5-a"
  need_number --slices "$slices"
  need_number --stop-seconds "$stop_seconds"
  need_number --poll-seconds "$poll_seconds"
  need_number --retries "$retries" 0
  [[ $shm_size =~ ^[1-9][0-9]*[kmg]$ ]] || fail "--shm-size=$shm_size: must be like 32g"
  case $command in up | create) check_accelerator ;; esac
  case $command in
    up | train)
      [[ $image =~ ^[a-z0-9][^[:space:]]*(:[A-Za-z0-9_.-]+|@sha256:[0-9a-f]{64})$ ]] ||
        fail "--image=$image: needs an image with its tag or digest, such as us-east5-docker.pkg.dev/PROJECT/vilam3/trainer:1"
      need_config
      workdir=$(flag_value workdir)
      [ -n "$workdir" ] || fail "--workdir=gs://BUCKET/FOLDER is missing after --; checkpoints are written there"
      check_paths need_bucket workdir "${PATH_FLAGS[@]}"
      compile_cache=${compile_cache:-${workdir%/}/compile_cache}
      need_bucket --compile-cache "$compile_cache"
      ;;
    *) [ ${#arguments[@]} = 0 ] || fail "$command takes no arguments after --; only train and up do" ;;
  esac
  need_program gcloud
}

# on_workers NODE WORKER COMMAND: runs the command there; exits with the code of the first worker that failed.
on_workers() {
  run "${QUEUED[@]}" ssh "$name" --project="$project" --zone="$zone" --node="$1" --worker="$2" \
    --batch-size=all --quiet --command="$3"
}

# state: prints the state of the queued resource; NONE if it does not exist, UNKNOWN if Google Cloud does not answer.
state() {
  local answer errors # kept apart, because gcloud prints warnings even if it succeeds
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
  local flags=(--accelerator-type="$accelerator_type" --runtime-version="$runtime_version")
  if [ "$slices" = 1 ]; then
    flags+=(--node-id="$name")
  else
    flags+=(--node-count="$slices" --node-prefix="$name")
  fi
  [ -z "$tier" ] || flags+=("$tier")
  [ -z "$valid_until_duration" ] || flags+=(--valid-until-duration="$valid_until_duration")
  [ -z "$service_account" ] || flags+=(--service-account="$service_account")
  say "$((chips * slices)) chips, billed from ACTIVE until \`delete\`; \`vilam3 plan\` estimates time and cost"
  run "${QUEUED[@]}" create "$name" --project="$project" --zone="$zone" "${flags[@]}"
}

delete() {
  run "${QUEUED[@]}" delete "$name" --project="$project" --zone="$zone" --force --quiet
}

await() {
  local now last=""
  if [ "$DRY_RUN" = 1 ]; then
    printf '# every %s s, until it prints ACTIVE:\n' "$poll_seconds"
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
    --env="JAX_COMPILATION_CACHE_DIR=$compile_cache")
  # With --distributed, JAX finds the other hosts through the metadata server.
  local trainer=("$image" vilam3 train --distributed "${arguments[@]}") setting registry command_line run_id script
  # Some projects have a firewall between slices that blocks JAX's default port for its coordinator.
  [ "$slices" = 1 ] || docker+=(--env=JAX_COORDINATOR_PORT=8476)
  for setting in "${environment[@]}"; do docker+=(--env="$setting"); done
  command_line=$(quoted "${docker[@]}" "${trainer[@]}")
  run_id=$(printf '%s' "$command_line" | cksum | cut -d' ' -f1)
  docker+=(--label="vilam3.run=$run_id" "${trainer[@]}")

  script="set -e; "
  # A trainer with the same arguments keeps running; one with others is not stopped.
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

# attach: waits for the trainer and returns its exit code; 2 (refused arguments or data) if any worker reports it.
attach() {
  local output code=0
  # If Docker fails without printing a code, the trainer has not ended.
  output=$(on_workers all all "code=\$(sudo docker wait $CONTAINER) && [ -n \"\$code\" ] || exit 1; echo \"trainer ended with \$code\"; exit \$code") || code=$?
  printf '%s\n' "$output"
  ! grep -q '^trainer ended with 2$' <<<"$output" || code=2
  return "$code"
}

# finish CODE: ends `up`.
finish() {
  if [ "$keep" = 1 ]; then
    say "$name keeps running and is billed until: launch/tpu_vm.sh delete --name=$name --project=$project --zone=$zone"
  else
    delete
  fi
  exit "$1"
}

# ready: makes the machines ACTIVE, whatever their state; fails if that takes another attempt.
ready() {
  case $(state) in
    UNKNOWN | DELETING) return 1 ;;
    NONE) ;;
    FAILED | SUSPENDING | SUSPENDED)
      say "$name was preempted; requesting it again"
      delete || return 1
      ;;
    *)
      await
      return
      ;;
  esac
  create || fail "$name could not be requested; see the error of gcloud above"
  await && return
  if [ "$(state)" = FAILED ]; then
    say "no machines available; \`status\` shows why"
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
    printf '# after a preemption or crash: repeat, at most %s times; then\n' "$retries"
    [ "$keep" = 1 ] || delete
    return
  fi
  trap 'say "detached; training continues and $name is billed; repeat the command to attach, or use delete"; exit 130' INT
  for ((attempt = 0; attempt <= retries; attempt++)); do
    if [ "$attempt" -gt 0 ]; then
      say "attempt $((attempt + 1)) of $((retries + 1))"
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
        say "the trainer refused its arguments or data (see above, or \`logs\`); not restarted"
        finish 2
        ;;
      143) say "interrupted after saving; will resume" ;;
      *) say "exited with code $code" ;;
    esac
  done
  say "giving up after $((retries + 1)) attempts"
  finish 1
}

parse_options "${OPTIONS//$'\n'/}" "$@"
check
case $command in
  up) up ;;
  create) create ;;
  wait) await || fail "$name will not become ACTIVE; \`status\` shows why; \`delete\` and \`create\` request it again" ;;
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
