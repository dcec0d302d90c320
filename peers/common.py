"""Shared by all peers' scripts: reads the job, counts tokens and measures time per step, and writes the result.

It needs NumPy and safetensors only: the peers' environments have other versions than `tunebench` needs.
"""

import contextlib
import json
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IGNORED = -100  # the label of positions that are not trained on
BETAS, EPSILON, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.999), 1e-8, 0.01, 1.0  # those of tunebench/recipe.py

# The repository root on sys.path would offer torch/ and paddle/ as empty namespace packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
# The same threads and kernels as the project's scripts. No GPU, no hub, no telemetry.
BOOTSTRAP = runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))
os.environ.update(BOOTSTRAP["maths_settings"]())
os.environ.update(BOOTSTRAP["home_settings"](paddle="paddle" in Path(sys.argv[0]).name))
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true"}


@dataclass(frozen=True)
class Sample:
    """A row of the plan: the tokens of prompt, response and EOS, and the number of prompt tokens."""

    tokens: list[int]
    prompt: int

    @property
    def labels(self) -> list[int]:
        """The labels, not shifted: IGNORED for the prompt, then the tokens."""
        return [IGNORED] * self.prompt + self.tokens[self.prompt :]


@dataclass(frozen=True)
class Job:
    """A peer's job. With `in_order` it takes the plan's batches without shuffling, so that loss curves compare."""

    peer: str
    method: str
    checkpoint: Path
    samples: list[Sample]
    pad_id: int
    bsz: int
    steps: int
    lr: float
    seed: int
    lora_r: int
    lora_alpha: int
    lora_targets: list[str]
    row_tokens: int
    in_order: bool
    out: Path

    @property
    def lora(self) -> bool:
        """Whether it trains LoRA's adapters. Otherwise it trains all parameters."""
        return self.method == "lora"

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        return json.loads((self.checkpoint / "config.json").read_text())


def refuse(message: str) -> None:
    """Ends the program with one line on stderr and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def read_job(peers: Sequence[str], environment: str, packages: Sequence[str]) -> Job:
    """The job in the file that the command line names. Exits with one line and code 2 where something is wrong.

    `peers` are the peers of this script. `packages` must be importable. They are in `.venv/<environment>`.
    """
    script = f"peers/{Path(sys.argv[0]).name}"
    if len(sys.argv) != 2:
        refuse(f"use: .venv/{environment}/bin/python -P {script} JOB.json")
    for package in ("numpy", "safetensors", *packages):
        found = find_spec(package)
        if found is None or found.origin is None:
            refuse(
                f"{sys.executable} has no {package}; run: bash setup.sh {environment}, "
                f"then: .venv/{environment}/bin/python -P {script} {sys.argv[1]}"
            )
    try:
        given = json.loads(Path(sys.argv[1]).read_text())
        if given["peer"] not in peers or given["method"] not in ("full", "lora"):
            refuse(f"{given['peer']} {given['method']} is not one of its peers: {', '.join(peers)}, full or lora")
        samples, pad_id = _read_plan(Path(given.pop("plan")))
        given |= {name: Path(given[name]).resolve() for name in ("checkpoint", "out")}
        job = Job(samples=samples, pad_id=pad_id, **{"in_order": False} | given)
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"{sys.argv[1]}: {type(error).__name__}: {error}")
    if any(pad_id in sample.tokens for sample in samples):
        refuse(f"{sys.argv[1]}: the plan's padding token {pad_id} is one of its samples', so padding cannot be told")
    return job


def _read_plan(path: Path) -> tuple[list[Sample], int]:
    safetensors = import_module("safetensors")
    with safetensors.safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["about"])
        tokens, offsets, prompts = (file.get_tensor(name) for name in ("tokens", "offsets", "prompt_lengths"))
    rows = zip(offsets[:-1], offsets[1:], prompts, strict=True)
    return [Sample(tokens[start:end].tolist(), int(prompt)) for start, end, prompt in rows], about["pad_id"]


class Meter:
    """Measures the time of each optimizer step, and counts the tokens of each batch that the peer's collator made."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.effective: list[int] = []
        self.padded: list[int] = []
        self.labels: list[int] = []
        self.seconds: list[float] = []
        self.losses: list[Any] = []
        self.grad_norms: list[Any] = []

    def count(self, input_ids: Any, labels: Any) -> None:
        """Counts the tokens of a step's batch (tensors or arrays). Batches may be loaded ahead, but in order."""
        self.effective.append(int((input_ids != self.job.pad_id).sum()))
        self.padded.append(int(input_ids.shape[0] * input_ids.shape[1]))
        self.labels.append(int((labels != IGNORED).sum()))

    def start(self) -> None:
        """Starts the clock of the first step."""
        self._clock = time.perf_counter()

    def end_step(self) -> None:
        """Ends a step. The next step's clock starts at the same moment."""
        now = time.perf_counter()
        self.seconds.append(now - self._clock)
        self._clock = now

    def write(self, parameters: int, trainable: int, packages: Sequence[str], setup: str) -> None:
        """Writes the result, whole or not at all. Only this reads `losses` and `grad_norms`, since it takes time."""
        steps = self.job.steps
        counts = {"effective_tokens": self.effective, "padded_tokens": self.padded, "label_tokens": self.labels}
        for name, values in {"seconds": self.seconds, "loss": self.losses, **counts}.items():
            if len(values) < steps:
                raise RuntimeError(f"{name} of {len(values)} steps, of {steps} asked for")
        versions = {}
        for name in packages:
            with contextlib.suppress(metadata.PackageNotFoundError):  # Paddle's build for GPUs has another name
                versions[name] = metadata.version(name)
        result = {
            "seconds": self.seconds[:steps],
            **{name: values[:steps] for name, values in counts.items()},
            "loss": [float(loss) for loss in self.losses[:steps]],
            "grad_norm": [float(norm) for norm in self.grad_norms[:steps]] or None,
            "parameters": parameters,
            "trainable_parameters": trainable,
            "versions": versions,
            "setup": setup,
            "peak_memory_bytes": _peak_resident_bytes(),
        }
        part = self.job.out.with_name(f".part-{os.getpid()}")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(self.job.out)
        rate = sum(self.effective[:steps]) / sum(self.seconds[:steps])
        first, last = result["loss"][0], result["loss"][-1]
        print(f"{self.job.peer} {self.job.method}: loss {first:.4f} -> {last:.4f}, {rate:.0f} effective tokens/s")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for the peer's output."""
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        yield Path(folder)


def copy_of_checkpoint(job: Job, folder: Path) -> Path:
    """Links the checkpoint's config and weights into `folder`, where a library may write. Returns `folder`."""
    for file in job.checkpoint.iterdir():
        if file.name == "config.json" or file.name.endswith((".safetensors", ".safetensors.index.json")):
            (folder / file.name).symlink_to(file)
    return folder


def _peak_resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
