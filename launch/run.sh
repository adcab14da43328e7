#!/usr/bin/env bash
# Runs a trainer so that whoever started it can tell a run that was interrupted from one that is finished.
#
#   launch/run.sh COMMAND [ARGUMENT ...]
#
# `vilam3 train` saves and exits with 0 on SIGTERM. A scheduler would take that for the end of the run and not
# start it again, so an interrupted command exits here with 143 (128 + SIGTERM). Every other exit code is the
# command's own: 0 finished, 2 the user's error (starting it again cannot help).
set -u

if [ $# -eq 0 ]; then
  echo "run.sh: error: no command; use launch/run.sh COMMAND [ARGUMENT ...]" >&2
  exit 2
fi

# The TPU's driver locks host memory for direct access. Where the limit cannot be raised (not root, no
# SYS_RESOURCE), whoever starts the container has to set it; off TPUs nobody needs it.
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
if [ "$interrupted" -eq 1 ]; then # the signal came before there was anyone to send it to
  kill -TERM "$child" 2>/dev/null
fi

wait "$child"
code=$?
while [ -n "$(jobs -pr)" ]; do # a signal ends `wait`, not the command, which is saving
  wait "$child"
  code=$?
done
if [ "$interrupted" -eq 1 ]; then
  # The status of a command that ended while the signal was handled is still to be fetched.
  wait "$child" 2>/dev/null
  late=$?
  [ "$late" -ne 127 ] && code=$late
  [ "$code" -eq 0 ] && code=143
fi
exit "$code"
