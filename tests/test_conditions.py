"""Disturbance: other programs beside real runs, what the record says of them, and how a suite waits."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import HERE, ROOT, train_altered

from tunebench import conditions
from tunebench.record import Record, read_record
from tunebench.report.pairing import join
from tunebench.suite import runner as suite

NAME = "burner"
NAMED = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{NAME}')\n"  # PR_SET_NAME
BURN = NAMED + "while True: pass"
# Part of a core is enough to disturb a run. It slows the run less than a whole core would.
BURN_SOME = (
    NAMED
    + """
import time
while True:
    end = time.process_time() + 0.03
    while time.process_time() < end:
        pass
    time.sleep(0.1)
"""
)
WRITE = (
    NAMED
    + """
import os, sys
block = os.urandom(1 << 20)
while True:
    with open(sys.argv[1], "wb") as file:
        for i in range(128):  # most of it to the page cache: a busy disk lets little through
            file.seek(i % 16 << 20)
            file.write(block)
        os.fsync(file.fileno())
"""
)
OTHER_USER = 12345
# Any user may start this interpreter. Others may have no access to the environment's.
PYTHON = next(p for p in ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable) if Path(p).exists())
# Eight steps are not timed. The timed ones last long enough for CPU time in ticks of 10 ms.
FLAGS = ["--model=llama-tiny", "--bsz=2", "--samples=20", "--steps=13", "--warmup-steps=8"]


@pytest.fixture
def burner():
    """A function that starts programs. They are ended after the test, also if it fails."""
    started = []

    def start(code: str, *arguments: object, **options) -> subprocess.Popen:
        started.append(subprocess.Popen([PYTHON, "-c", code, *map(str, arguments)], **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for_cpu_time(process: subprocess.Popen, seconds: float) -> None:
    """Waits until a process and its ended children have used so much more CPU time, however busy the machine is."""
    watched = psutil.Process(process.pid)
    first, deadline = sum(watched.cpu_times()), time.monotonic() + 60
    while sum(watched.cpu_times()) < first + seconds:
        assert time.monotonic() < deadline, f"no {seconds} s of CPU time within a minute"
        time.sleep(0.05)


def taken(record: Record) -> float:
    """The cores that the burner used during the timed steps."""
    seconds = sum(taker.core_seconds for taker in record.conditions.takers if taker.name == NAME)
    return seconds / record.conditions.seconds


def train(out: Path, method: str = "full", before: tuple[str, ...] = ()) -> tuple[Record, str]:
    """Runs this environment's framework; returns the record and the output."""
    command = [*before, sys.executable, ROOT / HERE / f"finetune_{method}.py", *FLAGS, f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd="/", check=True)
    return read_record(out), done.stdout


def test_a_burner_leaves_no_speedup(burner, tmp_path):
    """The burners belong to another user, where this user may start them so.

    Two of one name are among those that take most, whatever other tests run.
    """
    for _ in range(2):
        burner(BURN, cwd="/", **({} if os.geteuid() else {"user": OTHER_USER}))
    record, said = train(tmp_path / "r.json")
    assert taken(record) > 0.1  # below its share of a core: other tests run too
    assert record.disturbed
    assert record.disturbance[0] >= taken(record) - 0.05
    assert f"disturbed: others took {record.disturbance[0]:.1%} of a core (" in said
    other = record.model_copy(update={"framework": {"torch": "paddle", "paddle": "torch"}[record.framework]})
    (row,) = join([record, other])
    assert row.speedup is None
    assert row.refusal.startswith("disturbed: ")


@pytest.mark.frameworks
def test_a_burner_that_cannot_be_seen_counts_too(burner, tmp_path):
    """In a PID namespace, as in a container, a run sees no other process but still the kernel's counters."""
    if os.geteuid():
        pytest.skip("only root may make a namespace of processes")
    burner(BURN)
    record, _ = train(tmp_path / "r.json", before=("unshare", "--pid", "--fork", "--mount-proc"))
    assert [taker for taker in record.conditions.takers if taker.name == NAME] == []
    assert record.disturbance[0] > 0.2


