#!/usr/bin/env bash
# One TPU VM: create, setup, run, status, delete. `bash tpu_scripts/tpu.sh --help` explains.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: tpu.sh [--dry-run] COMMAND NAME ZONE [ARGUMENT ...]

  create NAME ZONE TYPE [--spot]   a TPU VM of TYPE, for example v5litepod-1, if it does not exist
  setup  NAME ZONE                 copies this checkout there and installs it with the `tpu` extra
  run    NAME ZONE COMMAND ...     runs COMMAND in the checkout there, on one host
  status NAME ZONE                 its state
  delete NAME ZONE                 deletes it, after a confirmation (typed name)

--dry-run prints the gcloud commands and runs none. Project and account are gcloud's own settings.
A run uses the devices of one host.
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
    if [[ $# -lt 1 ]]; then echo "create: TYPE is missing, for example v5litepod-1" >&2; exit 2; fi
    if [[ -z $dry ]] && tpu describe "$name" >/dev/null 2>&1; then echo "$name exists in $zone"; exit 0; fi
    tpu create "$name" --accelerator-type="$1" --version=tpu-ubuntu2204-base "${@:2}"
    ;;
setup)
    root=$(cd "$(dirname "$0")/.." && pwd)
    tpu scp --recurse "$root" "$name:kl_reg"
    tpu ssh "$name" --command="cd kl_reg && python3 -m venv .venv && .venv/bin/pip install -e '.[tpu]'"
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
