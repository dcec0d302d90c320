"""run_all.sh --versus OTHER: the runs of two checkouts or two environments beside each other, and the verdict."""

from collections.abc import Sequence
from pathlib import Path

from tunebench.bootstrap import ROOT
from tunebench.checkout import read_git
from tunebench.errors import BadInput
from tunebench.files import write_atomically
from tunebench.record import Record
from tunebench.report.load import VERSUS, load_records
from tunebench.report.markdown import revision_of
from tunebench.report.page import combined
from tunebench.report.regressions import exit_code, regressions
from tunebench.suite.file import Planned
from tunebench.suite.other import Other

ROUNDS = 6  # see docs/regressions.md for what they find
OTHER = "other"  # a file in the series' folder: the path that --versus named


def folder_of(results: Path, other: Other) -> Path:
    """The folder of a series' records, in that of the suite."""
    return results / f"{VERSUS}{other.name}"


def check_rounds(rounds: int) -> None:
    """Raises `BadInput` where the order of the sides would not be balanced."""
    if rounds % 2:
        raise BadInput(
            f"--versus with --repeats {rounds}: odd rounds start with the old side and even ones with the new, so give "
            f"an even number, such as {ROUNDS}"
        )


def claim(folder: Path, other: Other) -> None:
    """Notes in the series' folder against what it was measured. Raises `BadInput` where that was something else."""
    note = folder / OTHER
    if note.exists() and (before := note.read_text(encoding="utf-8").strip()) != str(other.path):
        raise BadInput(f"{folder} has runs against {before}; move them away by --fresh, or rename that folder")
    write_atomically(note, f"{other.path}\n".encode())


def tell_sides(other: Other) -> None:
    """Prints which code and which interpreter each side has."""
    for side, root in (("old", other.root), ("new", ROOT)):
        interpreter = f", {other.frameworks[0]} by {other.interpreter}" if other.interpreter and side == "old" else ""
        print(f"{side}: {root}, revision {revision_of(read_git(root))}{interpreter}", flush=True)


def check_code(record: Record, root: Path) -> None:
    """Raises `BadInput` where a run of the checkout `root` used the code of another commit."""
    there = read_git(root)
    if record.git.revision != there.revision:
        raise BadInput(
            f"a run of {root} used revision {revision_of(record.git)}, and that folder has {revision_of(there)}: "
            "unset TUNEBENCH_TORCH and TUNEBENCH_PADDLE where they name a Python with a tunebench of its own, and "
            "commit nothing while it measures"
        )


def judge(runs: Sequence[Planned], folder: Path, threshold: float) -> int:
    """Prints the table of these runs and returns its exit code: 1 for a regression, 2 where a row was not compared.

    The folder may hold runs of an earlier call that had another --only, and another commit.
    """
    records, broken = load_records([run.record for run in runs if run.record.exists()])
    for fault in broken:
        print(f"skipped {fault}")
    print(combined(records, threshold=threshold))
    print(f"The same as CSV or JSON: python3 summarize.py {folder} --format json", flush=True)
    code = exit_code(regressions(records, threshold))
    return 2 if broken and not code else code
