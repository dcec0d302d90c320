"""The flags. All four scripts share one parser, so that both sides spell a setup in the same way."""

import argparse
import contextlib
import math
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from tunebench.bootstrap import refuse
from tunebench.errors import BadInput
from tunebench.forecast.gpus import DEFAULT_GPU, GPUS, LINKS, kind_of
from tunebench.frameworks import FRAMEWORKS
from tunebench.hardware import visible_accelerators
from tunebench.models.presets import PRESETS
from tunebench.world import World

HUB = {"alpaca": "tatsu-lab/alpaca", "guanaco": "Chinese-Vicuna/guanaco_belle_merge_v1.0"}  # data sets by name
DATA_NAMES = ("synthetic-en", "synthetic-zh", *HUB)
SUFFIXES = (".json", ".jsonl", ".parquet")
FIXED = "fixed:"  # followed by N: the embedded data's text, cut into samples of N tokens
LONGEST_FIXED = 2**20
DEFAULT_SAMPLES, DEFAULT_FIXED_SAMPLES = 10_000, 1000
# The flags of --tuned: the fastest ones that do not change the result. A flag given beside --tuned overrides these.
TUNED: dict[str, Any] = {
    "order": "grouped",
    "padding_free": True,
    "attention": "sdpa",
    "head": "labels",
    "lean": True,
    "compile": True,
    "keep_memory": True,
    "overlap": True,
}
WITHOUT_FORMULA = ("sequence_parallel", "quick_lora", "fuse_projections")  # runs whose memory no formula knows
NAMED_DATA = f"{', '.join(DATA_NAMES)}, {FIXED}N (samples of N tokens)"
BSZ, WARMUP_STEPS, STEPS = 4, 8, 30  # defaults; other flags may change the first two
SWEEP_ROWS = 1000  # of the plan whose lengths --sweep looks at
TRACED_STEPS = 2  # with --profile
COMPILED_STEPS = 2  # with --compile, the first steps compile and must not be timed
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Flags(BaseModel):
    """The checked flags of one run. Batch sizes count samples, `timeout` is in seconds.

    `given` names the flags of the command line.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    weights: str
    layers: int | None
    data: str
    samples: int | None
    skip_bad: bool
    bsz: int
    order: str
    packing: int
    micro_bsz: int
    nproc: int
    nnodes: int
    node_rank: int
    master: str | None
    zero: int
    sharding: str | None = None
    mp: int
    sequence_parallel: bool
    dtype: str
    amp: str | None
    recompute: bool
    attention: str
    padding_free: bool
    head: str
    lean: bool
    compile: bool
    keep_memory: bool
    overlap: bool
    fuse_projections: bool
    tuned: bool
    steps: int | None
    epochs: int | None
    warmup_steps: int
    paired_halves: bool
    plan_seed: int
    lr: float
    seed: int
    timeout: float
    aa: str | None
    until: float | None = None
    out: Path | None
    profile: Path | None = None
    plan: bool = False
    sweep: bool = False
    gpu: str | None = None
    link: str | None = None
    price: float | None = None
    calibrate: Path | None = None
    given: frozenset[str] = Field(default=frozenset(), exclude=True)
    lora_r: int = 0
    lora_alpha: int = 0
    quick_lora: bool = False

    @property
    def model_name(self) -> str:
        """The preset's name, or the checkpoint folder's name without its path. A cut model says so."""
        name = Path(os.path.abspath(Path(self.model).expanduser())).name or "root"  # noqa: PTH100 (links keep their names)
        return name if self.layers is None else f"{name}-{self.layers}-layers"

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.nproc * self.nnodes

    @property
    def replicas(self) -> int:
        """Data-parallel copies of the model. Each global batch is split over them."""
        return self.world_size // self.mp

    @property
    def compute_dtype(self) -> str:
        """The dtype of matrix products, by the name that both frameworks use."""
        return DTYPES[self.dtype]

    @property
    def weights_dtype(self) -> str:
        """The dtype of the model's weights. At O2 the optimizer also holds float32 master weights."""
        return self.compute_dtype if self.amp == "O2" else "float32"

    @property
    def fsdp(self) -> bool:
        """Whether torch's FSDP2 shards, not DeepSpeed."""
        return self.sharding == "fsdp"

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed shards, where the framework is PyTorch."""
        return self.zero > 0 and not self.fsdp

    @property
    def accumulation(self) -> int:
        """Gradient accumulation: the micro-batches of one replica per optimizer step."""
        return self.bsz // self.replicas // self.micro_bsz


class Parser(argparse.ArgumentParser):
    """argparse with refusals of one line, without the usage text."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses like argparse. Refuses arguments that no record could hold: JSON needs valid UTF-8."""
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if any("\ud800" <= character <= "\udfff" or character == "\0" for character in word):
                self.error(f"{word!a} is not valid UTF-8; rename the file, or mend the argument")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        refuse(f"{self.prog}: {' '.join(message.split())}; see --help")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default where it has one that its help does not state."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is None or "(default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


def flag_parser(method: str, prog: str | None = None) -> Parser:
    """The parser of a script's flags. `method` is `full` or `lora`."""
    parser = Parser(prog=prog, allow_abbrev=False, formatter_class=Help)
    add_plan_flags(parser)
    add = parser.add_argument
    add("--tuned", action="store_true", help="the fast flags, those given beside it first: " + in_words(TUNED))
    add("--micro-bsz", type=positive, help="rows per replica and pass (default: all of its share of --bsz)")
    add(
        "--nproc",
        type=positive,
        help="processes on this node (default: all visible GPUs; without GPUs what --mp and --zero need)",
    )
    add("--nnodes", type=positive, help="nodes; start the same command on each (default: 1)")
    add("--node-rank", type=not_negative, help="which of the nodes this is (default: 0)")
    add("--master", metavar="HOST:PORT", help="where node 0 can be reached, with --nnodes")
    add(
        "--zero",
        type=int,
        choices=range(4),
        default=0,
        help="sharded over the replicas: 1 optimizer, 2 +gradients, 3 +parameters",
    )
    add(
        "--sharding",
        choices=["deepspeed", "fsdp"],
        help="what shards with --zero in PyTorch (default: deepspeed); fsdp: torch's FSDP2, for --zero 2 and 3",
    )
    add("--mp", type=positive, default=1, help="tensor-parallel degree")
    add(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="with --mp: split the tokens between the sliced products, where norms and residuals are",
    )
    add("--dtype", choices=list(DTYPES), default="fp32", help="in which matrices are multiplied")
    add(
        "--amp",
        choices=["O1", "O2"],
        help="with bf16 or fp16: O1 autocasts over float32 weights; O2 holds weights and gradients in --dtype, with "
        "float32 master weights (default: O2)",
    )
    add("--recompute", action="store_true", help="recompute activations in the backward pass")
    add(
        "--attention",
        choices=["eager", "sdpa", "flash"],
        default="eager",
        help="eager: separate kernels; sdpa: the fused one that the framework picks; flash: its flash kernel",
    )
    add(
        "--padding-free",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute the samples of a pass end to end, without padding; implied by --packing",
    )
    add(
        "--head",
        choices=["all", "labels"],
        default="all",
        help="labels: logits and loss only where there is a label, some at a time, with their gradients at once",
    )
    add(
        "--lean",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="kernels of fewer and cheaper operations where there are some, all of Paddle: on a CPU of Llama, on a GPU "
        "of RMSNorm",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let the framework's compiler make the layers (torch's; needs a C++ compiler)",
    )
    add(
        "--keep-memory",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let the C library keep freed memory, instead of having each page of a new tensor made anew",
    )
    add(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let collectives run beside the passes where the framework leaves that open: DeepSpeed's ZeRO 1 and 2, "
        "Paddle's ZeRO 2, and its --mp in full fine-tuning",
    )
    add(
        "--fuse-projections",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="make q, k and v one matrix product, and gate and up another (PaddleNLP's Llama and Qwen2, not with LoRA)",
    )
    add("--lr", type=positive_float, default=1e-4, help="learning rate, constant")
    add("--timeout", type=positive_float, default=3600.0, help="seconds after which the run ends as `timeout`")
    add("--aa", choices=["a", "b"], help="one side of a comparison of this run with itself (run_all.sh --aa)")
    add(
        "--until",
        type=percentage,
        metavar="SHARE",
        help="for the record: rounds are added until the interval is within ± this share (run_all.sh --until)",
    )
    add("--out", type=Path, help="record file (default: a new one in results/runs/)")
    add(
        "--profile",
        type=Path,
        metavar="DIR",
        help=f"trace {TRACED_STEPS} more steps after the timed ones, with the framework's profiler, into this folder",
    )
    add_forecast_flags(parser, "say what the run would take on GPUs, and start none: memory, tokens per second, cost")
    add(
        "--sweep",
        action="store_true",
        help="as --plan, for a grid of setups that the other flags leave open: the fastest ones by number of GPUs",
    )
    if method == "lora":
        add("--lora-r", type=positive, default=8, help="rank of the LoRA update")
        add("--lora-alpha", type=positive, default=32, help="LoRA scale: alpha / r")
        add(
            "--quick-lora",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="add the adapters' product to the frozen weights in each pass (PaddleNLP's Quick LoRA)",
        )
    return parser