@pytest.mark.frameworks
def test_a_burner_before_the_timed_steps_does_not_count(burner, tmp_path):
    process = burner(BURN)
    command = [sys.executable, "-u", ROOT / HERE / "finetune_lora.py", *FLAGS, f"--out={tmp_path / 'r.json'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/") as running:
        for line in running.stdout:
            if line.startswith("step 6/"):
                process.kill()
                process.wait()
    assert taken(read_record(tmp_path / "r.json")) < 0.01


@pytest.mark.frameworks
def test_writing_to_a_disk_counts(burner, tmp_path):
    burner(WRITE, tmp_path / "written")
    record, _ = train(tmp_path / "r.json", "lora")
    assert taken(record) > 0.01, record.conditions


def test_what_the_run_does_itself_does_not_count(burner):
    root = os.getpid()
    other, first = burner(BURN), conditions.read([root])
    wait_for_cpu_time(other, 0.4)
    found = conditions.between(first, conditions.read([root]))  # the burner is a child of this process
    assert found.own_core_seconds > 0.25
    assert all(taker.name != NAME for taker in found.takers)
    other.kill()
    other.wait()  # its time is now in the time of ended children
    assert conditions.between(first, conditions.read([root])).own_core_seconds >= found.own_core_seconds


def test_what_starts_and_ends_between_two_readings_counts_by_its_parent(burner):
    count = "i=0; while [ $i -lt 9999 ]; do i=$((i+1)); done"
    other = burner(f"{NAMED}import subprocess\nwhile True: subprocess.run(['sh', '-c', '{count}'])")
    time.sleep(0.3)
    root = subprocess.Popen(["sleep", "99"])  # a run that does nothing
    first = conditions.read([root.pid])
    wait_for_cpu_time(other, 0.6)
    found = conditions.between(first, conditions.read([root.pid]))
    root.kill()
    root.wait()
    assert sum(taker.core_seconds for taker in found.takers if taker.name == NAME) > 0.3
    assert found.own_core_seconds == 0.0


