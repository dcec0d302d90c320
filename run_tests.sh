#!/usr/bin/env bash
# Sets up what is missing, then checks format and lint and runs every test: the shared ones in both environments, since
# these pin different versions of the same libraries, and those that start programs once.
#
#   bash run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

bash setup.sh
.venv/torch/bin/ruff format --check .
.venv/torch/bin/ruff check .
.venv/paddle/bin/python -P -m pytest -m 'not frameworks' "$@"
.venv/torch/bin/python -P -m pytest "$@"
