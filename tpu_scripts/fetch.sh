#!/usr/bin/env bash
# usage: fetch.sh [--dry-run] NAME ZONE SOURCE DIR [FILE ...]
#
# Files and folders of ~/kl_reg/SOURCE (all of it, without FILE; those that exist) on worker 0 to DIR here. Checkpoints
# that are being written are left out, so that what comes can be resumed from.
source "$(dirname "$0")/common.sh"
begin '' "$@"
if [[ ${#words[@]} -lt 2 ]]; then refuse "SOURCE and DIR are to be given"; fi
files=("${words[@]:2}")
if [[ ${#files[@]} -eq 0 ]]; then files=(.); fi

archive=$(mktemp --suffix=.tar)
trap 'rm -f "$archive"' EXIT
printf -v source '%q' "kl_reg/${words[0]}"
printf -v quoted '%q ' "${files[@]}"
# tar ends with 1 where a file grew meanwhile, which is no harm
on 0 "cd $source && set -- && for file in $quoted; do if [ -e \"\$file\" ]; then set -- \"\$@\" \"\$file\"; fi; done
tar cf ~/fetch.tar --exclude='*orbax-checkpoint-tmp*' --exclude='*.lock' -- \"\$@\" || [ \$? -eq 1 ]"
call compute tpus tpu-vm scp "$name:fetch.tar" "$archive" --worker=0 --zone="$zone"
if [[ -z $dry ]]; then
    mkdir -p "${words[1]}"
    tar xf "$archive" -C "${words[1]}"
fi
