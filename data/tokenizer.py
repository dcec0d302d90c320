"""The tokenizer of a model: that of a Hugging Face checkpoint, or the embedded one.

The embedded tokenizer is a byte-level BPE, trained on the embedded data. It needs no download and loses no text.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import synthetic
from spiece import SentencePiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tunebench.errors import BadInput
from tunebench.files import write_atomically
from tunebench.models.checkpoint import tokenizer_files

VOCAB_SIZE = 8192
SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2
PAD_ID, EOS_ID = 0, 2
TRAINING_SAMPLES = 4000  # per language


def train() -> Tokenizer:
    """Trains the embedded tokenizer. Its bytes are the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(synthetic.PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [f"{word} {word}" for word in synthetic.lexicon()]  # at the start of a text and after a space
    for language in synthetic.SHAPES:
        texts += [text for record in synthetic.generate(language, TRAINING_SAMPLES) for text in record.values()]
    tokenizer.train_from_iterator(texts, trainer)
    # Without added tokens, text that spells "</s>" stays text and survives encoding and decoding.
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []}))


def embedded(cache: Path) -> Tokenizer:
    """The embedded tokenizer from a cache folder. Trained and written there where it is missing or broken."""
    sources = b"".join(Path(module).read_bytes() for module in (synthetic.__file__, __file__))
    key = hashlib.sha256(sources + str(VOCAB_SIZE).encode()).hexdigest()[:12]
    path = cache / f"tokenizer-{key}.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
        if tokenizer.get_vocab_size() == VOCAB_SIZE:
            return tokenizer
    except Exception:  # the library raises plain Exception for a missing or broken file
        pass
    tokenizer = train()
    write_atomically(path, tokenizer.to_str().encode())
    return tokenizer


def of_checkpoint(folder: Path) -> Tokenizer | SentencePiece | None:
    """The tokenizer of a checkpoint folder; None where it has none. Raises `BadInput` for other kinds of tokenizer."""
    path, model = folder / "tokenizer.json", folder / "tokenizer.model"
    files = {file.name for file in tokenizer_files(folder)}
    if folder_instead := next((file for file in (path, model) if file.is_dir()), None):
        raise BadInput(f"{folder_instead} is a folder; put the checkpoint's file there")
    settings = _read(folder / "tokenizer_config.json")
    if path.name in files:
        return _from_json(path)
    if model.name in files:
        family = _read(folder / "config.json").get("model_type")
        if family not in ("llama", "mistral") and "tokenizer_class" not in settings:
            raise BadInput(f"{model} of a {family} model is not offered; put the checkpoint's tokenizer.json beside it")
        names = ("special_tokens_map.json", "added_tokens.json")
        return SentencePiece(model, settings, *(_read(folder / name) for name in names))
    others = sorted(files - {"tokenizer_config.json"})
    if others or settings.get("tokenizer_class") is not None:
        found = ", ".join(others) or f"tokenizer_config.json for a {settings['tokenizer_class']}"
        raise BadInput(
            f"{folder} has {found} and neither tokenizer.json nor tokenizer.model, which alone are read; "
            "put the checkpoint's tokenizer.json into it"
        )
    return None


def _from_json(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
        # A file may ask for padding or truncation. Both would change the tokens of a sample.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    except Exception as error:  # the library raises plain Exception
        raise BadInput(f"{path} is not a readable tokenizer: {str(error).splitlines()[0]}") from None


def eos_id(tokenizer: Tokenizer | SentencePiece, folder: Path | None) -> int:
    """The id that ends a response. `folder` is the checkpoint's, None for the embedded tokenizer. Raises `BadInput`."""
    if folder is None:
        return EOS_ID
    found = _special_id(tokenizer, folder, "eos_token")
    if found is None:
        raise BadInput(
            f"no eos_token_id in {folder / 'config.json'} and no eos_token in tokenizer_config.json beside it"
        )
    return found


def pad_id(tokenizer: Tokenizer | SentencePiece, folder: Path | None) -> int:
    """The id that fills short rows: the checkpoint's, or the end-of-sequence id where it names none it can embed."""
    if folder is None:
        return PAD_ID
    found = _special_id(tokenizer, folder, "pad_token")
    # Padding does not change the result, so another id may replace one that is beyond the model's vocabulary.
    beyond = found is not None and found >= _read(folder / "config.json").get("vocab_size", math.inf)
    return eos_id(tokenizer, folder) if found is None or beyond else found


def _special_id(tokenizer: Tokenizer | SentencePiece, folder: Path, name: str) -> int | None:
    """The id of a special token.

    config.json has an id or a list of ids. Otherwise tokenizer_config.json or special_tokens_map.json has the token.
    """
    value = _read(folder / "config.json").get(f"{name}_id")
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, int) and value >= 0:  # -1 stands for none
        return value
    token = _read(folder / "tokenizer_config.json").get(name) or _read(folder / "special_tokens_map.json").get(name)
    if isinstance(token, dict):  # a serialized AddedToken
        token = token.get("content")
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no such file. Raises `BadInput`."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a JSON object")
    return content