def test_time_from_before_the_first_reading_is_not_an_ancestors(burner):
    """An ended shell passes its children's CPU time on to its parent, through any number of nested shells."""
    burn = "import time; [0 for _ in iter(lambda: time.process_time() < 0.6, False)]"
    shells = f"sh -c '{PYTHON} -c \"{burn}\"; echo burnt; read line; true'; true"
    code = f"{NAMED}import subprocess, sys, time\nsubprocess.run(['sh', '-c', sys.argv[1]])\n"
    code += "print('reaped', flush=True)\ntime.sleep(99)"
    ancestor = burner(code, shells, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert ancestor.stdout.readline() == "burnt\n"
    root = burner("import time; time.sleep(99)")  # a run that does nothing
    first = conditions.read([root.pid])
    ancestor.stdin.write("\n")
    ancestor.stdin.flush()
    assert ancestor.stdout.readline() == "reaped\n"
    time.sleep(0.3)
    last = conditions.read([root.pid])
    before, after = (each.processes[ancestor.pid].ended_children for each in (first, last))
    assert (after - before) * conditions.TICK > 0.5, "it got the time of all that ended"
    found = conditions.between(first, last)
    assert sum(taker.core_seconds for taker in found.takers if taker.name == NAME) < 0.2


def test_threads_that_are_bound_to_cores_count_with_all_of_them():
    """As with OMP_PROC_BIND, the cores of the first thread are not those of the process."""
    code = "import os, threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True).start(); "
    code += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(flush=True); time.sleep(9)"
    with subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        first = conditions.read([run.pid])
        time.sleep(0.3)
        found = conditions.between(first, conditions.read([run.pid]))
        run.kill()
    assert found.cores == len(os.sched_getaffinity(0))


def test_counters_that_cannot_be_true_are_not_known():
    first = conditions.read([os.getpid()])
    time.sleep(0.3)
    last = conditions.read([os.getpid()])
    assert conditions.between(first, last) is not None
    for cores in (first.cores, {}, {99: (0, 0, 0)}):  # equal, missing, other cores
        assert conditions.between(first, last._replace(cores=cores)) is None


def test_a_machine_whose_counters_cannot_be_read_ends_no_run(tmp_path):
    code = "import tunebench.conditions as c, pathlib; c.PROC = pathlib.Path('/nowhere')"
    record = train_altered(code, HERE, "lora", tmp_path / "r.json", *FLAGS[:-2], "--steps=2", "--warmup-steps=1")
    assert (record.status, record.conditions) == ("ok", None)


def test_the_run_of_a_launcher_is_all_its_processes(tmp_path):
    """Two processes of one script, started by no supervisor of this project: each finds both and no other."""
    script = tmp_path / "ranks.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tunebench.conditions import roots_of_run\n"
        "import time; time.sleep(0.5); print(*roots_of_run(sys.argv[0], 2), flush=True); time.sleep(1)\n"
    )
    ranks = [subprocess.Popen([sys.executable, "-P", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [set(map(int, rank.communicate(timeout=60)[0].split())) for rank in ranks]
    assert found == [{rank.pid for rank in ranks}] * 2


def test_a_suite_waits_for_a_quiet_machine_and_says_for_what(burner, capsys):
    # A run's own children do not count, so another process starts the burner.
    process = burner(
        f"import os, sys\nif os.fork(): os._exit(0)\n{NAMED}print(os.getpid(), flush=True)\nwhile True: pass",
        stdout=subprocess.PIPE,
    )
    pid = int(process.stdout.readline())
    try:
        assert not suite.wait_until_quiet("[1/2] mini/torch r1", 2.0)
    finally:
        os.kill(pid, 9)
    printed = capsys.readouterr().out
    assert "[1/2] mini/torch r1: waits for a quiet machine, 2 s at most: others took " in printed
    assert f"{NAME} " in printed
    assert "goes on all the same: others took" in printed


SUITE = """
title = "one short pair"
[defaults]
model = "llama-tiny"
bsz = 2
samples = 20
steps = 4
"warmup-steps" = 2
[[pair]]
name = "lora"
script = "finetune_lora.py"
"""
SHORT_WAIT = """
import sys
from tunebench import bootstrap
bootstrap.enter_environment("torch", "paddle", module="tunebench.suite.runner")
from tunebench.suite import runner as suite
suite.MOST_WAITING = 1.0
sys.exit(suite.main())
"""


@pytest.mark.frameworks
def test_both_sides_of_a_disturbed_round_run_again_twice(burner, tmp_path):
    (tmp_path / "mini.toml").write_text(SUITE)
    process = burner(BURN_SOME)
    command = [sys.executable, "-P", "-c", SHORT_WAIT, f"--suite={tmp_path / 'mini.toml'}"]
    env = os.environ | {"TUNEBENCH_RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd="/", env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("r1: starts") == 6
    assert done.stdout.count("r1: again, since ") == 4
    assert "measured again, since others disturbed a side of the round or its sides ran apart: 4 runs" in done.stdout
    assert "2 of 2 runs are of rounds that tell nothing; the same command measures them again:" in done.stdout
    assert "| disturbed: paddle: others took " in done.stdout
    kept = sorted(path.name for path in (tmp_path / "results" / ".previous").rglob("*.json"))
    assert kept == ["paddle-r1.2.json", "paddle-r1.json", "torch-r1.2.json", "torch-r1.json"]
    process.kill()
    anyway = subprocess.run(
        [*command, "--anyway"], capture_output=True, text=True, timeout=600, cwd="/", env=env, check=False
    )
    assert "runs: 2, done already: 2" in anyway.stdout
    assert "waits for" not in anyway.stdout
