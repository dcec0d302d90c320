"""Joins the records of runs into tables: one per model family, Paddle beside Torch.

python summarize.py                       every record under results/
python summarize.py results/cpu --format csv
python summarize.py results/published     the published record's tables, from its figures
python summarize.py --memory              predicted and measured peaks of memory
python summarize.py --html report.html    all tables with charts and each run's details, as one page
python summarize.py results/cpu --watch   the tables (with --html: the page), drawn anew after each run
python summarize.py results/quick/versus-NAME             regressions, by the runs of run_all.sh --versus
python summarize.py --compare results/quick OTHER/quick   speedups of two series, as advice
"""

import pathlib
import runpy
import sys
from collections.abc import Sequence

BOOTSTRAP = pathlib.Path(__file__).resolve().parent / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter_environment"]("torch", "paddle")

from tunebench.errors import BadInput, one_line_refusals
from tunebench.files import results_folder, write_atomically
from tunebench.flags import Parser, percentage
from tunebench.record import Record
from tunebench.report.compare import render_comparison
from tunebench.report.documents import documents
from tunebench.report.html.words import LANGUAGES
from tunebench.report.memory import render_memory
from tunebench.report.pack import own_names, pack
from tunebench.report.page import combined
from tunebench.report.pairing import join
from tunebench.report.published import FOLDER, combine, load, render_against, render_published
from tunebench.report.regressions import THRESHOLD, render_regressions
from tunebench.report.rounds import versus_of
from tunebench.report.tables import render
from tunebench.report.watch import watch


def write_page(file: pathlib.Path, records: list[Record], language: str, paths: list[pathlib.Path]) -> None:
    """Writes the page of these records, and says so. Raises `BadInput` without records."""
    from tunebench.report.html.page import page_of  # only here: the import of altair takes a second

    if not records:
        raise BadInput(f"--html: no records of runs in {', '.join(map(str, paths))}; make some with: bash run_all.sh")
    text = page_of(records, language).encode()
    write_atomically(file, text)
    print(f"{file}: {len(records)} records, {len(text) / 1e6:.1f} MB")


def main(args: Sequence[str] | None = None) -> None:
    """Prints the tables; broken records go to stderr, by name. `args` are by default the command line's."""
    parser = Parser(prog="summarize.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="*", type=pathlib.Path, help="record files or folders (default: results/)")
    parser.add_argument("--format", choices=["md", "csv", "json"], default="md", help="default: md")
    parser.add_argument("--parity", action="store_true", help="a column with the largest relative differences")
    parser.add_argument("--memory", action="store_true", help="the table of predicted and measured peaks of memory")
    parser.add_argument("--against", choices=["published"], help="a table of what stands beside that record's runs")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a record is broken")
    parser.add_argument(
        "--pack",
        type=pathlib.Path,
        metavar="FOLDER",
        help="copy a suite's records to results/measured/DATE-MACHINE/, without what would identify a person",
    )
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write docs/results.md, docs/flags.md and the READMEs' table and picture anew",
    )
    parser.add_argument(
        "--html", type=pathlib.Path, metavar="FILE", help="write one page there with all tables, charts and records"
    )
    parser.add_argument("--lang", choices=LANGUAGES, help="the language of --html's page (default: en)")
    parser.add_argument("--watch", action="store_true", help="draw it anew when records change, until Ctrl-C")
    parser.add_argument(
        "--compare", nargs=2, type=pathlib.Path, metavar=("OLD", "NEW"), help="speedups of two folders, as advice"
    )
    parser.add_argument(
        "--threshold",
        type=percentage,
        default=THRESHOLD,
        metavar="SHARE",
        help="of runs of run_all.sh --versus: the least change that counts as a regression (default: 3%%)",
    )
    options = parser.parse_args(args)
    given = [
        name for name in ("parity", "memory", "against", "pack", "docs") if options.html and getattr(options, name)
    ]
    given += ["format"] * bool(options.html and options.format != "md")
    if given:
        raise BadInput(f"--html writes a page of its own; leave --{given[0]} out")
    if options.lang and not options.html:
        raise BadInput("--lang is the language of a page; give --html FILE too, or leave --lang out")
    if options.compare:
        for name in ("paths", "parity", "memory", "against", "pack", "docs", "html", "watch"):
            if getattr(options, name):
                what = f"--{name}" if name != "paths" else str(options.paths[0])
                raise BadInput(f"--compare prints a table of its own; leave {what} out")
        text, broken = render_comparison(options.compare, options.format)
        for fault in broken:
            print(f"summarize.py: skipped {fault}", file=sys.stderr)
        print(text, flush=True)
        sys.exit(1 if broken and options.strict else 0)
    others = [name for name in ("parity", "against", "pack", "docs") if options.memory and getattr(options, name)]
    if others:
        raise BadInput(f"--memory prints a table of its own; leave --{others[0]} out")
    if options.watch:
        if options.pack or options.docs:
            raise BadInput("--watch draws what it prints anew; leave --pack and --docs out")
        words = [word for word in (sys.argv[1:] if args is None else args) if word != "--watch"]
        watch(options.paths or [results_folder()], lambda: main(words))
    if options.pack:
        if options.paths:
            raise BadInput(f"--pack packs the folder that it names; leave {options.paths[0]} out")
        print(pack(options.pack, results_folder() / "measured", own_names()).told())
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
    if not records and options.format == "md" and (options.memory or not published):
        parts.append(f"no records in {', '.join(map(str, paths))} yet; make some with: bash run_all.sh")
    elif options.memory:
        parts.append(render_memory(records, options.format))
    elif options.format == "md" and (records or not published):
        parts.append(combined(records, options.parity, options.threshold))
    elif records or not published:
        versus = [record for record in records if versus_of(record)]
        if len(versus) < len(records) or not versus:
            parts.append(render(join(records), options.format, records, options.parity))
        if versus:
            parts.append(render_regressions(versus, options.format, options.threshold))
    if published and not options.memory:
        parts.append(render_published(published, options.format))
    if options.against:
        parts.append(render_against(records, reference, options.format))
    print(combine(parts, options.format), flush=True)
    if broken and options.strict:
        sys.exit(1)


if __name__ == "__main__":
    with one_line_refusals("summarize.py"):
        main()
