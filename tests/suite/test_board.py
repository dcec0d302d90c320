"""The board of a suite: what is drawn on a real terminal while real runs go on, and its size for many rows."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import psutil
import pytest
from conftest import ROOT
from helpers import SUITE

from tunebench.record import parse_record, read_record
from tunebench.suite.board import Board, window
from tunebench.suite.file import find_suite, plan_runs, read_suite

COLUMNS, LINES = 110, 24
MOST_CPU = 0.04  # of a core: 0.004 was measured beside other programs


def frames(text):
    """What a terminal showed one after the other, without control codes: rich clears a frame line by line."""
    parts = re.split(r"\r?(?:\x1b\[1A\x1b\[2K|\x1b\[2K\x1b\[1A|\r\x1b\[2K)+", text)
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part).replace("\r", "") for part in parts]


@pytest.mark.frameworks
def test_a_suite_on_a_terminal(tmp_path):
    (tmp_path / "mini.toml").write_text(SUITE)
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    command = [sys.executable, "-P", "-m", "tunebench.suite.runner", f"--suite={tmp_path / 'mini.toml'}"]
    environment = {"TUNEBENCH_RESULTS": str(tmp_path / "results"), "OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
    running = subprocess.Popen(
        [*command, "--anyway", "--only=lora/*"],
        stdin=its,
        stdout=its,
        stderr=its,
        cwd="/",
        env={name: value for name, value in (os.environ | environment).items() if name not in ("COLUMNS", "LINES")},
    )
    os.close(its)
    shown, seen = "", []  # seen: the runner's CPU time and the time since boot whenever it drew a step
    try:
        while select.select([ours], [], [], 120)[0]:
            try:
                shown += os.read(ours, 1 << 16).decode(errors="replace")
            except OSError:  # the runner has ended
                break
            if "step " in shown and running.poll() is None and "### Llama" not in shown:
                runner = psutil.Process(running.pid)
                seen.append((sum(runner.cpu_times()[:2]), time.monotonic()))
        assert running.wait(timeout=60) == 0, shown
    finally:
        running.kill()
        running.wait()
        os.close(ours)
    drawn = [frame for frame in frames(shown) if "runs done" in frame]
    assert len(drawn) > 5
    record = read_record(tmp_path / "results" / "mini" / "lora" / "paddle-r1.json")
    rate = f"{record.effective_tokens_per_second:.0f}"
    rows = [re.search(r"▶ lora +(.+?)  +(.+)", frame) for frame in drawn]
    cells = [(row[1].strip(), row[2].strip()) for row in rows]
    assert cells[0] == ("starting", "waiting")
    assert any(re.fullmatch(r"step \d+/20: \d+", paddle) and torch == "waiting" for paddle, torch in cells)
    assert any(paddle == rate and re.fullmatch(r"step \d+/20: \d+", torch) for paddle, torch in cells)
    assert "0 of 2 runs done, time left not known yet; machine: " in drawn[0]
    assert any("1 of 2 runs done, about " in frame for frame in drawn)
    assert any("machine: quiet, " in frame or "machine: NOT QUIET, " in frame for frame in drawn)
    for frame in drawn:
        assert len(frame.split("runs done")[1].splitlines()) <= LINES
    after = frames(shown)[-1]
    assert "runs done" not in after
    assert "[2/2] lora/torch r1: ok" in after
    assert "### Llama" in after
    (cpu, start), (cpu_at_end, end) = seen[0], seen[-1]
    assert end - start > 2
    assert (cpu_at_end - cpu) / (end - start) < MOST_CPU


@pytest.fixture
def many(tmp_path):
    """The runs of a suite with 60 pairs and two rounds."""
    pairs = "".join(f'[[pair]]\nname = "pair-{i}"\nscript = "finetune_full.py"\n' for i in range(60))
    path = tmp_path / "many.toml"
    path.write_text(f'title = "many"\n[defaults]\nmodel = "llama-tiny"\n{pairs}')
    return plan_runs(path, read_suite(path), tmp_path, 2, None)


@pytest.mark.parametrize("height", [8, 24, 100])
def test_many_rows_are_cut_to_the_terminal_around_the_one_that_runs(many, height):
    board = Board(many)
    assert len(board.rows) == 60
    assert board.sides == ["paddle", "torch"]
    for number in range(0, len(many), 7):
        lines = [line.plain for line in board.lines(80, height, number)]
        assert len(lines) <= max(height - 2, 3)
        assert f"▶ {many[number].entry.group} " in "\n".join(lines)
        assert ("more rows" in lines[1]) == (height < 60)


def test_a_cell_says_how_its_rounds_ended(many):
    lines = (ROOT / "tests" / "data" / "quick.jsonl").read_bytes().splitlines()
    record = parse_record(lines[0])
    board = Board(many)
    numbers = [i for i, run in enumerate(many) if run.entry.name == "pair-3/torch"]
    assert len(numbers) == 2

    def row():
        line = next(line.plain for line in board.lines(80, 24, numbers[0]) if "pair-3 " in line.plain)
        return line.split("pair-3")[1].split()

    assert row() == ["waiting", "waiting"]
    board.ended(numbers[0], record)
    assert row() == ["waiting", f"{record.effective_tokens_per_second:.0f}", "(1/2)"]
    board.ended(numbers[1], record.model_copy(update={"status": "oom", "reason": "memory"}))
    assert row() == ["waiting", "oom", "(2/2)"]
    assert "2 of 240 runs done" in board.lines(80, 24, 0)[0].plain


def test_each_contestant_of_peers_has_a_row(tmp_path):
    path = find_suite("peers")
    runs = plan_runs(path, read_suite(path), tmp_path, 1, None)
    board = Board(runs)
    assert len(board.rows) == len(runs) > 10
    assert board.sides == [""]
    assert "▶ " in board.lines(100, 40, 5)[7].plain


@pytest.mark.parametrize(
    ("rows", "current", "height", "shown"),
    [(3, 1, 10, (0, 3)), (60, 0, 10, (0, 10)), (60, 30, 10, (25, 35)), (60, 59, 10, (50, 60)), (60, 7, -3, (7, 8))],
)
def test_window(rows, current, height, shown):
    assert window(rows, current, height) == shown
