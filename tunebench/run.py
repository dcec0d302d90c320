"""One run of a script: measures its steps and leaves one record, unless a signal ends it."""

import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import psutil

from tunebench import conditions, processes
from tunebench.bootstrap import ROOT, has_instructions, own_home
from tunebench.cache import cache_folder, results_folder, write_atomically
from tunebench.checkpoint import Checkpoint, find_checkpoint
from tunebench.config import paddle_lacks
from tunebench.errors import NO_ROOM, BadInput, forget_stdout, one_line_refusals
from tunebench.flags import Flags, check_folder, fit_to_steps, parse_flags
from tunebench.hardware import (
    Hardware,
    keep_freed_memory,
    read_environment,
    read_hardware,
    read_versions,
    visible_accelerators,
)
from tunebench.launch import ALONE, RUN_FOLDER, RUN_RECORD, RUN_SUPERVISOR, World, export, read_world, share_threads
from tunebench.plan import Plan, load_plan
from tunebench.record import LOG_LINES, MARKED, Built, Conditions, Git, Kernels, Model, Record, Setup, Steps

Framework = Literal["torch", "paddle"]
Method = Literal["full", "lora"]
TIMEOUT_EXIT = 124  # as timeout(1) has it


class Job(NamedTuple):
    """What a run is about to do: everything that can be wrong with it has been checked."""

    flags: Flags
    checkpoint: Checkpoint
    plan: Plan
    world: World


def read_job(framework: Framework, method: Method) -> Job:
    """Reads the command line, checks the checkpoint and loads the plan, making what is missing.

    It needs no framework, so that bad input is refused at once: with one line and exit code 2. Where the run is to have
    several processes and no launcher has started this one, it starts them, and ends this process when they have ended.
    """
    with one_line_refusals(Path(sys.argv[0]).name):
        read_environment()
        world = read_world(framework, on_terminal=os.isatty(0))
        # What a worker would say here, its supervisor or rank 0 has said.
        with contextlib.redirect_stdout(None if world and (world.rank or RUN_FOLDER in os.environ) else sys.stdout):
            flags = parse_flags(method, world=world, framework=framework)
            if flags.out is None and not (world and world.rank) and RUN_FOLDER not in os.environ:
                check_folder(results_folder() / "runs", "TUNEBENCH_RESULTS")
            checkpoint = find_checkpoint(flags.model, flags.weights, flags.seed)
            check_tensor_parallel(flags, checkpoint)
            prepare_compiler(framework, flags)
            plan = load_plan(flags, checkpoint)
            flags = fit_to_steps(flags, plan.steps)
    if flags.keep_memory:
        keep_freed_memory()
    job = Job(flags, checkpoint, plan, world or ALONE)
    reason = not_offered(framework, method, flags, checkpoint)
    if reason:
        Run(framework, method, job).fail("unsupported", reason)
        sys.exit(1)
    if world is not None:
        processes.die_with_parent()
        os.environ.update(share_threads(world.nproc))
        export(world, framework)
    elif flags.world_size > 1:
        from tunebench.supervisor import run_workers

        with one_line_refusals(Path(sys.argv[0]).name):
            sys.exit(run_workers(Run(framework, method, job)))
    return job


def check_tensor_parallel(flags: Flags, checkpoint: Checkpoint) -> None:
    """Raises `BadInput` where no framework can cut the model up as --mp asks for: both need whole heads."""
    needed = {name: width for name, width in checkpoint.tensor_parallel_widths().items() if "heads" in name}
    for name, width in needed.items():
        if width % flags.mp:
            smaller = range(1, min(flags.mp, width + 1))
            works = [str(mp) for mp in smaller if not any(width % mp for width in needed.values())]
            raise BadInput(f"--mp {flags.mp} does not divide the model's {width} ({name}); use {' or '.join(works)}")


