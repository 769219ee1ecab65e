#!/usr/bin/env bash
# usage: create.sh [--dry-run] [--spot] [--queued] NAME ZONE TYPE RUNTIME
#
# A TPU VM slice, if it does not exist, as: create.sh my-tpu us-west4-a v5litepod-8 v2-alpha-tpuv5-lite
#   --spot      cheaper, and taken away when it is needed elsewhere (resume.sh brings it back)
#   --queued    as a queued resource: returns at once, and status.sh says when it is there
# Project and account are gcloud's own settings.
source "$(dirname "$0")/common.sh"
begin '--spot --queued' "$@"
if [[ ${#words[@]} -lt 2 ]]; then refuse "TYPE and RUNTIME are to be given, as v5litepod-8 v2-alpha-tpuv5-lite"; fi
no_more 2

if [[ -z $dry ]]; then
    now=$(state)
    if gone "$now"; then
        echo "$name is there in state $now; resume.sh deletes what is left and creates it again" >&2
        exit 1
    elif [[ $now != ABSENT ]]; then
        echo "$name exists in $zone ($now)"
        exit 0
    fi
fi
kind=()
if given --spot; then kind=(--spot); fi
if given --queued; then
    queue create --node-id="$name" --accelerator-type="${words[0]}" --runtime-version="${words[1]}" "${kind[@]}"
else
    vm create --accelerator-type="${words[0]}" --version="${words[1]}" "${kind[@]}"
fi
