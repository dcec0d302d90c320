"""One run of a script. It measures the steps and leaves one record, unless a signal ends it."""

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil

from tunebench.checkout import read_git
from tunebench.errors import NO_ROOM, BadInput, forget_stdout
from tunebench.files import results_folder
from tunebench.flags import TRACED_STEPS, Flags
from tunebench.forecast.formula import predict
from tunebench.frameworks import FRAMEWORKS, other_library
from tunebench.hardware import Hardware, bind_to_gpu, read_hardware
from tunebench.models.checkpoint import Checkpoint
from tunebench.plan import Plan
from tunebench.profile.summary import rank_profile
from tunebench.profile.trace import SUFFIX
from tunebench.record import LOG_LINES, MARKED, Built, Kernels, Model, Profile, RankProfile, Record, Setup, Steps
from tunebench.run.meter import Meter
from tunebench.run.outcome import RUN_RECORD, RUN_SUPERVISOR, TIMEOUT_EXIT, folder_of_run, leave_done, leave_failure
from tunebench.world import World, share_threads

# Words by which errors say that memory ran out, in the order of search. They are those of torch, CUDA, NCCL and Paddle;
# of torch on CPUs; of cuBLAS and cuDNN; and of the system. Paddle's error class comes last: another line says more.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "status_alloc_failed",
    "cannot allocate memory",
    "resourceexhausted",
)


Marking = Callable[[], contextlib.AbstractContextManager[None]]


class Job(NamedTuple):
    """A checked run before its start: flags, checkpoint, plan and this process's place."""

    flags: Flags
    checkpoint: Checkpoint
    plan: Plan
    world: World