def prepare_compiler(framework: Framework, flags: Flags) -> None:
    """Gives torch's compiler its folder. Raises `BadInput` where it lacks what it builds its code with."""
    if framework != "torch" or not flags.compile:
        return
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise BadInput(f"--compile needs a C++ compiler, and there is no {compiler}; use --no-compile")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise BadInput(f"--compile needs Python's headers, and there is no {header}; use --no-compile")
    folder = cache_folder() / "inductor"
    if not os.access(folder if folder.exists() else cache_folder(), os.W_OK):  # another user's
        folder = own_home() / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))  # before torch is imported


def not_offered(framework: Framework, method: Method, flags: Flags, checkpoint: Checkpoint) -> str | None:
    """Why the framework does not do what is asked for, which is a result too; None where it does."""
    if framework == "torch" and method == "lora" and flags.mp > 1 and checkpoint.config["model_type"] == "glm":
        return (
            "peft 0.21.2 and transformers 5.23.0 each slice LoRA's A of a layer that tensor parallelism cuts by its "
            "inputs, so that it no longer fits"
        )
    family = checkpoint.config["model_type"]
    if framework == "paddle" and (lacking := paddle_lacks(checkpoint.config)):
        return lacking
    for name, width in checkpoint.tensor_parallel_widths().items():
        if framework == "paddle" and width % flags.mp:
            # transformers takes a last slice that is shorter.
            return f"Paddle 3.3.1 slices into equal parts, and --mp {flags.mp} does not divide {width} ({name})"
    if framework == "torch" and family == "bloom" and flags.padding_free and flags.attention == "eager":
        return "transformers 5.23.0 has no positions in Bloom's eager attention to tell samples apart by"
    if framework == "paddle" and family in ("bloom", "glm") and flags.padding_free:
        return "PaddleNLP 3.0.0b4 has no function for attention alone in this model, to call for each sample"
    if framework == "paddle" and family == "glm" and flags.head == "labels":
        return "PaddleNLP 3.0.0b4 has no layer for the logits alone in ChatGLMv2"
    if framework == "paddle" and flags.compile:
        return (
            "Paddle 3.3.1 has no compiler for CPUs (its wheel is built without CINN), and that for GPUs was not tried"
        )
    if visible_accelerators():
        # Of the fused kernels, those for float32. The flash kernels of both take grouped queries, Paddle's a bias too.
        if flags.attention == "sdpa" and flags.dtype == "fp32":
            grouped = checkpoint.config.get("num_key_value_heads") != checkpoint.config.get("num_attention_heads")
            if framework == "torch" and grouped:
                return "torch 2.13.0 has no fused attention in float32 on GPUs for grouped queries"
            if framework == "paddle" and checkpoint.config["model_type"] == "bloom":
                return (
                    "Paddle 3.3.1 has fused attention with a bias in float32 on GPUs for some widths of a batch alone"
                )
        return None
    if framework == "torch" and flags.zero and flags.weights_dtype == "float16" and not multiplies_float16():
        return "DeepSpeed 0.19.8 refuses float16 weights on CPUs that do not compute in it (AVX512-FP16)"
    if framework == "paddle" and flags.dtype != "fp32":
        return (
            f"Paddle 3.3.1 has no {flags.compute_dtype} kernels for CPUs: there autocast silently computes in float32, "
            "and a model in that dtype stops at its first linear layer"
        )
    return None


def multiplies_float16() -> bool:
    """Whether the processor does, by AVX512-FP16, with which it was tried; DeepSpeed asks oneDNN."""
    return has_instructions({"avx512_fp16"})


