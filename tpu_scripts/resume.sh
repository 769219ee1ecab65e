#!/usr/bin/env bash
# usage: resume.sh [--dry-run] [--spot] [--queued] NAME ZONE TYPE RUNTIME
#
# After a preemption: deletes what is left of the slice, and creates it again as create.sh does; then setup.sh, send.sh
# and run.sh as at first, and a run goes on from the checkpoints that were fetched. A slice that is well is left alone.
source "$(dirname "$0")/common.sh"
begin '--spot --queued' "$@"
if [[ ${#words[@]} -lt 2 ]]; then refuse "TYPE and RUNTIME are to be given, as for create.sh"; fi
no_more 2

scripts=$(dirname "$0")
if [[ -n $dry ]]; then
    bash "$scripts/delete.sh" --dry-run "$name" "$zone"
else
    now=$(state)
    if gone "$now"; then
        echo "$name is $now"
        bash "$scripts/delete.sh" --yes "$name" "$zone"
    fi
fi
bash "$scripts/create.sh" "$@"
