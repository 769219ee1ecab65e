#!/usr/bin/env bash
# One TPU VM: create, setup, run, status, delete. `bash tpu_scripts/tpu.sh --help` explains.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: tpu.sh [--dry-run] COMMAND NAME ZONE [ARGUMENT ...]

  create NAME ZONE TYPE RUNTIME [--spot]   a TPU VM, if it does not exist: for example v5litepod-1 v2-alpha-tpuv5-lite
  setup  NAME ZONE                 the last commit of this checkout, in a fresh folder there, installed with `tpu`
  run    NAME ZONE COMMAND ...     runs COMMAND in the checkout there, on one host
  status NAME ZONE                 its state
  delete NAME ZONE                 deletes it, after a confirmation (typed name)

--dry-run prints the gcloud commands and runs none. Project and account are gcloud's own settings.
A run uses the devices of one host. Kept by `setup`: nothing of an earlier one, so fetch runs/ before.
HELP
}

dry=
if [[ "${1:-}" == --dry-run ]]; then dry=1; shift; fi
if [[ $# -lt 1 || "$1" == --help || "$1" == -h ]]; then usage; exit 0; fi
if [[ $# -lt 3 ]]; then usage >&2; exit 2; fi
command=$1 name=$2 zone=$3
shift 3

tpu() {
    local call=(gcloud compute tpus tpu-vm "$@" --zone="$zone")
    if [[ -n $dry ]]; then printf '%q ' "${call[@]}"; echo; else "${call[@]}"; fi
}

case $command in
create)
    if [[ $# -lt 2 ]]; then echo "create: TYPE or RUNTIME is missing" >&2; exit 2; fi
    if [[ -z $dry ]] && tpu describe "$name" >/dev/null 2>&1; then echo "$name exists in $zone"; exit 0; fi
    tpu create "$name" --accelerator-type="$1" --version="$2" "${@:3}"
    ;;
setup)
    archive=$(mktemp --suffix=.tar)
    trap 'rm -f "$archive"' EXIT
    git -C "$(dirname "$0")/.." archive --output="$archive" --prefix=kl_reg/ HEAD
    tpu scp "$archive" "$name:kl_reg.tar"
    tpu ssh "$name" --command="rm -rf kl_reg && tar xf kl_reg.tar && cd kl_reg && pip install --user uv && \
python3 -m uv venv --python 3.11 .venv && python3 -m uv pip install --python .venv -e '.[tpu]'"
    ;;
run)
    if [[ $# -lt 1 ]]; then echo "run: COMMAND is missing" >&2; exit 2; fi
    tpu ssh "$name" --command="cd kl_reg && source .venv/bin/activate && $(printf '%q ' "$@")"
    ;;
status)
    tpu describe "$name" --format="value(state)"
    ;;
delete)
    if [[ -z $dry ]]; then
        read -r -p "Type the name of the TPU VM to delete it: " answer
        if [[ $answer != "$name" ]]; then echo "not deleted" >&2; exit 1; fi
    fi
    tpu delete "$name" --quiet
    ;;
*)
    echo "unknown command: $command" >&2; usage >&2; exit 2
    ;;
esac
