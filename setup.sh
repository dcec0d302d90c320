#!/usr/bin/env bash
# Makes environments in .venv/. Does nothing where they are complete and current.
#
#   bash setup.sh [ENVIRONMENT ...] [--cpu]     torch and paddle when none is named
#
# ENVIRONMENT              torch or paddle, or a folder of peers/envs/: that of other trainers (docs/peers.md)
# --cpu                    CPU builds on any machine
# PYTHON=/path/to/python   the Python 3.11 or 3.12 to build with (default: one of the machine, else uv fetches 3.11)
# TUNEBENCH_CUDA=12|13     CUDA's major version (default: by the NVIDIA driver: 13 from 580 on, 12 from 525 on)
#
# uv installs the packages. Where it is missing, pip of any Python from 3.9 on installs it in .venv/uv. pip's settings of
# indexes and certificates hold for uv too.
#
# An environment carries a stamp, written last, of everything it was built from. One without the stamp was interrupted,
# one with another stamp is out of date: either is removed and built anew, and nothing ever runs in it.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started by sh
set -euo pipefail
# A closed stream's number would be given to the next file.
[ -e /dev/fd/0 ] || exec 0</dev/null; [ -e /dev/fd/1 ] || exec 1>/dev/null; [ -e /dev/fd/2 ] || exec 2>/dev/null
unset CDPATH PYTHONHOME PYTHONPATH PYTHONOPTIMIZE PYTHONDONTWRITEBYTECODE
# Settings that would change what is installed, or where.
unset PIP_TARGET PIP_PREFIX PIP_ROOT UV_CONSTRAINT UV_OVERRIDE UV_BUILD_CONSTRAINT UV_EXCLUDE_NEWER UV_PRERELEASE \
  UV_RESOLUTION UV_TORCH_BACKEND UV_SYSTEM_PYTHON UV_PYTHON
export PYTHONUTF8=1 PIP_USER=0
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

uv_version=0.13.9
refuse() { printf 'setup: %s\n' "$*" >&2; exit 2; }
say() { printf 'setup: %s\n' "$*" 2>/dev/null || refuse "what it prints cannot be written; make room there"; }

# bash would wait for a program in the foreground before it heeds a signal.
child= ticker=
stop() { [ -z "$child" ] || kill "$child" $ticker 2>/dev/null || true; exit "$1"; }
trap 'stop 130' INT
trap 'stop 143' TERM HUP
run() { "$@" & child=$!; wait "$child"; }

# Runs a program as `run` does. Where its stderr is no terminal, uv shows no progress: a line says every so many seconds
# how much it has written, as the kernel counts it.
line_every=15
run_told() {
  local what=$1 started=$SECONDS code=0 written; shift
  "$@" & child=$!
  [ -t 2 ] || {
    # Its sleep outlives it for a moment, so it holds neither the lock nor the streams.
    while sleep $line_every </dev/null >/dev/null 2>&1 9>&- && kill -0 "$child" 2>/dev/null; do
      written=$(sed -n 's/^wchar: //p' "/proc/$child/io" 2>/dev/null || true)
      say "$what: $((SECONDS - started)) s so far${written:+, $((written / 1000000)) MB written}"
    done & ticker=$!
  }
  wait "$child" || code=$?
  [ -z "$ticker" ] || { kill "$ticker" 2>/dev/null || true; wait "$ticker" 2>/dev/null || true; ticker=; }
  return $code
}

