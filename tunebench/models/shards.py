"""The weight files of a checkpoint: their names, their content and their digest."""

import hashlib
import json
from pathlib import Path

from tunebench.errors import BadInput
from tunebench.progress import told

LARGE = 1 << 31  # bytes of weights whose digest takes seconds
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder: one file, or several shards. Raises `BadInput`."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        raise BadInput(f"{folder} has neither {SINGLE} nor {INDEX}; only those are read")
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if not all(isinstance(name, str) for name in named):
            raise TypeError("a shard's name is no text")
        names = sorted(set(named))
        missing = [name for name in names if not (folder / name).exists()]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise BadInput(f"{index} is not a readable index ({error})") from None
    for name in missing:
        raise BadInput(f"{folder / name} is missing, which {index.name} names; copy or download it again")
    return [folder / name for name in names]


def weight_file_name(number: int, of: int) -> str:
    """The name of shard `number` (from 1) of `of` shards."""
    return SINGLE if of == 1 else f"model-{number:05}-of-{of:05}.safetensors"


def bytes_of(file: Path, name: str) -> tuple[str, str]:
    """A tensor's dtype and the digest of its bytes. It reads the bytes itself, since NumPy has no bfloat16."""
    with file.open("rb") as content:  # safetensors: 8 bytes with the header's length, a JSON header, the tensors
        size = int.from_bytes(content.read(8), "little")
        about = json.loads(content.read(size))[name]
        first, end = about["data_offsets"]
        content.seek(8 + size + first)
        digest, left = hashlib.sha256(), end - first
        while block := content.read(min(left, 1 << 22)):
            digest.update(block)
            left -= len(block)
    return about["dtype"], digest.hexdigest()


def sha256_of(files: list[Path]) -> str:
    """The digest of the content of these files."""
    digest, total = hashlib.sha256(), sum(file.stat().st_size for file in files)
    with told("digest of the weights", total, bar=total > LARGE) as advance:
        for file in files:
            with file.open("rb") as content:
                while block := content.read(1 << 22):
                    digest.update(block)
                    advance(len(block))
    return digest.hexdigest()
