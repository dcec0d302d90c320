"""The start weights: one Hugging Face-format checkpoint that both frameworks load.

`--weights random` writes it once per preset and seed from a NumPy generator, without either framework.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tunebench.cache import cache_folder, follow_umask, only_one
from tunebench.config import expected_model, read_config
from tunebench.errors import BadInput, cannot_write
from tunebench.presets import PRESETS, Preset
from tunebench.record import Built, Work

WRITER_VERSION = 1  # part of the cache key: raise it when the same seed would give other weights
SHARD_BYTES = 1 << 30
VALUES_AT_ONCE = 2**24  # random ones, of which a float32 copy is in memory
# Files that say how text becomes tokens, as libraries name them: tokenizer.json, spiece.model, vocab.txt and so on.
TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "*.tiktoken", "vocab*", "merges*", "tekken.json"),
    *("added_tokens.json", "special_tokens_map.json"),
)
FINGERPRINT = "fingerprint.json"  # in the cache only: the digest of weights written there
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint folder: every tensor that its config asks for is there, whole and of the right shape."""

    folder: Path
    config: dict[str, Any]
    files: list[Path]
    weights_sha256: str

    @property
    def config_sha256(self) -> str:
        """SHA-256 of the config's canonical JSON."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    @property
    def parameters(self) -> int:
        """Weights of the model; tied weights count once."""
        return sum(math.prod(shape) for shape in tensor_shapes(self.config).values())

    @property
    def expected(self) -> Built:
        """What a model of this config computes with."""
        return expected_model(self.config)

    @contextlib.contextmanager
    def weights_alone(self) -> Iterator[Path]:
        """A folder with the weights and nothing else: beside them a library would also read configs and adapters."""
        with cannot_write(Path(tempfile.gettempdir()), "TMPDIR names another folder"):
            made = tempfile.TemporaryDirectory(prefix="weights-")
        with made as name:
            folder, weight_map = Path(name), {}
            for number, file in enumerate(self.files, 1):
                link = _weight_file_name(number, len(self.files))
                (folder / link).symlink_to(file)
                with safe_open(file, framework="numpy") as tensors:
                    weight_map |= dict.fromkeys(tensors.keys(), link)
            if len(self.files) > 1:
                (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
            yield folder

    @property
    def work(self) -> Work:
        """What decides the arithmetic of a token."""
        shapes, config = tensor_shapes(self.config), self.config
        products = [math.prod(shape) for shape in shapes.values() if len(shape) == 2]
        if HEAD in shapes:  # else the embedding is the head
            products.append(-math.prod(shapes["model.embed_tokens.weight"]))
        heads = config.get("num_attention_heads") or config["n_head"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        layers = config.get("num_hidden_layers") or config["n_layer"]
        return Work(matmul_parameters=sum(products), layers=layers, attention_width=heads * size)

    def tensor_parallel_widths(self) -> dict[str, int]:
        """What tensor parallelism cuts up, by what messages call it."""
        if self.config["model_type"] == "bloom":
            heads = {"attention heads": self.config["n_head"]}
            inner = 4 * self.config["hidden_size"]
        else:
            heads = {"attention heads": self.config["num_attention_heads"]}
            if self.config.get("num_key_value_heads"):
                heads["key-value heads"] = self.config["num_key_value_heads"]
            inner = self.config["intermediate_size"]
        return heads | {"feed-forward width": inner, "vocabulary": self.config["vocab_size"]}


def find_checkpoint(model: str, weights: str, seed: int) -> Checkpoint:
    """The checkpoint of a preset (written when missing), a local folder, or a hub name.

    Raises `BadInput` when there is no such model or the folder is incomplete.
    """
    if weights == "random":
        return _random_checkpoint(model, PRESETS[model], seed)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = _download(model)
    return open_checkpoint(folder.resolve())


def open_checkpoint(folder: Path, known_sha256: str | None = None) -> Checkpoint:
    """Reads and checks a Hugging Face checkpoint folder (config.json and safetensors, in one file or in shards).

    `known_sha256` saves reading the weights of a folder that nobody else writes to.
    """
    if (folder / "adapter_config.json").exists():
        raise BadInput(
            f"{folder}: adapter_config.json makes it the adapter of another model; merge the adapter into that model, "
            "or remove the file"
        )
    config = read_config(folder)
    files = _weight_files(folder)
    wanted = tensor_shapes(config)
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
            if not os.access(file, os.R_OK):  # safetensors says of such a file that there is none
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
            if _bytes_of(*places[embedding]) != _bytes_of(file, stored):
                raise BadInput(
                    f"{file}: {stored} differs from {embedding}, and tie_word_embeddings makes them one; "
                    "set it to false in config.json, or remove one of the two"
                )
        elif not is_computed(name):
            raise BadInput(
                f"{file}: {stored} has no place in the {config['model_type']} model that config.json describes; remove "
                "it, or use the checkpoint of a causal language model"
            )
    return Checkpoint(folder, config, files, known_sha256 or _sha256_of(files))


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model by its Hugging Face name, with its shape; linear weights are (out, in)."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    if config["model_type"] != "bloom":
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        key_value = (config.get("num_key_value_heads") or heads) * head_dim
        inner = config["intermediate_size"]
        shapes["model.embed_tokens.weight"] = (vocab, hidden)
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            shapes[prefix + "self_attn.q_proj.weight"] = (heads * head_dim, hidden)
            shapes[prefix + "self_attn.k_proj.weight"] = (key_value, hidden)
            shapes[prefix + "self_attn.v_proj.weight"] = (key_value, hidden)
            if config["model_type"] != "llama":
                shapes[prefix + "self_attn.q_proj.bias"] = (heads * head_dim,)
                shapes[prefix + "self_attn.k_proj.bias"] = (key_value,)
                shapes[prefix + "self_attn.v_proj.bias"] = (key_value,)
            shapes[prefix + "self_attn.o_proj.weight"] = (hidden, heads * head_dim)
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
            if config["model_type"] == "glm":
                shapes[prefix + "mlp.gate_up_proj.weight"] = (2 * inner, hidden)
            else:
                shapes[prefix + "mlp.gate_proj.weight"] = (inner, hidden)
                shapes[prefix + "mlp.up_proj.weight"] = (inner, hidden)
            shapes[prefix + "mlp.down_proj.weight"] = (hidden, inner)
        shapes["model.norm.weight"] = (hidden,)
        if not config["tie_word_embeddings"]:
            shapes[HEAD] = (vocab, hidden)
        return shapes
    shapes["transformer.word_embeddings.weight"] = (vocab, hidden)
    norms = ["transformer.word_embeddings_layernorm"]
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        norms += [prefix + "input_layernorm", prefix + "post_attention_layernorm"]
        linears = {
            "self_attention.query_key_value": (3 * hidden, hidden),
            "self_attention.dense": (hidden, hidden),
            "mlp.dense_h_to_4h": (4 * hidden, hidden),
            "mlp.dense_4h_to_h": (hidden, 4 * hidden),
        }
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            shapes[f"{prefix}{name}.bias"] = shape[:1]
    for norm in [*norms, "transformer.ln_f"]:
        shapes[norm + ".weight"] = shapes[norm + ".bias"] = (hidden,)
    return shapes


def is_computed(name: str) -> bool:
    """Whether a tensor is one that older libraries saved, and that both sides compute from the config."""
    return name.endswith(".rotary_emb.inv_freq")


def canonical_name(name: str, config: dict[str, Any]) -> str:
    """A tensor's name with its prefix: the published Bloom checkpoints leave `transformer.` out."""
    if config["model_type"] == "bloom" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name


