"""The record: one JSON file per run. It stores nothing that other fields determine."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import from_json

from tunebench.digest import digest_of
from tunebench.errors import BadInput
from tunebench.files import write_atomically
from tunebench.frameworks import FRAMEWORKS
from tunebench.hardware import Hardware

LOG_LINES = 40
BUILT_TOLERANCE = 1e-5  # relative: rounding a model's constants to float32 changed them by up to 1e-6
# Bounds that no real run reaches. They keep derived values finite.
Seconds = Annotated[float, Field(gt=1e-9, lt=1e9)]
Count = Annotated[int, Field(gt=0, lt=2**53)]
Amount = Annotated[int, Field(ge=0, lt=2**63)]
Duration = Annotated[float, Field(ge=0, lt=1e12)]
Curve = Annotated[float, Field(ge=0, lt=1e39)]  # float32 ends there


class Strict(BaseModel):
    """A part of the record. Unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Git(Strict):
    """The commit that ran, None outside a git checkout. `changes` is a digest of uncommitted changes."""

    revision: str | None
    dirty: bool | None
    changes: str | None


class Work(Strict):
    """The sizes that decide how many operations a token needs.

    `matmul_parameters` counts the elements of the matrices that activations are multiplied with. An embedding counts
    where it also is the head.
    """

    matmul_parameters: Count
    layers: Count
    attention_width: Count  # heads × head size


def _check_framework(name: str) -> str:
    if name not in FRAMEWORKS:
        raise ValueError(f"use {' or '.join(FRAMEWORKS)}")
    return name


FrameworkName = Annotated[
    str, AfterValidator(_check_framework), WithJsonSchema({"enum": list(FRAMEWORKS), "type": "string"})
]
Positive = Annotated[float, Field(gt=0, lt=1e9)]


class Built(Strict):
    """What a framework's model computes with, read back from its modules after the script has built it.

    `activation` is identified by the values that it computes. `norm_epsilon` is that of all norms. `padding_row` is the
    row of the embedding that gets no gradient. `rotary` has the angle in radians by which each pair of a head's numbers
    turns per position. The turned numbers are multiplied by `rotary_scale`. `alibi` has each head's slope.
    """

    layers: Count
    heads: Count
    key_value_heads: Count
    head_size: Count
    vocabulary: Count
    activation: str
    norm_epsilon: Positive
    tied: bool
    window: Count | None
    padding_row: Amount | None
    rotary: list[Positive] | None
    rotary_scale: Positive | None
    alibi: list[Positive] | None

    def contradiction(self, other: Self) -> str | None:
        """The first field in which this model differs from another, with both values; None where they are the same.

        Numbers may differ by what float32 rounds.
        """
        if vars(self) == vars(other):
            return None
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if name in ("rotary", "alibi") and ours and theirs and len(ours) == len(theirs):
                for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                    if not _about(a, b):
                        return f"{name}[{i}]: {a:.7g} ≠ {b:.7g}"
            elif isinstance(ours, float) and isinstance(theirs, float) and _about(ours, theirs):
                continue
            elif ours != theirs:
                return f"{name}: {_brief(ours)} ≠ {_brief(theirs)}"
        return None


def _about(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=BUILT_TOLERANCE)


def _brief(value: Any) -> str:
    return f"{len(value)} numbers" if isinstance(value, list) else str(value)


class Model(Strict):
    """The model. `trainable_parameters` and `built` are None until the framework has built the model."""

    name: str
    family: str
    parameters: Count
    trainable_parameters: Count | None
    config_sha256: str
    weights_sha256: str
    work: Work | None = None
    built: Built | None = None


class Setup(Strict):
    """How the run was split and computed. Batch sizes count samples, or with --packing rows of `packing` tokens."""

    nproc: Count
    nnodes: Count
    zero: Literal[0, 1, 2, 3]
    sharding: Literal["deepspeed", "fsdp"] | None = None
    mp: Count
    sequence_parallel: bool = False
    bsz: Count
    micro_bsz: Count
    accumulation: Count
    dtype: Literal["fp32", "bf16", "fp16"]
    amp: Literal["O1", "O2"] | None
    recompute: bool
    attention: Literal["eager", "sdpa", "flash"]
    padding_free: bool = False
    head: Literal["all", "labels"] = "all"
    lean: bool = False
    compile: bool = False
    keep_memory: bool = False
    overlap: bool = False
    fuse_projections: bool = False
    quick_lora: bool = False
    packing: Amount
    order: Literal["plan", "grouped"]
    tuned: bool

    @property
    def in_stages(self) -> list[str]:
        """The name of ZeRO's stage, with FSDP2 where that shards. None of it without --zero."""
        return [f"ZeRO {self.zero}{' FSDP2' * (self.sharding == 'fsdp')}"] * (self.zero > 0)


