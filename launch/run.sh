#!/usr/bin/env bash
# Runs a command, with an exit code that distinguishes an interrupted run from a finished one.
#
#   launch/run.sh COMMAND [ARGUMENT ...]
#
# On SIGTERM `vilam3 train` saves and exits with 0, which schedulers take for the end of the run. A command that was
# interrupted exits with 143 (128 + SIGTERM) here; all other codes are the command's (0 finished, 2 user error).
set -u

if [ $# -eq 0 ]; then
  echo "run.sh: error: no command; use launch/run.sh COMMAND [ARGUMENT ...]" >&2
  exit 2
fi

# The TPU driver locks host memory. Without the right to raise the limit (root or SYS_RESOURCE), it must be set
# where the container is started.
ulimit -l 68719476736 2>/dev/null || true

interrupted=0
child=""
# shellcheck disable=SC2317,SC2329  # called by the trap
forward() {
  interrupted=1
  if [ -n "$child" ]; then
    kill -TERM "$child" 2>/dev/null
  fi
}
trap forward TERM INT

"$@" &
child=$!
if [ "$interrupted" -eq 1 ]; then # the signal came before the command started
  kill -TERM "$child" 2>/dev/null
fi

wait "$child"
code=$?
while [ -n "$(jobs -pr)" ]; do # a signal interrupts `wait`, not the command, which is still saving
  wait "$child"
  code=$?
done
if [ "$interrupted" -eq 1 ]; then
  # If the command ended while the signal was handled, its status has not been collected yet.
  wait "$child" 2>/dev/null
  late=$?
  [ "$late" -ne 127 ] && code=$late
  [ "$code" -eq 0 ] && code=143
fi
exit "$code"
