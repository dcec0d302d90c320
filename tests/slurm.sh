#!/usr/bin/env bash
# Runs deploy/nodes.sbatch and deploy/one-node.sbatch by a real Slurm of two nodes that are this machine, without GPUs.
#
#   sudo bash tests/slurm.sh [FOLDER]     FOLDER keeps Slurm's files and the jobs' output (default: a new one in TMPDIR)
#
# It needs root and the packages slurmctld, slurmd, slurm-client and munge: for a person before a release, not for CI.
# The batch files are as they are, but for the runs' size: llama-tiny in place of llama-7b, one pair of the suite `quick`
# in place of the suite `a100x4`, two tasks a node in place of four. Slurm's programs end with this script.
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
if [ -z "${IN_NAMESPACE:-}" ]; then
  [ "$(id -u)" = 0 ] || { echo "slurm.sh: needs root" >&2; exit 2; }
  for program in slurmctld slurmd sbatch munged; do
    command -v $program >/dev/null || { echo "slurm.sh: no $program; apt install slurmctld slurmd slurm-client munge" >&2; exit 2; }
  done
  folder=${1:-$(mktemp -d)}
  mkdir -p "$folder"
  chmod 755 "$folder"  # munged runs as another user
  folder=$(readlink -f "$folder")
  IN_NAMESPACE=$folder exec unshare --mount --pid --fork --kill-child --mount-proc bash "$here/tests/slurm.sh"
fi

folder=$IN_NAMESPACE
unset IN_NAMESPACE
export SLURM_CONF=$folder/slurm.conf
mkdir -p "$folder/state" "$folder/munge"
cat >"$SLURM_CONF" <<CONF
ClusterName=tunebench
SlurmctldHost=localhost
SlurmUser=root
SlurmctldPort=16817
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
NodeName=node1 NodeHostname=localhost Port=16818 CPUs=32 Gres=gpu:4
NodeName=node2 NodeHostname=localhost Port=16819 CPUs=32 Gres=gpu:4
PartitionName=all Nodes=ALL Default=YES
CONF
touch "$folder"/gpu{0..3}  # Slurm asks that a GPU's device file is there, no more
echo "Name=gpu File=$folder/gpu[0-3]" >"$folder/gres.conf"
# The nodes' names lead to this machine, here alone.
{ cat /etc/hosts; echo '127.0.0.1 node1 node2'; } >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
# munged wants folders that no one else may write.
chown munge: "$folder/munge"
head -c 1024 /dev/urandom | install -o munge -m 400 /dev/stdin "$folder/munge/key"
mount -t tmpfs none /run/munge 2>/dev/null || { mkdir -p /run/munge; mount -t tmpfs none /run/munge; }
chown munge: /run/munge
chmod 755 /run/munge
runuser -u munge -- munged --key-file="$folder/munge/key" --log-file="$folder/munge/log" --pid-file=/run/munge/pid --seed-file="$folder/munge/seed"
slurmctld
for node in node1 node2; do slurmd -N $node; done
for _ in $(seq 60); do
  [ "$(sinfo --noheader --format=%D --states=idle)" != 2 ] || break
  sleep 1
done
[ "$(sinfo --noheader --format=%D --states=idle)" = 2 ] || { sinfo --list-reasons >&2; exit 1; }

cd "$here"
sed -e 's/^flags=.*/flags=(--model llama-tiny --samples 40 --zero 3 --bsz 8 --steps 4 --warmup-steps 1)/' \
  -e "s#results/nodes#$folder/results/nodes#g" deploy/nodes.sbatch >"$folder/nodes.sbatch"
sed -E '/run_all/{s/--suite a100x4/--suite quick --only "llama-tiny-lora-bsz4\/*"/; /--(check|rehearse)/!s/$/ --repeats 1 --anyway/}' \
  deploy/one-node.sbatch >"$folder/one-node.sbatch"
failed=0
for job in nodes one-node; do
  size=()
  [ $job = one-node ] || size=(--ntasks-per-node=2)
  printf '\nslurm: %s\n' "deploy/$job.sbatch"
  TUNEBENCH_RESULTS=$folder/results sbatch --wait --output="$folder/$job.out" "${size[@]}" "$folder/$job.sbatch" || failed=1
  tail -n 25 "$folder/$job.out"
done
exit $failed
