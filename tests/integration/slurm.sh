#!/usr/bin/env bash
# A sweep on a real Slurm of one node, started here and stopped again:  bash tests/integration/slurm.sh WORK
# Needs Debian's slurm-wlm and munge, the package's slurm extra, and root (for munge's key).
set -euo pipefail
cd "$(dirname "$0")/../.."
if [[ $# -ne 1 ]]; then echo "usage: slurm.sh WORK" >&2; exit 2; fi
skip() {
    echo "SKIPPED: a sweep on a real Slurm: $*"
    exit 0
}
for tool in slurmctld slurmd munged sbatch; do
    command -v "$tool" >/dev/null || skip "there is no $tool (apt-get install slurm-wlm munge)"
done
python -c "import submitit" 2>/dev/null || skip "there is no submitit (pip install -e '.[slurm]')"
[[ $(id -u) -eq 0 ]] || skip "its daemons are started as root only"

mkdir -p "$1"
work=$(cd "$1" && pwd)
cluster=$(mktemp -d)
daemons=()
stop() {
    scancel --me 2>/dev/null && sleep 5     # what a failed test left
    for daemon in "${daemons[@]}"; do kill "$daemon" 2>/dev/null || true; done
    wait
    rm -rf "$cluster"
}
trap stop EXIT

chmod 755 "$cluster"
mkdir -p "$cluster"/{munge,state,spool}
dd if=/dev/urandom of="$cluster/munge/key" bs=1 count=1024 status=none
chmod 700 "$cluster/munge" && chmod 400 "$cluster/munge/key"
host=$(hostname -s)
cat > "$cluster/slurm.conf" <<CONF
ClusterName=tiny
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$cluster/munge/socket,cred_expire=10
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=2
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=tiny Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$cluster/slurm.conf"

munged --foreground --key-file="$cluster/munge/key" --socket="$cluster/munge/socket" --pid-file="$cluster/munge/pid" \
    --log-file="$cluster/munge/log" --seed-file="$cluster/munge/seed" --force 2>/dev/null &
daemons+=($!)
for _ in $(seq 50); do [[ -S $cluster/munge/socket ]] && break; sleep 0.1; done
slurmctld -D 2>/dev/null &
daemons+=($!)
slurmd -D -N "$host" 2>/dev/null &
daemons+=($!)
for _ in $(seq 60); do
    [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]] && break
    sleep 1
done
if [[ $(sinfo --noheader --format=%T) != idle ]]; then
    echo "Slurm did not come up" >&2
    tail -n 20 "$cluster"/*.log >&2
    exit 1
fi
sinfo --version
PYTHONPATH=. python tests/integration/sweeps.py slurm "$work"
