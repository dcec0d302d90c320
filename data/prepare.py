"""Makes the batch plan that runs of both frameworks read: samples, then tokens, then global batches.

    python data/prepare.py --model llama-tiny --data alpaca --bsz 8 --steps 30

A script whose plan is missing calls it.
"""

import hashlib
import json
import pathlib
import runpy

BOOTSTRAP = pathlib.Path(__file__).resolve().parents[1] / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter_environment"]("torch", "paddle")

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, NamedTuple

import batching
import numpy as np
import sources
import tokenizer as tokenizers_of

from tunebench.errors import BadInput, one_line_refusals
from tunebench.files import cache_folder, only_one
from tunebench.flags import DEFAULT_FIXED_SAMPLES, Parser, add_plan_flags, fixed_tokens, resolve_plan_flags
from tunebench.models.checkpoint import Checkpoint, describe_checkpoint, find_checkpoint
from tunebench.plan import (
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    Rows,
    Samples,
    data_name,
    plan_path,
    ranges,
    read_plan,
    read_samples,
    row_seeds,
    tokens_key,
    write_plan,
    write_samples,
)
from tunebench.progress import told

CHUNK = 500  # samples encoded at a time
AHEAD = 3  # chunks read before the tokens of the first one are there
MOST_ID = 2**31 - 1  # the largest token id: plans hold 32-bit ids
TEXTS = 2000  # embedded samples from whose text --data fixed:N cuts its samples
MOST_TOKENS = 2**28  # the most tokens of --data fixed:N: 1 GB
MOST_ROWS = 2**26  # the most rows of a plan: half a gigabyte for each of its arrays