class Kernels(Strict):
    """What the first forward pass ran, as seen where the framework calls its kernels.

    `weights` and `matmuls` are the dtypes of the weights and of the matrix products with them. `attention` names the
    kernels that turned scores into attention: a fused kernel by the framework's name, or the softmax.
    """

    weights: list[str]
    matmuls: list[str]
    attention: list[str]


class PlanInfo(Strict):
    """The tokens that the run trained on, counted over all its steps. `skipped` samples were malformed.

    `remarks` are the lines printed about the data, such as the columns that were left out. `drawn_from` is a digest of
    the samples and of the rules that made batches of them. It is the same for plans that differ in --plan-seed alone.
    """

    data: str
    sha256: str
    samples: Amount
    skipped: Amount
    effective_tokens: Amount
    padded_tokens: Amount
    label_tokens: Amount
    remarks: list[str] = []
    drawn_from: str | None = None


class Steps(Strict):
    """All optimizer steps from the first on. The lists are equally long. Seconds are wall-clock.

    The gradient norm is None where the gradients overflowed float16. The optimizer skipped that step.
    """

    seconds: list[Seconds]
    effective_tokens: list[Count]
    padded_tokens: list[Count]
    label_tokens: list[Count]
    loss: list[Curve]
    grad_norm: list[Curve | None]
    squared_lengths: list[Count] | None = None  # tokens², summed over a step's samples: attention's work grows with it

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        if len({len(values) for values in vars(self).values() if values is not None}) > 1:
            lengths = {name: len(values) for name, values in vars(self).items() if values is not None}
            raise ValueError(f"the lists differ in length: {lengths}")
        return self


class Taker(Strict):
    """Processes of one name that do not belong to the run, and the core-seconds they took during the timed steps."""

    name: str
    core_seconds: Duration


class Device(Strict):
    """What else used a GPU. None where NVIDIA's library (NVML) does not tell.

    At the end of the timed steps, `processes` others held `memory_bytes`. `share` is their part of the GPU's time
    during the timed steps. `throttled` has the reasons that held its clocks down.
    """

    processes: Amount | None
    memory_bytes: Amount | None
    share: Duration | None
    throttled: list[str]
    sm_clock_mhz: Amount | None


# Shares of a core or a GPU. From MARKED on a table says what others took. From DISTURBED on it gives no speedup.
MARKED, DISTURBED = 0.01, 0.05
HARMFUL = ("thermal", "brake", "hardware")  # words in a reason to throttle; other reasons are a GPU's usual limits
# What `peak_memory_bytes` counts: on a GPU tensors, by the framework's allocator; on a CPU all that a process holds.
ALLOCATED, RESIDENT = "max_memory_allocated", "resident memory"


