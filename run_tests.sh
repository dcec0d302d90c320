#!/usr/bin/env bash
# Sets up what is missing, then checks format, lint and types, and runs every test: the shared ones in both environments, since
# these pin different versions of the same libraries, and those that start programs once.
#
#   bash run_tests.sh [pytest arguments]     -n0: one test at a time, as --pdb and -s need it
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH PYTHONOPTIMIZE PYTHONDONTWRITEBYTECODE
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

# Three files of tests at a time on two cores, since many tests wait for a time-out, a signal or another process. Their
# programs have a thread each. Files start in the order of tests/conftest.py.
export OMP_NUM_THREADS=1
arguments=(--numprocesses=3 --dist=loadfile --no-loadscope-reorder "$@")

bash setup.sh
bash tests/browser.sh
.venv/torch/bin/ruff format --check .
.venv/torch/bin/ruff check .
.venv/torch/bin/mypy
.venv/paddle/bin/python -P -m pytest -m 'not frameworks' "${arguments[@]}" || [ $? -eq 5 ]  # 5: none was asked for
.venv/torch/bin/python -P -m pytest "${arguments[@]}"