class Run:
    """The record of a run in the making.

    The script calls `describe` once the model stands, `start` before its loop and `end_step` at the end of each step.
    The device is synchronised when `start` is called, where the timed steps start, and where they end.
    """

    def __init__(self, framework: Framework, method: Method, job: Job) -> None:
        self.framework, self.method = framework, method
        self.flags, self.checkpoint, self.plan, self.world = job
        self.argv = [Path(sys.argv[0]).name, *sys.argv[1:]]
        # Set where this process is a worker of a run that is watched.
        self.folder = Path(os.environ[RUN_FOLDER]) if RUN_FOLDER in os.environ else None
        given = os.environ.get(RUN_RECORD) if self.folder else None
        self.out = Path(given) if given else self.flags.out or new_record_path(framework, method, self.flags)
        # What is known before anything runs, so that the record of a run that fails early has it too.
        self.about = describe_run(framework, method, self.flags, self.argv)
        self.model = Model(
            name=self.flags.model_name,
            family=self.checkpoint.config["model_type"],
            parameters=self.checkpoint.parameters,
            trainable_parameters=None,
            config_sha256=self.checkpoint.config_sha256,
            weights_sha256=self.checkpoint.weights_sha256,
            work=self.checkpoint.work,
        )
        self.watchdog = threading.Timer(self.flags.timeout, _end_at_timeout, [self])
        self.watchdog.daemon = True
        self.setup_seconds: float | None = None
        self.seconds: list[float] = []
        self.losses: list[Any] = []
        self.losses_are_whole = self.flags.replicas == 1  # or each process knows only those of its share
        self.grad_norms: list[Any] = []
        self.written = False
        self.before: conditions.Reading | None = None  # of the timed steps
        self.conditions: Conditions | None = None

    def describe(self, device: str, parameters: int, trainable: int, built: Built) -> None:
        """Keeps the device, the framework's counts and what it built. RuntimeError where the config contradicts these.

        `device` is `cpu` or the accelerator's name, as the framework has it.
        """
        adapters = trainable if self.method == "lora" else 0
        if parameters - adapters != self.checkpoint.parameters:
            raise RuntimeError(
                f"the framework counts {parameters - adapters} parameters, the config has {self.checkpoint.parameters}"
            )
        self.model = self.model.model_copy(update={"trainable_parameters": trainable, "built": built})
        if found := built.contradiction(self.checkpoint.expected):
            raise RuntimeError(
                f"the model that {self.framework} built is not that of the config: {found} of the config"
            )
        self.about["hardware"] = self.about["hardware"].model_copy(update={"device": device})

    def check_kernels(self, weights: set[str], matmuls: set[str], attention: set[str]) -> None:
        """Keeps what the first forward pass ran; RuntimeError if it is not what the flags ask for."""
        seen = Kernels(weights=sorted(weights), matmuls=sorted(matmuls), attention=sorted(attention))
        self.about["kernels"] = seen
        flags = self.flags
        for what, found, asked in (
            ("weights", seen.weights, flags.weights_dtype),
            ("matrix products", seen.matmuls, flags.compute_dtype),
        ):
            if found != [asked]:
                raise RuntimeError(f"--dtype {flags.dtype}: {what} are in {' and '.join(found)}, not in {asked}")
        signs = {"eager": ("softmax",), "sdpa": ("att",), "flash": ("flash", "varlen")}[flags.attention]
        if self.framework == "paddle" and self.about["hardware"].device == "cpu":
            signs = ("softmax",)  # there its scaled_dot_product_attention is made of separate kernels
        elif flags.attention == "flash" and self.model.family == "bloom":
            signs = ("att",)  # torch's flash kernels take no ALiBi: there Bloom runs the fastest fused one that does
        if not seen.attention or not all(any(sign in kernel for sign in signs) for kernel in seen.attention):
            raise RuntimeError(
                f"--attention {flags.attention}: what ran is {' and '.join(seen.attention) or 'none that is known'}"
            )

    def start(self, synchronize: Callable[[], None]) -> None:
        """Starts the clock of the first step."""
        self._synchronize = synchronize
        synchronize()
        if not self.flags.warmup_steps:
            self._look_before()
        self._clock = time.perf_counter()
        self.setup_seconds = time.time() - _started()
        self.say(f"start-up took {self.setup_seconds:.1f} s")

    def end_step(self, loss: Any, grad_norm: Any) -> None:
        """Stops the clock of this step and starts the next one's, so that no time falls between two steps.

        `loss` and `grad_norm` are the framework's scalars. They are read after the last step, since to read one here
        would make the device wait.
        """
        done = len(self.seconds) + 1
        if done in (self.flags.warmup_steps, self.plan.steps):
            self._synchronize()
        if done == self.flags.warmup_steps:
            self._look_before()
        now = time.perf_counter()
        if done == self.plan.steps:
            self._look_after()
        self.seconds.append(now - self._clock)
        self._clock = now
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        rate = self.plan.effective_tokens(done - 1) / self.seconds[-1]
        self.say(f"step {done}/{self.plan.steps}: {self.seconds[-1]:.3f} s, {rate:.0f} effective tokens/s")

    def _look_before(self) -> None:
        """Reads the machine before the timed steps, on one process: the others wait for it at their next exchange."""
        if not self.world.rank:
            with self._said_alone():
                self.before = conditions.read(self.roots)

    def _look_after(self) -> None:
        if self.before:
            with self._said_alone():
                self.conditions = conditions.between(self.before, conditions.read(self.roots))

    @contextlib.contextmanager
    def _said_alone(self) -> Iterator[None]:
        """Of what cannot be read of a machine a line is said: the run is worth more."""
        try:
            yield
        except Exception as error:
            self.say(f"warning: the machine's conditions cannot be read: {type(error).__name__}: {error}")

    @functools.cached_property
    def roots(self) -> set[int]:
        """The processes that all of this run's on this node descend from."""
        if RUN_SUPERVISOR in os.environ:
            return {int(os.environ[RUN_SUPERVISOR])}
        return conditions.roots_of_run(sys.argv[0], self.world.nproc) if self.world.size > 1 else {os.getpid()}

    def finish(self, losses: list[float], peak_memory_bytes: list[int], matmul_flops: list[int]) -> None:
        """Writes the record of a run whose steps are all done; FloatingPointError on a loss that is not finite.

        `losses` are those of whole global batches, the others have a value for each rank.
        """
        self.losses, self.losses_are_whole = list(losses), True
        steps = self.steps()
        if len(steps.loss) < len(self.losses):
            raise FloatingPointError(f"loss or gradient norm of step {len(steps.loss) + 1} is not a finite number")
        self.watchdog.cancel()
        if self.world.rank:
            return
        record = self.record("ok", None, steps, peak_memory_bytes=peak_memory_bytes, matmul_flops=matmul_flops)
        from tunebench.stats import drift_in_words, drift_of  # slow to import

        change = drift_of([record])
        record.write(self.out)
        self.written = True
        if self.folder:
            (self.folder / "done").touch()
        self.say(
            f"loss {steps.loss[0]:.4f} -> {steps.loss[-1]:.4f}, {record.effective_tokens_per_second:.1f} effective "
            f"tokens/s over {len(steps.seconds) - record.timed_from} timed steps, record: {self.out}"
        )
        if record.disturbance:
            share, words = record.disturbance
            level = "disturbed: " if record.disturbed else "warning: " if share >= MARKED else "the machine was quiet: "
            self.say("; ".join([level + words, *record.conditions.remarks()]))
        else:
            self.say("what other programs took of the machine is not known")
        if change:
            self.say(f"warning: the run {drift_in_words(change)} (--warmup-steps is {self.flags.warmup_steps})")

    def say(self, line: str) -> None:
        """Prints a line, once for all processes."""
        if not self.world.rank:
            print(line, flush=True)

    def steps(self) -> Steps:
        """The steps so far, up to the first whose loss or gradient norm is not finite."""
        loss = [float(x) for x in self.losses]
        grad_norm = [norm if math.isfinite(norm) else None for norm in map(float, self.grad_norms)]
        may_skip = self.flags.dtype == "fp16"
        finite = [math.isfinite(a) and (b is not None or may_skip) for a, b in zip(loss, grad_norm, strict=True)]
        kept = range(finite.index(False) if False in finite else len(finite))
        return Steps(
            seconds=[self.seconds[i] for i in kept],
            effective_tokens=[self.plan.effective_tokens(i) for i in kept],
            padded_tokens=[self.plan.padded_tokens(i) for i in kept],
            label_tokens=[self.plan.label_tokens(i) for i in kept],
            loss=[loss[i] for i in kept],
            grad_norm=[grad_norm[i] for i in kept],
            squared_lengths=[self.plan.squared_lengths(i) for i in kept],
        )

    def record(
        self,
        status: str,
        reason: str | None,
        steps: Steps | None,
        log: Sequence[str] = (),
        peak_memory_bytes: Sequence[int] = (),
        matmul_flops: Sequence[int] = (),
    ) -> Record:
        """The record as far as it is known."""
        return Record(
            status=status,
            reason=reason,
            model=self.model,
            plan=self.plan.info(),
            steps=steps,
            setup_seconds=self.setup_seconds,
            peak_memory_bytes=list(peak_memory_bytes),
            matmul_flops=list(matmul_flops),
            conditions=self.conditions if status == "ok" else None,
            log=list(log[-LOG_LINES:]),
            **self.about,
        )

    def fail(self, status: str, reason: str, log: Sequence[str] = (), steps: Steps | None = None) -> None:
        """Writes a record that says why there is no result, or tells whoever watches this worker."""
        if self.folder:
            about = {"rank": self.world.rank, "status": status, "reason": reason, "log": list(log)}
            about["steps"] = steps and steps.model_dump()
            try:
                write_atomically(self.folder / f"failure-{self.world.rank}", json.dumps(about).encode())
            except BadInput as fault:
                print(
                    f"{self.argv[0]}: rank {self.world.rank}: {status}: {reason}; {fault}", file=sys.stderr, flush=True
                )
        elif self.world.rank:
            print(f"{self.argv[0]}: rank {self.world.rank}: {status}: {reason}", file=sys.stderr, flush=True)
        else:
            where = f"record: {self.out}"
            try:
                self.record(status, reason, steps, log).write(self.out)
            except BadInput as fault:
                where = "no record" if str(fault) in reason else f"no record: {fault}"
            print(f"{self.argv[0]}: {status}: {reason} ({where})", file=sys.stderr, flush=True)


