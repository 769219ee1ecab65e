#!/usr/bin/env bash
# usage: status.sh [--dry-run] NAME ZONE
#
# Two words: the slice's state, as gcloud has it or ABSENT; and, where it is READY, what became of run.sh's command on
# worker 0: none (nothing was started, or it is lost), running, or its exit status.
source "$(dirname "$0")/common.sh"
begin '' "$@"
no_more 0

asked="if [ -e run.exit ]; then cat run.exit
elif [ -e run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null; then echo running
else echo none; fi"
if [[ -n $dry ]]; then
    call compute tpus queued-resources describe "$name" --format="value(state.state)" --zone="$zone"
    vm describe --format="value(state)"
    on 0 "$asked"
    exit 0
fi
now=$(state)
if [[ $now == READY ]]; then
    ran=$(on 0 "$asked")
    echo "$now ${ran##*$'\n'}"
else
    echo "$now none"
fi
