#!/usr/bin/env bash
# usage: delete.sh [--dry-run] [--yes] NAME ZONE
#
# Deletes the slice, with its queued resource and its disks, once its name is typed (--yes: at once). Fetch what is
# needed before.
source "$(dirname "$0")/common.sh"
begin '--yes' "$@"
no_more 0

if [[ -n $dry ]]; then
    echo "# a queued resource:"
    queue delete --force --quiet
    echo "# any other:"
    vm delete --quiet
    exit 0
fi
queued=$(describe queued-resources state.state)
machine=$(describe tpu-vm state)
if [[ $queued == ABSENT && $machine == ABSENT ]]; then
    echo "there is no $name in $zone"
    exit 0
fi
if ! given --yes; then
    read -r -p "Type the name of the slice to delete it: " answer || answer=''
    if [[ $answer != "$name" ]]; then
        echo "not deleted" >&2
        exit 1
    fi
fi
if [[ $queued == ABSENT ]]; then vm delete --quiet; else queue delete --force --quiet; fi     # with its VM
