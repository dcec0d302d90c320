"""The batch plan: the file that says which tokens each global batch holds. Both frameworks read the same one.

`data/prepare.py` writes it; a script whose plan is missing runs that program first.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tunebench.bootstrap import ROOT
from tunebench.cache import cache_folder, write_atomically
from tunebench.checkpoint import Checkpoint
from tunebench.errors import BadInput
from tunebench.flags import DATA_NAMES, Flags
from tunebench.processes import dying_with_parent
from tunebench.record import PlanInfo

PLAN_VERSION = 1  # part of the cache key: raise it when the same inputs would give another plan
PROMPT_TOKENS, RESPONSE_TOKENS = 256, 384  # the published record's limits; the response's EOS comes on top
IGNORED = -100  # the label of a position that is not trained on


Row = tuple[np.ndarray, int]  # a sample's tokens, int32, and how many of them are its prompt


@dataclass(frozen=True)
class MicroBatch:
    """One replica's share of a pass; each array is (micro_bsz, width), int64, padded to the global batch's longest.

    `labels` are shifted already: position t is trained to give the token at t + 1, or nothing where it is -100.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Plan:
    """The global batches of a run. Row r of the plan is sample r % bsz of step r // bsz."""

    path: Path
    sha256: str
    about: dict[str, Any]
    tokens: np.ndarray  # all rows' tokens, one after the other, int32
    offsets: np.ndarray  # where row r starts (and the end, last), int64, (steps × bsz + 1,)
    prompt_lengths: np.ndarray  # int32, (steps × bsz,)

    @property
    def bsz(self) -> int:
        """Samples in a global batch."""
        return self.about["bsz"]

    @property
    def steps(self) -> int:
        """Global batches in the plan."""
        return len(self.prompt_lengths) // self.bsz

    def lengths(self, step: int) -> np.ndarray:
        """Tokens of each sample of a step (prompt, response and EOS), shape (bsz,)."""
        return np.diff(self.offsets[step * self.bsz : (step + 1) * self.bsz + 1])

    def effective_tokens(self, step: int) -> int:
        """Non-padding input tokens of a step."""
        return int(self.lengths(step).sum())

    def padded_tokens(self, step: int) -> int:
        """Input tokens of a step, padding included."""
        return int(self.lengths(step).max()) * self.bsz

    def label_tokens(self, step: int) -> int:
        """Positions of a step that are trained on: responses and their EOS."""
        return self.effective_tokens(step) - int(self.prompt_lengths[step * self.bsz : (step + 1) * self.bsz].sum())

    def micro_batches(
        self, step: int, micro_bsz: int, replica: int = 0, replicas: int = 1
    ) -> Iterator[tuple[bool, MicroBatch]]:
        """The passes of one replica in a step, in order: its contiguous slice of the global batch, cut up.

        Each comes with whether it is the last one.
        """
        width, share = int(self.lengths(step).max()), self.bsz // replicas
        first = step * self.bsz + replica * share
        for start in range(first, first + share, micro_bsz):
            input_ids = np.full((micro_bsz, width), self.about["pad_id"], dtype=np.int64)
            attention_mask = np.zeros((micro_bsz, width), dtype=np.int64)
            labels = np.full((micro_bsz, width), IGNORED, dtype=np.int64)
            for row in range(micro_bsz):
                tokens = self.tokens[self.offsets[start + row] : self.offsets[start + row + 1]]
                prompt = self.prompt_lengths[start + row]
                input_ids[row, : len(tokens)] = tokens
                attention_mask[row, : len(tokens)] = 1
                labels[row, prompt - 1 : len(tokens) - 1] = tokens[prompt:]
            yield start + micro_bsz == first + share, MicroBatch(input_ids, attention_mask, labels)

    def info(self) -> PlanInfo:
        """What the record says of the plan."""
        run = range(self.steps)
        return PlanInfo(
            data=self.about["data"],
            sha256=self.sha256,
            samples=self.about["samples"],
            skipped=self.about["skipped"],
            effective_tokens=sum(map(self.effective_tokens, run)),
            padded_tokens=sum(map(self.padded_tokens, run)),
            label_tokens=sum(map(self.label_tokens, run)),
        )