class Run:
    """A running run, and what its record will hold.

    The script calls `describe` after it built the model, `start` before its loop and `end_step` at the end of each
    step. The device is synchronised in `start`, before the first timed step and after the last.
    """

    def __init__(self, framework: str, method: str, job: Job) -> None:
        self.framework, self.method = framework, method
        self.flags, self.checkpoint, self.plan, self.world = job
        self.argv = [Path(sys.argv[0]).name, *sys.argv[1:]]
        # None where this process has no supervisor.
        self.folder = folder_of_run()
        given = os.environ.get(RUN_RECORD) if self.folder else None
        self.out = Path(given) if given else self.flags.out or new_record_path(framework, method, self.flags)
        # The fields that are known before anything runs. The record of a run that fails early has them too.
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
        # Known before anything runs, so that a run that ends out of memory has it too.
        self.predicted_peak_memory_bytes = self._predict_peak()
        self.setup_seconds: float | None = None
        self.meter = Meter(self.flags, self.plan, self.world, self.say)
        self.peak_memory_bytes = 0  # of this process, at the end of the timed steps
        self.profile: RankProfile | None = None  # of this process
        self.losses_are_whole = self.flags.replicas == 1  # with more replicas a process knows its share's losses
        self.written = False

    def _predict_peak(self) -> int | None:
        """The predicted peak of the GPU that holds most; None where no formula knows such runs.

        Where a formula fails, prints a warning. The run goes on.
        """
        if other_library(self.about["versions"]):
            return None
        try:
            memory = predict(self.framework, self.method, self.flags, self.checkpoint, self.plan)
        except Exception as error:
            self.say(f"warning: the peak of memory cannot be predicted: {type(error).__name__}: {error}")
            return None
        return None if memory is None else memory.peak

    def describe(self, device: str, parameters: int, trainable: int, built: Built) -> None:
        """Keeps the device, the framework's parameter counts and the model that it built.

        `device` is `cpu` or the accelerator's name. Raises RuntimeError where the config contradicts the model.
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
        """Keeps the kernels of the first forward pass. Raises RuntimeError where they are not those of the flags."""
        seen = Kernels(weights=sorted(weights), matmuls=sorted(matmuls), attention=sorted(attention))
        self.about["kernels"] = seen
        flags = self.flags
        for what, found, asked in (
            ("weights", seen.weights, flags.weights_dtype),
            ("matrix products", seen.matmuls, flags.compute_dtype),
        ):
            if found != [asked]:
                raise RuntimeError(f"--dtype {flags.dtype}: {what} are in {' and '.join(found)}, not in {asked}")
        on_gpu = self.about["hardware"].device != "cpu"
        biased = self.checkpoint.expected.alibi is not None
        signs = FRAMEWORKS[self.framework].attention_signs(flags.attention, on_gpu, biased)
        if not seen.attention or not all(any(sign in kernel for sign in signs) for kernel in seen.attention):
            raise RuntimeError(
                f"--attention {flags.attention}: what ran is {' and '.join(seen.attention) or 'none that is known'}"
            )

    def start(self, synchronize: Callable[[], None]) -> None:
        """Starts the clock of the first step. `synchronize` waits until the device has done all queued work."""
        self.meter.start(synchronize)
        self.setup_seconds = time.time() - _started()
        self.say(f"start-up took {self.setup_seconds:.1f} s")

    def steps(
        self,
        peak_memory_bytes: Callable[[], int],
        tracing: Callable[[Path], contextlib.AbstractContextManager[Marking]],
    ) -> Iterator[int]:
        """The steps of the plan. With --profile the last ones come again, after all that is measured has been read.

        `tracing` traces them into a file, and gives what marks steps in it. The first is not marked: what tensors hold
        is known from its end on.
        """
        yield from range(self.plan.steps)
        self.peak_memory_bytes = peak_memory_bytes()
        if self.flags.profile is None:
            return
        again = iter([step % self.plan.steps for step in range(-1 - TRACED_STEPS, 0)])
        path = self.flags.profile.expanduser() / f"{self.out.stem}-rank{self.world.rank}{SUFFIX}"
        try:
            with tracing(path) as marking:
                yield next(again)
                with marking():
                    yield from again
            self.profile = rank_profile(path, TRACED_STEPS)
        except Exception as error:
            print(
                f"warning: rank {self.world.rank} has no profile: {type(error).__name__}: {error}",
                file=sys.stderr,
                flush=True,
            )
            yield from again  # the other processes wait for this one in each step

    def end_step(self, loss: Any, grad_norm: Any) -> None:
        """Ends a step. `loss` and `grad_norm` are the framework's scalars. They are read after the last step.

        The steps of --profile are neither timed nor recorded.
        """
        if len(self.meter.seconds) < self.plan.steps:
            self.meter.end_step(loss, grad_norm)

    def finish(
        self,
        losses: list[float],
        peak_memory_bytes: list[int],
        matmul_flops: list[int],
        profiles: Sequence[RankProfile | None],
    ) -> None:
        """Writes the record of a run that finished its steps. Raises FloatingPointError where a loss is not finite.

        `losses` has a value for each step's global batch. The other lists have a value for each rank. `profiles` is
        empty without --profile.
        """
        self.meter.losses, self.losses_are_whole = list(losses), True
        steps = self.meter.steps()
        if len(steps.loss) < len(losses):
            raise FloatingPointError(f"loss or gradient norm of step {len(steps.loss) + 1} is not a finite number")
        self.watchdog.cancel()
        if self.world.rank:
            return
        record = self.record("ok", None, steps, peak_memory_bytes=peak_memory_bytes, matmul_flops=matmul_flops)
        known = [profile for profile in profiles if profile is not None]
        if known and len(known) == len(profiles):
            record = record.model_copy(update={"profile": Profile(steps=TRACED_STEPS, ranks=known)})
        from tunebench.report.stats import drift_in_words, drift_of

        change = drift_of([record])
        record.write(self.out)
        self.written = True
        if self.folder:
            leave_done(self.folder)
        self.say(
            f"loss {steps.loss[0]:.4f} -> {steps.loss[-1]:.4f}, {record.effective_tokens_per_second:.1f} effective "
            f"tokens/s over {len(steps.seconds) - record.timed_from} timed steps, record: {self.out}"
        )
        if record.disturbance and record.conditions:
            share, words = record.disturbance
            level = "disturbed: " if record.disturbed else "warning: " if share >= MARKED else "the machine was quiet: "
            self.say("; ".join([level + words, *record.conditions.remarks()]))
        else:
            self.say("what other programs took of the machine is not known")
        if record.profile:
            self.say(f"{TRACED_STEPS} further steps traced: {self.flags.profile}/{self.out.stem}-rank*{SUFFIX}")
        if change:
            self.say(f"warning: the run {drift_in_words(change)} (--warmup-steps is {self.flags.warmup_steps})")

    def say(self, line: str) -> None:
        """Prints a line on rank 0."""
        if not self.world.rank:
            print(line, flush=True)

    def record(
        self,
        status: str,
        reason: str | None,
        steps: Steps | None,
        log: Sequence[str] = (),
        peak_memory_bytes: Sequence[int] = (),
        matmul_flops: Sequence[int] = (),
    ) -> Record:
        """The record with all that is known so far."""
        return Record(
            status=status,
            reason=reason,
            model=self.model,
            plan=self.plan.info(),
            steps=steps,
            setup_seconds=self.setup_seconds,
            peak_memory_bytes=list(peak_memory_bytes),
            predicted_peak_memory_bytes=None if status == "unsupported" else self.predicted_peak_memory_bytes,
            matmul_flops=list(matmul_flops),
            conditions=self.meter.conditions if status == "ok" else None,
            log=list(log[-LOG_LINES:]),
            **self.about,
        )

    def fail(self, status: str, reason: str, log: Sequence[str] = (), steps: Steps | None = None) -> None:
        """Writes a record that says why there is no result. A worker reports to its supervisor instead."""
        if self.folder:
            try:
                leave_failure(self.folder, self.world.rank, status, reason, log, steps)
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
    """The hardware with the threads that each of `nproc` workers gets."""
    shared = share_threads(nproc)
    if not shared:
        return hardware
    update = {"environment": hardware.environment | shared, "threads": int(shared["OMP_NUM_THREADS"])}
    return hardware.model_copy(update=update)


def describe_run(framework: str, method: str, flags: Flags, argv: list[str]) -> dict[str, Any]:
    """The fields of a record that are known before anything runs."""
    return {
        "schema": 1,
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "framework": framework,
        "method": method,
        "aa": flags.aa,
        "until": flags.until,
        "argv": argv,
        "versions": FRAMEWORKS[framework].versions(),
        "git": read_git(),
        "hardware": as_workers_have_it(read_hardware(), flags.nproc),
        "setup": setup_of(flags),
        "kernels": None,
        "timed_from": flags.warmup_steps,
    }


def setup_of(flags: Flags) -> Setup:
    """The flags that say how the run is split and computed."""
    return Setup(**{name: getattr(flags, name) for name in Setup.model_fields})


@contextlib.contextmanager
def recorded(framework: str, method: str, job: Job) -> Iterator[Run]:
    """Gives the script its `Run`. Every end of the body leaves a record, but Ctrl-C and a closed stdout.

    An allocation failure or another error ends the process with exit code 1, --timeout with 124. Where the user's own
    launcher started several processes, only rank 0 writes a record. The others print their error on stderr.
    """
    run = Run(framework, method, job)
    if run.folder is None:  # a supervisor handles signals and --timeout for its workers
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run.watchdog.start()
    try:
        if near := bind_to_gpu(run.world.local_rank):
            run.say(f"cores nearest to the GPU: {len(near)}")
        yield run
        _leave(run, 0)
    except KeyboardInterrupt:
        print(
            f"{run.argv[0]}: interrupted, {'record written' if run.written else 'no record written'}", file=sys.stderr
        )
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout is gone
        forget_stdout()
        _leave(run, 130)
        sys.exit(130)
    except Exception as error:
        _end_with(run, error)
    finally:
        run.watchdog.cancel()
        if run.folder is None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on Ctrl-C may end the process at once


def new_record_path(trainer: str, method: str, flags: Flags) -> Path:
    """The path of a new record in results/runs/, for a run without --out. `trainer` is a framework or a peer."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    model = os.fsencode(flags.model_name)[:100].decode(errors="ignore")  # a file's name has room for 255 bytes
    return results_folder() / "runs" / f"{trainer}-{method}-{model}-bsz{flags.bsz}-{now}-{os.getpid()}.json"


