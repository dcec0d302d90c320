"""Runs a suite for run_all.sh: one run after the other, each in its own process. Each leaves one record.

A second start continues where the first one stopped.
"""

from tunebench import bootstrap

if __name__ == "__main__":
    bootstrap.enter_environment("torch", "paddle", module="tunebench.suite.runner")

import argparse
import contextlib
import datetime
import errno
import fcntl
import itertools
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tunebench import conditions, processes
from tunebench.bootstrap import ROOT
from tunebench.checkout import read_git
from tunebench.errors import BadInput, forget_stdout, one_line_refusals
from tunebench.files import results_folder
from tunebench.flags import Parser, add_forecast_flags, check_out, path_of, percentage, positive
from tunebench.frameworks import FRAMEWORKS, SHARED_PACKAGES
from tunebench.peers import has_environment
from tunebench.progress import Step, in_words, read_step
from tunebench.record import LOG_LINES, Record, read_record
from tunebench.report.load import REHEARSALS
from tunebench.report.page import print_tables
from tunebench.report.regressions import THRESHOLD
from tunebench.report.rounds import APART, RUNS_APART, beside, started_lately
from tunebench.report.stats import LOOKS
from tunebench.run.run import describe_run
from tunebench.suite.board import Board, progress_of
from tunebench.suite.check import check
from tunebench.suite.environments import make_environments
from tunebench.suite.file import MOST_ROUNDS, Planned, find_suite, plan_runs, read_suite
from tunebench.suite.forecast import forecast_suite
from tunebench.suite.other import find_other
from tunebench.suite.rehearsal import rehearsal_changes, rehearsal_table
from tunebench.suite.resume import FINAL, record_before, set_aside, versions_in
from tunebench.suite.until import check_sides, run_until
from tunebench.suite.versus import ROUNDS, check_code, check_rounds, claim, folder_of, judge, tell_sides

PROGRAM = "run_all.sh"
GRACE = 30.0  # seconds that a run has after its --timeout to leave its own record
MOST_WAITING = 300.0  # seconds: the longest wait for a quiet machine
MARGIN = 10.0  # seconds from a run's start to the start time in its record, at most
TRIES_AGAIN = 2  # how often a disturbed round runs again
LOOK = 0.25  # seconds between two looks at a run, which are rare, since the run needs the cores

stop_signals: list[int] = []  # the signals so far that asked this process to end