def as_workers_have_it(hardware: Hardware, nproc: int) -> Hardware:
    """The hardware with the threads that each of `nproc` workers gets, whoever asks."""
    shared = share_threads(nproc)
    if not shared:
        return hardware
    update = {"environment": hardware.environment | shared, "threads": int(shared["OMP_NUM_THREADS"])}
    return hardware.model_copy(update=update)


def describe_run(framework: Framework, method: Method, flags: Flags, argv: list[str]) -> dict[str, Any]:
    """The part of a record that is known before anything runs."""
    return {
        "schema": 1,
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "framework": framework,
        "method": method,
        "aa": flags.aa,
        "argv": argv,
        "versions": read_versions(framework),
        "git": read_git(),
        "hardware": as_workers_have_it(read_hardware(), flags.nproc),
        "setup": Setup(
            nproc=flags.nproc,
            nnodes=flags.nnodes,
            zero=flags.zero,
            mp=flags.mp,
            bsz=flags.bsz,
            micro_bsz=flags.micro_bsz,
            accumulation=flags.accumulation,
            dtype=flags.dtype,
            amp=flags.amp,
            recompute=flags.recompute,
            attention=flags.attention,
            padding_free=flags.padding_free,
            head=flags.head,
            lean=flags.lean,
            compile=flags.compile,
            keep_memory=flags.keep_memory,
            packing=flags.packing,
            order=flags.order,
            tuned=flags.tuned,
        ),
        "kernels": None,
        "timed_from": flags.warmup_steps,
    }


