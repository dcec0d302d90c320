"""The tokenizer: a byte-level BPE trained on the embedded data, or the one of a Hugging Face checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile

import synthetic
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 8192
SPECIAL = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2
PAD, EOS = 0, 2
TRAINING_SAMPLES = 4000  # of each language


def train() -> Tokenizer:
    """Trains on the embedded data; the same bytes every time."""
    tokenizer = Tokenizer(models.BPE())
    # Single digits and single Han characters are tokens of their own, like in the llama family.
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
    records = [r for language in synthetic.SHAPES for r in synthetic.generate(language, TRAINING_SAMPLES)]
    tokenizer.train_from_iterator(
        [t for r in records for t in r.values()] + [f"{w} {w}" for w in synthetic.lexicon()], trainer
    )
    return tokenizer