class Conditions(Strict):
    """What else the machine did during the timed steps, on the node of rank 0. None where the system does not tell.

    - `seconds`: the time between the two readings.
    - Core-seconds of the `cores` that the run may use: `busy` with any process, taken by the hypervisor (`steal`),
      `idle`, and the run's `own`. `takers` are the other visible processes that took most.
    - `run_delay_seconds`: how long the run's threads waited for a core, summed.
    - `major_faults`: the run's. `swapped_bytes`: the machine's. `memory_stall_seconds`: how long some process waited
      for memory.
    - `mhz`: the cores' mean clock at the first and at the second reading.
    """

    seconds: Seconds
    cores: Count
    busy_core_seconds: Duration
    steal_core_seconds: Duration
    idle_core_seconds: Duration
    own_core_seconds: Duration
    takers: list[Taker]
    run_delay_seconds: Duration | None
    involuntary_switches: Amount
    major_faults: Amount
    swapped_bytes: Amount | None
    memory_stall_seconds: Duration | None
    mhz: tuple[Duration, Duration] | None
    gpus: list[Device]

    @property
    def others_cores(self) -> float:
        """Core-seconds that others took per second: (busy + steal - own) ÷ wall."""
        taken = self.busy_core_seconds + self.steal_core_seconds - self.own_core_seconds
        return max(0.0, taken) / self.seconds

    def disturbance(self, on_gpu: bool) -> tuple[float, str]:
        """The largest share of a core or a GPU that others took, and a sentence that says who took it.

        On a GPU run others may use idle cores. What exceeds the idle cores counts.
        """
        cores = self._cores_taken(on_gpu)
        named = [f"{taker.name} {taker.core_seconds / self.seconds:.1%}" for taker in self.takers]
        if sum(taker.core_seconds for taker in self.takers) / self.seconds > 1.3 * cores + MARKED:
            named = []  # they took more than that: of other cores, or of idle ones
        named += [f"the hypervisor {self.steal_core_seconds / self.seconds:.1%}"] * (self.steal_core_seconds > 0)
        found = [(cores, f"others took {cores:.1%} of a core" + f" ({', '.join(named)})" * bool(named))]
        for i, gpu in enumerate(self.gpus):
            found.append((gpu.share or 0.0, f"other processes took {gpu.share or 0.0:.0%} of GPU {i}"))
        return max(found)

    def share_taken(self, on_gpu: bool) -> float:
        """The share of `disturbance` without its sentence, which takes longer to make."""
        return max([self._cores_taken(on_gpu), *(gpu.share or 0.0 for gpu in self.gpus)])

    def _cores_taken(self, on_gpu: bool) -> float:
        return max(0.0, self.others_cores - self.idle_core_seconds / self.seconds * on_gpu)

    def remarks(self) -> list[str]:
        """Other facts that a reader must know: swapping, throttled or shared GPUs, on GPU runs waiting for a core."""
        swapped = (self.swapped_bytes or 0) >> 20
        lines = [f"{swapped} MiB were swapped"] * (swapped > 0)
        waited = (self.run_delay_seconds or 0.0) / self.seconds
        lines += [f"its threads waited for a core for {waited:.0%} of the time"] * (
            waited >= DISTURBED and bool(self.gpus)
        )
        for i, gpu in enumerate(self.gpus):
            reasons = [reason for reason in gpu.throttled if any(word in reason for word in HARMFUL)]
            lines += [f"GPU {i} was throttled: {', '.join(reasons)}"] * bool(reasons)
            lines += [f"GPU {i} was shared with {gpu.processes} other process(es)"] * bool(gpu.processes)
            lines += [f"what others took of GPU {i} is not known"] * (gpu.share is None)
        return lines


Share = Annotated[float, Field(ge=0, le=1)]
KernelKind = Literal[
    "matrix products",
    "attention",
    "norms",
    "elementwise",
    "loss",
    "optimizer",
    "communication",
    "copies",
    "other",
]
KERNEL_KINDS: tuple[KernelKind, ...] = get_args(KernelKind)
LONGEST = 10  # kernels that a profile lists
SHARES_TOLERANCE = 1e-6  # of the sum of a profile's shares


class Shares(Strict):
    """The shares of the traced time, each moment in one of them. They add up to 1.

    - `computing`: kernels that compute, without communication at the same time.
    - `communication_hidden`: communication and computing at the same time.
    - `communication_alone`: communication without computing.
    - `copies`: copies of memory alone.
    - `waiting_for_host`: the device has nothing to do, since the host has not launched the next kernel. On a CPU: no
      operator runs, since Python does.
    - `idle`: the rest. On a GPU: between a kernel's launch and its start. On a CPU: the framework's own bookkeeping.
    """

    computing: Share
    communication_alone: Share
    communication_hidden: Share
    copies: Share
    waiting_for_host: Share
    idle: Share

    @model_validator(mode="after")
    def _add_up(self) -> Self:
        total = sum(getattr(self, name) for name in type(self).model_fields)
        if abs(total - 1) > SHARES_TOLERANCE:
            raise ValueError(f"the shares add up to {total:.6g}, not to 1")
        return self


class Kernel(Strict):
    """All kernels of one name, on a CPU operators. `seconds` and `calls` are per step."""

    name: str
    kind: KernelKind
    seconds: Duration
    calls: Duration


