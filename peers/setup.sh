#!/usr/bin/env bash
# Makes the peers' own environments .venv/peers, .venv/torchtune and .venv/llamafactory. Does nothing where they are
# complete and current. PaddleNLP's Trainer needs none: it runs in .venv/paddle, which setup.sh makes.
#
#   bash peers/setup.sh [peers] [torchtune] [llamafactory] [--cpu]     all three when none is named
#
# --cpu   the smaller torch wheel from PyTorch's CPU index
#
# As in setup.sh, a stamp is written last, and an environment without it, or with another one, is built anew.
set -euo pipefail
# A closed stream's number would be given to the next file.
[ -e /dev/fd/0 ] || exec 0</dev/null; [ -e /dev/fd/1 ] || exec 1>/dev/null; [ -e /dev/fd/2 ] || exec 2>/dev/null
unset CDPATH PYTHONHOME PYTHONPATH PYTHONOPTIMIZE
export PYTHONUTF8=1 PIP_USER=0
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'peers/setup: %s\n' "$*"; }
refuse() { printf 'peers/setup: %s\n' "$*" >&2; exit 2; }

names=() index=() cpu=()
for argument in "$@"; do
  case $argument in
    peers|torchtune|llamafactory) names+=("$argument") ;;
    --cpu) cpu=(--cpu); index=(--extra-index-url https://download.pytorch.org/whl/cpu) ;;
    *) refuse "unknown argument '$argument'; use: bash peers/setup.sh [peers] [torchtune] [llamafactory] [--cpu]" ;;
  esac
done
[ ${#names[@]} -gt 0 ] || names=(peers torchtune llamafactory)

build() {
  local name=$1 folder=.venv/$1 source=peers/envs/$1 stamp started=$SECONDS
  stamp=$("$python" -c 'import runpy, sys; print(runpy.run_path("tunebench/bootstrap.py")["stamp"](sys.argv[1]))' "$source")
  if [ -x "$folder/bin/python" ] && [ "$(head -n 1 "$folder/complete" 2>/dev/null)" = "$stamp" ]; then
    say "$folder is complete"
    return
  fi
  rm -f "$folder/complete"  # first, so that a half-removed environment does not pass for a whole one
  rm -rf "$folder"
  say "making $folder, packages as pinned in $source"
  "$python" -m venv "$folder"
  "$folder/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off -qq \
    ${index[@]+"${index[@]}"} --constraint "$source/constraints.txt" --requirement "$source/requirements.txt" ||
    refuse "pip could not install $name's packages (its messages are above); run 'bash peers/setup.sh $name' again when mended"
  "$folder/bin/python" -m pip check
  if [ "$name" = llamafactory ]; then
    # Of no use for text, and PyPI's builds of them cannot be loaded beside a torch for CPUs: transformers would fail.
    "$folder/bin/python" -m pip uninstall --yes -qq torchvision torchaudio
  fi
  printf '%s\n' "$stamp" >"$folder/complete.part"
  mv "$folder/complete.part" "$folder/complete"
  say "$folder is complete, after $((SECONDS - started)) s"
}

python=.venv/torch/bin/python  # of the right version; an environment made with it is none of its own
[ -x $python ] || bash setup.sh torch ${cpu[@]+"${cpu[@]}"}
if command -v flock >/dev/null 2>&1; then
  exec 9>.venv/lock
  flock --nonblock 9 || { say "another setup is running here: waiting for it"; flock 9; }
fi
for name in "${names[@]}"; do build "$name"; done
