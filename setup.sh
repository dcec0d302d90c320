#!/usr/bin/env bash
# Makes the environments .venv/torch and .venv/paddle. Does nothing where they are complete and current.
#
#   bash setup.sh [torch] [paddle] [--cpu]     both environments, at the same time, when none is named
#
# --cpu   CPU builds on any machine: the smaller torch wheel from PyTorch's CPU index, and paddlepaddle without CUDA.
# PYTHON=/path/to/python3.11             the interpreter to build with
# TUNEBENCH_PADDLE_CUDA=cu130|cu129|cu126 which of Paddle's GPU builds to take (cu130 matches torch's CUDA major version)
#
# An environment carries a stamp, written last, of everything it was built from. One without the stamp was interrupted,
# one with another stamp is out of date: either is removed and built anew, and nothing ever runs in it.
set -euo pipefail
# A closed stream's number would be given to the next file.
[ -e /dev/fd/0 ] || exec 0</dev/null; [ -e /dev/fd/1 ] || exec 1>/dev/null; [ -e /dev/fd/2 ] || exec 2>/dev/null
unset CDPATH PYTHONHOME PYTHONPATH PYTHONOPTIMIZE
export PYTHONUTF8=1 PIP_USER=0
cd "$(dirname "${BASH_SOURCE[0]}")"

trap 'exit 130' INT  # before it says that an installation failed
refuse() { printf 'setup: %s\n' "$*" >&2; exit 2; }
say() { printf 'setup: %s\n' "$*" 2>/dev/null || refuse "what it prints cannot be written; make room there"; }

names=() cpu=0
for argument in "$@"; do
  case $argument in
    torch|paddle) [[ " ${names[*]-} " == *" $argument "* ]] || names+=("$argument") ;;
    --cpu) cpu=1 ;;
    *) refuse "unknown argument '$argument'; use: bash setup.sh [torch] [paddle] [--cpu]" ;;
  esac
done
[ ${#names[@]} -gt 0 ] || names=(torch paddle)

supported() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || refuse "PYTHON=$PYTHON is not a Python 3.11 with its venv module; name one that is"
    echo "$PYTHON"; return
  fi
  for candidate in python3.11 python3 python /usr/bin/python3.11 /usr/local/bin/python3.11; do
    if supported "$candidate"; then command -v "$candidate"; return; fi
  done
  refuse "found no Python 3.11 with its venv module, the version that both stacks are locked for. Install Python 3.11" \
    "(Debian/Ubuntu: python3.11 and python3.11-venv; or 'uv python install 3.11'), or name one: PYTHON=/path/to/python3.11"
}

gpu() { [ $cpu -eq 0 ] && command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

stamp_of() {
  "$python" -c 'import runpy, sys; print(runpy.run_path("tunebench/bootstrap.py")["stamp"](sys.argv[1]))' "$1"
}

build() {
  local name=$1 folder=.venv/$1 kind=cpu stamp started=$SECONDS
  local requirements=$name/requirements.txt index=()
  if gpu; then kind=gpu; fi
  if [ "$name" = paddle ] && [ $kind = gpu ]; then
    kind=gpu-${TUNEBENCH_PADDLE_CUDA:=cu130}
    case $TUNEBENCH_PADDLE_CUDA in cu130|cu129|cu126) ;; *)
      refuse "TUNEBENCH_PADDLE_CUDA=$TUNEBENCH_PADDLE_CUDA is not offered; use cu130, cu129 or cu126" ;; esac
    index=(--extra-index-url "https://www.paddlepaddle.org.cn/packages/stable/$TUNEBENCH_PADDLE_CUDA/")
  fi
  if [ "$name" = torch ]; then
    # The default wheel carries CUDA and runs on a CPU too, so a GPU changes nothing here; --cpu takes the smaller one.
    kind=default
    [ $cpu -eq 0 ] || { kind=cpu; index=(--extra-index-url https://download.pytorch.org/whl/cpu); }
  fi
  stamp=$(stamp_of "$name")
  if [ -x "$folder/bin/python" ] && [ "$(head -n 1 "$folder/complete" 2>/dev/null)" = "$stamp" ]; then
    say "$folder is complete ($(tail -n 1 "$folder/complete") build; 'rm -r $folder' first to change that)"
    return
  fi
  if [ -e "$folder" ]; then
    if [ -e "$folder/complete" ]; then say "$folder is out of date: building it anew"
    else say "$folder was left half-made: building it anew"; fi
    rm -f "$folder/complete"  # first, so that a half-removed environment does not pass for a whole one
    rm -rf "$folder"
  fi
  say "making $folder with $("$python" --version), packages as pinned in $name/requirements.txt and $name/constraints.txt ($kind)"
  "$python" -m venv "$folder"
  if [[ $kind == gpu-* ]]; then
    requirements=$folder/requirements.txt
    sed 's/^paddlepaddle==/paddlepaddle-gpu==/' "$name/requirements.txt" >"$requirements"
  fi
  "$folder/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off -qq \
    ${index[@]+"${index[@]}"} --constraint "$name/constraints.txt" --requirement "$requirements" --editable '.[test]' \
    2>&1 | sed "s/^/$name: /" >&2 ||
    refuse "pip could not install $name's packages (its messages are above); run 'bash setup.sh $name' again when mended"
  "$folder/bin/python" -m pip check | sed "s/^/$name: /" ||
    refuse "$name's packages do not fit each other (see above)"
  printf '%s\n' "$stamp" "$kind" >"$folder/complete.part"
  mv "$folder/complete.part" "$folder/complete"
  say "$folder is complete, after $((SECONDS - started)) s"
}

mkdir -p .venv
if [ -z "${TUNEBENCH_SETUP_HOLDS_LOCK:-}" ] && command -v flock >/dev/null 2>&1 && { : >>.venv/lock; } 2>/dev/null; then
  exec 9>.venv/lock
  flock --nonblock 9 || { say "another setup is running here: waiting for it"; flock 9; }
fi
python=$(find_python)
if [ ${#names[@]} -eq 1 ]; then build "${names[0]}"; exit; fi
# Both at a time: pip keeps one core busy. By xargs, whose processes, unlike a shell's in the background, heed Ctrl-C;
# each keeps the lock for as long as it runs. Both write the same tunebench.egg-info, whole files at a time.
export TUNEBENCH_SETUP_HOLDS_LOCK=1
options=(); [ $cpu -eq 0 ] || options=(--cpu)
printf '%s\0' "${names[@]}" | xargs -0 -n 1 -P 2 bash "$PWD/setup.sh" ${options[@]+"${options[@]}"} || exit 2