def main() -> None:
    """Makes the plan of the flags where it is missing, and prints its path and content."""
    parser = Parser(prog="prepare.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_plan_flags(parser)
    parser.add_argument("--config-alone", action="store_true", help="make the plan without the model's weights")
    options = resolve_plan_flags(vars(parser.parse_args()))
    find = describe_checkpoint if options["config_alone"] else find_checkpoint
    checkpoint = find(options["model"], options["weights"], options["seed"], options["layers"])
    path = plan_path(options, checkpoint)
    with only_one("prepare"):
        try:
            plan = read_plan(path)
        except (FileNotFoundError, BadInput):
            make_plan(options, checkpoint)
            plan = read_plan(path)
    plan.print_remarks()
    info = plan.info()
    print(
        f"plan {plan.sha256[:12]}: {plan.steps} steps of {plan.bsz} from {info.samples} samples of {info.data}, "
        f"{info.effective_tokens} effective of {info.padded_tokens} padded tokens, {path}",
        flush=True,
    )


def make_plan(options: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Tokenizes the samples, unless the cache has their tokens, and writes the plan."""
    found, samples = tokenized(options, checkpoint)
    drawn = batching.drawn(len(samples.lengths), options["plan_seed"])
    rows = batch(samples.lengths[drawn], options)
    rows = rows._replace(order=drawn[rows.order])
    about = {"data": data_name(options["data"]), "samples": len(samples.lengths), "skipped": len(found["skipped"])}
    about |= {"pad_id": found["pad_id"], "bsz": options["bsz"], "remarks": remarks(about["data"], found)}
    how = [*(options[name] for name in ("bsz", "steps", "epochs", "order", "packing")), *row_seeds(options)]
    about["drawn_from"] = hashlib.sha256(json.dumps([samples.digest(), how]).encode()).hexdigest()
    write_plan(plan_path(options, checkpoint), about, samples, rows)


def remarks(data: str, found: dict[str, Any]) -> list[str]:
    """Remarks on the data, a line each: samples and columns left out, and whether the embedded tokenizer was used."""
    lines = []
    if skipped := found["skipped"]:
        lines.append(f"--data {data}: {len(skipped)} malformed sample(s) left out, the first: {data}{skipped[0]}")
    if left_out := found["left_out"]:
        lines.append(f"--data {data}: columns left out: {sources.in_words(left_out)}")
    if found["replaced"]:
        size = tokenizers_of.VOCAB_SIZE
        lines.append(f"--model: its folder has no tokenizer: the text is encoded by the embedded one of {size} tokens")
    return [" ".join(line.splitlines()) for line in lines]


def batch(lengths: np.ndarray, options: dict[str, Any]) -> Rows:
    """The rows of all global batches, from the tokens of each sample. Raises `BadInput` where there are none."""
    bsz, packing, seed = options["bsz"], options["packing"], options["seed"] + 2**32 * options["plan_seed"]
    epoch, what = batching.single(len(lengths)), "samples"
    if packing:
        if packing < lengths.max():
            raise BadInput(f"--packing {packing}: a sample has {lengths.max()} tokens; use at least {lengths.max()}")
        epoch, what = batching.pack(lengths, packing), "packed rows"
        rows = len(epoch.starts) - 1
        print(f"--packing {packing}: {len(lengths)} samples fill {lengths.sum() / rows / packing:.1%} of {rows} rows")
    each = len(epoch.starts) - 1
    if options["epochs"] is None:
        rows = bsz * options["steps"]
        check_size(f"--steps {options['steps']}", rows, bsz)
    else:
        check_size(f"--epochs {options['epochs']}", options["epochs"] * each, each)
        whole, left = divmod(options["epochs"] * each, bsz)
        rows = whole * bsz
        if not rows:
            raise BadInput(
                f"--epochs {options['epochs']}: {left} {what} fill no batch of --bsz {bsz}; "
                f"use --bsz {left} or less, or --epochs {-(-bsz // each)} or more"
            )
        if left:
            print(f"--epochs {options['epochs']}: the last {left} {what} fill no batch of {bsz}: left out", flush=True)
    if packing:
        made = batching.shuffled(epoch, rows, seed)
    elif options["order"] == "grouped":
        made = batching.grouped(epoch, rows, seed, lengths, bsz)
    else:
        made = batching.in_turn(epoch, rows)
    if options["steps"] and options["paired_halves"]:
        return batching.paired_halves(made, bsz, min(options["warmup_steps"], options["steps"] - 1))
    return made


def check_size(flag: str, rows: int, unit: int) -> None:
    """Raises `BadInput` where a plan has more than MOST_ROWS rows. `unit` is the number of rows of a step or epoch."""
    if unit > MOST_ROWS:
        raise BadInput(f"--bsz {unit}: a plan has room for {MOST_ROWS} rows; use a smaller one")
    if rows > MOST_ROWS:
        raise BadInput(
            f"{flag}: a plan has room for {MOST_ROWS} rows, and this is {rows}; use at most {MOST_ROWS // unit}"
        )


def tokenized(options: dict[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, Any], Samples]:
    """What was found while tokenizing, and the tokenized samples. The cache keeps both."""
    cached = cache_folder() / "tokens" / f"{tokens_key(options, checkpoint)}.safetensors"
    try:
        return read_samples(cached)
    except (FileNotFoundError, BadInput):
        pass
    own = tokenizers_of.of_checkpoint(checkpoint.folder)
    folder = None if own is None else checkpoint.folder
    tokenizer = own or tokenizers_of.embedded(cache_folder())
    found = {"skipped": [], "left_out": [], "replaced": own is None and options["weights"] == "pretrained"}
    found["pad_id"], eos_id = tokenizers_of.pad_id(tokenizer, folder), tokenizers_of.eos_id(tokenizer, folder)
    if fixed_tokens(options["data"]) is None:
        source = sources.Source(options["data"], options["samples"], options["skip_bad"])
        samples = encode(tokenizer, source, eos_id)
        found |= {"skipped": source.skipped, "left_out": sorted(source.left_out)}
    else:
        samples = fixed(tokenizer, options, checkpoint.config.get("max_position_embeddings"), eos_id)
    write_samples(cached, found, samples)
    return found, samples


def encode(tokenizer: Any, source: sources.Source, eos_id: int) -> Samples:
    """Encodes samples and shows the progress: prompts cut to 256 tokens, responses to 384 and followed by EOS."""
    tokens = bytearray()  # it grows without a copy of what it holds
    lengths, prompt_lengths = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)]
    done = 0
    for prompts, responses in _encoded(tokenizer, source):
        empty = np.flatnonzero((prompts.lengths == 0) | (responses.lengths == 0))
        if len(empty):
            raise BadInput(f"sample {done + 1 + empty[0]}: the tokenizer makes no token of its prompt or response")
        first, second = np.minimum(prompts.lengths, PROMPT_TOKENS), np.minimum(responses.lengths, RESPONSE_TOKENS)
        ends = np.cumsum(first + second + 1)
        chunk = np.full(ends[-1], eos_id, dtype=np.int32)
        starts = ends - first - second - 1
        chunk[ranges(starts, first)] = prompts.tokens[ranges(prompts.starts, first)]
        chunk[ranges(starts + first, second)] = responses.tokens[ranges(responses.starts, second)]
        tokens += chunk.data
        lengths.append(first + second + 1)
        prompt_lengths.append(first.astype(np.int32))
        done += len(first)
    offsets = np.cumsum(np.concatenate(lengths), dtype=np.int64)
    return Samples(np.frombuffer(tokens, dtype=np.int32), offsets, np.concatenate(prompt_lengths))


def fixed(tokenizer: Any, options: dict[str, Any], positions: int | None, eos_id: int) -> Samples:
    """The samples of --data fixed:N, N tokens each.

    The embedded data's prompts, end to end, are cut into prompts, and its responses into responses followed by EOS.
    Both start again where they are used up. Prompts have the same share of all tokens as in the embedded data.
    """
    size = fixed_tokens(options["data"])
    count = options["samples"] or min(DEFAULT_FIXED_SAMPLES, MOST_TOKENS // size)
    if positions is not None and size > positions:
        raise BadInput(
            f"--data {options['data']}: the model takes at most {positions} tokens (max_position_embeddings, or "
            "Mistral's sliding_window); use at most that"
        )
    if size * count > MOST_TOKENS:
        raise BadInput(f"--samples {count} of {options['data']} are too many; use at most {MOST_TOKENS // size}")
    encoded = list(_encoded(tokenizer, sources.Source("synthetic-en", TEXTS, skip_bad=False)))
    prompts, responses = (np.concatenate([part[side].tokens for part in encoded]) for side in (0, 1))
    if not len(prompts) or not len(responses):
        raise BadInput(f"--data {options['data']}: the tokenizer makes no token of the text")
    share = len(prompts) / (len(prompts) + len(responses) + TEXTS)
    prompt = min(max(round(size * share), 1), size - 2)
    tokens = np.full((count, size), eos_id, dtype=np.int32)
    tokens[:, :prompt] = np.resize(prompts, (count, prompt))
    tokens[:, prompt:-1] = np.resize(responses, (count, size - prompt - 1))
    return Samples(tokens.reshape(-1), np.arange(count + 1) * size, np.full(count, prompt, dtype=np.int32))


class Texts(NamedTuple):
    """The tokens of texts, one after the other (int32), and the number of tokens of each (int64)."""

    tokens: np.ndarray
    lengths: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """The start of each text in `tokens`."""
        return np.cumsum(self.lengths) - self.lengths


def _encoded(tokenizer: Any, source: sources.Source) -> Iterator[tuple[Texts, Texts]]:
    """Yields the tokens of the prompts and of the responses of CHUNK samples at a time, and shows the progress.

    A thread tokenizes while this one reads on. The libraries spread a chunk over all cores, and leave Python to this
    thread meanwhile.
    """
    worker = ThreadPoolExecutor(1, "tokenizer")
    waiting: deque[tuple[Future[tuple[Texts, Texts]], int]] = deque()
    told_of = 0
    try:
        with told(f"tokenizing {source.total} samples", source.total) as advance:
            for chunk in chain(_chunks(source), [None]):
                if chunk is not None:
                    waiting.append((worker.submit(_encoded_chunk, tokenizer, chunk), source.place))
                while len(waiting) > (0 if chunk is None else AHEAD):
                    made, place = waiting.popleft()
                    yield made.result()
                    advance(place - told_of)
                    told_of = place
    finally:
        worker.shutdown(cancel_futures=True)


def _chunks(source: sources.Source) -> Iterator[list[sources.Sample]]:
    samples = iter(source)
    while chunk := list(islice(samples, CHUNK)):
        yield chunk


def _encoded_chunk(tokenizer: Any, chunk: list[sources.Sample]) -> tuple[Texts, Texts]:
    texts = [*(sample.prompt for sample in chunk), *(sample.response for sample in chunk)]
    # Without the offsets of tokens in their text, which nobody reads. Only the tokenizers library has this.
    encode_batch = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    try:
        ids = [encoded.ids for encoded in encode_batch(texts, add_special_tokens=False)]
    except Exception as error:  # the library raises plain Exception, such as for a missing unknown token
        raise BadInput(f"the tokenizer of --model cannot encode the data: {error}; mend its tokenizer.json") from None
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    tokens = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=lengths.sum())
    if tokens.max(initial=0) > MOST_ID:
        raise BadInput(f"the tokenizer of --model gives a token above {MOST_ID}; mend its tokenizer.json")
    tokens, half, end = tokens.astype(np.int32), len(chunk), lengths[: len(chunk)].sum()
    return Texts(tokens[:end], lengths[:half]), Texts(tokens[end:], lengths[half:])


if __name__ == "__main__":
    with one_line_refusals("prepare.py"):
        main()
