# Sourced by the scripts beside it: their common arguments, and what they ask gcloud.
# shellcheck shell=bash
set -euo pipefail
shopt -s inherit_errexit    # a gcloud that fails in $(...) ends the script

explain() { sed -n '2,/^[^#]/s/^#[ ]\{0,1\}//p' "$0"; }     # a script's first comment is its help

refuse() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# begin "OPTION ..." "$@" reads the arguments. An option is --follow, or --lines= with a value. Sets dry, name, zone,
# the options that are given, and words: the rest, and everything behind a bare --.
begin() {
    local known=" $1 " kind
    shift
    dry='' name='' zone='' options=() words=()
    while [[ $# -gt 0 ]]; do
        case $1 in
        --dry-run) dry=1 ;;
        --help | -h)
            explain
            exit 0
            ;;
        --)
            words+=("${@:2}")
            break
            ;;
        --*)
            kind=$1
            if [[ $1 == *=* ]]; then kind="${1%%=*}="; fi
            if [[ $known != *" $kind "* ]]; then refuse "unknown option $1 (--help explains)"; fi
            options+=("$1")
            ;;
        *)
            if [[ -z $name ]]; then
                name=$1
            elif [[ -z $zone ]]; then
                zone=$1
            else
                words+=("$1")
            fi
            ;;
        esac
        shift
    done
    if [[ -z $zone ]]; then
        explain >&2
        exit 2
    fi
    if [[ ! $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ || ${#name} -gt 61 ]]; then
        refuse "NAME '$name' must be at most 61 lower-case letters, digits and '-', a letter first and no '-' last"
    fi
}

# Refuses more words than a script has use for.
no_more() {
    if [[ ${#words[@]} -gt $1 ]]; then refuse "unexpected ${words[*]:$1}"; fi
}

given() { [[ " ${options[*]} " == *" $1 "* ]]; }

# The value of --NAME=, or a default.
value() {
    local option
    for option in "${options[@]}"; do
        if [[ $option == "$1="* ]]; then
            echo "${option#*=}"
            return
        fi
    done
    echo "$2"
}

# gcloud, or what it would be called with.
call() {
    if [[ -z $dry ]]; then
        gcloud "$@"
        return
    fi
    printf 'gcloud'
    printf ' %q' "$@"
    echo
}

vm() { call compute tpus tpu-vm "$1" "$name" "${@:2}" --zone="$zone"; }
queue() { call compute tpus queued-resources "$1" "$name" "${@:2}" --zone="$zone"; }
on() { call compute tpus tpu-vm ssh "$name" --worker="$1" --command="$2" --zone="$zone"; }

# One word: what gcloud says of a resource, ABSENT if there is none; any other failure ends the script.
describe() {
    local said status=0
    said=$(gcloud compute tpus "$1" describe "$name" --format="value($2)" --zone="$zone" 2>&1) || status=$?
    if [[ $status -eq 0 ]]; then
        echo "${said##*$'\n'}"
    elif [[ $said == *NOT_FOUND* || $said == *"not found"* ]]; then
        echo ABSENT
    else
        echo "$said" >&2
        return 1
    fi
}

# The slice's state: a queued resource's, where it has failed or has no VM yet; else the VM's.
state() {
    local queued machine
    queued=$(describe queued-resources state.state)
    case $queued in SUSPENDED | SUSPENDING | FAILED | DELETING) echo "$queued" && return ;; esac
    machine=$(describe tpu-vm state)
    if [[ $machine == ABSENT ]]; then echo "$queued"; else echo "$machine"; fi
}

# Whether a state is one from which nothing comes back by itself.
gone() { case $1 in PREEMPTED | TERMINATED | STOPPED | SUSPENDED | SUSPENDING | FAILED) true ;; *) false ;; esac; }
