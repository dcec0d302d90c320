"""Generates docs/results.md and README's table from results/measured/, and docs/flags.md from the parser.

    python3 summarize.py --docs

results/measured/DATE-MACHINE/SUITE/ holds records that `summarize.py --pack` wrote, and
results/measured/DATE-MACHINE/growth.json what `benchmarks/growth.py --out` wrote.
"""

import argparse
import re
from pathlib import Path

from tunebench.bootstrap import ROOT
from tunebench.errors import BadInput
from tunebench.flags import flag_parser
from tunebench.record import Record
from tunebench.report.growth import read_growth
from tunebench.report.load import load_records
from tunebench.report.markdown import measured_on
from tunebench.report.page import combined
from tunebench.report.pairing import LIKE_FOR_LIKE, Row, join
from tunebench.report.rounds import round_of
from tunebench.report.tables import COLUMNS, table

MEASURED = ROOT / "results" / "measured"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
Series = tuple[str, str, list[Record]]  # the folder of a date and machine, the suite, its records
README_SUITE, README_ROWS = "cpu", 6
README_COLUMNS = ("Model", "Method", "Num GPUs", "Batch Size", "Paddle Setup", "Speedup")


def documents() -> dict[Path, str]:
    """Each generated document's path and content."""
    measured = series()
    return {
        ROOT / "docs" / "results.md": results_page(measured),
        ROOT / "docs" / "flags.md": flags_page(),
        ROOT / "README.md": readme(measured),
    }


def series() -> list[Series]:
    """The measured series, the newest first. Raises `BadInput` where a record is broken."""
    found = []
    for machine in sorted(MEASURED.glob("*/"), reverse=True):
        for suite in sorted(machine.glob("*/")):
            records, broken = load_records([suite])
            if broken:
                raise BadInput(f"{broken[0]}; results/measured/ holds whole records alone")
            found.append((machine.name, suite.name, records))
    return found


def results_page(measured: list[Series]) -> str:
    """docs/results.md: all tables of all measured series, with the commands that measured them."""
    parts = [
        "# Measured results\n",
        "`python3 summarize.py --docs` writes this page from the records in `results/measured/`. Each series was "
        "measured on one machine at one commit. Do not divide rates of different tables.\n",
    ]
    for machine, suite, records in measured:
        again = f"python3 summarize.py results/measured/{machine}/{suite}"
        parts += [f"## {suite}, {machine}\n", f"Measured by {_commands(suite, records)}. `{again}` prints it.\n"]
        parts.append(_deeper(combined(records)) + "\n")
    for file in sorted(MEASURED.glob("*/growth.json"), reverse=True):
        growth = read_growth(file)
        parts += [f"## growth, {file.parent.name}\n", f"Measured by `{growth.command}`.\n"]
        parts += [_deeper(table.text()) + "\n" for table in growth.tables]
    return "\n".join(parts)


def flags_page() -> str:
    """docs/flags.md: all flags of the scripts."""
    parser = flag_parser("lora", "finetune_lora.py")
    lines = ["| Flag | Values | Default | Meaning |", "|---|---|---|---|"]
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            lines.append("| " + " | ".join(_cells(action)) + " |")
    return "\n".join(
        [
            "# Flags\n",
            "`python3 summarize.py --docs` writes this page from the parser. All four scripts have these flags, and "
            "`finetune_lora.py` alone has `--lora-r` and `--lora-alpha`. A default that depends on other flags stands "
            "in the meaning.\n",
            *lines,
            "",
        ]
    )


def readme(measured: list[Series]) -> str:
    """README.md with the table between its markers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{readme_table(measured)}\n{END}{rest.split(END)[1]}"


def readme_table(measured: list[Series]) -> str:
    """Some rows of the newest series of the default suite, with their caveat."""
    for machine, suite, records in measured:
        if suite == README_SUITE:
            rows = _some([row for row in join(records) if row.compared == LIKE_FOR_LIKE])
            columns = [column for column in COLUMNS if column.title in README_COLUMNS]
            return f"{measured_on(records)}\n\n{table(columns, rows)}\n\nRecords: `results/measured/{machine}/{suite}`."
    return "No measured table is in the repository yet. `bash run_all.sh` prints the table of your machine."


def _some(rows: list[Row]) -> list[Row]:
    """The first row of each family, method and setup: at most README_ROWS, rows of one process first."""
    first: dict[tuple[str, str, str | None], Row] = {}
    for row in sorted(rows, key=lambda row: row.num_gpus):
        first.setdefault((row.family, row.method, row.paddle_setup), row)
    return list(first.values())[:README_ROWS]


def _commands(suite: str, records: list[Record]) -> str:
    """The commands that measured a suite's records: with their numbers of rounds."""
    commands = []
    for aa in (False, True):
        rounds = max((round_of(record) for record in records if bool(record.aa) == aa), default=0)
        if rounds:
            commands.append(f"`bash run_all.sh --suite {suite}{' --aa' * aa} --repeats {rounds}`")
    return " and ".join(commands)


def _deeper(text: str) -> str:
    """A text for a section of a page: its headings are one level deeper."""
    return re.sub(r"(?m)^### ", "#### ", text)


def _cells(action: argparse.Action) -> list[str]:
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    values = ", ".join(f"`{choice}`" for choice in action.choices) if action.choices else action.metavar or ""
    if not values and action.nargs != 0:
        values = getattr(action.type, "__name__", "text").replace("_", " ")
    default = "" if action.default is None else f"`{action.default}`"
    if isinstance(action.default, bool):
        default = "on" if action.default else "off"
    return [names, str(values), default, (action.help or "").replace("|", "\\|")]
