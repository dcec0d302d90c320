"""Faults around runs: a full disk, no memory, kills at any moment. Each is named and loses nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, run_program
from helpers import SUITE

from tunebench.record import read_record

pytestmark = pytest.mark.frameworks

# Runs a shell script in $0, where a disk of 256 KiB is mounted. Its content is copied to $1 at the end.
DISK = """
mount -t tmpfs -o size=256k none "$0" || exit 99
fill() { cat /dev/zero >"$0/filler" 2>/dev/null; }
empty() { rm "$0/filler"; }
%s
cp -a "$0/." "$1"
"""


def on_a_small_disk(tmp_path: Path, script: str, environment: dict[str, str]) -> tuple[str, Path]:
    """Returns the script's output and the folder that holds the copy of the disk."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    copy.mkdir()
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", DISK % script, disk, copy]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=600, cwd="/")
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"a disk of its own cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, copy


def test_a_full_disk_ends_a_suite_in_one_line_and_keeps_what_is_there(tmp_path):
    (tmp_path / "mini.toml").write_text(SUITE)
    suite = f"'{sys.executable}' -P -m tunebench.suite.runner '--suite={tmp_path}/mini.toml' 2>&1 --anyway --only"
    printed, copy = on_a_small_disk(
        tmp_path,
        f"""
        {suite} full/torch; echo "one: $?"; cp "$0/mini/full/torch-r1.json" '{tmp_path}/before.json'; fill
        {suite} '*/torch'; echo "full: $?"
        cmp "$0/mini/full/torch-r1.json" '{tmp_path}/before.json' && echo kept; empty
        {suite} '*/torch'; echo "room: $?"
        """,
        {"TUNEBENCH_RESULTS": str(tmp_path / "disk"), "OMP_NUM_THREADS": "1"},
    )
    full, room = printed.split("one: 0\n")[1].split("full: 2\nkept\n")
    assert "room: 0" in room
    assert "done already: full/torch r1: ok" in full
    last = full.splitlines()[-1]
    assert last.startswith(f"run_all.sh: {tmp_path}/disk/mini/lora/torch-r1.")
    assert "No space left on device" in last
    assert "Traceback" not in printed
    assert {file.name for file in copy.rglob("*") if file.is_file()} == {".lock", "torch-r1.json", "torch-r1.log"}
    assert [read_record(file).status for file in copy.rglob("*.json")] == ["ok", "ok"]


def test_weights_for_which_there_is_no_room_are_named_before_they_are_written(tmp_path):
    script = f"'{ROOT}/.venv/torch/bin/python' '{ROOT}/torch/finetune_full.py' --model=llama-65b"
    printed, copy = on_a_small_disk(
        tmp_path, f'{script} 2>&1; echo "ended: $?"', {"TUNEBENCH_CACHE": str(tmp_path / "disk")}
    )
    expected = f"the random weights of llama-65b take 130.57 GB, and {tmp_path}/disk/checkpoints has 0.00 GB free"
    assert printed.splitlines() == [
        f"finetune_full.py: {expected}; make room there, or TUNEBENCH_CACHE names another folder",
        "ended: 2",
    ]
    assert not [file for file in copy.rglob("*") if file.is_file() and file.suffix != ".lock"]


@pytest.mark.parametrize(("framework", "nproc"), [("torch", 1), ("paddle", 2)])
def test_a_record_that_has_no_room_is_named_and_the_old_one_stays(tmp_path, framework, nproc):
    script = f"'{ROOT}/.venv/{framework}/bin/python' '{ROOT}/{framework}/finetune_full.py'"
    flags = f"--model=llama-tiny --samples=20 --bsz=2 --steps=2 --warmup-steps=0 --nproc={nproc}"
    printed, copy = on_a_small_disk(
        tmp_path,
        f"""
        echo old >"$0/r.json"; fill
        {script} {flags} "--out=$0/r.json" 2>&1; echo "ended: $?"
        TMPDIR=$0 {script} {flags} "--out=$0/r.json" 2>&1; echo "all full: $?"; empty
        """,
        {},
    )
    assert "Traceback" not in printed
    assert printed.splitlines()[-1] in ("all full: 1", "all full: 2")
    *_, last = printed.split("ended: 1\n")[0].splitlines()
    out = tmp_path / "disk" / "r.json"
    assert (
        f"failed: {'' if nproc == 1 else 'rank 0: '}{out} cannot be written: No space left on device; make room" in last
    )
    assert last.endswith("(no record)")
    assert (copy / "r.json").read_text() == "old\n"
    assert [file.name for file in copy.iterdir()] == ["r.json"]


@pytest.fixture
def cgroup():
    """A function that moves the calling process into a cgroup with a memory limit in bytes."""
    roots = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    root = next((root for root in roots if (root / "cgroup.procs").exists()), roots[-1])
    group = root / f"tunebench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    limits = [group / "memory.limit_in_bytes", group / "memory.max"]

    def enter(limit: int) -> None:
        next(file for file in limits if file.exists()).write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))

    if not any(file.exists() for file in limits):
        group.rmdir()
        pytest.skip(f"{root} limits no memory")
    yield enter
    for pid in (group / "cgroup.procs").read_text().split():
        psutil.Process(int(pid)).kill()
        psutil.wait_procs([psutil.Process(int(pid))], timeout=5)
    group.rmdir()


def test_a_process_that_the_kernel_ends_for_want_of_memory_is_oom(tmp_path, cgroup):
    """The cgroup's memory is enough for the runner and too little for a framework."""
    lora = 'name = "lora"\nscript = "finetune_lora.py"\nflags = { steps = 20, recompute = true }'
    assert lora in SUITE
    (tmp_path / "mini.toml").write_text(
        SUITE.replace(lora, 'name = "two"\nscript = "finetune_full.py"\nflags = { nproc = 2 }')
    )
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "tunebench.suite.runner",
            f"--suite={tmp_path / 'mini.toml'}",
            "--anyway",
            "--only=*/torch",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"TUNEBENCH_RESULTS": str(tmp_path)},
        preexec_fn=lambda: cgroup(200 * 2**20),
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr  # oom is a result
    alone, two = (read_record(tmp_path / "mini" / pair / "torch-r1.json") for pair in ("full", "two"))
    assert (alone.status, two.status) == ("oom", "oom")
    killed = r"killed by SIGKILL \(9\): the kernel ended a process for want of memory meanwhile"
    assert re.fullmatch(killed, alone.reason)
    assert re.fullmatch(rf"(rank [01]|the launcher) was {killed}", two.reason)
    assert "| OOM " in done.stdout


def test_a_random_kill_loses_no_finished_record():
    """Runs tests/stress.py briefly. A long run is started by hand: --kills 200."""
    done = run_program("tests/stress.py", "--kills=1", check=True)
    assert "none lost or broken" in done.stdout
