"""Finds and reads the records of files and folders."""

import gc
import itertools
from pathlib import Path

from tunebench.errors import BadInput
from tunebench.files import results_folder
from tunebench.record import Record, read_record

REHEARSALS = "rehearsals"
# Folders of records that are searched only where they are named, and how others of them begin.
KEPT_APART = ("measured", "published", REHEARSALS)
VERSUS = "versus-"


def load_records(paths: list[Path]) -> tuple[list[Record], list[str]]:
    """The records of files and folders by start time, and a line for each broken file.

    It searches folders, but for hidden ones and those that are kept apart. Raises `BadInput`.
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
    files = ((file, file.relative_to(path).parts) for file in path.rglob("*.json"))
    return sorted(file for file, parts in files if not any(p.startswith(".") or is_kept_apart(p) for p in parts))


def is_kept_apart(name: str) -> bool:
    """Whether a folder of this name is searched only where it is named itself."""
    return name in KEPT_APART or name.startswith(VERSUS)
