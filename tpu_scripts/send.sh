#!/usr/bin/env bash
# usage: send.sh [--dry-run] NAME ZONE DIR TARGET [FILE ...]
#
# Files and folders of DIR (all of it, without FILE) to ~/kl_reg/TARGET on all workers.
source "$(dirname "$0")/common.sh"
begin '' "$@"
if [[ ${#words[@]} -lt 2 ]]; then refuse "DIR and TARGET are to be given"; fi
files=("${words[@]:2}")
if [[ ${#files[@]} -eq 0 ]]; then files=(.); fi

archive=$(mktemp --suffix=.tar)
trap 'rm -f "$archive"' EXIT
if [[ -z $dry ]]; then tar cf "$archive" -C "${words[0]}" --exclude='*.lock' -- "${files[@]}"; fi
printf -v target '%q' "kl_reg/${words[1]}"
call compute tpus tpu-vm scp "$archive" "$name:send.tar" --worker=all --zone="$zone"
on all "mkdir -p $target && tar xf send.tar -C $target"