def add_forecast_flags(parser: argparse.ArgumentParser, plan: str) -> None:
    """Adds --plan, whose help is `plan`, and what it needs to know. The scripts and run_all.sh have them."""
    add = parser.add_argument
    add("--plan", action="store_true", help=plan)
    add("--gpu", choices=list(GPUS), help=f"with --plan: the kind of GPU (default: the visible one, or {DEFAULT_GPU})")
    add("--link", choices=list(LINKS), help="with --plan: what joins the GPUs of a node (default: that of the kind)")
    add("--price", type=positive_float, help="with --plan: dollars per GPU and hour")
    add(
        "--calibrate",
        type=Path,
        metavar="RECORDS",
        help="with --plan: a record of a run on the machine that is planned for, or a folder of such records",
    )


def settle_forecast(options: dict) -> None:
    """Fills in --gpu, but with --calibrate, whose records say it. Raises `BadInput` where no known GPU is visible."""
    if options["calibrate"] is not None:
        options["calibrate"] = path_of("calibrate", str(options["calibrate"]))
        return
    visible = visible_accelerators()
    if options["gpu"] is None:
        options["gpu"] = kind_of(visible[0]) if visible else DEFAULT_GPU
        if options["gpu"] is None:
            raise BadInput(f"--plan: {visible[0]} is none of the GPUs that are known here; name one by --gpu")
        print(f"--gpu {options['gpu']} (the default: {'the visible GPU' if visible else 'no GPU visible'})", flush=True)


