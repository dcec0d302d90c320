"""Makes the batch plan that a run on either framework reads: samples, then tokens, then global batches.

    python data/prepare.py --model llama-tiny --data alpaca --bsz 8 --steps 30

The scripts call it when their plan is missing; calling it first saves that wait.
"""

import pathlib
import runpy

BOOTSTRAP = pathlib.Path(__file__).resolve().parents[1] / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter"]("torch", "paddle")

from typing import Any

import batching
import numpy as np
import sources
import tokenizer as tokenizers_of
from rich.progress import track

from tunebench.cache import cache_folder, only_one
from tunebench.checkpoint import Checkpoint, find_checkpoint
from tunebench.errors import BadInput, one_line_refusals
from tunebench.flags import DATA_NAMES, Parser, add_plan_flags, resolve_plan_flags
from tunebench.plan import (
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    Rows,
    Sample,
    Samples,
    plan_path,
    read_plan,
    read_samples,
    tokens_key,
    write_plan,
    write_samples,
)

CHUNK = 500  # samples encoded between two moves of the progress bar


def main() -> None:
    """Makes the plan of the flags unless it is there, and prints where it is and what it holds."""
    parser = Parser(prog="prepare.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_plan_flags(parser)
    options = resolve_plan_flags(vars(parser.parse_args()))
    checkpoint = find_checkpoint(options["model"], options["weights"], options["seed"])
    path = plan_path(options, checkpoint)
    with only_one("prepare"):
        try:
            plan = read_plan(path)
        except (FileNotFoundError, BadInput):
            make_plan(options, checkpoint)
            plan = read_plan(path)
    info = plan.info()
    print(
        f"plan {plan.sha256[:12]}: {plan.steps} steps of {plan.bsz} from {info.samples} samples of {info.data}, "
        f"{info.effective_tokens} effective of {info.padded_tokens} padded tokens, {path}",
        flush=True,
    )


def make_plan(options: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Tokenizes what is not tokenized yet and writes the plan."""
    samples, skipped, pad_id = tokenized(options, checkpoint)
    if skipped:
        print(f"--skip-bad left {len(skipped)} malformed samples out, the first: {skipped[0]}", flush=True)
    rows = batch(samples.lengths, options)
    data = options["data"] if options["data"] in DATA_NAMES else pathlib.Path(options["data"]).name
    about = {"data": data, "samples": len(samples.lengths), "skipped": len(skipped), "pad_id": pad_id}
    write_plan(plan_path(options, checkpoint), about | {"bsz": options["bsz"]}, samples, rows)


def batch(lengths: np.ndarray, options: dict[str, Any]) -> Rows:
    """The rows of all global batches, from the tokens of each sample. Raises `BadInput` where they fill none."""
    bsz, packing, seed = options["bsz"], options["packing"], options["seed"]
    epoch, what = batching.single(len(lengths)), "samples"
    if packing:
        if packing < lengths.max():
            raise BadInput(f"--packing {packing}: a sample has {lengths.max()} tokens; use at least {lengths.max()}")
        epoch, what = batching.pack(lengths, packing), "packed rows"
        rows = len(epoch.starts) - 1
        print(f"--packing {packing}: {len(lengths)} samples fill {lengths.sum() / rows / packing:.1%} of {rows} rows")
    rows = bsz * (options["steps"] or 0)
    if options["epochs"] is not None:
        whole, left = divmod(options["epochs"] * (len(epoch.starts) - 1), bsz)
        rows = whole * bsz
        if not rows:
            raise BadInput(f"--bsz {bsz}: {options['epochs']} epoch(s) of {left} {what} fill no batch of it")
        if left:
            print(f"--epochs {options['epochs']}: the last {left} {what} fill no batch of {bsz}: left out", flush=True)
    if packing:
        return batching.shuffled(epoch, rows, seed)
    if options["order"] == "grouped":
        return batching.grouped(epoch, rows, seed, lengths, bsz)
    return batching.in_turn(epoch, rows)


def tokenized(options: dict[str, Any], checkpoint: Checkpoint) -> tuple[Samples, list[str], int]:
    """The tokenized samples, what was skipped, and the padding token; kept in the cache."""
    cached = cache_folder() / "tokens" / f"{tokens_key(options, checkpoint)}.safetensors"
    try:
        about, samples = read_samples(cached)
    except (FileNotFoundError, BadInput):
        own = tokenizers_of.of_checkpoint(checkpoint.folder)
        folder = None if own is None else checkpoint.folder
        tokenizer = own or tokenizers_of.embedded(cache_folder())
        loaded = sources.load(options["data"], options["samples"], options["skip_bad"])
        samples = Samples.of(encode(tokenizer, loaded.samples, tokenizers_of.eos_id(tokenizer, folder)))
        about = {"skipped": loaded.skipped, "pad_id": tokenizers_of.pad_id(tokenizer, folder)}
        write_samples(cached, about, samples)
    return samples, about["skipped"], about["pad_id"]


def encode(tokenizer: Any, samples: list[sources.Sample], eos_id: int) -> list[Sample]:
    """Prompts cut to 256 tokens, responses to 384 and closed by EOS, with a progress bar."""
    rows: list[Sample] = []
    for start in track(range(0, len(samples), CHUNK), description=f"tokenizing {len(samples)} samples"):
        chunk = samples[start : start + CHUNK]
        prompts = tokenizer.encode_batch([sample.prompt for sample in chunk], add_special_tokens=False)
        responses = tokenizer.encode_batch([sample.response for sample in chunk], add_special_tokens=False)
        for prompt, response in zip(prompts, responses, strict=True):
            ids = prompt.ids[:PROMPT_TOKENS]
            if not ids or not response.ids:
                raise BadInput(f"sample {len(rows) + 1}: the tokenizer makes no token of its prompt or response")
            rows.append((np.array([*ids, *response.ids[:RESPONSE_TOKENS], eos_id], dtype=np.int32), len(ids)))
    return rows


if __name__ == "__main__":
    with one_line_refusals("prepare.py"):
        main()