def main() -> int:
    """Runs the suite of the command line. Returns 0, or 1 where a run failed, or 130 after an interruption."""
    parser = Parser(prog=PROGRAM, description="Runs a suite and prints its tables.", allow_abbrev=False)
    add = parser.add_argument
    add("--suite", default="cpu", help="a name in suites/, or a .toml file (default: cpu)")
    add("--only", metavar="GLOB", help="only the runs whose PAIR/FRAMEWORK fits, such as 'llama*/paddle'")
    add("--repeats", type=positive, help="rounds, the order of the sides alternating (default: the suite's, mostly 1)")
    add(
        "--fresh",
        action="store_true",
        help="from the start; earlier results (with --only or --aa: those runs') move to results/.previous/",
    )
    add("--aa", action="store_true", help="each side against itself instead: what a difference is worth here")
    add(
        "--versus",
        metavar="OTHER",
        help="regressions: another checkout, or another Python of one framework, beside this checkout in one series",
    )
    add("--threshold", type=percentage, metavar="SHARE", help="with --versus: the least regression (default: 3%%)")
    add(
        "--until",
        type=percentage,
        metavar="SHARE",
        help="rounds of each pair until its interval is within ± this share: 4, 6, 8, 10 or 12",
    )
    add("--cpu", action="store_true", help="CPU builds in the environments that are still to be set up")
    add("--anyway", action="store_true", help="do not wait for a quiet machine, nor measure disturbed rounds again")
    add("--dry-run", action="store_true", help="print the runs, start none")
    add("--check", action="store_true", help="look at the machine and the suite's runs, start none")
    add(
        "--rehearse",
        action="store_true",
        help="each run for a few steps with at most two layers: what would fail, and how long all take",
    )
    add_forecast_flags(parser, "say what each run would take on GPUs, start none")
    add("--out", type=Path, help="with --plan: a file for the same as JSON")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, lambda number, _: stop_signals.append(number))

    path = find_suite(options.suite)
    suite, folder = read_suite(path), results_folder() / path.stem
    if options.rehearse and (options.aa or options.repeats):
        raise BadInput("--rehearse runs each run once; leave --aa and --repeats out")
    check_kinds(options)
    if suite.contest:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the peers train on the CPU, so the scripts beside them do too
    if options.repeats and options.repeats > MOST_ROUNDS:
        raise BadInput(f"--repeats {options.repeats}: use at most {MOST_ROUNDS}")
    if options.check:
        return check(path, suite, options.only)
    if options.plan:
        if suite.contest:
            raise BadInput(f"--plan: {path} has peers, which are not forecast; use a suite of pairs")
        if options.out is not None:
            check_out(options.out)
        settings = {name: vars(options)[name] for name in ("plan", "gpu", "link", "price", "calibrate")}
        settings = {name: value for name, value in settings.items() if value is not None} | {"profile": None}
        if options.calibrate is not None:
            # The runs' folders are others.
            settings["calibrate"] = str(path_of("calibrate", str(options.calibrate)).absolute())
        asked = dict.fromkeys((entry.name for entry in suite.entries), settings)
        rounds = options.repeats or suite.repeats
        return forecast_suite(plan_runs(path, suite, folder, 1, options.only, changes=asked), rounds, options.out)
    for name in ("gpu", "link", "price", "calibrate", "out"):
        if vars(options)[name] is not None:
            raise BadInput(f"--{name} is for --plan; add it, or leave --{name} out")
    other = None if options.versus is None else find_other(options.versus)
    rounds = options.repeats or suite.repeats
    if other:
        folder, rounds = folder_of(folder, other), options.repeats or ROUNDS
        check_rounds(rounds)
    elif options.until:
        rounds = LOOKS[-1]
    whole = plan_runs(path, suite, folder, rounds, options.only, options.aa, other=other, until=options.until)
    runs = whole
    if options.until:
        check_sides(whole)
    if options.rehearse:
        folder = results_folder() / REHEARSALS / path.stem
        runs = plan_runs(path, suite, folder, 1, options.only, changes=rehearsal_changes(whole))
    if options.dry_run:
        if options.until:
            print(f"at most these rounds: a pair ends after {', '.join(map(str, LOOKS[:-1]))} or {LOOKS[-1]}")
        for run in runs:
            done = record_before(run.record, run.argv, run.flags.nproc, run.interpreter, run.root)[0] is not None
            print(f"{run.name}{': done already' * done}\n  {shlex.join(run.command)}")
        return 0
    with _locked(results_folder()):
        environments = sorted({run.entry.environment for run in runs})
        incomplete = [name for name in environments if not has_environment(name)]
        if incomplete and not make_environments(ROOT, incomplete, options.cpu, stopped):
            return 130
        folder.mkdir(parents=True, exist_ok=True)
        for run in runs:  # a run that was killed while it wrote its record leaves a partial file
            for part in run.record.parent.glob(f".{run.record.name}.*"):
                part.unlink()
        if options.fresh:
            only_these = options.only or options.aa
            set_aside(folder, *((p for r in runs for p in (r.record, r.log)) if only_these else folder.iterdir()))
        print(f"suite {path.stem} ({suite.title}), records in {folder}/")
        if options.rehearse:
            return run_all(runs, folder, None, anyway=True, show=lambda _: rehearsal_table(runs, whole))
        if rounds == 1:
            print("one round: a look, whose small differences say nothing; --repeats 4 gives intervals")
        expected = suite.minutes and suite.minutes * 60 / len(suite.entries)
        if other:
            claim(folder, other)
            tell_sides(other)
            if other.is_checkout and not make_environments(other.root, environments, options.cpu, stopped):
                return 130
            code = run_all(runs, folder, expected, options.anyway, show=lambda _: None)
            return code if code == 130 else judge(runs, folder, options.threshold or THRESHOLD)
        if options.until:
            return run_until(runs, options.until, lambda due: run_all(due, folder, expected, options.anyway))
        return run_all(runs, folder, expected, options.anyway)


