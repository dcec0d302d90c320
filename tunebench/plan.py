"""The batch plan: a file with the tokens of each global batch. Both frameworks read the same file.

`data/prepare.py` writes it. A script whose plan is missing runs that program first.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tunebench.bootstrap import ROOT
from tunebench.errors import BadInput
from tunebench.files import cache_folder, write_atomically
from tunebench.flags import FIXED, HUB, Flags, is_named, plan_arguments
from tunebench.models.checkpoint import Checkpoint, tokenizer_files
from tunebench.processes import dying_with_parent, signal_in_words
from tunebench.record import PlanInfo

PLAN_VERSION = 4  # part of the cache key; raise it when a change of code gives the same inputs another plan
PROMPT_TOKENS, RESPONSE_TOKENS = 256, 384  # the published record's limits; the response's EOS comes on top
SLICES = 2**14  # slices of samples copied at a time
IGNORED = -100  # the label of a position that is not trained on


Sample = tuple[np.ndarray, int]  # its tokens (int32), and the number of prompt tokens among them
Passes = list[tuple[bool, "MicroBatch"]]


@dataclass(frozen=True)
class MicroBatch:
    """One replica's micro-batch. All arrays are int64.

    Padded arrays have the shape (micro_bsz, width), where `width` is the longest sample of the global batch.
    Padding-free arrays have the shape (1, tokens): all samples end to end, with the tokens of each in `lengths`.
    `width` and `tokens` are rounded up to a multiple that the plan names. In the latter the padding is one more sample
    without labels. Positions count from 0 in each sample. `labels` are shifted: the label at t is the token at t + 1,
    or -100 where the position is not trained on. `labelled` are the indices of the labels, in the flattened array.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    labelled: np.ndarray
    lengths: list[int] | None

    @property
    def targets(self) -> np.ndarray:
        """The labels at `labelled`."""
        return self.labels.flat[self.labelled]