names=() cpu=0 known=(torch paddle)
for folder in peers/envs/*/; do [ ! -d "$folder" ] || known+=("$(basename "$folder")"); done
for argument in "$@"; do
  case $argument in
    --cpu) cpu=1 ;;
    *)
      [[ " ${known[*]} " == *" $argument "* ]] || refuse "unknown argument '$argument'; use: bash setup.sh$(printf ' [%s]' "${known[@]}" --cpu)"
      [[ " ${names[*]-} " == *" $argument "* ]] || names+=("$argument") ;;
  esac
done
[ ${#names[@]} -gt 0 ] || names=(torch paddle)

# The NVIDIA driver's version; empty where there is no GPU.
driver=
if command -v nvidia-smi >/dev/null 2>&1; then
  if answer=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1); then
    driver=$(printf '%s\n' "$answer" | head -n 1)
  elif [ -e /proc/driver/nvidia/version ] && [ $cpu -eq 0 ]; then
    refuse "nvidia-smi fails: ${answer##*$'\n'}; mend the driver, or use --cpu"
  fi
fi
major=${driver%%.*}
[ -z "$driver" ] || [[ $major =~ ^[0-9]+$ ]] || refuse "nvidia-smi names no driver version, but '$driver'; mend the driver, or use --cpu"

# What to build: cpu, cuda12, cuda13, or default: the CPU build of Paddle and PyPI's torch, which has CUDA 13.
choose_build() {
  if [ $cpu -eq 1 ]; then echo cpu; return; fi
  case ${TUNEBENCH_CUDA:-} in
    12|13) echo "cuda$TUNEBENCH_CUDA" ;;
    '')
      if [ -z "$driver" ]; then echo default
      elif [ "$major" -ge 580 ]; then echo cuda13
      elif [ "$major" -ge 525 ]; then echo cuda12
      else refuse "NVIDIA driver $driver is too old: CUDA 12 needs 525, CUDA 13 needs 580; update the driver, or use --cpu"
      fi ;;
    *) refuse "TUNEBENCH_CUDA=$TUNEBENCH_CUDA is not offered; use 12 or 13, or unset it" ;;
  esac
}

# A complete environment may have been made when the machine had another GPU or driver, or none.
check_kind() {
  local folder=$1 kind=$2 again="run: rm -r $1; bash setup.sh ${1##*/}"
  [ $cpu -eq 0 ] || return 0
  case $kind in
    CPU) [ -z "$driver" ] || say "$folder cannot use this machine's NVIDIA GPU (driver $driver), since it has a CPU build; $again" ;;
    CUDA\ *)
      if [ -z "$driver" ]; then say "$folder has a build for GPUs ($kind), and no GPU is visible here: runs use the CPU"
      elif [[ $kind == 'CUDA 13'* ]] && [ "$major" -lt 580 ]; then
        say "$folder has a build for $kind, which needs driver 580, and this machine has driver $driver; $again"
      fi ;;
  esac
}

old_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 9))' >/dev/null 2>&1; }

