"""Which runs of a series are done: their records, of the same flags, commit and machine; others are set aside."""

import datetime
import functools
from collections.abc import Sequence
from pathlib import Path

from tunebench.checkout import read_git
from tunebench.errors import BadInput
from tunebench.hardware import Hardware, read_hardware
from tunebench.record import Git, Record, read_record
from tunebench.run.run import as_workers_have_it

FINAL = ("ok", "oom", "unsupported")  # what another try would not change
NOW = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"


def record_before(path: Path, argv: Sequence[str], nproc: int) -> tuple[Record | None, str]:
    """The record of a run that is done, or why the one that is there does not do.

    `argv` is as the run's record will have it, --out last; `nproc` are its processes.
    """
    if not path.exists():
        return None, ""
    try:
        record = read_record(path)
    except BadInput:
        return None, "its record is broken"
    if record.argv[:-1] != list(argv[:-1]):  # without --out: results may be moved
        return None, "its flags changed"
    if record.status not in FINAL:
        return None, f"it ended as {record.status}"
    git, hardware = _here()
    if record.git != git:
        return None, "the code is of another commit, or was changed since"
    then, now = record.hardware.lasting(), as_workers_have_it(hardware, nproc).lasting()
    changed = [name for name in dict.fromkeys((*then, *now)) if now.get(name) != then.get(name)]
    if changed:
        return None, f"the machine changed ({', '.join(changed)})"
    return record, ""


def set_aside(folder: Path, *paths: Path) -> Path:
    """Moves what there is of `paths` out of a series' results in `folder`, and says where to."""
    previous = folder.parent / ".previous" / f"{folder.name}-{NOW}"
    for path in filter(Path.exists, paths):
        target, number = previous / path.relative_to(folder), 1
        while target.exists():  # the same run was set aside before
            number += 1
            target = target.with_name(f"{path.stem}.{number}{path.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return previous


@functools.cache
def _here() -> tuple[Git, Hardware]:
    """The commit and the machine, asked for once."""
    return read_git(), read_hardware()
