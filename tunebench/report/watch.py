"""Draws a report anew whenever its records change, as while a suite runs."""

import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tunebench.errors import BadInput
from tunebench.report.load import record_files

POLL = 2.0  # seconds between two looks at the files; a look takes some milliseconds
CLEAR = "\x1b[2J\x1b[3J\x1b[H"  # the screen, the lines above it, and back to the first line (ECMA-48, xterm)


def watch(paths: list[Path], draw: Callable[[], None]) -> NoReturn:
    """Calls `draw` now and after each change of the record files under `paths`, until a signal ends the process.

    On a terminal each drawing starts on an empty screen. A run's record is written when the run has ended, so that a
    drawing falls into the start of the next one, which is not timed. What `draw` refuses is printed on stderr. Raises
    `BadInput` where a path is missing.
    """
    drawn = None
    while True:
        found = _state(paths)
        if found != drawn:
            drawn = found
            if sys.stdout.isatty():
                print(CLEAR, end="")
            now = datetime.datetime.now()
            print(f"{now:%H:%M:%S}, {len(found)} record(s) in {', '.join(map(str, paths))}; Ctrl-C ends this\n")
            try:
                draw()
            except BadInput as fault:  # such as a page without records yet
                print(fault, file=sys.stderr)
        time.sleep(POLL)


def _state(paths: list[Path]) -> dict[Path, tuple[int, int]]:
    """The time of change and the size of each record file."""
    state = {}
    for path in paths:
        for file in record_files(path):
            try:
                about = file.stat()
            except FileNotFoundError:  # moved away meanwhile
                continue
            state[file] = about.st_mtime_ns, about.st_size
    return state