class RankProfile(Strict):
    """What one process did in the traced steps.

    - `seconds`: wall-clock time per step, the profiler's own cost included.
    - `kinds`: seconds per step by kind of kernel. Kernels that run at the same time count each.
    - `longest`: the kernels with the most seconds, the longest first.
    - `memory`: seconds since the first traced step began, and the bytes that tensors then held above those of that
      moment. Negative where more was freed since then.
    - `trace`: the name of the trace's file in the folder of --profile.
    """

    seconds: Seconds
    shares: Shares
    kinds: dict[KernelKind, Duration]
    longest: list[Kernel] = Field(max_length=LONGEST)
    memory: list[tuple[Duration, int]]
    trace: str


class Profile(Strict):
    """What --profile traced: `steps` further steps after the timed ones. No other field has anything of them.

    `ranks` has a part for each process.
    """

    steps: Count
    ranks: list[RankProfile]


class Record(Strict):
    """One run. Fields that a run which did not end ok leaves unknown are None."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True, serialize_by_alias=True)

    schema_: Literal[1] = Field(alias="schema")
    status: Literal["ok", "oom", "failed", "timeout", "unsupported"]
    reason: str | None
    started_at: str
    framework: FrameworkName
    method: Literal["full", "lora"]
    peer: str | None = None  # the trainer that ran in place of this project's script
    aa: Literal["a", "b"] | None  # the side of a comparison of a run with itself (--aa)
    # Rounds were added until the interval of the speedup was within ± this share (run_all.sh --until); None where not.
    until: Annotated[float, Field(gt=0, lt=1)] | None = None
    argv: list[str]
    versions: dict[str, str]
    git: Git
    hardware: Hardware
    model: Model | None
    setup: Setup
    kernels: Kernels | None
    plan: PlanInfo | None
    steps: Steps | None
    timed_from: Amount
    setup_seconds: Seconds | None
    # Of each process, from the first step on. Of peers and of older records, from the process's start.
    peak_memory_bytes: list[Amount]
    # Of the GPU that holds most, by formula as for --plan. None in older records and where no formula knows such runs.
    predicted_peak_memory_bytes: Amount | None = None
    conditions: Conditions | None = None  # None in older records and in runs that did not end ok
    matmul_flops: list[Amount] = []  # operations per second of the framework's matrix product, for each process
    profile: Profile | None = None  # with --profile alone
    log: list[str]

    @model_validator(mode="after")
    def _complete_when_ok(self) -> Self:
        if self.status == "ok":
            started = self.setup_seconds is not None or self.peer
            if self.model is None or self.plan is None or self.steps is None or not started:
                raise ValueError("a run that ended ok has model, plan, steps and setup_seconds")
            if not self.timed_from < len(self.steps.seconds):
                raise ValueError(f"timed_from {self.timed_from} is not one of {len(self.steps.seconds)} steps")
            if self.model.trainable_parameters is None or self.hardware.device is None:
                raise ValueError("a run that ended ok has trainable_parameters and a device")
            if self.kernels is None and not self.peer:
                raise ValueError("a run that ended ok has kernels")
            if self.skipped_steps and self.setup.dtype != "fp16":
                raise ValueError(f"only fp16 skips steps, and dtype is {self.setup.dtype}")
        elif not self.reason:
            raise ValueError(f"status {self.status} needs a reason")
        return self

    @property
    def devices(self) -> int:
        """Processes of the whole job: on a machine with GPUs, one per GPU."""
        return self.setup.nproc * self.setup.nnodes

    @property
    def disturbance(self) -> tuple[float, str] | None:
        """The share of a core or a GPU that others took, and a sentence about it; None where it is not known."""
        if self.conditions is None:
            return None
        return self.conditions.disturbance(on_gpu=self.hardware.device != "cpu")

    @property
    def share_taken(self) -> float | None:
        """The share of `disturbance`; None where it is not known."""
        if self.conditions is None:
            return None
        return self.conditions.share_taken(on_gpu=self.hardware.device != "cpu")

    @property
    def disturbed(self) -> bool:
        """Whether others took at least DISTURBED, so that the rate says nothing about the framework."""
        return (self.share_taken or 0.0) >= DISTURBED

    @property
    def peak_memory_counter(self) -> str | None:
        """The counter of `peak_memory_bytes`, ALLOCATED or RESIDENT; None where nothing was counted."""
        if not self.peak_memory_bytes or self.hardware.device is None:
            return None
        return RESIDENT if self.hardware.device == "cpu" else ALLOCATED

    @property
    def effective_tokens_per_second(self) -> float:
        """Non-padding input tokens of the job's timed steps ÷ the wall-clock seconds of these steps."""
        assert self.steps is not None
        timed = slice(self.timed_from, None)
        return sum(self.steps.effective_tokens[timed]) / sum(self.steps.seconds[timed])

    @property
    def useful_flops(self) -> float | None:
        """Operations per second that the timed steps needed. None where a part of the formula is not known.

        The formula is that of PaLM's appendix B (https://arxiv.org/abs/2204.02311) without the embedding, which is
        looked up. Per token it counts 6 operations for each parameter in a product, with LoRA 4 since frozen weights
        need no gradient. Causal attention adds 12 · layers · width · length / 2. Padding and recomputation count as
        nothing. Positions without a label count in full.
        """
        if self.steps is None or self.steps.squared_lengths is None or self.model is None or self.model.work is None:
            return None
        work, timed = self.model.work, slice(self.timed_from, None)
        products = (4 if self.method == "lora" else 6) * work.matmul_parameters
        attention = 6 * work.layers * work.attention_width
        done = products * sum(self.steps.effective_tokens[timed]) + attention * sum(self.steps.squared_lengths[timed])
        return done / sum(self.steps.seconds[timed])

    def mfu(self, peak: float | None = None) -> float | None:
        """Model FLOPs utilisation: `useful_flops` ÷ `peak` (operations per second). None where either is not known.

        The default peak is the rate of the framework's matrix product in this run, summed over the processes.
        """
        peak = peak or sum(self.matmul_flops)
        return None if not peak or self.useful_flops is None else self.useful_flops / peak

    @property
    def skipped_steps(self) -> int:
        """Steps without an update. A gradient overflowed float16, so the loss scale was halved instead."""
        return self.steps.grad_norm.count(None) if self.steps else 0

    def write(self, path: Path) -> None:
        """Writes the record and its digest, whole or not at all. Raises `BadInput` where that fails."""
        content = json.loads(self.model_dump_json(by_alias=True))
        write_atomically(path, (json.dumps(content | {"sha256": digest_of(content)}, indent=1) + "\n").encode())


