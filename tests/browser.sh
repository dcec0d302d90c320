#!/usr/bin/env bash
# Installs Chromium and its driver with apt where they are missing: as root, or with a sudo that asks for no password.
# Where it cannot, it says so and ends well: the tests of the page then say what is missing.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail

say() { printf 'tests: %s\n' "$*"; }
has() { command -v "$1" >/dev/null 2>&1; }
advice='the tests of the page need it: apt-get install chromium chromium-driver'

if has chromedriver && { has chromium || has chromium-browser || has google-chrome; }; then exit 0; fi
has apt-get || { say "no Chromium here, and no apt-get; $advice"; exit 0; }
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  sudo -n true 2>/dev/null || { say "no Chromium here, and neither root nor a sudo without password; $advice"; exit 0; }
  as_root=(sudo -n)
fi
say 'installing chromium and chromium-driver with apt-get'
export DEBIAN_FRONTEND=noninteractive
if ! { ${as_root[@]+"${as_root[@]}"} apt-get -qq update &&
       ${as_root[@]+"${as_root[@]}"} apt-get -qq install --yes --no-install-recommends chromium chromium-driver; } >/dev/null; then
  say "apt-get could not install Chromium (its messages are above); $advice"
fi
