"""Reads a checkpoint's tokenizer.model by sentencepiece. It gives the tokens of transformers 4's slow LlamaTokenizer.

Text that spells a special or added token becomes that token. The text between two of these is encoded by itself.
"""

import re
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

from tunebench.errors import BadInput

CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast")
DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
NAMES = (*DEFAULTS, "pad_token", "sep_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
# Settings that change the tokens and are not supported here, with the values that change nothing.
PLAIN: dict[str, tuple] = {
    "add_prefix_space": (None, True),
    "auto_map": (None,),
    "do_lower_case": (None, False),
    "sp_model_kwargs": (None, {}),
    "split_special_tokens": (None, False),
}
TIKTOKEN = rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n"
NO_PREFIX = b"\x1a\x02\x18\x00"  # appended to a model: normalizer_spec { add_dummy_prefix: false }
SPACE = "▁"


class Encoded(NamedTuple):
    """The tokens of a text."""

    ids: list[int]


class SentencePiece:
    """A tokenizer.model with those methods of the tokenizers library that this project uses.

    `settings`, `named` and `added` are the contents of tokenizer_config.json, special_tokens_map.json and
    added_tokens.json. Raises `BadInput` where it would give other tokens than transformers' class.
    """

    def __init__(self, path: Path, settings: dict[str, Any], named: dict[str, Any], added: dict[str, Any]) -> None:
        self._path = path
        content = path.read_bytes()
        if not content:
            raise self._refusal("it is empty")
        if re.match(TIKTOKEN, content):
            raise self._refusal("it is in tiktoken's format")
        # Legacy tokenizers add a space to the text after a special token, as transformers did before 4.31.
        self._legacy = settings.get("legacy") is not False
        try:
            self._model = SentencePieceProcessor(model_proto=content + NO_PREFIX * (not self._legacy))
        except (RuntimeError, OSError, ValueError) as error:
            raise self._refusal(f"sentencepiece cannot read it ({' '.join(str(error).split())})") from None
        if settings.get("tokenizer_class") not in CLASSES:
            raise self._refusal(f"tokenizer_config.json asks for a {settings['tokenizer_class']}")
        for name, harmless in PLAIN.items():
            if settings.get(name) not in harmless:
                raise self._refusal(f"tokenizer_config.json asks for {name} {settings[name]!r}")
        self._special = self._named(settings, named)
        self._unknown = self._special.get("unk_token", DEFAULTS["unk_token"])
        self._ids = self._ids_of(settings, added)
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[Encoded]:
        """The tokens of each text, computed on all cores. It adds no special tokens."""
        assert not add_special_tokens
        split = [self._parts(text) for text in texts]
        encoded = iter(self._pieces([part for parts in split for part in parts if isinstance(part, str)]))
        return [
            Encoded(list(chain.from_iterable(next(encoded) if isinstance(part, str) else [part] for part in parts)))
            for parts in split
        ]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token; None where the tokenizer does not have it."""
        piece = self._model.piece_to_id(token)
        return self._ids.get(token, piece if self._model.id_to_piece(piece) == token else None)

    def _parts(self, text: str) -> list[str | int]:
        """The ids of the special and added tokens in a text, and the texts between them."""
        if text and not self._legacy:
            text = SPACE + text.replace(SPACE, " ")
        parts = self._split.split(text)  # texts at even indices, tokens at odd ones
        if not self._legacy and len(parts) > 1 and parts[0] == SPACE and parts[1] in self._special.values():
            parts[0] = ""
        return [self._ids[part] if i % 2 else part for i, part in enumerate(parts) if part]

    def _pieces(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts without special tokens."""
        # Without its own prefix sentencepiece may drop leading spaces, so an unknown token goes before them.
        prefixed = [not self._legacy and text.startswith((SPACE, " ")) for text in texts]
        before = len(self._model.encode(self._unknown))
        given = [self._unknown * prefix + text for text, prefix in zip(texts, prefixed, strict=True)]
        found = self._model.encode(given) if given else []
        return [ids[before * prefix :] for ids, prefix in zip(found, prefixed, strict=True)]

    def _named(self, settings: dict[str, Any], named: dict[str, Any]) -> dict[str, str]:
        """The special tokens by their names."""
        special: dict[str, str] = {}
        for name in NAMES:
            found = [self._text(name, source[name]) for source in (settings, named) if source.get(name) is not None]
            if len(set(found)) > 1:
                raise self._refusal(
                    f"{name} is {found[0]!r} in tokenizer_config.json, {found[1]!r} in special_tokens_map.json"
                )
            if found or (name in DEFAULTS and name not in settings):
                special[name] = found[0] if found else DEFAULTS[name]
        for source in (settings, named):
            for name in LISTS:
                tokens = source.get(name) or []
                tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
                if not isinstance(tokens, list):
                    raise self._refusal(f"{name} must be a list, not {tokens!r}")
                special |= {f"{name} {text}": text for text in (self._text(name, token) for token in tokens)}
        return {name: text for name, text in special.items() if text}

    def _ids_of(self, settings: dict[str, Any], added: dict[str, Any]) -> dict[str, int]:
        """The id of each special or added token."""
        given = dict(added)
        listed = settings.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict):
            raise self._refusal("added_tokens_decoder must be an object")
        given |= {self._text("added_tokens_decoder", token): number for number, token in listed.items()}
        ids: dict[str, int] = {}
        for token in (*given, *self._special.values()):
            piece = self._model.piece_to_id(token)
            known = piece if self._model.id_to_piece(piece) == token else None
            number = given.get(token, known)
            if number is None:
                raise self._refusal(f"it has no token {token!r}, and no other file gives its id")
            if isinstance(number, str) and re.fullmatch("[0-9]{1,10}", number):  # the keys of added_tokens_decoder
                number = int(number)
            if type(number) is not int or not 0 <= number < 2**31:
                raise self._refusal(f"the added token {token!r} has the id {number!r}")
            if token:
                ids[token] = number
        return ids

    def _text(self, name: str, token: Any) -> str:
        """The text of a token, which may be a serialized AddedToken."""
        if isinstance(token, dict):
            for rule in ("lstrip", "rstrip", "single_word"):
                if token.get(rule):
                    raise self._refusal(f"{name} {token.get('content')!r} asks for {rule}")
            token = token.get("content")
        if not isinstance(token, str):
            raise self._refusal(f"{name} must be text, not {token!r}")
        return token

    def _refusal(self, reason: str) -> BadInput:
        return BadInput(f"{self._path} cannot be used: {reason}; put the checkpoint's tokenizer.json beside it")
