"""Joins the records of runs into tables: one per model family, Paddle beside Torch.

python summarize.py                       every record under results/
python summarize.py results/cpu --format csv
python summarize.py results/published     the published record's tables, from its figures
python summarize.py --memory              predicted and measured peaks of memory
python summarize.py --html report.html    all tables with charts and each run's details, as one page
python summarize.py --profile             what the traced steps did, both sides beside each other
"""

import pathlib
import runpy
import sys

BOOTSTRAP = pathlib.Path(__file__).resolve().parent / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter_environment"]("torch", "paddle")

from tunebench.errors import BadInput, one_line_refusals
from tunebench.files import results_folder, write_atomically
from tunebench.flags import Parser
from tunebench.record import Record
from tunebench.report.documents import documents
from tunebench.report.html.words import LANGUAGES
from tunebench.report.keep import keep
from tunebench.report.memory import render_memory
from tunebench.report.page import combined
from tunebench.report.pairing import join
from tunebench.report.profile import render_profiles
from tunebench.report.published import FOLDER, combine, load, render_against, render_published
from tunebench.report.tables import render


def write_page(file: pathlib.Path, records: list[Record], language: str, paths: list[pathlib.Path]) -> None:
    """Writes the page of these records, and says so. Raises `BadInput` without records."""
    from tunebench.report.html.page import page_of  # only here: the import of altair takes a second

    if not records:
        raise BadInput(f"--html: no records of runs in {', '.join(map(str, paths))}; make some with: bash run_all.sh")
    text = page_of(records, language).encode()
    write_atomically(file, text)
    print(f"{file}: {len(records)} records, {len(text) / 1e6:.1f} MB")


def main() -> None:
    """Prints the tables; broken records go to stderr, by name."""
    parser = Parser(prog="summarize.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="*", type=pathlib.Path, help="record files or folders (default: results/)")
    parser.add_argument("--format", choices=["md", "csv", "json"], default="md", help="default: md")
    parser.add_argument("--parity", action="store_true", help="a column with the largest relative differences")
    parser.add_argument("--memory", action="store_true", help="the table of predicted and measured peaks of memory")
    parser.add_argument("--profile", action="store_true", help="tables of what the steps traced by --profile did")
    parser.add_argument("--against", choices=["published"], help="a table of what stands beside that record's runs")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a record is broken")
    parser.add_argument(
        "--keep", type=pathlib.Path, metavar="FOLDER", help="copy the records of one folder there, without local paths"
    )
    parser.add_argument(
        "--docs", action="store_true", help="write docs/results.md, docs/flags.md and README's table anew"
    )
    parser.add_argument(
        "--html", type=pathlib.Path, metavar="FILE", help="write one page there with all tables, charts and records"
    )
    parser.add_argument("--lang", choices=LANGUAGES, help="the language of --html's page (default: en)")
    options = parser.parse_args()
    given = [
        name
        for name in ("parity", "memory", "profile", "against", "keep", "docs")
        if options.html and getattr(options, name)
    ]
    given += ["format"] * bool(options.html and options.format != "md")
    if given:
        raise BadInput(f"--html writes a page of its own; leave --{given[0]} out")
    if options.lang and not options.html:
        raise BadInput("--lang is the language of a page; give --html FILE too, or leave --lang out")
    alone = "memory" if options.memory else "profile" if options.profile else None
    others = [name for name in ("profile", "parity", "against", "keep", "docs") if getattr(options, name)]
    if alone and (others := [name for name in others if name != alone]):
        raise BadInput(f"--{alone} prints a table of its own; leave --{others[0]} out")
    if options.keep:
        if len(options.paths) != 1 or not options.paths[0].is_dir():
            raise BadInput("--keep copies the records of one folder; name it, such as results/cpu")
        print(f"{keep(options.paths[0], options.keep)} records copied to {options.keep}")
        return
    if options.docs:
        for path, text in documents().items():
            write_atomically(path, text.encode())
        return
    paths = options.paths or [results_folder()]
    records, published, broken = load(paths)
    reference, faults = load([FOLDER])[1:] if options.against else ([], [])
    parts, broken = [], list(dict.fromkeys(broken + faults))
    for fault in broken:
        print(f"summarize.py: skipped {fault}", file=sys.stderr)
    if options.html:
        if published:
            print(f"summarize.py: --html leaves {len(published)} published records out", file=sys.stderr)
        write_page(options.html, records, options.lang or "en", paths)
        if broken and options.strict:
            sys.exit(1)
        return
    if not records and options.format == "md" and (alone or not published):
        parts.append(f"no records in {', '.join(map(str, paths))} yet; make some with: bash run_all.sh")
    elif options.memory:
        parts.append(render_memory(records, options.format))
    elif options.profile:
        parts.append(render_profiles(records, options.format))
    elif records or not published:
        parts.append(
            combined(records, options.parity)
            if options.format == "md"
            else render(join(records), options.format, records, options.parity)
        )
    if published and not alone:
        parts.append(render_published(published, options.format))
    if options.against:
        parts.append(render_against(records, reference, options.format))
    print(combine(parts, options.format), flush=True)
    if broken and options.strict:
        sys.exit(1)


if __name__ == "__main__":
    with one_line_refusals("summarize.py"):
        main()
