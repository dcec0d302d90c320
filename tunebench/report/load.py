"""Finds and reads the records of files and folders."""

import gc
import itertools
from pathlib import Path

from tunebench.errors import BadInput
from tunebench.files import results_folder
from tunebench.record import Record, read_record

REHEARSALS = "rehearsals"
KEPT_APART = ("measured", "published", REHEARSALS)  # folders of records that are searched only where they are named


def load_records(paths: list[Path]) -> tuple[list[Record], list[str]]:
    """The records of files and folders by start time, and a line for each broken file.

    It searches folders, but for hidden ones and those named `measured` or `published`. Raises `BadInput`.
    """
    records, broken = [], []
    gc.disable()  # the collector would scan all records so far again and again, and they hold no cycles
    try:
        for file in itertools.chain.from_iterable(record_files(path) for path in paths):
            try:
                records.append(read_record(file))
            except BadInput as fault:
                broken.append(str(fault))
    finally:
        gc.enable()
    return sorted(records, key=lambda record: record.started_at), broken


def record_files(path: Path) -> list[Path]:
    """The file `path`, or the record files of the folder `path`. Raises `BadInput`.

    The results folder may be missing: the first record makes it.
    """
    try:
        if path.is_file():
            return [path]
        is_folder = path.is_dir()
    except OSError as error:
        raise BadInput(f"{str(path)[:80]}: {error.strerror}; name record files or folders of them") from None
    if not is_folder:
        if path == results_folder():
            return []
        raise BadInput(f"{path}: no such file or folder; name record files or folders of them")
    return sorted(file for file in path.rglob("*.json") if not _is_kept_apart(file.relative_to(path)))


def _is_kept_apart(file: Path) -> bool:
    return any(part.startswith(".") or part in KEPT_APART for part in file.parts)
