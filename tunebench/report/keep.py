"""Copies records into the repository, without what belongs to the machine that they were made on."""

import json
from pathlib import Path
from typing import Any

from tunebench.errors import BadInput
from tunebench.files import write_atomically
from tunebench.record import Record, digest_of, read_record
from tunebench.report.load import record_files


def keep(folder: Path, target: Path) -> int:
    """Copies the records of a results folder to `target` under the same names; how many.

    Raises `BadInput` where a record is broken, or where its environment names a folder.
    """
    kept = {file: portable(read_record(file), folder) for file in record_files(folder)}
    for file, content in kept.items():
        text = json.dumps(content | {"sha256": digest_of(content)}, separators=(",", ":"))
        write_atomically(target / file.relative_to(folder), f"{text}\n".encode())
    return len(kept)


def portable(record: Record, folder: Path) -> dict[str, Any]:
    """A record's content, its paths relative to the results folder, and without the log.

    Raises `BadInput` where its environment names a folder, which may be a person's.
    """
    content = json.loads(record.model_dump_json(by_alias=True))
    content["argv"] = [word.replace(f"{folder.resolve()}/", "") for word in record.argv]
    content["log"] = []
    for name, value in record.hardware.environment.items():
        if "/" in value:
            raise BadInput(f"{name}={value} is part of a record, and names a folder; unset it and measure again")
    return content
