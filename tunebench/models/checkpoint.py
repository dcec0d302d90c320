"""The start weights: one Hugging Face-format checkpoint that both frameworks load.

`--weights random` writes it once per preset and seed, without either framework.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tunebench.errors import BadInput, cannot_write
from tunebench.files import cache_folder, free_bytes, only_one
from tunebench.models.config import normalise, read_config
from tunebench.models.families import HEAD, Family, family_of
from tunebench.models.presets import PRESETS
from tunebench.models.random_weights import FINGERPRINT, WRITER_VERSION, random_bytes, write_random
from tunebench.models.shards import INDEX, bytes_of, sha256_of, weight_file_name, weight_files
from tunebench.record import Built, Work

# Name patterns of the files from which libraries make a tokenizer: tokenizer.json, spiece.model, vocab.txt and others.
TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges*", "tekken.json"),
    *("added_tokens.json", "special_tokens_map.json"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder: every tensor that its config needs is there, complete and of the right shape."""

    folder: Path
    config: dict[str, Any]
    files: list[Path]
    weights_sha256: str

    @property
    def config_sha256(self) -> str:
        """SHA-256 of the config's canonical JSON."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    @property
    def family(self) -> Family:
        """The family of its model."""
        return family_of(self.config)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Each parameter's shape by its Hugging Face name. Linear weights have the shape (out, in)."""
        return self.family.tensors(self.config)

    @property
    def parameters(self) -> int:
        """The number of weights. Tied weights count once."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def expected(self) -> Built:
        """What a model of this config has to compute with."""
        return self.family.computes(self.config)

    @contextlib.contextmanager
    def weights_alone(self) -> Iterator[Path]:
        """A temporary folder with links to the weights only: a library would also read other files beside them."""
        with cannot_write(Path(tempfile.gettempdir()), "TMPDIR names another folder"):
            made = tempfile.TemporaryDirectory(prefix="weights-")
        with made as name:
            folder = Path(name)
            weight_map: dict[str, str] = {}
            for number, file in enumerate(self.files, 1):
                link = weight_file_name(number, len(self.files))
                (folder / link).symlink_to(file)
                with safe_open(file, framework="numpy") as tensors:
                    weight_map |= dict.fromkeys(tensors.keys(), link)
            if len(self.files) > 1:
                (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
            yield folder

    @property
    def widths(self) -> dict[str, int]:
        """The widths that tensor parallelism slices, by their names in messages."""
        return self.family.widths(self.config)

    @property
    def work(self) -> Work:
        """The sizes that decide how many operations a token needs."""
        shapes, built = self.tensors, self.expected
        products = [math.prod(shape) for shape in shapes.values() if len(shape) == 2]
        if HEAD in shapes:  # the embedding, which is first, is a lookup only; without a head it is multiplied too
            products.append(-math.prod(next(iter(shapes.values()))))
        return Work(matmul_parameters=sum(products), layers=built.layers, attention_width=built.heads * built.head_size)


def find_checkpoint(model: str, weights: str, seed: int, layers: int | None = None) -> Checkpoint:
    """The checkpoint of a preset (written when missing), a local folder, or a hub name.

    Of a preset it has so many `layers`, where they are given.

    Raises `BadInput` where there is no such model or its folder is incomplete.
    """
    if weights == "random":
        return _random_checkpoint(model, seed, layers)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(model)
    return open_checkpoint(folder.resolve())


def open_checkpoint(folder: Path, known_sha256: str | None = None) -> Checkpoint:
    """Reads and checks a Hugging Face checkpoint folder: config.json and safetensors, one file or shards.

    Raises `BadInput`. `known_sha256` is the weights' digest where it is known, so that they need not be read.
    """
    if (folder / "adapter_config.json").exists():
        raise BadInput(
            f"{folder}: adapter_config.json makes it the adapter of another model; merge the adapter into that model, "
            "or remove the file"
        )
    config = read_config(folder)
    files = weight_files(folder)
    wanted = family_of(config).tensors(config)
    found: dict[str, tuple[int, ...]] = {}
    places: dict[str, tuple[Path, str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for stored in tensors.keys():  # noqa: SIM118 (safe_open is no dictionary)
                    tensor, name = tensors.get_slice(stored), canonical_name(stored, config)
                    if name in found:
                        raise BadInput(f"{file}: {name} is there twice; use a checkpoint with each tensor once")
                    found[name], places[name] = tuple(tensor.get_shape()), (file, stored)
                    if tensor.get_dtype() not in ("F32", "F16", "BF16"):
                        raise BadInput(f"{file}: {name} is {tensor.get_dtype()}; use weights in F32, F16 or BF16")
        except (SafetensorError, OSError) as error:
            if not os.access(file, os.R_OK):  # safetensors would say that the file does not exist
                raise BadInput(f"{file}: Permission denied; let this user read it") from None
            raise BadInput(f"{file}: not a whole safetensors file ({error}); copy or download it again") from None
    for name, shape in wanted.items():
        if name not in found:
            raise BadInput(f"{folder}: the weights lack {name}, which its config.json asks for; use a whole checkpoint")
        if found[name] != shape:
            raise BadInput(f"{folder}: {name} has shape {found[name]}, its config.json asks for {shape}")
    for name in found.keys() - wanted.keys():
        file, stored = places[name]
        if name == HEAD and config["tie_word_embeddings"]:
            embedding = next(iter(wanted))
            if bytes_of(*places[embedding]) != bytes_of(file, stored):
                raise BadInput(
                    f"{file}: {stored} differs from {embedding}, and tie_word_embeddings makes them one; "
                    "set it to false in config.json, or remove one of the two"
                )
        elif not is_computed(name):
            raise BadInput(
                f"{file}: {stored} has no place in the {config['model_type']} model that config.json describes; remove "
                "it, or use the checkpoint of a causal language model"
            )
    return Checkpoint(folder, config, files, known_sha256 or sha256_of(files))


def describe_checkpoint(model: str, weights: str, seed: int, layers: int | None = None) -> Checkpoint:
    """The checkpoint of `find_checkpoint` as far as its config tells, without its weights. Its folder may be missing.

    Raises `BadInput` where there is no such model.
    """
    if weights == "random":
        config = normalise(PRESETS[model].cut(layers).config)
        return Checkpoint(random_folder(model, seed, layers), config, [], "")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(model, weights=False)
    return Checkpoint(folder.resolve(), read_config(folder), [], "")


def is_computed(name: str) -> bool:
    """Whether a tensor is one that older libraries saved and that both sides compute from the config."""
    return name.endswith(".rotary_emb.inv_freq")


def canonical_name(name: str, config: dict[str, Any]) -> str:
    """A tensor's name with the family's prefix. Published Bloom checkpoints leave out `transformer.`."""
    prefix = family_of(config).prefix
    return name if name.startswith((prefix, "lm_head.")) else f"{prefix}{name}"


def random_folder(name: str, seed: int, layers: int | None) -> Path:
    """The folder in the cache of a preset's random checkpoint."""
    preset = PRESETS[name].cut(layers)
    content = json.dumps([WRITER_VERSION, preset.config, preset.checkpoint_dtype, seed], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:12]
    return cache_folder() / "checkpoints" / f"{name}-seed{seed}-{key}"


