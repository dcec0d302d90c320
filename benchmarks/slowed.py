"""Checks --versus for real: a second checkout whose training steps take longer, against this one.

python benchmarks/slowed.py [--slower 10%] [--suite quick] [--only GLOB] [--repeats 6] [--anyway]

The second checkout is a clone in a temporary folder, with this one's uncommitted changes. Its environments have
this checkout's packages. In the loops of its four scripts a step sleeps before it ends, for a share of the time that it
has taken: with --slower 10% the rate falls by 10%. That holds on a CPU, where a step's operations end before its last
line.
The clone's run_all.sh runs the suite with --versus THIS CHECKOUT: old is this one, new is the slower one. Records go to
results/slowed/, and the same command goes on. The exit code is that of run_all.sh: 1 where a regression was found.
"""

import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"]("torch", "paddle")

import os
import shutil
import signal
import subprocess
import tempfile

from tunebench import processes
from tunebench.errors import BadInput, one_line_refusals
from tunebench.files import cache_folder, results_folder
from tunebench.flags import Parser, percentage, positive
from tunebench.frameworks import FRAMEWORKS

PROGRAM = "slowed.py"
START = "    for step in run.steps(device.peak_memory_bytes, profiling.tracer(model)):\n"
END = "        run.end_step(loss, grad_norm)\n"


def main() -> int:
    """Makes the slower checkout, runs the suite and says what it should have found."""
    parser = Parser(prog=PROGRAM, description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--slower", type=percentage, default=0.1, metavar="SHARE", help="by which rates fall (default: 10%%)")
    add("--suite", default="quick", help="as of run_all.sh (default: quick)")
    add("--only", metavar="GLOB", help="as of run_all.sh")
    add("--repeats", type=positive, default=6, help="rounds, an even number (default: 6)")
    add("--anyway", action="store_true", help="as of run_all.sh")
    options = parser.parse_args()
    suite = str(pathlib.Path(options.suite).absolute()) if options.suite.endswith(".toml") else options.suite
    arguments = [f"--versus={ROOT}", f"--suite={suite}", f"--repeats={options.repeats}"]
    arguments += [f"--only={options.only}"] * bool(options.only) + ["--anyway"] * options.anyway
    folders = {"TUNEBENCH_CACHE": str(cache_folder()), "TUNEBENCH_RESULTS": str(results_folder() / "slowed")}
    with tempfile.TemporaryDirectory(prefix="slowed-") as place:
        clone = pathlib.Path(place) / "slowed"
        copy_checkout(clone)
        for framework in FRAMEWORKS:
            borrow_environment(clone, framework)
            for method in ("full", "lora"):
                slow_down(clone / framework / f"finetune_{method}.py", options.slower)
        print(f"each row should have a change of about {-options.slower:.0%}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        process = processes.start(["bash", clone / "run_all.sh", *arguments], env=os.environ | folders)
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 130
        finally:
            processes.end(process)


def copy_checkout(clone: pathlib.Path) -> None:
    """Clones this checkout and copies its uncommitted changes. Raises `BadInput` where git is missing or refuses."""
    git("clone", "--quiet", ROOT, clone)
    for name in git("-C", ROOT, "ls-files", "-z", "--modified", "--others", "--exclude-standard").split("\0"):
        if not name:
            continue
        if (ROOT / name).exists():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
        else:
            (clone / name).unlink(missing_ok=True)


def git(*arguments: object) -> str:
    """What git prints."""
    try:
        done = subprocess.run(["git", *map(str, arguments)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BadInput("git is missing, which copies the checkout; install it") from None
    if done.returncode:
        raise BadInput(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def borrow_environment(clone: pathlib.Path, framework: str) -> None:
    """Gives a clone an environment of its own code and of this checkout's packages, so that the code alone differs.

    Raises `BadInput` where this checkout's environment is not complete.
    """
    ours, theirs = (root / ".venv" / framework for root in (ROOT, clone))
    try:
        kind = (ours / "complete").read_text().split("\n")[1]
    except OSError:
        raise BadInput(f"the environment .venv/{framework} is not complete; run: bash setup.sh {framework}") from None
    subprocess.run([ours / "bin" / "python", "-m", "venv", "--without-pip", theirs], check=True)
    (packages,) = ours.glob("lib/python3*/site-packages")
    (own,) = theirs.glob("lib/python3*/site-packages")
    (own / "packages.pth").write_text(f"{packages}\n")  # a path alone: the .pth files in there are not read
    (own / "tunebench").symlink_to(clone / "tunebench")
    stamp = runpy.run_path(str(clone / "tunebench" / "bootstrap.py"))["stamp"](framework)
    (theirs / "complete").write_text(f"{stamp}\n{kind}\n")


def slow_down(script: pathlib.Path, share: float) -> None:
    """Lets each step of a script sleep, so that its rate falls by `share`. Raises `BadInput` for an unknown loop."""
    text = script.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise BadInput(f"{script.name} has no loop that this program knows; adapt START and END in {PROGRAM}")
    text = text.replace("import runpy\n", "import runpy\nimport time\n", 1)
    text = text.replace(START, f"{START}        began = time.perf_counter()\n")
    wait = f"        time.sleep((time.perf_counter() - began) * {share / (1 - share)!r})\n"
    script.write_text(text.replace(END, wait + END), encoding="utf-8")


if __name__ == "__main__":
    with one_line_refusals(PROGRAM):
        sys.exit(main())