def load_plan(flags: Flags, checkpoint: Checkpoint) -> Plan:
    """The plan of these flags; made first, by data/prepare.py in a process of its own, when it is missing.

    Raises `BadInput` when the plan cannot be made or does not fit the model.
    """
    path = plan_path(flags.model_dump(), checkpoint)
    try:
        plan = read_plan(path)
    except (FileNotFoundError, BadInput):
        _prepare(flags)
        plan = read_plan(path)
    vocabulary, positions = checkpoint.config["vocab_size"], checkpoint.config.get("max_position_embeddings")
    for token in (int(plan.tokens.min()), int(plan.tokens.max()), plan.about["pad_id"]):
        if not 0 <= token < vocabulary:
            raise BadInput(f"--model {flags.model}: its tokenizer gives token {token}, its vocabulary has {vocabulary}")
    longest = int(np.diff(plan.offsets).max())
    if positions is not None and longest > positions:
        raise BadInput(f"--model {flags.model}: a sample has {longest} tokens, max_position_embeddings is {positions}")
    return plan


def read_plan(path: Path) -> Plan:
    """Reads a plan file. Raises FileNotFoundError, or `BadInput` where it is damaged."""
    sha256 = _file_key(path)
    about, arrays = read_rows(path)
    return Plan(path, sha256, about, **arrays)


def write_plan(path: Path, about: dict[str, Any], samples: list[Row], steps: int) -> None:
    """Writes the plan whose rows go through `samples` in order, and again from the start."""
    write_rows(path, about, [samples[row % len(samples)] for row in range(steps * about["bsz"])])


def read_rows(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `write_rows` wrote: the description, and the arrays that `Plan` documents.

    Raises FileNotFoundError, or `BadInput` where the file is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["about"])
            return about, {name: file.get_tensor(name) for name in ("tokens", "offsets", "prompt_lengths")}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: not a whole batch plan ({error}); remove it and it is made again") from None


def write_rows(path: Path, about: dict[str, Any], rows: list[Row]) -> None:
    """Writes rows of tokens, one after the other, with a description."""
    arrays = {
        "tokens": np.concatenate([tokens for tokens, _ in rows]).astype(np.int32),
        "offsets": np.cumsum([0, *(len(tokens) for tokens, _ in rows)], dtype=np.int64),
        "prompt_lengths": np.array([prompt for _, prompt in rows], dtype=np.int32),
    }
    write_atomically(path, save(arrays, metadata={"about": json.dumps(about, sort_keys=True)}))


def plan_path(options: dict[str, Any], checkpoint: Checkpoint) -> Path:
    """Where the plan of these flags lies: a name made of everything that the plan depends on."""
    data = options["data"]
    parts = [tokens_key(options, checkpoint), options["bsz"], options["steps"], options["epochs"]]
    name = data if data in DATA_NAMES else Path(data).stem
    return cache_folder() / "plans" / f"{name}-bsz{options['bsz']}-{_key(parts)}.safetensors"


def tokens_key(options: dict[str, Any], checkpoint: Checkpoint) -> str:
    """A name for the tokenized data: it changes with the data, the tokenizer and the limits."""
    code = [_file_key(ROOT / "data" / name) for name in ("sources.py", "prepare.py")]
    generator = [_file_key(ROOT / "data" / name) for name in ("synthetic.py", "tokenizer.py")]
    own = [checkpoint.folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    ids = [checkpoint.config.get(name) for name in ("eos_token_id", "pad_token_id")]
    tokenizer = [*ids, *(_file_key(file) for file in own if file.exists())] if own[0].exists() else generator
    data = options["data"]
    source = generator if data.startswith("synthetic-") else [] if data in DATA_NAMES else [_file_key(Path(data))]
    limits = [PROMPT_TOKENS, RESPONSE_TOKENS, options["samples"], options["skip_bad"]]
    return _key([PLAN_VERSION, code, tokenizer, data if data in DATA_NAMES else "file", source, limits])


def _prepare(flags: Flags) -> None:
    arguments = [f"--model={flags.model}", f"--weights={flags.weights}", f"--data={flags.data}", f"--bsz={flags.bsz}"]
    arguments += [f"--samples={flags.samples}"] * (flags.samples is not None) + ["--skip-bad"] * flags.skip_bad
    arguments += [f"--epochs={flags.epochs}"] if flags.epochs else [f"--steps={flags.steps}"]
    command = [sys.executable, ROOT / "data" / "prepare.py", *arguments, f"--seed={flags.seed}"]
    done = subprocess.run(command, check=False, preexec_fn=dying_with_parent())
    if done.returncode:
        sys.exit(done.returncode)  # prepare.py has said why


def _key(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _file_key(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
