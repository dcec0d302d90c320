"""What --versus and --until find and claim, by drawing rounds from the recorded A/A runs of tests/data/aa.jsonl.

python benchmarks/resample.py [--records FILE] [--draws 2000] [--threshold 3%] [--seed 1]

It measures nothing: any machine prints the same. A record file has a record per line; a folder has record files.
"""

import pathlib
import runpy

ROOT = pathlib.Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"]("torch", "paddle")

from tunebench.errors import BadInput, one_line_refusals
from tunebench.flags import Parser, not_negative, percentage, positive
from tunebench.record import Record, parse_record
from tunebench.report.load import load_records
from tunebench.report.markdown import markdown
from tunebench.report.pairing import against_itself
from tunebench.report.regressions import THRESHOLD
from tunebench.report.resampling import Rate, until, versus
from tunebench.report.stats import LOOKS, pooled_noise

RECORDS = ROOT / "tests" / "data" / "aa.jsonl"
ROUNDS = (4, 6, 8, 10)
TARGETS = (0.02, 0.03, 0.04, 0.05, 0.08)
# The review's figures, of an earlier recording of the same suite with less noise, for 6 rounds.
REVIEW = {6: ("at most 0.6%", "66%", "99%")}
REVIEW_COVERAGE = "95.5%"


def main() -> None:
    """Prints a table for each rule."""
    parser = Parser(prog="resample.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--records", type=pathlib.Path, default=RECORDS, help="A/A records (default: tests/data/)")
    parser.add_argument("--draws", type=positive, default=2000, help="tables, and draws of a row (default: 2000)")
    parser.add_argument("--threshold", type=percentage, default=THRESHOLD, metavar="SHARE", help="default: 3%%")
    parser.add_argument("--seed", type=not_negative, default=1, help="of the draws (default: 1)")
    options = parser.parse_args()
    rows = [each.log_ratios for each in against_itself(read(options.records))]
    rows = [row for row in rows if len(row) >= LOOKS[-1]]
    noise = pooled_noise(rows)
    if len(rows) < 2 or noise is None:
        raise BadInput(f"--records {options.records}: two A/A comparisons of {LOOKS[-1]} rounds are the least")
    print(
        f"{len(rows)} A/A comparisons of {min(map(len, rows))} rounds or more, pooled round noise {noise.deviation:.1%}"
        f"; {options.draws} draws each, with the 99.9% interval of each rate\n"
    )
    print("### --versus: one row of a table has a true change, the others have none\n")
    titles = ("Rounds", "False Regression", "Any False Claim", "5% Slower Found", "10% Slower Found", "The Review's")
    lines = []
    for rounds in ROUNDS:
        arguments = options.draws, rounds, options.threshold, options.seed
        _, regressed, claimed = versus(rows, 0.0, *arguments)
        found = [versus(rows, change, *arguments)[0] for change in (-0.05, -0.1)]
        lines.append([str(rounds), *map(said, (regressed, claimed, *found)), ", ".join(REVIEW.get(rounds, ("",)))])
    print(markdown(titles, lines))
    print("\nThe review's figures: false alarms of a table, 5% found, 10% found.\n")
    print(f"### --until: all rows together, looks at {', '.join(map(str, LOOKS))} rounds\n")
    lines = []
    for target in TARGETS:
        each = [until(row, target, options.draws, options.seed + i) for i, row in enumerate(rows)]
        worst = min((one.covered for one in each), key=lambda rate: rate.share)
        rounds = sum(one.rounds for one in each) / len(each)
        lines.append(
            [
                f"±{target:.0%}",
                said(total([one.covered for one in each])),
                said(worst),
                said(total([one.reached for one in each])),
                f"{rounds:.1f}",
            ]
        )
    print(markdown(("Target", "Covered", "Covered, Worst Row", "Target Reached", "Rounds"), lines))
    print(f"\nThe review's worst coverage: {REVIEW_COVERAGE}.")


def read(path: pathlib.Path) -> list[Record]:
    """The records of a file with one per line, or of a folder. Raises `BadInput`."""
    if path.suffix != ".jsonl":
        return load_records([path])[0]
    try:
        return [parse_record(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError) as fault:
        raise BadInput(f"--records {path}: {fault}") from None


def total(rates: list[Rate]) -> Rate:
    """The rate of all draws together."""
    return Rate(sum(rate.happened for rate in rates), sum(rate.draws for rate in rates))


def said(rate: Rate) -> str:
    """A rate with its interval."""
    low, high = rate.limits()
    return f"{rate.share:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    with one_line_refusals("resample.py"):
        main()
