"""run_all.sh --until SHARE: as many rounds of each pair as its interval needs to be narrow.

Looks and quantile are fixed before the first round (docs/method.md). What decides is the width of the interval, never
where it lies: stopping at the first difference would find differences where there are none.
"""

from collections.abc import Callable, Sequence

from tunebench.errors import BadInput
from tunebench.record import Record, read_record
from tunebench.report.pairing import SIDES
from tunebench.report.remarks import until_in_words
from tunebench.report.rounds import Rounds, beside, pair_rounds
from tunebench.report.stats import LOOKS, is_narrow
from tunebench.suite.file import Planned


def check_sides(runs: Sequence[Planned]) -> None:
    """Raises `BadInput` where a pair would run on one side alone, which has no interval."""
    for group in dict.fromkeys(run.entry.group for run in runs):
        sides = {run.entry.framework for run in runs if run.entry.group == group}
        if len(sides) < len(SIDES):
            raise BadInput(f"--until needs both sides of a pair, and --only leaves {group} with {sides.pop()} alone")


def run_until(runs: Sequence[Planned], target: float, run_all: Callable[[list[Planned]], int]) -> int:
    """Runs the rounds up to each look, of the pairs that are not narrow yet. Returns the worst exit code.

    `runs` are all rounds up to the last look. `run_all` runs some of them, those with a record excepted, and returns
    130 after an interruption.
    """
    wide = list(dict.fromkeys(run.entry.group for run in runs))
    code, before = 0, 0
    for look in LOOKS:
        due = [run for run in runs if before < run.round <= look and run.entry.group in wide]
        if not due:
            break
        print(f"--until {target * 100:g}%: rounds {before + 1} to {look} of {', '.join(wide)}")
        code = max(code, run_all(due))
        if code == 130:
            return code
        measured = {group: rounds_of(runs, group, look) for group in wide}
        for group, rounds in measured.items():
            print(f"{group}: {until_in_words(target, is_narrow(rounds.log_ratios, target), len(rounds.pairs))}")
        wide = [group for group, rounds in measured.items() if goes_on(rounds, target)]
        before = look
    if wide:
        print(f"never within ±{target * 100:g}%, after {before} rounds: {', '.join(wide)}")
    return code


def goes_on(rounds: Rounds, target: float) -> bool:
    """Whether more rounds can make the interval narrow. They cannot where a side does not run."""
    return len(rounds.pairs) > 1 and not is_narrow(rounds.log_ratios, target)


def rounds_of(runs: Sequence[Planned], group: str, last: int) -> Rounds:
    """The complete rounds of a pair, up to round `last`, from the records as they are."""
    sides: dict[str, list[Record]] = {side: [] for side in SIDES}
    for run in runs:
        if run.entry.group == group and run.round <= last:
            try:
                record = read_record(run.record)
            except BadInput:  # the run left none
                continue
            if record.status == "ok":
                sides[record.framework].append(record)
    ours, theirs = (sides[side] for side in SIDES)
    return pair_rounds(ours, theirs, beside)
