#!/usr/bin/env bash
# Sets up what is missing, runs a suite and prints its tables. Ctrl-C keeps what is done; the same command goes on.
#
#   bash run_all.sh [--cpu] [--suite NAME] [--only GLOB] [--repeats N] [--aa] [--fresh] [--anyway] [--dry-run]
#
# --cpu          set up CPU builds on any machine (see setup.sh); hide its GPUs too: CUDA_VISIBLE_DEVICES= (empty)
# --suite NAME   which of suites/NAME.toml, or a .toml file of your own (default: cpu; quick: a few minutes, intervals)
#                peers: other trainers beside the scripts
# --only GLOB    only the runs whose PAIR/FRAMEWORK fits, such as 'llama*/paddle' or '*lora*'; CONTEST/CONTESTANT of peers
# --repeats N    rounds (default: the suite's, mostly 1); the order of the two sides alternates
# --aa           each side against itself: what a difference is worth here (records in results/SUITE/aa/)
# --fresh        from the start; earlier results move to results/.previous/
# --anyway       do not wait for a quiet machine, nor measure rounds again that other programs disturbed
# --dry-run      print the runs, start none
#
# Records go to results/SUITE/PAIR/FRAMEWORK-rROUND.json; one run_all.sh at a time works on a results folder.
# TUNEBENCH_RESULTS and TUNEBENCH_CACHE move the two folders that it writes to. Exit code: 0, 1 where a run failed,
# 2 for bad input, 130 when interrupted.
set -euo pipefail
# A closed stream's number would be given to the next file.
[ -e /dev/fd/0 ] || exec 0</dev/null; [ -e /dev/fd/1 ] || exec 1>/dev/null; [ -e /dev/fd/2 ] || exec 2>/dev/null
unset CDPATH PYTHONHOME PYTHONPATH PYTHONOPTIMIZE
export PYTHONUTF8=1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

setup=() suite=() peers='' before=''
for argument in "$@"; do
  case "$before $argument" in *' --suite=peers'|'--suite peers') peers=1 ;; esac
  before=$argument
  case $argument in
    -h|--help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$root/run_all.sh"; exit 0 ;;
    --cpu) setup=(--cpu) ;;
    *) suite+=("$argument") ;;
  esac
done

# pip answers Ctrl-C with an ordinary failure, so say here what it was.
trap 'echo "run_all.sh: interrupted during set-up; the same command goes on" >&2; exit 130' INT
bash "$root/setup.sh" ${setup[@]+"${setup[@]}"}
[ -z "$peers" ] || bash "$root/peers/setup.sh" ${setup[@]+"${setup[@]}"}
trap - INT
# -P: the working directory could be the repository, which must not be on Python's path.
exec "$root/.venv/torch/bin/python" -P -m tunebench.suite.runner ${suite[@]+"${suite[@]}"}
