#!/usr/bin/env bash
# Runs the suite of peers: other trainers beside this project's scripts. It takes run_all.sh's arguments.
set -euo pipefail
unset CDPATH
exec bash "$(dirname "${BASH_SOURCE[0]}")/../run_all.sh" --suite peers "$@"
