#!/usr/bin/env bash
# Sets up what is missing, then runs the peers and this project's scripts by turns on the same samples.
#
#   bash peers/run.sh [--rounds 5] [--methods full lora] [--only GLOB ...] [--samples 96] [--steps N] [--fresh]
#
# Records go to results/peers/; what is there already, of the same flags, commit and machine, is not run again.
# `python3 summarize.py results/peers` prints the tables again.
set -euo pipefail
unset CDPATH PYTHONHOME PYTHONPATH PYTHONOPTIMIZE
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash setup.sh
bash peers/setup.sh
exec .venv/torch/bin/python -P peers/run.py "$@"
