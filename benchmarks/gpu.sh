#!/usr/bin/env bash
# Everything that only an accelerator can show, in at most eight minutes of one H200:
#
#   bash benchmarks/gpu.sh [--rehearse] [FOLDER]
#
# A selection of the tests on the accelerator; benchmarks.rl_step beside TRL and Tunix, where they can be imported;
# decode, budget_step, attention, sweep_cost and quantized_decode, all with random weights of SmolLM2's shapes, so that
# nothing is fetched. Each has a time limit of its own. JSON and what was printed go to FOLDER, by default
# benchmarks/results/DEVICE; the device's name is in each JSON. --rehearse does the same on the CPU at tiny sizes.
# Exits with 1 where a part gave no result; missed goals are in the tables.
# $PYTHON is the Python that has the project's packages; python3 by default.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} KL_REG_PEERS_HERE=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
rehearse=
if [ "${1-}" = --rehearse ]; then
    rehearse=1 JAX_PLATFORMS=cpu
    export JAX_PLATFORMS
    shift
fi
device=$("$python" -c 'import jax; print(jax.devices()[0].device_kind.replace(" ", "_"))') || exit 1
folder=${1:-benchmarks/results/$device}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$folder"
failed=0

# part NAME SECONDS COMMAND...: runs it; what it prints goes to FOLDER/NAME.md. A benchmark may exit with 1 for a goal.
part() {
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    echo "== $name"
    timeout "$limit" "$@" > "$folder/$name.md" 2> "$scratch/$name.err"
    status=$?
    cat "$folder/$name.md"
    if { [ "$name" = tests ] && [ "$status" -ne 0 ]; } || { [ "$name" != tests ] && [ ! -s "$folder/$name.json" ]; }; then
        tail -n 20 "$scratch/$name.err" >&2
        echo "FAILED: $name, exit status $status"
        failed=1
    fi
    echo "-- $name: $((SECONDS - began)) s"
}

# benchmark NAME SECONDS ARGUMENTS...: benchmarks.NAME, which writes FOLDER/NAME.json.
benchmark() {
    local name=$1 limit=$2
    shift 2
    rm -f "$folder/$name.json"
    part "$name" "$limit" "$python" -m "benchmarks.$name" "$@" --json "$folder/$name.json"
}

model=$scratch/shapes
if [ -n "$rehearse" ]; then
    model=embedded
    sizes=(--model=miniature --sequences=4 --prompt=6 --generated=2 --steps=1 --warmup=1)
    part tests 300 "$python" -m pytest -q -p no:cacheprovider tests/kl/test_exact.py
    benchmark rl_step 300 "${sizes[@]}" --group=2 --peers=
    benchmark decode 300 "${sizes[@]}" --group=2 --alone --shared
    benchmark budget_step 600 --model="$model" --members 1 2 --arms none tilt --steps 1 --episodes 2 --length 12
    benchmark attention 300 --model="$model" --dtype=float32 --rows 2 --length 16 --repeats 1
    benchmark sweep_cost 300 "${sizes[@]}" --members=2
    benchmark quantized_decode 300 --model="$model" --rows 2 --prompt 4 --tokens 4 --repeats 1
else
    "$python" -c 'import pathlib, sys; from benchmarks.peers import work
work.write_model("shapes", pathlib.Path(sys.argv[1]))' "$model" || exit 1
    peers=$("$python" -c 'import importlib.util as u; print(",".join(n for n in ("trl", "tunix") if u.find_spec(n)))')
    KL_REG_TESTS_ON=cuda part tests 90 "$python" -m pytest -q -p no:cacheprovider tests/kl/test_chunked.py \
        tests/kl/test_exact.py tests/kl/test_operations.py tests/training/test_ledger.py tests/models/test_decoder.py
    benchmark rl_step 100 --model=shapes --peers="$peers" --steps=3 --warmup=2
    benchmark decode 55 --model=shapes --shared --dtype=bfloat16 --steps=3
    benchmark budget_step 100 --model="$model" --members 1 --arms none tilt mixture --steps 2
    benchmark attention 40 --model=shapes
    benchmark sweep_cost 60 --model=shapes --members=1,16 --steps=3
    benchmark quantized_decode 30 --model="$model" --dtype=bfloat16 --rows 64
fi
exit "$failed"