class Unchecked(NamedTuple):
    """A record whose digest has not been compared: the record, the digest in its file, and the content of that."""

    record: Record
    kept: str
    content: dict[str, Any]


def read_record(path: Path) -> Record:
    """Reads one record file. Raises `BadInput` with the file and its first fault."""
    with faults_of(path):
        return parse_record(path.read_bytes())


@contextlib.contextmanager
def faults_of(path: Path) -> Iterator[None]:
    """Raises the faults of a record file as `BadInput`, which names the file."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError as fault:
        raise BadInput(f"{path}: not a record: {' '.join(str(fault).split())}") from None


def parse_record(text: bytes) -> Record:
    """Parses a record file's content. Raises ValueError with the first fault in one line."""
    record, kept, content = parse_unchecked(text)
    if kept != (digest := digest_of(content)):
        raise ValueError(f"edited since it was written: sha256 is {kept}, that of its content {digest}")
    return record


def parse_unchecked(text: bytes) -> Unchecked:
    """Does all that `parse_record` does but compare the digest."""
    try:
        content = from_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"a record is an object, not {type(content).__name__}")
    kept = content.pop("sha256", None)
    try:
        record = Record.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None
    if kept is None:
        raise ValueError("sha256: Field required")
    return Unchecked(record, kept, content)


def first_fault(error: ValidationError) -> str:
    """The first fault of a failed validation: the field and what is wrong with it."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"


def json_schema() -> str:
    """The record's JSON Schema, which is kept in tunebench/record.schema.json."""
    schema = Record.model_json_schema(by_alias=True)
    about = "Of all the other fields, as JSON with sorted keys and no blanks."
    schema["properties"]["sha256"] = {"title": "Sha256", "type": "string", "description": about}
    schema["required"].append("sha256")
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "record.schema.json").write_text(json_schema())