def arguments_of(method: str, table: dict[str, Any]) -> list[str]:
    """The arguments of a table of flags. True gives the bare flag, false its opposite. Raises `BadInput`."""
    actions = flag_parser(method)._option_string_actions
    arguments = []
    for name, value in table.items():
        opposite = name.removeprefix("no-") if name.startswith("no-") else f"no-{name}"
        if value is not False:
            arguments.append(f"--{name}" if value is True else f"--{name}={value}")
        elif f"--{opposite}" in actions:
            arguments.append(f"--{opposite}")
        elif f"--{name}" not in actions:
            raise BadInput(f"{name} = false: there is no flag --{name}")
        elif actions[f"--{name}"].nargs != 0:
            raise BadInput(f"{name} = false: --{name} takes a value; give one, or leave it out")
    return arguments


def parse_flags(
    method: str,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    world: World | None = None,
    framework: str | None = None,
) -> Flags:
    """Reads the flags of a script. `method` is `full` or `lora`. `world` is the place that a launcher gave it.

    --tuned leaves out the flags that `framework` does not have. A wrong flag ends the process with exit code 2. A wrong
    combination of flags raises `BadInput`.
    """
    options = vars(flag_parser(method, prog).parse_args(argv))
    given, gpus = _given(method, prog, argv), len(visible_accelerators())
    if options["tuned"]:
        parser = flag_parser(method, prog)
        parser.set_defaults(**tuned(options, framework, gpus))
        options = vars(parser.parse_args(argv))
    if options["packing"] and "padding_free" in given and not options["padding_free"]:
        raise BadInput("--packing has no padding; leave --no-padding-free out, or --packing")
    options["padding_free"] |= options["packing"] > 0
    if options["head"] == "labels" and options["mp"] > 1:
        raise BadInput("--head labels with --mp: not combined here; use --head all, or --mp 1")
    options["plan"] |= options["sweep"]
    if options["plan"]:
        if world is not None:
            raise BadInput("--plan asks once for all processes; start the script without a launcher")
        settle_forecast(options)
        gpus = 1  # the planned GPUs are of the kind that --gpu names
        place(options, 0)
    elif world is None:
        place(options, gpus)
    else:
        _join(options, world, gpus)
    if "dtype" not in given and (options["amp"] or options["sweep"] or (options["attention"] == "flash" and gpus)):
        options["dtype"] = "bf16"
        asks = f"--amp {options['amp']}" if options["amp"] else "--sweep" if options["sweep"] else "--attention flash"
        print(f"--dtype bf16 (not the default fp32: {asks} is for low precision)", flush=True)
    settle_precision(options, gpus)
    size, mp = options["nproc"] * options["nnodes"], options["mp"]
    if options["nproc"] % mp:
        raise BadInput(
            f"--mp {mp} does not divide the {options['nproc']} process(es) of a node; "
            f"use --nproc {mp * (options['nproc'] // mp + 1)} or --mp {_divisors(options['nproc'])}"
        )
    if options["zero"] and mp > 1:
        raise BadInput(
            f"--zero {options['zero']} with --mp {mp}: not combined here, since DeepSpeed does not shard transformers' "
            "tensor-parallel models; use --zero 0 or --mp 1"
        )
    if options["sequence_parallel"] and mp == 1:
        raise BadInput("--sequence-parallel splits what --mp leaves whole; add --mp 2 or more, or leave it out")
    if options["sharding"]:
        check_sharding(options)
    if options["sweep"]:
        check_sweep(options)
    if options["zero"] and size == 1:
        raise BadInput(f"--zero {options['zero']} has nothing to shard over in one process; use --nproc 2 or --zero 0")
    replicas = size // mp
    if options["bsz"] is None:
        options["bsz"] = default_bsz(options, replicas * (options["micro_bsz"] or 1))
    bsz = options["bsz"]
    if bsz % replicas:
        raise BadInput(
            f"--bsz {bsz} does not divide over {replicas} replicas; "
            f"use {' or '.join(str(n * replicas) for n in (bsz // replicas, bsz // replicas + 1) if n)}"
        )
    options["micro_bsz"] = options["micro_bsz"] or bsz // replicas
    for name in ("gpu", "link", "price", "calibrate"):
        if options[name] is not None and not options["plan"]:
            raise BadInput(f"--{name} is for --plan; add it, or leave --{name} out")
    if options["sweep"] and not given & {"steps", "epochs"}:
        options["steps"] = max(STEPS, SWEEP_ROWS // bsz)
    flags = Flags(**resolve_plan_flags(options), given=given)
    if bsz // replicas % flags.micro_bsz:
        raise BadInput(
            f"--micro-bsz {flags.micro_bsz} does not divide --bsz {bsz} over {replicas} replica(s); "
            f"use one of {_divisors(bsz // replicas)}"
        )
    if flags.out is not None:
        check_out(flags.out)
    if flags.profile is not None:
        _check_profile(flags)
    return flags if flags.steps is None else fit_to_steps(flags, flags.steps)


def check_sharding(options: dict) -> None:
    """Raises `BadInput` where --sharding has nothing to shard, or where FSDP2 cannot."""
    given = f"--sharding {options['sharding']}"
    if not options["zero"]:
        raise BadInput(f"{given} says what shards with --zero; add --zero 2 or 3, or leave it out")
    if options["sharding"] == "fsdp" and options["zero"] == 1:
        raise BadInput(f"{given} has no stage 1: FSDP shards gradients too; use --zero 2 or 3, or --sharding deepspeed")
    if options["sharding"] == "fsdp" and options["sweep"]:
        raise BadInput(f"{given} with --sweep: its formulas are DeepSpeed's; leave --sharding out, or use --plan")


def check_sweep(options: dict) -> None:
    """Raises `BadInput` where no formula knows runs with these flags."""
    for name in WITHOUT_FORMULA:
        if options.get(name):
            flag = f"--{name.replace('_', '-')}"
            raise BadInput(f"{flag} with --sweep: no formula knows such runs; leave it out, or use --plan")


def _given(method: str, prog: str | None, argv: Sequence[str] | None) -> frozenset[str]:
    """The names of the flags on the command line."""
    parser = flag_parser(method, prog)
    options = vars(parser.parse_args([]))
    parser.set_defaults(**dict.fromkeys(options))
    return frozenset(name for name, value in vars(parser.parse_args(argv)).items() if value is not None)


def fit_to_steps(flags: Flags, steps: int) -> Flags:
    """The flags of a run of `steps` steps. It adapts defaults that do not fit and prints that it does.

    Raises `BadInput` where a flag of the command line does not fit.
    """
    warmup, compiled = flags.warmup_steps, flags.compile
    if "warmup_steps" in flags.given:
        if warmup >= steps:
            raise BadInput(
                f"--warmup-steps {warmup} leaves none of the {steps} step(s) to time; use at most {steps - 1}"
            )
    elif warmup >= steps:
        warmup = steps - 1
        print(f"--warmup-steps {warmup} (the default {flags.warmup_steps} leaves none of {steps} to time)", flush=True)
    if compiled and warmup < COMPILED_STEPS:
        if "compile" not in flags.given:
            compiled = False
            print(f"--no-compile (the default of --tuned needs {COMPILED_STEPS} warm-up steps)", flush=True)
        elif "warmup_steps" in flags.given:
            raise BadInput(
                f"--warmup-steps {warmup} would time --compile too; use {COMPILED_STEPS} or more, or --no-compile"
            )
        else:
            raise BadInput(
                f"--compile takes {COMPILED_STEPS} steps before those timed, of {steps}; use --steps "
                f"{COMPILED_STEPS + 1} or more, or --no-compile"
            )
    return flags.model_copy(update={"warmup_steps": warmup, "compile": compiled})


def default_bsz(options: dict, unit: int) -> int:
    """The default of --bsz: rounded up to a multiple of `unit` samples, lowered where --samples × --epochs is less."""
    bsz = math.ceil(BSZ / unit) * unit
    why = f"a multiple of {unit}"
    if options["samples"] and options["epochs"] and not options["packing"]:
        most = options["samples"] * options["epochs"]
        if unit <= most < bsz:
            bsz, why = most // unit * unit, f"{options['epochs']} epoch(s) have {most} sample(s)"
    if bsz != BSZ:
        print(f"--bsz {bsz} (not the default {BSZ}: {why})", flush=True)
    return bsz


def tuned(options: dict, framework: str | None, gpus: int) -> dict:
    """The flags that --tuned sets beside `options`: those that go with them, with the framework and `gpus` GPUs."""
    compiles = framework is None or FRAMEWORKS[framework].compiles
    left_out = {"order"} if options["packing"] else set()
    left_out |= {"head"} if options["mp"] > 1 else set()
    left_out |= set() if compiles else {"compile"}
    on_gpus = options.get("plan") or gpus
    left_out |= set() if on_gpus else {"overlap"}  # gloo waits for each collective
    return {name: value for name, value in TUNED.items() if name not in left_out}


def in_words(options: dict) -> str:
    """Flags, spelled as on a command line."""
    flags = {name.replace("_", "-"): value for name, value in options.items()}
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items())


