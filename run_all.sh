#!/usr/bin/env bash
# Sets up what is missing, runs a suite and prints its tables. Ctrl-C keeps what is done; the same command goes on.
#
#   bash run_all.sh [--suite NAME] [--only GLOB] [--repeats N | --until SHARE] [--aa] [--fresh] [--anyway] [--cpu]
#                   [--versus OTHER [--threshold SHARE]]
#                   [--dry-run | --check | --rehearse | --plan] [--torch PYTHON] [--paddle PYTHON]
#
# --cpu          set up CPU builds on any machine (see setup.sh); hide its GPUs too: CUDA_VISIBLE_DEVICES= (empty)
# --suite NAME   which of suites/NAME.toml, or a .toml file of your own (default: cpu; quick: a few minutes, intervals)
#                peers: other trainers beside the scripts
# --only GLOB    only the runs whose PAIR/FRAMEWORK fits, such as 'llama*/paddle' or '*lora*'; CONTEST/CONTESTANT of peers
# --repeats N    rounds (default: the suite's, mostly 1); the order of the two sides alternates
# --aa           each side against itself: what a difference is worth here (records in results/SUITE/aa/)
# --until SHARE  such as 3%: rounds of each pair until its interval is within ± that, looked at after 4, 6, 8, 10 and 12
# --versus OTHER regressions: another checkout's folder, or another Python with the packages of one framework, beside this
#                checkout in one series, 6 rounds (records in results/SUITE/versus-NAME/); see docs/regressions.md
# --threshold SHARE
#                with --versus: the least change that counts (default: 3%)
# --fresh        from the start; earlier results move to results/.previous/
# --anyway       do not wait for a quiet machine, nor measure rounds again that other programs disturbed
# --dry-run      print the runs, start none
# --check        look at the machine and at what each run needs, start none; exit code 1 where something is wrong
# --rehearse     each run for a few steps with at most two layers: what would fail, and how long the suite would take
# --plan         say what each run would take on GPUs, start none: memory, tokens per second, time; needs no GPU
# --gpu KIND, --link KIND, --price DOLLARS, --calibrate RECORDS, --out FILE
#                with --plan: the kind of GPU, what joins them, the price per GPU and hour, records of runs on the machine,
#                a file for the same as JSON
# --torch PYTHON, --paddle PYTHON
#                interpreters of your own, with the packages installed; TUNEBENCH_TORCH and TUNEBENCH_PADDLE do the same
#
# Records go to results/SUITE/PAIR/FRAMEWORK-rROUND.json; one run_all.sh at a time works on a results folder.
# TUNEBENCH_RESULTS and TUNEBENCH_CACHE move the two folders that it writes to. Exit code: 0, 1 where a run failed,
# 2 for bad input, 130 when interrupted; with --versus 1 for a regression, 2 where a row could not be compared.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
# A closed stream's number would be given to the next file.
[ -e /dev/fd/0 ] || exec 0</dev/null; [ -e /dev/fd/1 ] || exec 1>/dev/null; [ -e /dev/fd/2 ] || exec 2>/dev/null
unset CDPATH PYTHONHOME PYTHONPATH PYTHONOPTIMIZE
export PYTHONUTF8=1
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)

setup=() suite=() before=''
for argument in "$@"; do
  case $before in --torch) export TUNEBENCH_TORCH=$argument ;; --paddle) export TUNEBENCH_PADDLE=$argument ;; esac
  own=''; case $before in --torch|--paddle) own=1 ;; esac
  before=${own:+=}$argument
  [ -z "$own" ] || continue
  case $argument in
    --torch|--paddle) ;;
    --torch=*) export TUNEBENCH_TORCH=${argument#*=} ;;
    --paddle=*) export TUNEBENCH_PADDLE=${argument#*=} ;;
    -h|--help) sed -n '2,/^\[ /{/^#/s/^# \{0,1\}//p}' "$root/run_all.sh"; exit 0 ;;
    --cpu) setup=(--cpu) suite+=(--cpu) ;;
    *) suite+=("$argument") ;;
  esac
done

case $before in --torch|--paddle) echo "run_all.sh: $before names no Python; give one: $before /path/to/python" >&2; exit 2 ;; esac

# The runner sets up the environments of peers, and those of --versus. This set-up runs in the background, since bash
# heeds a signal only after a program in the foreground. It then ignores Ctrl-C itself.
bash "$root/setup.sh" torch paddle ${setup[@]+"${setup[@]}"} &
stop() { kill "$!" 2>/dev/null; echo "run_all.sh: $2 during set-up; the same command goes on" >&2; exit "$1"; }
trap 'stop 130 interrupted' INT
trap 'stop 143 ended' TERM HUP
wait "$!"
trap - INT TERM HUP
exec "${TUNEBENCH_TORCH:-$root/.venv/torch/bin/python}" "$root/tunebench/bootstrap.py" torch,paddle tunebench.suite.runner ${suite[@]+"${suite[@]}"}