def lora_a(seed: int, name: str, shape: tuple[int, int]) -> np.ndarray:
    """The start value of LoRA's A, shape (r, in), float32, the same on both sides (B starts at zero).

    `name` is the parameter's in either framework: its layer and target module decide.
    Uniform within ±1/√in, which is what Kaiming's rule with a = √5 gives (peft's and PaddleNLP's default).
    """
    parts = name.split(".")
    layer, target = next(part for part in parts if part.isdigit()), parts[parts.index("lora_A") - 1]
    bound = 1.0 / math.sqrt(shape[1])
    return _generator(seed, f"lora_a.{layer}.{target}").uniform(-bound, bound, shape).astype(np.float32)


def _random_checkpoint(name: str, preset: Preset, seed: int) -> Checkpoint:
    content = json.dumps([WRITER_VERSION, preset.config, preset.checkpoint_dtype, seed], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = cache_folder() / "checkpoints" / f"{name}-seed{seed}-{key}"
    with only_one("checkpoints"):
        if not folder.exists():
            part = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            try:
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


def write_random(
    folder: Path, preset: Preset, seed: int, shard_bytes: int = SHARD_BYTES, description: str = "weights"
) -> None:
    """Writes config.json and seeded random weights, one shard in memory at a time, with a progress bar.

    Matrices are normal with the config's standard deviation. Norms and biases get the same noise around 1 and 0, so
    that a tensor loaded into the wrong place shows in the loss. Each tensor's values depend on seed and name alone.
    """
    (folder / "config.json").write_text(json.dumps(preset.config | {"torch_dtype": preset.checkpoint_dtype}, indent=2))
    dtype = np.dtype(preset.checkpoint_dtype)
    shards: list[list[str]] = [[]]
    size = 0
    shapes = tensor_shapes(preset.config)
    for name, shape in shapes.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if size and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    weight_map: dict[str, str] = {}
    for index, names in enumerate(track(shards, description=description, disable=len(shards) == 1), 1):
        file = _weight_file_name(index, len(shards))
        save_file({name: _random_tensor(name, shapes[name], preset, seed, dtype) for name in names}, folder / file)
        follow_umask(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index_json, indent=2))
    fingerprint = {"weights_sha256": _sha256_of(_weight_files(folder))}
    (folder / FINGERPRINT).write_text(json.dumps(fingerprint))


def _random_tensor(name: str, shape: tuple[int, ...], preset: Preset, seed: int, dtype: np.dtype) -> np.ndarray:
    """One tensor, made in stretches of rows: in float32 a vocabulary's embedding would be several GB."""
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


def _weight_files(folder: Path) -> list[Path]:
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


def _weight_file_name(number: int, of: int) -> str:
    return SINGLE if of == 1 else f"model-{number:05}-of-{of:05}.safetensors"


def _bytes_of(file: Path, name: str) -> tuple[str, str]:
    """A tensor's dtype and the digest of its bytes, which NumPy could not hold in bfloat16."""
    with file.open("rb") as content:  # the format: a length of 8 bytes, a header of JSON, the tensors
        size = int.from_bytes(content.read(8), "little")
        about = json.loads(content.read(size))[name]
        first, end = about["data_offsets"]
        content.seek(8 + size + first)
        digest, left = hashlib.sha256(), end - first
        while block := content.read(min(left, 1 << 22)):
            digest.update(block)
            left -= len(block)
    return about["dtype"], digest.hexdigest()


def _sha256_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            while block := content.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that say how text becomes tokens, used here or not, in the order of names."""
    return sorted({file for glob in TOKENIZER_FILES for file in folder.glob(glob) if not file.is_dir()})


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            f"--model {name}: no preset ({', '.join(PRESETS)}), no folder, and the hub did not give it: {reason}"
        ) from None
