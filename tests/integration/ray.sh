#!/usr/bin/env bash
# A sweep on a real Ray on this machine:  bash tests/integration/ray.sh WORK    Needs the package's ray extra.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [[ $# -ne 1 ]]; then echo "usage: ray.sh WORK" >&2; exit 2; fi
if ! python -c "import ray" 2>/dev/null; then
    echo "SKIPPED: a sweep on a real Ray: there is no ray (pip install -e '.[ray]')"
    exit 0
fi
PYTHONPATH=. python tests/integration/sweeps.py ray "$1"