@contextlib.contextmanager
def recorded(framework: Framework, method: Method, job: Job) -> Iterator[Run]:
    """Gives the script its `Run` and sees to it that every end but Ctrl-C leaves a record.

    An allocation failure or any other error ends with exit code 1, --timeout with 124. Where a launcher of the user's
    own has started several processes, only rank 0 writes: what ends another one is on that one's stderr.
    """
    run = Run(framework, method, job)
    if run.folder is None:  # or who watches this worker sees to both
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run.watchdog.start()
    try:
        yield run
        _leave(run, 0)
    except KeyboardInterrupt:
        print(
            f"{run.argv[0]}: interrupted, {'record written' if run.written else 'no record written'}", file=sys.stderr
        )
        sys.exit(130)
    except BrokenPipeError:  # who read this is gone
        forget_stdout()
        _leave(run, 130)
        sys.exit(130)
    except Exception as error:
        _end_with(run, error)
    finally:
        run.watchdog.cancel()
        if run.folder is None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is cleared away now may end at once


def new_record_path(framework: str, method: str, flags: Flags) -> Path:
    """Where the record of a run without --out goes: a new file for each run."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    model = os.fsencode(flags.model_name)[:100].decode(errors="ignore")  # a file's name has room for 255 bytes
    return results_folder() / "runs" / f"{framework}-{method}-{model}-bsz{flags.bsz}-{now}-{os.getpid()}.json"


def read_git() -> Git:
    """The commit of this checkout, and what was changed since."""

    def git(*arguments: str, given: bytes = b"") -> bytes | None:
        try:
            command = ["git", "-c", f"safe.directory={ROOT}", "-C", ROOT, *arguments]  # also in another user's clone
            done = subprocess.run(command, input=given, capture_output=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout if done.returncode == 0 else None

    revision, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if revision is None or status is None:
        return Git(revision=None, dirty=None, changes=None)
    changes = hashlib.sha256(status + (git("diff", "HEAD", "--binary") or b""))
    names = git("ls-files", "--others", "--exclude-standard", "--full-name") or b""
    changes.update(git("hash-object", "--stdin-paths", given=names) or b"")
    return Git(
        revision=revision.decode().strip(), dirty=bool(status), changes=changes.hexdigest()[:12] if status else None
    )


def _end_with(run: Run, error: Exception) -> NoReturn:
    if run.written:
        print(f"{run.argv[0]}: after its record was written: {type(error).__name__}: {error}", file=sys.stderr)
        _leave(run, 1)
        sys.exit(1)
    text = str(error).strip() or type(error).__name__
    # torch raises OutOfMemoryError or a RuntimeError that says so, Paddle MemoryError or the same in words.
    out_of_memory = isinstance(error, MemoryError) or any(
        sign in text.lower() for sign in ("out of memory", "can't allocate memory", "resourceexhausted")
    )
    # A record that could not be written, a loss that is no number, no room for what is printed.
    expected = out_of_memory or isinstance(error, BadInput | FloatingPointError)
    expected |= isinstance(error, OSError) and error.errno in NO_ROOM
    log = traceback.format_exc().splitlines()
    if not expected:
        print("\n".join(log), file=sys.stderr)
    steps = None
    if run.losses_are_whole:
        with contextlib.suppress(Exception):  # after a device error the losses may not be readable
            steps = run.steps()
    reason = text.splitlines()[0] if expected else f"{type(error).__name__}: {text.splitlines()[0]}"
    run.fail("oom" if out_of_memory else "failed", reason, log, steps)
    _leave(run, 1)
    sys.exit(1)


def _leave(run: Run, code: int) -> None:
    """Ends one of several processes at once: torch's gloo groups can deadlock when the interpreter clears them away.

    (Their destructor waits for a thread that waits for the interpreter's lock, which the destructor's caller holds.)
    """
    if run.world.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _started() -> float:
    """When the run was started, in seconds since the epoch: when its supervisor was, where it has one."""
    supervisor = os.environ.get(RUN_SUPERVISOR)
    return psutil.Process(int(supervisor) if supervisor else None).create_time()


def _end_at_timeout(run: Run) -> NoReturn:
    """Runs in the watchdog's thread, so it ends a main thread that hangs in native code too."""
    where = f"after step {len(run.seconds)}" if run.seconds else "before the first step ended"
    try:
        run.fail("timeout", f"not done within --timeout {run.flags.timeout:g} s, {where}")
    finally:
        os._exit(TIMEOUT_EXIT)