@dataclass(frozen=True)
class Plan:
    """The global batches of a run. Row r of the plan is row r % bsz of step r // bsz: one sample, or several packed."""

    path: Path
    sha256: str
    about: dict[str, Any]
    tokens: np.ndarray  # all samples' tokens, one after the other, int32
    offsets: np.ndarray  # each sample's start in `tokens`, and the end; int64, (samples + 1,)
    prompt_lengths: np.ndarray  # int32, (samples,)
    rows: np.ndarray  # each row's first sample, and the number of samples; int64, (steps × bsz + 1,)
    padding_free: bool = False  # whether the run computes the samples without padding
    micro_bsz: int = 1  # rows of a micro-batch
    multiple: int = 1  # of which the width of a micro-batch is a multiple
    _ahead: dict[tuple, "Future[Passes]"] = field(default_factory=dict, repr=False)
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "batches"), repr=False)

    @property
    def bsz(self) -> int:
        """Rows of a global batch: without packing, samples."""
        return self.about["bsz"]

    @property
    def steps(self) -> int:
        """Global batches in the plan."""
        return (len(self.rows) - 1) // self.bsz

    def row_lengths(self, step: int) -> np.ndarray:
        """Tokens of each row of a step; shape (bsz,)."""
        return np.diff(self.offsets[self.rows[step * self.bsz : (step + 1) * self.bsz + 1]])

    def samples(self, step: int) -> int:
        """Samples of a step."""
        return int(self.rows[(step + 1) * self.bsz] - self.rows[step * self.bsz])

    def effective_tokens(self, step: int) -> int:
        """Non-padding input tokens of a step."""
        return int(self.row_lengths(step).sum())

    def padded_tokens(self, step: int) -> int:
        """Input tokens of a step, padding included."""
        if self.padding_free:
            return int(self.rounded_up(self.row_lengths(step).reshape(-1, self.micro_bsz).sum(axis=1)).sum())
        return int(self.rounded_up(self.row_lengths(step).max())) * self.bsz

    def rounded_up(self, tokens: Any) -> Any:
        """The next multiple of `multiple`, for a number or an array."""
        return -(-tokens // self.multiple) * self.multiple

    def of_run(self, flags: Flags) -> Self:
        """The same plan, computed as these flags say. Sequence parallelism gives all processes equally many tokens."""
        multiple = flags.mp if flags.sequence_parallel else 1
        return replace(self, padding_free=flags.padding_free, micro_bsz=flags.micro_bsz, multiple=multiple, _ahead={})

    def label_tokens(self, step: int) -> int:
        """Positions of a step with a label: responses and their EOS."""
        first, end = self.rows[step * self.bsz], self.rows[(step + 1) * self.bsz]
        return self.effective_tokens(step) - int(self.prompt_lengths[first:end].sum())

    def squared_lengths(self, step: int) -> int:
        """The sum over a step's samples of the square of their tokens."""
        first, end = self.rows[step * self.bsz], self.rows[(step + 1) * self.bsz]
        return int((np.diff(self.offsets[first : end + 1]) ** 2).sum())

    def micro_batches(self, step: int, micro_bsz: int, replica: int = 0, replicas: int = 1) -> Passes:
        """The micro-batches of one replica in a step, in order: its contiguous slice of the global batch, cut up.

        Each comes with whether it is the step's last. A thread makes the next step's while this step runs.
        """
        how = micro_bsz, replica, replicas
        made = self._ahead.pop((step, *how), None)
        passes = made.result() if made else list(self.passes(step, *how))
        if step + 1 < self.steps:
            self._ahead[(step + 1, *how)] = self._worker.submit(lambda: list(self.passes(step + 1, *how)))
        return passes

    def passes(self, step: int, micro_bsz: int, replica: int, replicas: int) -> Iterator[tuple[bool, MicroBatch]]:
        """The micro-batches of `micro_batches`, made as they are asked for."""
        width, share = int(self.rounded_up(self.row_lengths(step).max())), self.bsz // replicas
        first = step * self.bsz + replica * share
        for start in range(first, first + share, micro_bsz):
            samples = range(self.rows[start], self.rows[start + micro_bsz])
            lengths = [int(self.offsets[i + 1] - self.offsets[i]) for i in samples]
            shape = (1, self.rounded_up(sum(lengths))) if self.padding_free else (micro_bsz, width)
            arrays: dict[str, np.ndarray] = {
                name: np.zeros(shape, dtype=np.int64) for name in ("position_ids", "attention_mask")
            }
            arrays["input_ids"] = np.full(shape, self.about["pad_id"], dtype=np.int64)
            arrays["labels"] = np.full(shape, IGNORED, dtype=np.int64)
            row, at = 0, 0
            for i, length in zip(samples, lengths, strict=True):
                tokens, prompt = self.tokens[self.offsets[i] : self.offsets[i + 1]], self.prompt_lengths[i]
                arrays["input_ids"][row, at : at + length] = tokens
                arrays["attention_mask"][row, at : at + length] = 1
                arrays["position_ids"][row, at : at + length] = np.arange(length)
                arrays["labels"][row, at + prompt - 1 : at + length - 1] = tokens[prompt:]
                row, at = (row, at + length) if self.padding_free else (row + 1, 0)
            if self.padding_free and (rest := shape[1] - at):
                arrays["position_ids"][0, at:] = np.arange(rest)
                lengths.append(rest)
            arrays["labelled"] = np.flatnonzero(arrays["labels"] != IGNORED)
            last = start + micro_bsz == first + share
            yield last, MicroBatch(**arrays, lengths=lengths if self.padding_free else None)

    def print_remarks(self) -> None:
        """Prints the remarks about the data, such as columns that were left out. One line each."""
        for remark in self.about["remarks"]:
            print(remark, flush=True)

    def info(self) -> PlanInfo:
        """The plan as the record describes it."""
        run = range(self.steps)
        return PlanInfo(
            data=self.about["data"],
            sha256=self.sha256,
            samples=self.about["samples"],
            skipped=self.about["skipped"],
            remarks=self.about["remarks"],
            drawn_from=self.about["drawn_from"],
            effective_tokens=sum(map(self.effective_tokens, run)),
            padded_tokens=sum(map(self.padded_tokens, run)),
            label_tokens=sum(map(self.label_tokens, run)),
        )


@dataclass(frozen=True)
class Samples:
    """Tokenized samples, one after the other. The arrays are those of `Plan`."""

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample: prompt, response and EOS."""
        return np.diff(self.offsets)

    def digest(self) -> str:
        """A digest of all tokens and of the starts of samples and responses."""
        return hashlib.sha256(save(vars(self))).hexdigest()

    @classmethod
    def of(cls, samples: list[Sample]) -> Self:
        """Joins single samples."""
        return cls(
            np.concatenate([tokens for tokens, _ in samples]).astype(np.int32),
            np.cumsum([0, *(len(tokens) for tokens, _ in samples)], dtype=np.int64),
            np.array([prompt for _, prompt in samples], dtype=np.int32),
        )


class Rows(NamedTuple):
    """The samples of a plan's rows. `order` has their indices, row after row.

    `starts` has each row's start in `order`, and the length of `order` last.
    """

    order: np.ndarray
    starts: np.ndarray


def load_plan(flags: Flags, checkpoint: Checkpoint) -> Plan:
    """The plan of these flags. Where it is missing, data/prepare.py makes it first, in another process.

    Raises `BadInput` where the plan cannot be made or does not fit the model.
    """
    path = plan_path(flags.model_dump(), checkpoint)
    try:
        plan = read_plan(path)
        plan.print_remarks()
    except (FileNotFoundError, BadInput):
        _prepare(flags)  # it prints the remarks itself
        plan = read_plan(path)
    plan = plan.of_run(flags)
    vocabulary, positions = checkpoint.config["vocab_size"], checkpoint.config.get("max_position_embeddings")
    for token in (int(plan.tokens.min()), int(plan.tokens.max()), plan.about["pad_id"]):
        if not 0 <= token < vocabulary:
            raise BadInput(f"--model {flags.model}: its tokenizer gives token {token}, its vocabulary has {vocabulary}")
    longest = int(np.diff(plan.offsets).max())
    wide = longest if plan.padding_free else int(plan.rounded_up(longest))
    if positions is not None and wide > positions:
        rounded = f", rounded up to {wide} for --sequence-parallel" if wide > longest else ""
        raise BadInput(
            f"--model {flags.model}: a sample has {longest} tokens{rounded}, and the model takes at most {positions} "
            "(max_position_embeddings, or Mistral's sliding_window)"
        )
    return plan


def read_plan(path: Path) -> Plan:
    """Reads a plan file. Raises FileNotFoundError, or `BadInput` where it is damaged."""
    names = ("tokens", "offsets", "prompt_lengths", "rows")
    about, arrays = _read(path, "batch plan", names)
    tokens, offsets, prompt_lengths, rows = (arrays[name] for name in names)
    return Plan(path, _file_key(path), about, tokens, offsets, prompt_lengths, rows)


def write_plan(path: Path, about: dict[str, Any], samples: Samples, rows: Rows) -> None:
    """Writes the plan of these rows of `samples`."""
    order, starts = rows
    lengths = samples.lengths[order]
    arrays = {
        "tokens": _taken(samples.tokens, samples.offsets[order], lengths),
        "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        "prompt_lengths": samples.prompt_lengths[order],
        "rows": starts,
    }
    write_atomically(path, save(arrays, metadata={"about": json.dumps(about, sort_keys=True)}))


def read_samples(path: Path) -> tuple[dict[str, Any], Samples]:
    """What `write_samples` wrote. Raises FileNotFoundError, or `BadInput` where the file is damaged."""
    about, arrays = _read(path, "file of tokens", ("tokens", "offsets", "prompt_lengths"))
    return about, Samples(**arrays)


def write_samples(path: Path, about: dict[str, Any], samples: Samples) -> None:
    """Writes tokenized samples, with a description."""
    write_atomically(path, save(vars(samples), metadata={"about": json.dumps(about, sort_keys=True)}))


def plan_path(options: dict[str, Any], checkpoint: Checkpoint) -> Path:
    """The path of these flags' plan. Its name has a digest of everything that the plan depends on."""
    parts: list[Any] = [tokens_key(options, checkpoint), _file_key(ROOT / "data" / "batching.py")]
    parts += [options[name] for name in ("bsz", "steps", "epochs", "order", "packing", "plan_seed")]
    if options["steps"] and options["paired_halves"]:
        parts += [min(options["warmup_steps"], options["steps"] - 1)]
    parts += row_seeds(options)
    name = data_name(options["data"]).replace(":", "-")
    if not is_named(options["data"]):
        # A data file's name may have the longest allowed length, and the plan's name adds to it.
        name = Path(name).stem.encode()[:100].decode(errors="ignore")
    return cache_folder() / "plans" / f"{name}-bsz{options['bsz']}-{_key(parts)}.safetensors"


def row_seeds(options: dict[str, Any]) -> list[int]:
    """The seed of the rows' order; empty where rows keep the order in which samples are drawn."""
    return [options["seed"]] * (options["order"] == "grouped" or options["packing"] > 0)


def data_name(data: str) -> str:
    """The name of --data in records and messages: for a file, its name without the folder."""
    return data if is_named(data) else Path(data).name


def tokens_key(options: dict[str, Any], checkpoint: Checkpoint) -> str:
    """The cache key of the tokenized data. It changes with the data, the tokenizer and the limits."""
    code = [_file_key(ROOT / "data" / name) for name in ("sources.py", "prepare.py")]
    generator = [_file_key(ROOT / "data" / name) for name in ("synthetic.py", "tokenizer.py", "spiece.py")]
    read = [checkpoint.config.get(name) for name in ("eos_token_id", "pad_token_id", "vocab_size", "model_type")]
    tokenizer = [*read, generator, options["weights"]]
    tokenizer += [(file.name, _file_key(file)) for file in tokenizer_files(checkpoint.folder)]
    data = options["data"]
    if data in HUB:  # `datasets` prefers a local folder of that name to the hub
        files = sorted(file for file in Path(HUB[data]).rglob("*") if file.is_file())
    else:
        files = [] if is_named(data) else [Path(data)]
    source = generator if data.startswith(("synthetic-", FIXED)) else [_file_key(file) for file in files]
    limits = [PROMPT_TOKENS, RESPONSE_TOKENS, options["samples"], options["skip_bad"]]
    return _key([PLAN_VERSION, code, tokenizer, data if is_named(data) else Path(data).suffix, source, limits])


def _prepare(flags: Flags) -> None:
    command = [
        sys.executable,
        str(ROOT / "data" / "prepare.py"),
        *plan_arguments(flags),
        *["--config-alone"] * flags.plan,
    ]
    done = subprocess.run(command, check=False, preexec_fn=dying_with_parent())
    if done.returncode < 0:
        raise BadInput(
            f"data/prepare.py was killed by {signal_in_words(-done.returncode)}; where memory ran out, use a smaller "
            "--bsz or fewer --steps or --samples"
        )
    if done.returncode:
        sys.exit(done.returncode)  # prepare.py has said why


def _key(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _file_key(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def _read(path: Path, what: str, names: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads(file.metadata()["about"]), {name: file.get_tensor(name) for name in names}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: not a whole {what} ({error}); remove it and it is made again") from None


def _taken(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The elements at `ranges`, taken slice by slice: the indices of all would need three times their memory."""
    taken = np.empty(lengths.sum(), dtype=tokens.dtype)
    ends = np.cumsum(lengths)
    for first in range(0, len(starts), SLICES):
        some = slice(first, first + SLICES)
        taken[ends[first] - lengths[first] : ends[some][-1]] = tokens[ranges(starts[some], lengths[some])]
    return taken


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices of all elements of the slices `starts[i] : starts[i] + lengths[i]`, slice after slice."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