def check_kinds(options: argparse.Namespace) -> None:
    """Raises `BadInput` where a flag stands beside another that ignores it or gives the runs another meaning."""
    apart = {
        "versus": ("aa", "until", "rehearse", "plan", "check"),
        "until": ("repeats", "aa", "rehearse", "plan", "check"),
        "plan": ("aa", "rehearse", "fresh", "check"),
        "check": ("aa", "rehearse", "fresh"),
    }
    for name, others in apart.items():
        for other in others:
            if getattr(options, name) and getattr(options, other):
                raise BadInput(f"--{name} and --{other} do not go together; leave one out")
    if options.threshold and not options.versus:
        raise BadInput("--threshold is for --versus; add it, or leave --threshold out")


def stopped() -> bool:
    """Whether a signal asked this process to end."""
    return bool(stop_signals)


class Interrupted(Exception):
    """A signal asked this process to end."""


@dataclass
class Series:
    """The runs of a suite and their progress.

    Unless `anyway` is set, each run waits for a quiet machine, and all runs of a disturbed round run again.
    """

    runs: list[Planned]
    folder: Path
    anyway: bool
    to_run: int  # runs in all, repeated ones included
    again: int  # repeated runs among them
    board: Board
    took: list[float] = field(default_factory=list)  # seconds of each run so far
    # The longest wait for a quiet machine before a round, in seconds. It is read late, since tests change it.
    patience: float = field(default_factory=lambda: MOST_WAITING)

    def measure(self, todo: dict[int, str], records: dict[int, Record | None]) -> dict[int, str]:
        """Runs the runs `todo` of a round and puts their records into `records`. Raises `Interrupted`.

        `todo` has the reason for each run's number where an existing record does not count, else an empty text. Returns
        the runs whose records still tell nothing, with the reason.
        """
        for attempt in range(1 if self.anyway else 1 + TRIES_AGAIN):
            if attempt:
                self.again, self.to_run = self.again + len(todo), self.to_run + len(todo)
            self._measure_once(todo, records)
            todo = _to_run_again(records)
            if not todo:
                break
        return todo

    def _measure_once(self, todo: dict[int, str], records: dict[int, Record | None]) -> None:
        began = time.monotonic()
        for number, (i, why) in enumerate(todo.items()):
            run = self.runs[i]
            title = f"[{i + 1}/{len(self.runs)}] {run.name}"
            if not self.anyway and not stop_signals:
                # The second side waits no longer than the two sides of a round may lie apart.
                left = (
                    max(APART, RUNS_APART * self.took[-1]) - MARGIN - (time.monotonic() - began) if number else math.inf
                )
                with self.board.waiting(i, title):
                    quiet = wait_until_quiet(title, max(0.0, min(left, self.patience)))
                self.board.found(quiet)
                if not number:  # after a wait in vain, later rounds only look, until the machine is quiet
                    self.patience = MOST_WAITING if quiet else 0.0
            if not number:
                began = time.monotonic()
            if stop_signals:
                raise Interrupted
            if why:  # the existing record must not pass for the coming one
                place = set_aside(self.folder, run.record, run.log)
                records[i] = None
                print(f"{title}: again, since {why}; the old one moves to {place}/")
            record = _execute(run, i, title, self.board, self.took, self.to_run - len(self.took) - 1)
            if record is None:
                raise Interrupted
            print(f"{title}: {_result(record)}, {in_words(self.took[-1])}")
            self.board.ended(i, record)
            records[i] = record