# Sets uv, and pip_settings of the Python whose pip has them.
find_uv() {
  local python candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11; do
    if old_enough "$candidate"; then python=$candidate; break; fi
  done
  uv=.venv/uv/bin/uv
  if [ "$("$uv" --version 2>/dev/null | cut -d ' ' -f 2)" != $uv_version ]; then
    rm -rf .venv/uv
    if [ -n "${python:-}" ] && "$python" -m pip --version >/dev/null 2>&1; then
      "$python" -m pip install --disable-pip-version-check --no-input -q --target .venv/uv "uv==$uv_version" || true
    fi
    if [ ! -x "$uv" ] && [ -n "${python:-}" ] && "$python" -m venv --clear .venv/uv >/dev/null 2>&1; then
      .venv/uv/bin/python -m pip install --disable-pip-version-check --no-input -q "uv==$uv_version" || true
    fi
    if [ ! -x "$uv" ]; then
      rm -rf .venv/uv
      for candidate in uv "${HOME:-}/.local/bin/uv"; do
        if uv=$(command -v "$candidate"); then break; fi
      done
      [ -n "$uv" ] || refuse "found neither uv nor a Python with pip to install uv $uv_version with (pip's messages, if any, are" \
        "above). Install one: Debian or Ubuntu: apt install python3-venv; elsewhere: https://docs.astral.sh/uv"
    fi
  fi
  # pip's settings as uv's, where uv has none of its own.
  pip_setting() { "${python:-false}" -m pip config get "global.$1" 2>/dev/null || "${python:-false}" -m pip config get "install.$1" 2>/dev/null || true; }
  list() { tr -s ' \n' "$1" | sed "s/^$1//; s/$1\$//"; }
  local default=${PIP_INDEX_URL:-$(pip_setting index-url)} more=${PIP_EXTRA_INDEX_URL:-$(pip_setting extra-index-url)}
  local links=${PIP_FIND_LINKS:-$(pip_setting find-links)} certificates=${PIP_CERT:-$(pip_setting cert)}
  [ -n "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ] || [ -z "$default" ] || export UV_DEFAULT_INDEX="$default"
  [ -n "${UV_INDEX:-}${UV_EXTRA_INDEX_URL:-}" ] || [ -z "$more" ] || UV_INDEX=$(printf '%s' "$more" | list ' ')
  [ -n "${UV_FIND_LINKS:-}" ] || [ -z "$links" ] || UV_FIND_LINKS=$(printf '%s' "$links" | list ',')
  [ -n "${SSL_CERT_FILE:-}" ] || [ -z "$certificates" ] || export SSL_CERT_FILE="$certificates"
  [ -z "${UV_INDEX:-}" ] || export UV_INDEX
  [ -z "${UV_FIND_LINKS:-}" ] || export UV_FIND_LINKS
  [ -w "${HOME:-/nowhere}" ] || export UV_CACHE_DIR="${UV_CACHE_DIR:-$PWD/.venv/uv-cache}"
  # As pip does, take the newest version that fits from any index.
  export UV_INDEX_STRATEGY=unsafe-best-match
}

# Sets python.
find_python() {
  local version
  if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1 ||
      refuse "PYTHON=$PYTHON is no Python 3.11 or 3.12; name one that is, or unset it"
    python=$PYTHON; return
  fi
  for version in 3.11 3.12; do
    if python=$("$uv" python find --system --no-project --no-python-downloads $version 2>/dev/null); then return; fi
  done
  say "this machine has no Python 3.11 or 3.12: uv fetches 3.11"
  run_told "fetching Python 3.11" "$uv" python install 3.11 || refuse "uv could not fetch Python 3.11 (its message is above); let it reach" \
    "github.com, or install Python 3.11 or 3.12 (Debian 12: apt install python3.11; Ubuntu 24.04: apt install python3.12)," \
    "or name one: PYTHON=/path/to/python"
  python=$("$uv" python find --no-project 3.11)
}

check_room() {
  local needed=$1 free
  free=$(df -Pk .venv | tail -n 1 | sed -E 's/.* +([0-9]+) +[0-9]+% .*/\1/')
  [[ ! $free =~ ^[0-9]+$ ]] || [ "$free" -ge $((needed * 1000 * 1000)) ] || refuse "an environment of $needed GB does not fit: $((free / 1000 / 1000)) GB are free here; make room"
}

build() {
  local name=$1 folder=.venv/$1 source=$1 started=$SECONDS wanted gigabytes=2 index=() editable=(--editable '.[page,test]') kind quiet=() framework=torch
  case $name in
    torch|paddle) framework=$name ;;
    *) source=peers/envs/$name editable=(); ! grep -q '^paddlepaddle==' "$source/requirements.txt" || framework=paddle ;;
  esac
  local own=TUNEBENCH_$(printf '%s' "$name" | tr a-z A-Z)
  if [ -n "${!own:-}" ]; then say "$name runs in $own=${!own}"; return; fi
  stamp() { "$folder/bin/python" -S -c 'import runpy, sys; print(runpy.run_path("tunebench/bootstrap.py")["stamp"](sys.argv[1]))' "$source"; }
  if [ -x "$folder/bin/python" ] && [ -e "$folder/complete" ] && [ "$(head -n 1 "$folder/complete")" = "$(stamp)" ]; then
    kind=$(sed -n 2p "$folder/complete")
    say "$folder is complete ($kind)"
    [ "$source" != "$name" ] || check_kind "$folder" "$kind"  # peers train on the CPU
    return
  fi
  wanted=$(choose_build)
  [ $framework != paddle ] || [ "$source" = "$name" ] || wanted=cpu  # Paddle's builds for GPUs are not on PyPI
  [ -n "${uv:-}" ] || find_uv
  [ -n "${python:-}" ] || find_python
  if [ -e "$folder" ]; then
    if [ -e "$folder/complete" ]; then say "$folder is out of date: building it anew"
    else say "$folder was left half-made: building it anew"; fi
    rm -f "$folder/complete"  # first, so that a half-removed environment does not pass for a whole one
    rm -rf "$folder"
  fi
  # --cpu and CUDA 12: torch's wheels for it have a version of their own and an index.
  local torch='' paddle=paddlepaddle
  case $wanted in
    cpu) torch=+cpu ;;
    cuda12) torch=+cu126 gigabytes=8 paddle=paddlepaddle-gpu index=(--index https://www.paddlepaddle.org.cn/packages/stable/cu126/) ;;
    cuda13) gigabytes=8 paddle=paddlepaddle-gpu index=(--index https://www.paddlepaddle.org.cn/packages/stable/cu130/) ;;
    default) [ $framework = paddle ] || gigabytes=6 ;;
  esac
  [ "$name" != axolotl ] || gigabytes=$((gigabytes + 2))  # it pulls in 250 packages
  if [ $framework != paddle ]; then index=(${torch:+--index "https://download.pytorch.org/whl/${torch#+}"}); fi
  check_room $gigabytes
  [ -t 2 ] || quiet=(--quiet)
  say "making $folder with $("$python" --version), packages as pinned in $source ($wanted${index[1]+ from ${index[1]}}, at most $gigabytes GB)"
  "$uv" venv --quiet --no-project --python "$python" "$folder" || refuse "uv could not make $folder (its message is above)"
  sed "s/^torch==.*/&$torch/; s/^paddlepaddle==/$paddle==/" "$source/requirements.txt" >"$folder/requirements.txt"
  if [ "$torch" = +cu126 ] && [ $framework != paddle ]; then  # constraints.txt has CUDA 13's packages
    sed '/^nvidia-ml-py==/!{ /^cuda-/d; /^nvidia-/d; }' "$source/constraints.txt" | cat - torch/cuda12.txt
  else
    cat "$source/constraints.txt"
  fi >"$folder/constraints.txt"
  run_told "installing $name's packages" "$uv" pip install ${quiet[@]+"${quiet[@]}"} --python "$folder/bin/python" ${index[@]+"${index[@]}"} \
    --constraint "$folder/constraints.txt" --requirement "$folder/requirements.txt" ${editable[@]+"${editable[@]}"} ||
    refuse "uv could not install $name's packages (its messages are above); run 'bash setup.sh $name' again when mended"
  "$uv" pip check --quiet --python "$folder/bin/python" || refuse "$name's packages do not fit each other (see above)"
  if [ "$name" = llamafactory ]; then
    # Of no use for text, and PyPI's builds of them cannot be loaded beside a torch for CPUs: transformers would fail.
    "$uv" pip uninstall --quiet --python "$folder/bin/python" torchvision torchaudio
  fi
  say "importing $name once, which compiles its modules"
  run "$folder/bin/python" -P -W ignore tunebench/installed.py "$folder/requirements.txt" >"$folder/kind" || exit 2
  kind=$(cat "$folder/kind")
  printf '%s\n' "$(stamp)" "$kind" >"$folder/complete.part"
  mv "$folder/complete.part" "$folder/complete"
  say "$folder is complete ($kind), after $((SECONDS - started)) s"
}

mkdir -p .venv
if command -v flock >/dev/null 2>&1 && { : >>.venv/lock; } 2>/dev/null; then
  exec 9>.venv/lock
  flock --nonblock 9 || { say "another setup is running here: waiting for it"; flock 9; }
fi
for name in "${names[@]}"; do build "$name"; done