def _end_with(run: Run, error: Exception) -> NoReturn:
    if run.written:
        print(f"{run.argv[0]}: after its record was written: {type(error).__name__}: {error}", file=sys.stderr)
        _leave(run, 1)
        sys.exit(1)
    text = str(error).strip() or type(error).__name__
    memory_fault = find_memory_fault(text)
    out_of_memory = isinstance(error, MemoryError) or memory_fault is not None
    # Errors that need no traceback: memory, an unwritable record, a loss that is not finite, a full disk.
    expected = out_of_memory or isinstance(error, BadInput | FloatingPointError)
    expected |= isinstance(error, OSError) and error.errno in NO_ROOM
    log = traceback.format_exc().splitlines()
    if not expected:
        print("\n".join(log), file=sys.stderr)
    steps = None
    if run.losses_are_whole:
        with contextlib.suppress(Exception):  # after a device error the losses may not be readable
            steps = run.meter.steps()
    first = memory_fault or text.splitlines()[0]
    reason = first if expected else f"{type(error).__name__}: {first}"
    run.fail("oom" if out_of_memory else "failed", reason, log, steps)
    _leave(run, 1)
    sys.exit(1)


def find_memory_fault(text: str) -> str | None:
    """The line of an error's text that says that memory ran out; None where no line does."""
    # glibc says "cannot allocate memory in static TLS block" of a library that is loaded too late. Memory is not short.
    lines = [line for line in text.splitlines() if "static tls block" not in line.lower()]
    return next((line.strip() for sign in OUT_OF_MEMORY for line in lines if sign in line.lower()), None)


def _leave(run: Run, code: int) -> None:
    """Ends one of several processes without the interpreter's clean-up, in which torch's gloo groups can deadlock.

    A group's destructor waits for a thread. That thread waits for the interpreter's lock, which the caller holds.
    """
    if run.world.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _started() -> float:
    """The start of the run in seconds since the epoch. Where the run has a supervisor, that process's start."""
    supervisor = os.environ.get(RUN_SUPERVISOR)
    return psutil.Process(int(supervisor) if supervisor else None).create_time()


def _end_at_timeout(run: Run) -> NoReturn:
    """Ends the run at --timeout. It runs in another thread, so it also ends a main thread that hangs in native code."""
    where = f"after step {len(run.meter.seconds)}" if run.meter.seconds else "before the first step ended"
    try:
        run.fail("timeout", f"not done within --timeout {run.flags.timeout:g} s, {where}")
    finally:
        os._exit(TIMEOUT_EXIT)