def place(options: dict, gpus: int) -> None:
    """Fills in processes and nodes of a run that no launcher started, with `gpus` visible GPUs. Raises `BadInput`."""
    if options["nproc"] is None:
        nodes = options["nnodes"] or 1
        options["nproc"] = options["mp"] * (2 if options["zero"] and nodes == 1 else 1)
        if gpus:
            fitting = (n for n in range(gpus, 0, -1) if _fits(options, n, nodes))
            fit = next(fitting, gpus)
            options["nproc"] = fit
            if fit < gpus:
                print(f"--nproc {options['nproc']} (not all {gpus} GPUs: --bsz and --mp allow no more)", flush=True)
    if gpus and options["nproc"] > gpus:
        raise BadInput(
            f"--nproc {options['nproc']}: {gpus} GPU(s) visible; use at most {gpus}, or hide them for a run on the "
            "CPU: CUDA_VISIBLE_DEVICES="
        )
    options["nnodes"] = options["nnodes"] or 1
    if options["nnodes"] == 1:
        for name in ("node_rank", "master"):
            if options[name] is not None:
                raise BadInput(f"--{name.replace('_', '-')} is for several nodes; add --nnodes")
    else:
        options["node_rank"] = options["node_rank"] or 0
        if options.get("plan"):
            return
        last = options["nnodes"] - 1
        if options["node_rank"] > last:
            raise BadInput(f"--node-rank {options['node_rank']}: use 0 to {last}, as --nnodes is {options['nnodes']}")
        host, _, port = (options["master"] or "").rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            given = "is missing" if options["master"] is None else f"{options['master']} is no HOST:PORT"
            raise BadInput(f"--master {given}; with --nnodes name node 0 and a free port there, such as 10.0.0.1:29500")
        try:
            socket.gethostbyname(host)
        except (OSError, UnicodeError):
            raise BadInput(f"--master {options['master']}: {host} is not known here; name node 0") from None
    options["node_rank"] = options["node_rank"] or 0


