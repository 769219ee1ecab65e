#!/usr/bin/env bash
# usage: run.sh [--dry-run] NAME ZONE -- COMMAND ...
#
# Starts COMMAND in ~/kl_reg on all workers and returns; it goes on when the connection ends. What it prints is shown by
# logs.sh, whether it runs by status.sh. While one runs no other is started.
source "$(dirname "$0")/common.sh"
begin '' "$@"
if [[ ${#words[@]} -eq 0 ]]; then refuse "COMMAND is missing, as: run.sh NAME ZONE -- python -m launch.sweep ..."; fi

printf -v quoted '%q ' "${words[@]}"
printf -v script '%q' "source .venv/bin/activate; $quoted; echo \$? > ~/run.exit"
on all "set -e
if [ -e run.pid ] && [ ! -e run.exit ] && kill -0 \$(cat run.pid) 2>/dev/null; then
    echo 'a command runs already'
    exit 0
fi
rm -f run.exit
cd kl_reg
nohup setsid bash -c $script > ~/run.log 2>&1 < /dev/null &
echo \$! > ~/run.pid"