def run_all(
    runs: list[Planned],
    folder: Path,
    expected: float | None,
    anyway: bool,
    show: Callable[[list[Path]], None] = print_tables,
) -> int:
    """Runs all runs that are not done, and prints the tables after each pair by `show`. Returns the exit code.

    A failed run does not stop the others. `expected` is the usual length of a run in seconds; None where not known.
    """
    before = [record_before(run.record, run.argv, run.flags.nproc, run.interpreter, run.root) for run in runs]
    rounds = [list(group) for _, group in itertools.groupby(range(len(runs)), key=lambda i: runs[i].measured_with)]
    again = 0
    if not anyway:
        for members in rounds:
            for i, why in _to_run_again({i: before[i][0] for i in members}).items():
                before[i] = None, why
                again += 1
    to_run = sum(record is None for record, _ in before)
    print(f"runs: {len(runs)}, done already: {len(runs) - to_run}")
    if expected and to_run:
        print(f"expected: about {math.ceil(to_run * expected / 60)} minutes, by what they took on two cores")
    board = Board(runs)
    for i, (run, (record, _)) in enumerate(zip(runs, before, strict=True)):
        if record is not None:
            print(f"done already: {run.name}: {_result(record)}")
            board.ended(i, record)
    series = Series(runs, folder, anyway, to_run, again, board)
    bad: list[str] = []
    spoilt: list[str] = []
    shown = len(series.took)
    known = {i: record for i, (record, _) in enumerate(before)}
    for members, following in itertools.pairwise([*rounds, []]):
        records = {i: known[i] for i in members}
        try:
            told = series.measure({i: before[i][1] for i in members if before[i][0] is None}, records)
        except Interrupted:
            known |= records  # not read anew: a signal to the group of processes would end git, which that starts
            done = sum(record is not None and record.status in FINAL for record in known.values())
            command = ["bash", PROGRAM, *(argument for argument in sys.argv[1:] if argument != "--fresh")]
            print(f"interrupted with {done} of {len(runs)} runs done; `{shlex.join(command)}` goes on from here")
            return 130
        known |= records
        spoilt += [f"  {runs[i].name}: {why}" for i, why in told.items()]
        for i, record in records.items():
            if record is not None and record.status not in FINAL:
                bad.append(f"  {runs[i].name}: {_result(record)}, log: {runs[i].log}")
        last = not following or runs[following[0]].measured_with[:2] != runs[members[0]].measured_with[:2]
        if last and (shown < len(series.took) or not following):
            show([folder])
            shown = len(series.took)
    if series.again:
        why = "others disturbed a side of the round or its sides ran apart"
        print(f"measured again, since {why}: {series.again} runs")
    if spoilt:
        advice = "" if anyway else "; the same command measures them again"
        print(f"{len(spoilt)} of {len(runs)} runs are of rounds that tell nothing{advice}:", *spoilt, sep="\n")
    if bad:
        print(f"{len(bad)} of {len(runs)} runs did not end well; the same command tries them again:", *bad, sep="\n")
    return 1 if bad else 0


def wait_until_quiet(title: str, seconds: float) -> bool:
    """Waits while others take DISTURBED of a core or a GPU or more, at most for `seconds`, and prints for what.

    Returns whether the machine is quiet.
    """
    deadline = time.monotonic() + seconds
    busy = said = conditions.busy_with()
    if busy and seconds:
        print(f"{title}: waits for a quiet machine, {in_words(seconds)} at most: {busy}")
    while busy and not stop_signals and time.monotonic() < deadline:
        busy = conditions.busy_with()
    if said and not stop_signals:
        print(f"{title}: " + (f"goes on all the same: {busy}" if busy else "the machine is quiet now"))
    return not busy


def _to_run_again(records: dict[int, Record | None]) -> dict[int, str]:
    """The runs of a round that must run again, by number, with the reason.

    All of them must where others disturbed one of them, or where they ran at different times.
    """
    done = {i: record for i, record in records.items() if record and record.status == "ok"}
    why = _fault_of_round(list(done.values()), complete=None not in records.values())
    return dict.fromkeys(done, why) if why else {}


def _fault_of_round(done: list[Record], complete: bool) -> str:
    """Why the runs of a round tell nothing; empty where they do."""
    for record in done:
        if record.disturbance and record.disturbed:
            return f"{record.framework} was disturbed: {record.disturbance[1]}"
    if not complete and not all(started_lately(record) for record in done):
        return "the other side of its round is still to run"
    if not all(beside(done[0], other) for other in done):
        return "the other side of its round ran at another time"
    return ""