def _fits(options: dict, nproc: int, nodes: int) -> bool:
    """Whether the batch sizes and degrees in `options` go with `nproc` processes on each of `nodes` nodes."""
    if nproc % options["mp"] or (options["zero"] and nproc * nodes == 1):
        return False
    replicas = nproc * nodes // options["mp"]
    return options["bsz"] is None or options["bsz"] % (replicas * (options["micro_bsz"] or 1)) == 0


def settle_precision(options: dict, gpus: int) -> None:
    """Fills in --amp for low precision. Raises `BadInput` where precision flags contradict each other or the GPUs."""
    if options["dtype"] != "fp32":
        options["amp"] = options["amp"] or "O2"
    elif options["amp"]:
        raise BadInput(f"--amp {options['amp']} is for low precision; use --dtype bf16 or fp16, or leave --amp out")
    elif options["attention"] == "flash" and gpus:
        raise BadInput(
            "--attention flash: no flash kernel for GPUs takes float32; use --dtype bf16 or fp16, or --attention sdpa"
        )


def _join(options: dict, world: World, gpus: int) -> None:
    """Fills in processes and nodes of a run that a launcher started. Raises `BadInput` where a flag differs from it."""
    for name, given in (("nproc", world.nproc), ("nnodes", world.nnodes)):
        if options[name] not in (None, given):
            raise BadInput(
                f"--{name} {options[name]}: the launcher started {given}; leave the flag out, or the launcher"
            )
        options[name] = given
    if 1 < gpus < world.nproc:  # with one visible GPU, Slurm may have given each task its own
        raise BadInput(f"the launcher started {world.nproc} processes for {gpus} GPUs; start at most {gpus}")
    options["node_rank"], options["master"] = world.rank // world.nproc, None


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that decide which tokens a run trains on. data/prepare.py and all scripts have them."""
    add = parser.add_argument
    add("--model", help=f"{', '.join(PRESETS)}, or a Hugging Face checkpoint: a folder or a hub name")
    add("--weights", choices=["random", "pretrained"], help="random: a preset's shared seeded checkpoint")
    add("--layers", type=positive, help="of a preset, only so many layers: for a rehearsal (default: all)")
    add("--data", default="synthetic-en", help=f"{NAMED_DATA}, or a .json, .jsonl or .parquet file")
    add(
        "--samples",
        type=positive,
        help=f"how many of the data (default: {DEFAULT_SAMPLES:,}; of fixed:N, {DEFAULT_FIXED_SAMPLES:,}; of a file, "
        "all)",
    )
    add("--skip-bad", action="store_true", help="leave malformed samples out and count them, instead of refusing them")
    add("--bsz", type=positive, help=f"global batch size: samples, or rows with --packing (default: {BSZ})")
    add(
        "--order",
        choices=["plan", "grouped"],
        default="plan",
        help="plan: batches in the order of the data; grouped: shuffled, with samples of about the same length in each",
    )
    add("--packing", type=not_negative, default=0, help="pack samples into rows of so many tokens (0: do not)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, help=f"optimizer steps (default: {STEPS})")
    length.add_argument("--epochs", type=positive, help="passes over the samples, instead of --steps")
    add(
        "--warmup-steps",
        type=not_negative,
        default=WARMUP_STEPS,
        help="first steps, recorded but not timed; fewer where there are not more steps",
    )
    add(
        "--paired-halves",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --steps: the second half of the timed steps has the batches of the first again, so that steps which "
        "get slower or faster show",
    )
    add("--plan-seed", type=not_negative, default=0, help="draws the samples in another order (0: the data's own)")
    add("--seed", type=not_negative, default=0, help="of the random start weights and of LoRA's A")


def plan_arguments(flags: Flags) -> list[str]:
    """The command-line arguments with which data/prepare.py makes the plan of these flags."""
    parser = argparse.ArgumentParser(add_help=False)
    add_plan_flags(parser)
    values = {action.dest: getattr(flags, action.dest) for action in parser._actions}
    return arguments_of("full", {name.replace("_", "-"): v for name, v in values.items() if v is not None})


def resolve_plan_flags(options: dict) -> dict:
    """Fills in the defaults that depend on the machine or on other flags, and checks them. Raises `BadInput`."""
    if options["model"] is None:
        accelerators = visible_accelerators()
        options["model"] = "llama-7b" if accelerators or options.get("plan") else "llama-tiny"
        found = f"{len(accelerators)} GPU(s) visible" if accelerators else "no GPU visible"
        found = "planned for GPUs" if options.get("plan") else found
        print(f"--model {options['model']} (the default: {found})", flush=True)
    model = options["model"]
    options["weights"] = options["weights"] or ("random" if model in PRESETS else "pretrained")
    if options["weights"] == "random" and model not in PRESETS:
        raise BadInput(f"--weights random is for presets; --model {model} is none of {', '.join(PRESETS)}")
    if options["layers"]:
        if options["weights"] == "pretrained":
            raise BadInput(f"--layers {options['layers']} cuts presets, and --model {model} is none; leave it out")
        most = PRESETS[model].layers
        if options["layers"] > most:
            raise BadInput(f"--layers {options['layers']}: {model} has {most}; use at most {most}")
        if options["layers"] == most:
            options["layers"] = None  # the whole preset, under its own name
    folder = path_of("model", model)
    if options["weights"] == "pretrained" and model in PRESETS and not Path(model).is_dir():
        raise BadInput(f"--weights pretrained needs a checkpoint: {model} is a preset; name a folder or owner/name")
    if options["weights"] == "pretrained" and not folder.is_dir() and model.count("/") != 1:
        raise BadInput(
            f"--model {model}: no such preset or folder; use one of {', '.join(PRESETS)}, a checkpoint folder, "
            "or a hub name of the form owner/name"
        )
    if not is_named(options["data"]):
        path = path_of("data", options["data"])
        if path.suffix not in SUFFIXES:
            raise BadInput(f"--data {options['data']}: use {NAMED_DATA}, or a .json, .jsonl or .parquet file")
        if not path.is_file() or not os.access(path, os.R_OK):
            raise BadInput(f"--data {options['data']}: no such file, or not readable")
        options["data"] = str(path.resolve())
    if options["packing"] and options["order"] == "grouped":
        raise BadInput("--order grouped is for rows of one sample, and --packing fills rows with more; leave one out")
    if options["bsz"] is None:
        options["bsz"] = default_bsz(options, 1)
    if options["steps"] is None and options["epochs"] is None:
        options["steps"] = STEPS
    return options


def is_named(data: str) -> bool:
    """Whether --data names data of this project or of the hub, not a file. Raises `BadInput` for a wrong fixed:N."""
    return data in DATA_NAMES or fixed_tokens(data) is not None


def fixed_tokens(data: str) -> int | None:
    """N of fixed:N, or None for other data. Raises `BadInput` for a wrong N."""
    if not data.startswith(FIXED) or Path(data).suffix in SUFFIXES:
        return None
    number = data.removeprefix(FIXED)
    if re.fullmatch("[1-9][0-9]{0,9}", number) and 3 <= int(number) <= LONGEST_FIXED:
        return int(number)
    raise BadInput(
        f"--data {data}: name the tokens of a sample in plain digits, 3 (one each of prompt, response and end) to "
        f"{LONGEST_FIXED}, such as fixed:2048"
    )


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no whole number") from None


def positive(text: str) -> int:
    """An integer from 1 to 2^31 − 1, which fits the frameworks' 32-bit counters."""
    value = _whole(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is out of range; use 1 {'or more' if value < 1 else 'to 2147483647'}")
    return value


def not_negative(text: str) -> int:
    """An integer from 0 to 2^32 − 1, the range of a seed."""
    value = _whole(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is out of range; use 0 to 4294967295")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is out of range; use a number above 0")
    return value


def percentage(text: str) -> float:
    """A share above 0 and below 1 from a text such as 3%."""
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%", text.strip())
    if not found or not 0 < float(found[1]) < 100:
        raise argparse.ArgumentTypeError(f"{text} is no share; use one above 0% and below 100%, such as 3%")
    return float(found[1]) / 100


def path_from(text: str) -> Path:
    """A path from a text that is not empty, as an unset variable of a shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; name one")
    return Path(text)


def check_out(path: Path) -> None:
    """Raises `BadInput` before the work where its result could not be written after it."""
    there = path_of("out", str(path))
    if there.is_dir():
        raise BadInput(f"--out {path} is a folder; name a file")
    if there.exists() and not there.is_file():
        raise BadInput(f"--out {path} is no regular file; name another file")
    check_folder(path.parent, f"--out {path}")


def _check_profile(flags: Flags) -> None:
    """Raises `BadInput` before the run where it could not leave its traces."""
    if flags.plan:
        raise BadInput("--profile traces a run, and --plan starts none; leave one of them out")
    folder = path_of("profile", str(flags.profile)).absolute()
    existing = next(each for each in (folder, *folder.parents) if os.access(each, os.F_OK))
    if not existing.is_dir():
        raise BadInput(f"--profile {flags.profile}: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK):
        raise BadInput(f"--profile {flags.profile}: {existing} is not writable")


def check_folder(folder: Path, named_by: str) -> None:
    """Makes a folder for records. Raises `BadInput` where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{named_by}: {error.strerror}: {folder}") from None
    if not os.access(folder, os.W_OK):
        raise BadInput(f"{named_by}: {folder} is not writable")


def path_of(flag: str, text: str) -> Path:
    """The path that `text` names, whether it exists or not. Raises `BadInput` where `text` cannot be a path."""
    if not text:
        raise BadInput(f"--{flag}: the path is empty; name one")
    try:
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.stat()
    except (OSError, RuntimeError) as error:
        raise BadInput(f"--{flag} {text[:80]}: no such path: {getattr(error, 'strerror', None) or error}") from None
    return path


def _divisors(number: int) -> str:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return ", ".join(map(str, sorted({*small, *(number // d for d in small)})))
