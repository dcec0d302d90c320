"""Checkpoints without weights: config.json beside safetensors files of holes, which take no room on a disk.

A library maps such a file and never touches its pages, so that a model of any size is built in no memory.
"""

import json
import math
from pathlib import Path
from typing import Any

from tunebench.models.families import Config, family_of
from tunebench.models.random_weights import SHARD_BYTES
from tunebench.models.shards import INDEX

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # by the frameworks' name of a dtype


def write_hollow(folder: Path, config: Config, dtype: str) -> None:
    """Writes config.json and sparse safetensors files: headers without the tensors' bytes. `dtype` is one of BYTES."""
    (folder / "config.json").write_text(json.dumps(config))
    shapes = family_of(config).tensors(config)
    sizes = {name: math.prod(shape) * BYTES[dtype] for name, shape in shapes.items()}
    files: dict[str, dict[str, Any]] = {}
    start = SHARD_BYTES
    for name, shape in shapes.items():
        if start + sizes[name] > SHARD_BYTES:
            files[f"model-{len(files)}.safetensors"], start = {}, 0
        place = [start, start + sizes[name]]
        files[f"model-{len(files) - 1}.safetensors"][name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        start = place[1]
    for file, tensors in files.items():
        head = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
        with (folder / file).open("wb") as content:
            content.write(len(head).to_bytes(8, "little") + head)
            content.truncate(8 + len(head) + sum(sizes[name] for name in tensors))
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
