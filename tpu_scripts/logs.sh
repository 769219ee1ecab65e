#!/usr/bin/env bash
# usage: logs.sh [--dry-run] [--worker=N] [--lines=N] [--follow] NAME ZONE
#
# The end of what the command of run.sh printed on a worker (0).
source "$(dirname "$0")/common.sh"
begin '--worker= --lines= --follow' "$@"
no_more 0

lines=$(value --lines 40)
if [[ ! $lines =~ ^[0-9]+$ ]]; then refuse "--lines=$lines is no number"; fi
follow=''
if given --follow; then follow=' --follow'; fi
on "$(value --worker 0)" "tail --lines=$lines$follow run.log"
