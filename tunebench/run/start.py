"""Starts a run: reads the command line, makes missing files, and starts the workers of a run with several processes."""

import contextlib
import gc
import os
import shutil
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from tunebench import processes
from tunebench.bootstrap import order_of, own_home, own_python, variable_of
from tunebench.errors import BadInput, one_line_refusals
from tunebench.files import cache_folder, results_folder
from tunebench.flags import Flags, check_folder, fit_to_steps, parse_flags
from tunebench.forecast import sweep
from tunebench.forecast.calibrate import machine_of
from tunebench.forecast.job import describe
from tunebench.forecast.report import refused, say
from tunebench.frameworks import FRAMEWORKS, other_library
from tunebench.hardware import keep_freed_memory, read_environment, read_hardware, visible_accelerators
from tunebench.installed import explained
from tunebench.models.checkpoint import Checkpoint, find_checkpoint
from tunebench.plan import load_plan
from tunebench.run.outcome import folder_of_run
from tunebench.run.place import export_place, read_world
from tunebench.run.run import Job, Run
from tunebench.run.supervisor import run_workers
from tunebench.run.unsupported import heads_left, not_offered
from tunebench.world import ALONE, share_threads

MP_NEEDS = "5.18.0"  # the oldest transformers that was seen to split a model; 5.16.0 does not


def start_run(framework: str, method: str) -> Job:
    """The job of this process: checked flags, checkpoint and plan, and its place among the workers.

    This function imports no framework, so that it refuses bad input at once, with one line and exit code 2. Where the
    run has several processes and no launcher started this one, this process supervises them: it starts them and exits
    with the run's exit code after they ended.
    """
    program = Path(sys.argv[0]).name
    with one_line_refusals(program):
        read_environment()
        check_build(framework)
        world = read_world(framework, on_terminal=os.isatty(0))
        watched = folder_of_run() is not None
        # A worker is silent here: its supervisor or rank 0 has printed the same. Without a supervisor it may be the one
        # that makes weights and tokens, whose progress goes to a stream.
        silent = world and (world.rank or watched)
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere if silent else sys.stdout):
            flags = parse_flags(method, world=world, framework=framework)
            if flags.out is None and not (world and world.rank) and not watched:
                check_folder(results_folder() / "runs", "TUNEBENCH_RESULTS")
            if flags.plan:
                return describe_job(framework, method, flags)
            if flags.profile is not None:
                check_folder(flags.profile.expanduser(), f"--profile {flags.profile}")
            checkpoint = find_checkpoint(flags.model, flags.weights, flags.seed, flags.layers)
            check_tensor_parallel(flags, checkpoint)
            versions = FRAMEWORKS[framework].versions()
            check_packages(framework, flags, versions, sys.executable)
            prepare_compiler(framework, flags)
            plan = load_plan(flags, checkpoint)
            flags = fit_to_steps(flags, plan.steps)
    if flags.keep_memory:
        keep_freed_memory()
    job = Job(flags, checkpoint, plan, world or ALONE)
    reason = not_offered(framework, method, flags, checkpoint, other_library(versions))
    if reason:
        Run(framework, method, job).fail("unsupported", reason)
        sys.exit(1)
    if world is not None:
        processes.die_with_parent()
        os.environ.update(share_threads(world.nproc))
        export_place(world, framework)
    elif flags.world_size > 1:
        with one_line_refusals(program):
            sys.exit(run_workers(Run(framework, method, job)))
    return job


def describe_job(framework: str, method: str, flags: Flags) -> Job:
    """The job of a forecast. Where no framework is needed for the answer, it is printed, and the process ends."""
    flags, checkpoint, plan, remarks = describe(flags)
    check_tensor_parallel(flags, checkpoint)
    versions = FRAMEWORKS[framework].versions()
    check_packages(framework, flags, versions, sys.executable)
    if library := other_library(versions):
        raise BadInput(f"--plan is of PaddleNLP's models, and {sys.executable} has {library}; unset TUNEBENCH_PADDLE")
    for remark in remarks:
        print(remark, flush=True)
    machine = machine_of(framework, flags)  # refuses records that do not go together
    if machine.cpu and flags.price is not None:
        raise BadInput("--price is for a GPU and hour, and the records of --calibrate are of a CPU; leave --price out")
    job = Job(flags, checkpoint, plan, ALONE)
    if flags.sweep:
        sweep.say(sweep.sweep(framework, method, job), flags.out)
        sys.exit(0)
    if reason := not_offered(framework, method, flags, checkpoint):
        say(refused(framework, method, job, reason), flags.out)
        sys.exit(0)
    return job


@contextlib.contextmanager
def importing(framework: str, method: str, job: Job) -> Iterator[None]:
    """The script imports its framework within this. A failed import ends the process with exit code 1 and a record.

    Python's garbage collector passes over the imports and over what they leave. It took a sixth of the imports' time.
    Later collections would go through these 400,000 objects again, for 0.3 s at a time, also within a timed step.
    """
    gc.disable()
    try:
        yield
    except Exception as error:
        log, first = traceback.format_exc().splitlines(), error
        while isinstance(first.__cause__, Exception):  # transformers and PaddleNLP wrap it
            first = first.__cause__
        Run(framework, method, job).fail("failed", f"an import failed: {explained(first)}", log)
        sys.exit(1)
    finally:
        gc.freeze()
        gc.enable()


def check_build(framework: str) -> None:
    """Raises `BadInput` where the installed build of the framework cannot use this machine's GPUs.

    Both frameworks would train on the CPU instead, without a word.
    """
    names = visible_accelerators()
    if not names:
        return
    machine, built = read_hardware(), FRAMEWORKS[framework].cuda_of_build()
    anew = f"run: rm -r .venv/{framework}; bash setup.sh {framework}"
    mended = f"name an interpreter with one by {variable_of(framework)}" if own_python(framework) else anew
    works = f"{mended}; or hide the GPUs: CUDA_VISIBLE_DEVICES="
    if built is None:
        raise BadInput(f"{framework} is a build for CPUs, and {len(names)} GPU(s) are here ({names[0]}); {works}")
    if machine.cuda and int(built.partition(".")[0]) > int(machine.cuda.partition(".")[0]):
        raise BadInput(
            f"{framework} is built for CUDA {built}, and the driver {machine.driver} supports CUDA up to "
            f"{machine.cuda}; update the driver, or {works}"
        )


def check_tensor_parallel(flags: Flags, checkpoint: Checkpoint) -> None:
    """Raises `BadInput` where --mp does not divide the model's heads."""
    if reason := heads_left(flags, checkpoint):
        raise BadInput(reason)


def check_packages(framework: str, flags: Flags, packages: Mapping[str, str], python: str | Path) -> None:
    """Raises `BadInput` where the flags need a package that a user's own interpreter lacks or has too old.

    `packages` has the versions of the packages of the interpreter `python`.
    """
    if framework != "torch":
        return
    if flags.deepspeed and "deepspeed" not in packages:
        raise BadInput(
            f"--zero needs deepspeed, which {python} lacks; install it there, or use --sharding fsdp, --nproc or --mp"
        )
    if flags.mp > 1 and order_of(found := packages["transformers"]) < order_of(MP_NEEDS):
        raise BadInput(f"--mp needs transformers {MP_NEEDS} or newer, and {python} has {found}")


def prepare_compiler(framework: str, flags: Flags) -> None:
    """Names the cache folder of torch's compiler. Raises `BadInput` where g++ or Python's headers are missing."""
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
