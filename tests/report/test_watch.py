"""--watch: the tables are drawn anew when a record comes, on a terminal and elsewhere, until Ctrl-C."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, refusal, run_program

from tunebench.record import parse_record

pytestmark = pytest.mark.frameworks
RECORDS = [parse_record(line) for line in (ROOT / "tests" / "data" / "quick.jsonl").read_bytes().splitlines()[:2]]


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_are_drawn_anew_when_a_record_comes(tmp_path, terminal):
    RECORDS[0].write(tmp_path / "a.json")
    ours, its = pty.openpty() if terminal else os.pipe()
    command = [sys.executable, str(ROOT / "summarize.py"), str(tmp_path), "--watch"]
    running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=its, stderr=its, cwd="/")
    os.close(its)
    shown = ""

    def until(text):
        nonlocal shown
        deadline = time.monotonic() + 60
        while text not in shown:
            assert select.select([ours], [], [], max(0, deadline - time.monotonic()))[0], shown
            shown += os.read(ours, 1 << 16).decode()

    try:
        until("warm-up and start-up are not timed.")
        assert ", 1 record(s) in " in shown
        assert ", 2 record(s) in " not in shown
        deadline = time.monotonic() + 2.5
        while select.select([ours], [], [], max(0, deadline - time.monotonic()))[0]:
            shown += os.read(ours, 1 << 16).decode()
        assert shown.count("record(s) in ") == 1, "nothing has changed"
        RECORDS[1].write(tmp_path / "b.json")
        shown = ""
        until("warm-up and start-up are not timed.")
        assert ", 2 record(s) in " in shown
        assert ("\x1b[2J" in shown) == terminal
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=30) in (-signal.SIGINT, 130)  # a shell says 130 in either case
    finally:
        running.kill()
        running.wait()
        os.close(ours)


def test_what_is_not_watched_is_refused(tmp_path):
    assert "leave --pack and --docs out" in refusal(run_program("summarize.py", "--watch", "--docs"))
    assert "no such file or folder" in refusal(run_program("summarize.py", "--watch", tmp_path / "missing"))
