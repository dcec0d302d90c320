"""Finds the finished runs of a series: those with a record of the same flags, commit, machine and packages. Others
move away.
"""

import datetime
import functools
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tunebench.bootstrap import ROOT
from tunebench.checkout import read_git
from tunebench.errors import BadInput
from tunebench.hardware import Hardware, read_hardware
from tunebench.record import Git, Record, read_record
from tunebench.report.load import PREVIOUS
from tunebench.run.run import as_workers_have_it
from tunebench.suite.other import PROBE_SECONDS

FINAL = ("ok", "oom", "unsupported")  # statuses that another try would not change
# What an interpreter says of the distributions that it is asked for, with the standard library alone.
ASK = """
import json, platform, sys
from importlib import metadata
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
NOW = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"


def record_before(
    path: Path, argv: Sequence[str], nproc: int, python: Path, root: Path = ROOT
) -> tuple[Record | None, str]:
    """The record of a finished run. Or None, with the reason why an existing record does not count.

    `argv` is what the run's record will hold, with --out last. `nproc` is its number of processes. `python` is the
    interpreter whose packages train, and `root` the checkout.
    """
    if not path.exists():
        return None, ""
    try:
        record = read_record(path)
    except BadInput:
        return None, "its record is broken"
    if _lasting(record.argv) != _lasting(argv):
        return None, "its flags changed"
    if record.status not in FINAL:
        return None, f"it ended as {record.status}"
    hardware = _here()
    if record.git != _git(root):
        return None, "the code is of another commit, or was changed since"
    then, now = record.hardware.lasting(), as_workers_have_it(hardware, nproc).lasting()
    changed = [name for name in dict.fromkeys((*then, *now)) if now.get(name) != then.get(name)]
    if root != ROOT:  # another checkout may set other variables for its runs, and record others
        changed = [name for name in changed if not name.startswith("environment.")]
    if changed:
        return None, f"the machine changed ({', '.join(changed)})"
    installed = versions_in(python, tuple(record.versions))
    changed = [name for name, version in record.versions.items() if installed.get(name) != version]
    if installed and changed:
        return None, f"the packages changed ({', '.join(changed)})"
    return record, ""


@functools.cache
def versions_in(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The versions of an interpreter and of those distributions that it has; empty where it does not start."""
    try:
        done = subprocess.run(
            [python, "-P", "-c", ASK, *names],
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
            timeout=PROBE_SECONDS,
        )
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def set_aside(folder: Path, *paths: Path) -> Path:
    """Moves those of `paths` that exist out of the series' results in `folder`. Returns the new folder."""
    previous = folder.parent / PREVIOUS / f"{folder.name}-{NOW}"
    for path in filter(Path.exists, paths):
        target, number = previous / path.relative_to(folder), 1
        while target.exists():  # the same run was set aside before
            number += 1
            target = target.with_name(f"{path.stem}.{number}{path.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return previous


def _lasting(argv: Sequence[str]) -> list[str]:
    """A command line without what may change between the rounds of one series.

    The results folder may have moved. --until goes on from rounds that were measured without it.
    """
    return [word for word in argv[:-1] if not word.startswith("--until=")]


@functools.cache
def _git(root: Path) -> Git:
    """The commit of a checkout, read once per process."""
    return read_git(root)


@functools.cache
def _here() -> Hardware:
    """The machine, read once per process."""
    return read_hardware()
