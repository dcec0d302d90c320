"""Generates docs/results.md, READMEs' table and picture from results/measured/, and docs/flags.md from the parser.

    python3 summarize.py --docs

results/measured/DATE-MACHINE/SUITE/ holds records that `summarize.py --pack` wrote, and
results/measured/DATE-MACHINE/growth.json what `benchmarks/growth.py --out` wrote.
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from tunebench.bootstrap import ROOT
from tunebench.errors import BadInput
from tunebench.flags import flag_parser
from tunebench.record import Record
from tunebench.report.growth import read_growth
from tunebench.report.load import OF_SUITE, VERSUS, load_records
from tunebench.report.markdown import measured_on
from tunebench.report.page import combined
from tunebench.report.pairing import LIKE_FOR_LIKE, Row, join
from tunebench.report.picture import description, picture
from tunebench.report.rounds import round_of
from tunebench.report.tables import COLUMNS, table

MEASURED = ROOT / "results" / "measured"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
Series = tuple[str, str, list[Record]]  # the folder of a date and machine, the suite, its records
READMES = ("README.md", "README.zh.md")
PICTURE = ROOT / "docs" / "measured.svg"
PICTURE_TITLE = "Effective tokens per second of both sides; longer is faster"
README_SUITE, README_ROWS = "cpu", 6
README_COLUMNS = ("Model", "Method", "Num GPUs", "Batch Size", "Paddle Setup", "Speedup")


def documents() -> dict[Path, str]:
    """Each generated document's path and content."""
    measured = series()
    found = {
        ROOT / "docs" / "results.md": results_page(measured),
        ROOT / "docs" / "flags.md": flags_page(),
        **{ROOT / name: readme(ROOT / name, measured) for name in READMES},
    }
    if first := _first(measured):
        found[PICTURE] = picture(first.rows, PICTURE_TITLE, _caveat(first.records))
    return found


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


def readme(path: Path, measured: list[Series]) -> str:
    """A README with the picture and the table between its markers."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{readme_table(measured)}\n{END}{rest.split(END)[1]}"


def readme_table(measured: list[Series]) -> str:
    """The picture and the table of the first rows of the newest series of the default suite, with their caveat."""
    first = _first(measured)
    if first is None:
        return "No measured table is in the repository yet. `bash run_all.sh` prints the table of your machine."
    columns = [column for column in COLUMNS if column.title in README_COLUMNS]
    parts = [
        f"![{PICTURE_TITLE}. {description(first.rows)}]({PICTURE.relative_to(ROOT)})",
        measured_on(first.records),
        table(columns, first.rows),
        f"Records: `results/measured/{first.folder}`.",
    ]
    return "\n\n".join(parts)


class First(NamedTuple):
    """What a README shows: the folder of a series in results/measured/, its records, and some of its rows."""

    folder: str
    records: list[Record]
    rows: list[Row]


def _first(measured: list[Series]) -> First | None:
    """The newest series of the default suite, and its first row of each family, method and setup.

    There are at most README_ROWS rows, those of one process first.
    """
    for machine, suite, records in measured:
        if suite == README_SUITE:
            kinds: dict[tuple[str, str, str | None], Row] = {}
            like = [row for row in join(records) if row.compared == LIKE_FOR_LIKE]
            for row in sorted(like, key=lambda row: row.num_gpus):
                kinds.setdefault((row.family, row.method, row.paddle_setup), row)
            return First(f"{machine}/{suite}", records, list(kinds.values())[:README_ROWS])
    return None


def _caveat(records: list[Record]) -> str:
    """The machines of records, and what CPUs do not tell."""
    done = [record.hardware for record in records if record.status == "ok"]
    on_cpu = {f"{machine.cpu} with {machine.cores} cores" for machine in done if machine.device == "cpu"}
    machines = sorted({str(machine.device) for machine in done if machine.device != "cpu"} | on_cpu)
    return f"Measured on {', '.join(machines)}.{' It says nothing about GPUs.' * bool(on_cpu)}"


def _commands(suite: str, records: list[Record]) -> str:
    """The commands that measured a suite's records: with their numbers of rounds, or the target of --until."""
    if suite.startswith(VERSUS):
        other, _, of = suite.removeprefix(VERSUS).rpartition(OF_SUITE)
        if not other:
            raise BadInput(f"results/measured/: {suite} names no suite; rename it {suite}{OF_SUITE}SUITE")
        return f"`--versus` of the suite {of}, against {other}"
    commands = []
    for aa in (False, True):
        runs = [record for record in records if bool(record.aa) == aa]
        if runs:
            until = next((record.until for record in runs if record.until), None)
            rounds = f"--until {100 * until:g}%" if until else f"--repeats {max(map(round_of, runs))}"
            commands.append(f"`bash run_all.sh --suite {suite}{' --aa' * aa} {rounds}`")
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
