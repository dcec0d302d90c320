"""The digest of a record. As a program it prints the digests of many files, for a process that reads them meanwhile.

python -P -m tunebench.digest < PATHS    (separated by NUL bytes; a line for each)
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from pydantic_core import from_json


def digest_of(content: dict[str, Any]) -> str:
    """The SHA-256 of a record's fields but `sha256`: of its JSON with sorted keys and no blanks."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_in(path: Path) -> str:
    """The digest of the content of a record file; empty where the file cannot be read or holds no object."""
    try:
        content = from_json(path.read_bytes())
    except (OSError, ValueError):
        return ""
    if not isinstance(content, dict):
        return ""
    content.pop("sha256", None)
    return digest_of(content)


if __name__ == "__main__":
    paths = map(os.fsdecode, sys.stdin.buffer.read().split(b"\0"))
    sys.stdout.writelines(f"{digest_in(Path(path))}\n" for path in paths)
