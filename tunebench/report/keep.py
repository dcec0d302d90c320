"""Copies records into the repository, without what could identify their machine's user."""

import json
from pathlib import Path
from typing import Any

from tunebench.errors import BadInput
from tunebench.files import write_atomically
from tunebench.record import Record, digest_of, read_record
from tunebench.report.load import record_files


def keep(folder: Path, target: Path) -> int:
    """Copies the records of a results folder to `target` under the same names. Returns their number.

    Raises `BadInput` where a record is broken, or where its flags or its environment name a folder.
    """
    files = {file.relative_to(folder): file for file in record_files(folder)}
    kept = {name: portable(read_record(file), name) for name, file in files.items()}
    for name, content in kept.items():
        text = json.dumps(content | {"sha256": digest_of(content)}, separators=(",", ":"))
        write_atomically(target / name, f"{text}\n".encode())
    return len(kept)


def portable(record: Record, file: Path) -> dict[str, Any]:
    """A record's content without the log and with `file` as its --out: its path within the results folder.

    Traces are not kept, so that --profile names no folder of the machine.

    Raises `BadInput` where its flags or its environment name a folder, since that may name a person.
    """
    content = json.loads(record.model_dump_json(by_alias=True))
    content["argv"] = [f"--out={file}" if word.startswith("--out=") else word for word in record.argv]
    content["argv"] = ["--profile=traces" if word.startswith("--profile=") else word for word in content["argv"]]
    for word in content["argv"]:
        if word.startswith("/") or "=/" in word:
            raise BadInput(f"{file}: {word} names a folder; measure with data and models by their names")
    content["log"] = []
    for name, value in record.hardware.environment.items():
        if "/" in value:
            raise BadInput(f"{name}={value} is part of a record, and names a folder; unset it and measure again")
    return content
