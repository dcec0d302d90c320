"""Sizes of a model and a batch whose products can be told apart, so that one trace holds for all sizes.

Each size is a prime number times a power of two. The bytes of a tensor then factor into sizes in one way: they are a
term, a number times a product of sizes.
"""

import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tunebench.flags import Flags, parse_flags
from tunebench.models.checkpoint import Checkpoint, describe_checkpoint
from tunebench.plan import MicroBatch

# Sizes, each a prime times a power of two.
# - mp: --mp. kv: key and value heads of a process. group: heads for each of them. head: width of a head.
# - joined: heads of a query, key and value matrix in one, for each key head: those of `group`, and two.
# - hidden: width of the hidden state, divided by the number of heads.
# - inner: width of the feed-forward layer, vocabulary: number of words, both of a process.
# - rows, width: of the micro-batch. labels: positions with a label. rank: LoRA's.
SYMBOLS = {
    "mp": 31,
    "kv": 13,
    "group": 17,
    "joined": 17 + 2,
    "head": 8 * 11,
    "hidden": 8 * 29,
    "inner": 64 * 43,
    "vocabulary": 64 * 23,
    "rows": 5,
    "width": 128 * 7,
    "labels": 8 * 37,
    "rank": 41,
}
PRIMES = {name: size >> (size & -size).bit_length() - 1 for name, size in SYMBOLS.items()}
SMALL_BYTES = 4096  # bytes of a tensor that is left out: it has no size among its factors

Monomial = tuple[int, ...]  # the exponents of SYMBOLS
Amounts = dict[tuple[str, Monomial], float]  # numbers before monomials, by kind of tensor


class Kind(NamedTuple):
    """What decides which tensors a pass makes, beside sizes. `types` is --amp, or fp32.

    `mp`: whether tensor parallelism slices the layers. `adds`: whether gradients of several passes are added. `lean`:
    whether RMSNorm is one kernel.
    """

    family: str
    tied: bool
    method: str
    types: str
    attention: str
    padding_free: bool
    recompute: bool
    head: str
    mp: bool
    adds: bool
    lean: bool


def term(size: int) -> tuple[Monomial, float] | None:
    """The sizes whose product is in `size` bytes, and the number before it. None for a tensor too small to count.

    Raises ValueError where other sizes are in it.
    """
    exponents, rest = [], size
    for prime in PRIMES.values():
        exponent = 0
        while rest % prime == 0:
            rest //= prime
            exponent += 1
        exponents.append(exponent)
    while rest % 2 == 0 and rest:
        rest //= 2
    while rest % 3 == 0 and rest:
        rest //= 3
    if rest != 1:
        if size <= SMALL_BYTES:
            return None
        raise ValueError(f"{size} bytes are no product of the known sizes: {rest} is left")
    monomial = tuple(exponents)
    return monomial, size / math.prod(s**e for s, e in zip(SYMBOLS.values(), monomial, strict=True))


def symbolic(kind: Kind, layers: int, own_width: bool) -> tuple[Flags, Checkpoint, MicroBatch]:
    """The flags of such a run, its model of so many layers and its micro-batch, with the sizes of SYMBOLS.

    `own_width`: whether the heads together may have another width than the hidden state.
    """
    of = SYMBOLS | ({} if kind.mp else {"mp": 1})
    heads = of["mp"] * of["kv"] * of["group"]
    config: dict[str, Any] = {"model_type": kind.family, "vocab_size": of["mp"] * of["vocabulary"]}
    if kind.family == "bloom":
        config |= {"n_layer": layers, "n_head": of["mp"] * of["kv"], "hidden_size": of["mp"] * of["kv"] * of["head"]}
    else:
        config |= {
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": of["mp"] * of["kv"],
            "head_dim": of["head"],
            "hidden_size": heads * of["hidden" if own_width else "head"],
            "intermediate_size": of["mp"] * of["inner"],
            "max_position_embeddings": of["width"],
            "tie_word_embeddings": kind.tied,
        }
    rows = 1 if kind.padding_free else of["rows"]
    words = ["--plan", f"--data=fixed:{of['width']}", f"--samples={4 * rows}", "--steps=2"]
    words += [f"--nproc={of['mp']}", f"--mp={of['mp']}", f"--micro-bsz={rows}", f"--bsz={rows * (1 + kind.adds)}"]
    words += [f"--attention={kind.attention}", f"--head={kind.head}"]
    words += ["--padding-free"] * kind.padding_free + ["--recompute"] * kind.recompute
    words += ["--lean"] * kind.lean
    words += [f"--dtype={'fp32' if kind.types == 'fp32' else 'bf16'}"]
    words += [f"--amp={kind.types}"] * (kind.types != "fp32")
    words += [f"--lora-r={of['rank']}"] * (kind.method == "lora")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        flags = parse_flags(kind.method, [f"--model={folder}", *words])
        checkpoint = describe_checkpoint(flags.model, flags.weights, flags.seed, flags.layers)
    shape = (rows, of["width"])
    zeros, labelled = np.zeros(shape, dtype=np.int64), np.arange(of["labels"])
    lengths = [of["width"]] if kind.padding_free else None
    return flags, checkpoint, MicroBatch(zeros, zeros, zeros + 1, zeros, labelled, lengths)


def add_up(sizes: Iterable[tuple[str, int]]) -> Amounts:
    """The sum of tensors' bytes, each with a kind, in terms."""
    amounts: Amounts = {}
    for kind, size in sizes:
        if size and (made := term(size)) is not None:
            monomial, number = made
            amounts[kind, monomial] = amounts.get((kind, monomial), 0.0) + number
    return amounts
