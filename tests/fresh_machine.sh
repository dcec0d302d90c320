#!/usr/bin/env bash
# Follows the README on a minimal system, as a new user would: installs what the messages name, and nothing else.
#
#   sudo bash tests/fresh_machine.sh [bookworm|trixie|noble] [pytest arguments]
#
# bookworm (the default) is Debian 12, trixie is Debian 13, noble is Ubuntu 24.04 with Python 3.12. The pytest arguments
# go to run_tests.sh; by default it runs the tests of the losses in both environments.
#
# It needs root, debootstrap (for noble also Ubuntu's package ubuntu-keyring), 12 GB in TMPDIR, and about ten minutes:
# for a person before a release, not for CI. The system lies in a folder of its own with mounts that end with this
# script. FRESH_MOUNTS names folders to show in it, separated by spaces, such as a package index on disk. Variables named
# PIP_*, UV_*, SSL_CERT_FILE, PYTHON and *_proxy go along, and so does the file of certificates that they name. MIRROR
# names another archive of the system's packages.
set -euo pipefail
release=${1:-bookworm}
tests=("${@:2}")
[ ${#tests[@]} -gt 0 ] || tests=(tests/scripts/test_numerics.py)
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
if [ -z "${IN_NAMESPACE:-}" ]; then
  [ "$(id -u)" = 0 ] || { echo "fresh_machine.sh: needs root" >&2; exit 2; }
  command -v debootstrap >/dev/null || { echo "fresh_machine.sh: needs debootstrap; apt install debootstrap" >&2; exit 2; }
  system=$(mktemp -d)
  chmod 755 "$system"  # it is the root folder of a user there
  trap 'rm -rf --one-file-system "$system"' EXIT
  IN_NAMESPACE=$system unshare --mount --pid --fork --kill-child bash "$here/tests/fresh_machine.sh" "$release" "${tests[@]}"
  exit
fi

system=$IN_NAMESPACE
unset TMPDIR  # that folder is not in the new system
say() { printf '\nfresh_machine: %s\n' "$*"; }
say "makes a minimal $release in $system"
case $release in
  noble) source=(http://archive.ubuntu.com/ubuntu gutsy main,universe) ;;  # both are in Ubuntu's own images
  *) source=(http://deb.debian.org/debian sid main) ;;
esac
debootstrap --variant=minbase --components="${source[2]}" "$release" "$system" "${MIRROR:-${source[0]}}" "/usr/share/debootstrap/scripts/${source[1]}" >"$system.log" 2>&1 ||
  { tail -n 5 "$system.log" >&2; exit 1; }
rm -f "$system.log"
mount --rbind --make-rslave /dev "$system/dev"
mount -t proc none "$system/proc"
for folder in ${FRESH_MOUNTS:-}; do
  mkdir -p "$system$folder"
  mount --bind "$folder" "$system$folder"
done
cp /etc/resolv.conf "$system/etc/resolv.conf"
for name in PIP_CERT SSL_CERT_FILE; do
  [ -n "${!name:-}" ] || continue
  cp "${!name}" "$system/opt/$name.pem"
  export "$name=/opt/$name.pem"
done
chroot "$system" /usr/sbin/useradd --create-home --shell /bin/bash visitor
project='/home/visitor/my 项目'
mkdir -p "$system$project"
git -c safe.directory="$here" clone -q "$here" "$system$project/tunebench"
chroot "$system" chown -R visitor: "$project"

variables=()
while IFS= read -r name; do variables+=("$name=${!name}"); done < <(compgen -e | grep -E '^(PIP_|UV_|SSL_CERT_FILE$|PYTHON$|.*_proxy$)')
as_visitor() {
  # A login shell has no other variable of this system.
  chroot "$system" su --login visitor -c "cd '$project/tunebench' && env ${variables[*]@Q} bash -c ${1@Q}"
}
install() {
  chroot "$system" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive ${variables[@]+"${variables[@]}"} \
    sh -c "apt-get update -qq && apt-get install -qq --yes --no-install-recommends $*" >/dev/null
}

installed=()
# Runs a command of the README until it passes. After each failure it installs the packages that the message names.
until_it_passes() {
  local attempt wanted
  for attempt in 1 2 3 4 5; do
    say "attempt $attempt: $1"
    if as_visitor "$1" >"$system/said" 2>&1; then tail -n 30 "$system/said"; return; fi
    tail -n 12 "$system/said"
    wanted=$(grep -oE 'apt install [a-z0-9.+ -]+' "$system/said" | tail -n 1 | sed 's/apt install //; s/ $//' || true)
    [ -n "$wanted" ] && [[ " ${installed[*]:-} " != *" $wanted "* ]] || { echo "fresh_machine: the message names nothing to install" >&2; exit 1; }
    say "installs what the message names: $wanted"
    install "$wanted" || { echo "fresh_machine: $release has no $wanted" >&2; exit 1; }
    installed+=("$wanted")
  done
  exit 1
}
until_it_passes 'bash run_all.sh --suite quick --only llama-tiny-lora-bsz4/* --repeats 1 --anyway'
failed=0
grep -q '% (one round)' "$system/said" || { echo "fresh_machine: no percentage in the table; is the machine busy?" >&2; failed=1; }
until_it_passes "bash run_tests.sh ${tests[*]@Q}"
say "done, with these packages beside the minimal system: ${installed[*]:-none}"
exit $failed
