"""Random start weights. NumPy draws them, so that both frameworks start from the same numbers."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tunebench.files import follow_umask
from tunebench.models.families import family_of
from tunebench.models.presets import Preset
from tunebench.models.shards import INDEX, sha256_of, weight_file_name, weight_files
from tunebench.progress import told

WRITER_VERSION = 1  # part of the cache key; raise it when a change of code gives the same seed other weights
SHARD_BYTES = 1 << 30
VALUES_AT_ONCE = 2**24  # random numbers per draw, which are in memory as float32
FINGERPRINT = "fingerprint.json"  # the digest of the weights, in folders of the cache only


def random_bytes(preset: Preset) -> int:
    """The bytes of a preset's weights as `write_random` writes them."""
    values = sum(map(math.prod, family_of(preset.config).tensors(preset.config).values()))
    return values * np.dtype(preset.checkpoint_dtype).itemsize


def write_random(
    folder: Path, preset: Preset, seed: int, shard_bytes: int = SHARD_BYTES, description: str = "weights"
) -> None:
    """Writes config.json and seeded random weights, with one shard in memory at a time, and shows its progress.

    Matrices are normal with the config's standard deviation. Norms get the same noise around 1 and biases around 0, so
    that a tensor in the wrong place changes the loss. Each tensor's values depend on the seed and its name only.
    """
    (folder / "config.json").write_text(json.dumps(preset.config | {"torch_dtype": preset.checkpoint_dtype}, indent=2))
    dtype = np.dtype(preset.checkpoint_dtype)
    shards: list[list[str]] = [[]]
    size = 0
    shapes = family_of(preset.config).tensors(preset.config)
    for name, shape in shapes.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if size and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    weight_map: dict[str, str] = {}
    with told(description, len(shards), bar=len(shards) > 1) as advance:
        for index, names in enumerate(shards, 1):
            file = weight_file_name(index, len(shards))
            save_file({name: _random_tensor(name, shapes[name], preset, seed, dtype) for name in names}, folder / file)
            follow_umask(folder / file)
            weight_map |= dict.fromkeys(names, file)
            advance(1)
    if len(shards) > 1:
        index_json = {"metadata": {"total_size": random_bytes(preset)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index_json, indent=2))
    fingerprint = {"weights_sha256": sha256_of(weight_files(folder))}
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint))


def lora_a(seed: int, name: str, shape: tuple[int, int]) -> np.ndarray:
    """The start value of LoRA's A: shape (r, in), float32, the same on both sides. B starts at zero.

    `name` is the parameter's name in either framework; its layer and target module decide the values. They are uniform
    within ±1/√in. Kaiming's rule with a = √5 gives the same bound: it is the default of peft and of PaddleNLP.
    """
    parts = name.split(".")
    layer, target = next(part for part in parts if part.isdigit()), parts[parts.index("lora_A") - 1]
    bound = 1.0 / math.sqrt(shape[1])
    return _generator(seed, f"lora_a.{layer}.{target}").uniform(-bound, bound, shape).astype(np.float32)


def _random_tensor(name: str, shape: tuple[int, ...], preset: Preset, seed: int, dtype: np.dtype) -> np.ndarray:
    """One tensor, drawn in blocks of rows: in float32 an embedding could take several GB."""
    generator, tensor = _generator(seed, name), np.empty(shape, dtype)
    rows = max(1, VALUES_AT_ONCE // math.prod(shape[1:]))
    for first in range(0, len(tensor), rows):
        stretch = tensor[first : first + rows]
        values = generator.standard_normal(stretch.shape, dtype=np.float32)
        values *= preset.config["initializer_range"]
        if len(shape) == 1 and name.endswith(".weight"):  # a norm's scale
            values += 1.0
        stretch[...] = values
    return tensor


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