def _execute(run: Planned, number: int, title: str, board: Board, took: list[float], rest: int) -> Record | None:
    """Executes a run and returns its record. None where a signal to this process ended the run."""
    run.record.parent.mkdir(parents=True, exist_ok=True)
    oom_kills = processes.oom_kills()
    started_at, started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), time.monotonic()
    limit = started + run.flags.timeout + GRACE
    steps: list[Step] = []
    unread = b""
    with (
        run.log.open("wb") as log,
        run.log.open("rb") as printed,
        board.running(number, title, run.log) as show,
    ):
        process = processes.start(
            run.command,
            cwd=run.cwd,
            env=os.environ | run.variables | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None and not stop_signals and time.monotonic() < limit:
                time.sleep(LOOK)
                *lines, unread = (unread + printed.read()).split(b"\n")
                steps += filter(None, (read_step(line.decode(errors="replace")) for line in lines))
                elapsed = time.monotonic() - started
                show(progress_of(steps, run.flags.warmup_steps, elapsed, took, rest))
            exit_code = process.returncode
        finally:
            processes.end(process)  # this also ends what the run left behind
    took.append(time.monotonic() - started)
    if exit_code is None and stop_signals:
        return None
    try:
        record = read_record(run.record)
    except BadInput as fault:
        if run.other and run.record.exists():
            raise BadInput(
                f"--versus {run.other.path}: this checkout cannot read its records; name one whose records it reads: "
                f"{fault}"
            ) from None
        return _record_for(run, started_at, exit_code, oom_kills)
    if run.other:
        check_code(record, run.root)
    return record


def _record_for(run: Planned, started_at: str, exit_code: int | None, oom_kills: int) -> Record:
    """Writes the record of a run that left none. `exit_code` is None where the run overran its time."""
    log = run.log.read_text(encoding="utf-8", errors="replace").splitlines()
    status = "failed"
    if exit_code is None:
        status = "timeout"
        reason = f"not ended {GRACE:g} s after --timeout {run.flags.timeout:g} s, so the suite ended it"
    elif exit_code < 0:
        status, reason = processes.death_in_words(-exit_code, oom_kills)
    else:
        reason = f"exit code {exit_code}, last line: {log[-1] if log else 'none'}"
    about = describe_run(run.entry.framework, run.entry.method, run.flags, run.argv) | {"peer": run.entry.peer}
    about |= {
        "git": read_git(run.root),
        "started_at": started_at,
        "versions": versions_in(run.interpreter, (*FRAMEWORKS[run.entry.framework].packages, *SHARED_PACKAGES)),
    }
    unknown = dict.fromkeys(("model", "plan", "steps", "setup_seconds"))
    record = Record(status=status, reason=reason, log=log[-LOG_LINES:], peak_memory_bytes=[], **unknown, **about)
    record.write(run.record)
    return record


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of the results folder. Raises `BadInput` while another process has it. No child inherits it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+b", buffering=0) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().decode() or "another process"
            raise BadInput(f"{folder} is in use by {holder}; wait for it, since two would slow each other") from None
        lock.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            lock.write(f"process {os.getpid()} ({shlex.join(['run_all.sh', *sys.argv[1:]])})".encode())
        yield


def _result(record: Record) -> str:
    if record.status != "ok" or record.steps is None:
        return f"{record.status}: {record.reason}"
    timed = len(record.steps.seconds) - record.timed_from
    return f"ok, {record.effective_tokens_per_second:.0f} effective tokens/s over {timed} timed steps"


if __name__ == "__main__":
    with one_line_refusals(PROGRAM):
        try:
            sys.exit(main())
        except OSError as error:
            if error.filename is not None or error.errno not in (errno.EPIPE, errno.EIO):
                where = error.filename or results_folder()
                raise BadInput(f"{where}: {error.strerror}; the records before it are kept") from None
            forget_stdout()  # the reader of stdout is gone
            sys.exit(130)
