#!/usr/bin/env bash
# A real SLURM cluster of one node, on loopback: srun starts two processes; the job script of docs/pods.md is told in mid-run that its
# time ends, and is preempted later, goes on after the step that it stopped at both times, and ends with the bits of a run that nobody
# touched. Installs Debian's slurm-wlm and munge where they are not there yet, so .ci/run calls it, not
# pytest. JKD=… names the command, default .venv/bin/jkd; it needs root and takes three to five minutes on two cores. With --write what
# it said is put into docs/pods.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
JKD=$(realpath -s "${JKD:-.venv/bin/jkd}")
STEPS=300
LIMIT=400 # seconds for anything that trains; on an idle machine it takes a tenth of that

work=$(mktemp -d) daemons=()
say() { printf 'slurm: %s\n' "$*" | tee -a "$work/said"; }
fail() { say "FAILED: $*"; tail -n 15 "$work"/{munge,slurmctld,slurmd,whole,job}.log >&2 || true; exit 1; }
until_true() { # SECONDS WHAT COMMAND…
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" &>/dev/null; do
    ((SECONDS < end)) || fail "$what did not happen in time"
    sleep 0.2
  done
}

installed() { # all of them: command -v with several names is content with one
  local each
  for each in slurmctld slurmd scontrol sbatch srun sinfo munged munge; do command -v "$each" >/dev/null || return 1; done
}
installed || {
  [[ $EUID == 0 ]] || { say "slurm-wlm and munge are not installed, and only root can: run as root"; exit 1; }
  say "installing slurm-wlm and munge"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends slurm-wlm munge; } >/dev/null
}
[[ $EUID == 0 ]] || { say "slurmd starts jobs as root only"; exit 1; }

clean() {
  scancel --quiet --user=root 2>/dev/null || true
  for daemon in "${daemons[@]}"; do kill "$daemon" 2>/dev/null || true; done
  wait
  rm -rf "$work"
}
chmod 755 "$work"
export SLURM_CONF=$work/slurm.conf XDG_CACHE_HOME=$work/cache JAX_PLATFORMS=cpu
cat >"$SLURM_CONF" <<CONF
ClusterName=jkd
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
# a requeued job waits until the credentials of its first start are worthless
AuthInfo=socket=$work/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
# the name that jax.distributed finds the first process by
NodeName=localhost NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=120 State=UP OverSubscribe=NO
CONF
mkdir "$work/state" "$work/spool"
trap clean EXIT
head -c 1024 /dev/urandom >"$work/munge.key"
chmod 400 "$work/munge.key"
munged --foreground --force --key-file="$work/munge.key" --socket="$work/munge.socket" --pid-file="$work/munge.pid" \
  --log-file="$work/munged.log" --seed-file="$work/munge.seed" &>"$work/munge.log" &
daemons+=($!)
until_true 20 "a credential of munge" munge --socket="$work/munge.socket" --no-input
slurmctld -D &>"$work/slurmctld.log" &
daemons+=($!)
until_true 20 "an answer of slurmctld" scontrol ping
slurmd -D -N localhost &>"$work/slurmd.log" &
daemons+=($!)
idle() { [[ $(sinfo --noheader --format=%T) == idle ]]; }
until_true 30 "an idle node" idle
say "$(slurmctld -V): one node, $(nproc) CPUs"

# small enough for two cores: what is shown here does not depend on the teacher's size
train=("$JKD" train configs/digits.py --set steps=$STEPS --set 'teacher.student.widths=(4,4,4,4)' --set '*.evaluate_every=0'
  --set '*.log_every=10' --workdir)
sha() { grep -o '"params_sha256": "[0-9a-f]*"' "$1/summary.json" | tr '\n' ' '; }

SECONDS=0
timeout $LIMIT srun --ntasks=2 "${train[@]}" "$work/whole" &>"$work/whole.log" || fail "srun -n 2 jkd train"
say "srun -n 2 jkd train configs/digits.py: finished in $SECONDS s"

# the script of docs/pods.md, with this cluster's size and this training
awk '/^#!\/bin\/bash/ { found = 1 } found && /^```/ { exit } found' docs/pods.md >"$work/page.sh"
grep -q '^srun jkd train .* --workdir ' "$work/page.sh" || fail "docs/pods.md has no job script"
COMMAND="srun ${train[*]@Q} '$work/preempted'" awk '/^#SBATCH --nodes/ { print "#SBATCH --ntasks=2 --time=100"; next }
  /^srun jkd train / { print ENVIRON["COMMAND"]; next } { print }' "$work/page.sh" >"$work/job.sh"
SECONDS=0
job=$(sbatch --parsable --output="$work/job.log" "$work/job.sh")
state() { scontrol --oneliner show job "$job" | grep -o "$1=[^ ]*" | cut -d= -f2; }
over() { [[ $(state JobState) == COMPLETED || $(state JobState) == FAILED ]]; }
stopped() { grep -o '^jkd: stopped student at step [0-9]*' "$work/job.log"; }
preempt() { # STEP TIMES HOW COMMAND…
  local step=$1 times=$2 how=$3 at
  shift 3
  reached() { grep -q "\"step\": ${step}[,}]" "$work/preempted/student/metrics.jsonl" || over; }
  until_true $LIMIT "step $step of the job" reached
  "$@" "$job" || fail "$how"
  say "job $job: told to stop after $SECONDS s ($how)"
  saved() { (($(stopped | wc -l) == times)); }
  until_true 60 "a checkpoint before the end" saved
  at=$(stopped | tail -n 1)
  say "$at"
  resumed() { grep -q "student: goes on after step ${at##* }\$" "$work/job.log" || over; }
  until_true $LIMIT "the second start" resumed
  grep -q "student: goes on after step ${at##* }\$" "$work/job.log" || fail "it did not go on after step ${at##* }"
  say "job $job: started again, goes on after step ${at##* }"
}
preempt 50 1 "what --signal sends ahead of the end of the time" scancel --signal=TERM
preempt 150 2 "scontrol requeue" scontrol requeue
until_true $LIMIT "the end of the job" over
[[ $(state JobState) == COMPLETED && $(state Restarts) == 2 ]] || fail "the job: $(state JobState), $(state Restarts) restarts"
say "job $job: finished after $SECONDS s, $(state Restarts) restarts"
[[ $(sha "$work/preempted") == "$(sha "$work/whole")" ]] || fail "$(sha "$work/preempted") is not $(sha "$work/whole")"
say "the same bits as the run that was never preempted: $(sha "$work/whole")"
if [[ ${1:-} == --write ]]; then
  awk -v said="$work/said" '/^<!-- slurm -->$/ { print $0 "\n```console"; while ((getline line <said) > 0) print line; print "```"; cut = 1 }
    /^<!-- \/slurm -->$/ { cut = 0 } !cut' docs/pods.md >"$work/page.md"
  cp "$work/page.md" docs/pods.md
fi