def _random_checkpoint(name: str, seed: int, layers: int | None) -> Checkpoint:
    folder, preset = random_folder(name, seed, layers), PRESETS[name].cut(layers)
    with only_one("checkpoints"):
        if not folder.exists():
            part = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            try:
                needed, free = random_bytes(preset), free_bytes(folder)
                if needed > free:
                    raise BadInput(
                        f"the random weights of {name} take {needed / 1e9:.2f} GB, and {folder.parent} has "
                        f"{free / 1e9:.2f} GB free; make room there, or TUNEBENCH_CACHE names another folder"
                    )
                part.mkdir(parents=True)
                write_random(part, preset, seed, description=f"random weights of {name}")
                part.rename(folder)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(part, ignore_errors=True)
                raise BadInput(f"{folder} cannot be written: {error}; TUNEBENCH_CACHE names another folder") from None
    try:
        return open_checkpoint(folder, json.loads((folder / FINGERPRINT).read_text())["weights_sha256"])
    except (BadInput, OSError, ValueError, KeyError, TypeError) as damage:
        raise BadInput(f"{damage} (a cached random checkpoint: remove {folder} and it is written again)") from None


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder from which a library may make its tokenizer, sorted by name."""
    return sorted({file for glob in TOKENIZER_FILES for file in folder.glob(glob) if not file.is_dir()})


def _download(name: str, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", *TOKENIZER_FILES, *["*.safetensors", "*.safetensors.index.json"] * weights]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            f"--model {name}: no preset ({', '.join(PRESETS)}), no folder, and the hub did not give it: {reason}"
        ) from None
