"""Joins the records of runs into tables: one per model family, Paddle beside Torch.

python summarize.py                       every record under results/
python summarize.py results/cpu --format csv
python summarize.py results/published     the published record's tables, from its figures
python summarize.py --memory              predicted and measured peaks of memory
python summarize.py --profile             what the traced steps did, both sides beside each other
python summarize.py --html report.html    all tables with charts and each run's details, as one page
python summarize.py results/cpu --watch   the tables (with --html: the page), drawn anew after each run
python summarize.py results/quick/versus-NAME             regressions, by the runs of run_all.sh --versus
python summarize.py --compare results/quick OTHER/quick   speedups of two series, as advice
"""

import argparse
import contextlib
import pathlib
import runpy
import sys
from collections.abc import Iterator, Sequence

BOOTSTRAP = pathlib.Path(__file__).resolve().parent / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter_environment"]("torch", "paddle")

from tunebench.errors import BadInput, one_line_refusals
from tunebench.files import results_folder, write_atomically
from tunebench.flags import Parser, path_from, percentage
from tunebench.record import Record
from tunebench.report.compare import render_comparison
from tunebench.report.documents import documents
from tunebench.report.html.words import LANGUAGES
from tunebench.report.memory import render_memory
from tunebench.report.pack import own_names, pack
from tunebench.report.page import combined
from tunebench.report.pairing import join
from tunebench.report.profile import render_profiles
from tunebench.report.published import FOLDER, combine, load, render_against, render_published
from tunebench.report.regressions import THRESHOLD, render_regressions
from tunebench.report.rounds import versus_of
from tunebench.report.tables import render
from tunebench.report.watch import watch


def write_page(file: pathlib.Path, records: list[Record], language: str, paths: list[pathlib.Path]) -> None:
    """Writes the page of these records, and says so. Raises `BadInput` without records."""
    with page_packages():
        from tunebench.report.html.page import page_of  # only here: the import of altair takes a second

    if not records:
        raise BadInput(
            f"--html: no records of runs in {', '.join(map(str, paths))}; make some with: bash run_all.sh, or name a "
            "folder of results/measured"
        )
    if all(map(versus_of, records)):
        raise BadInput("--html: a page has no runs of --versus; print their table by leaving --html out")
    text = page_of(records, language).encode()
    write_atomically(file, text)
    print(f"{file}: {len(records)} records, {len(text) / 1e6:.1f} MB")


@contextlib.contextmanager
def page_packages() -> Iterator[None]:
    """Raises `BadInput` where a user's own interpreter lacks the packages of charts and templates."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BadInput(
            f"--html and --docs need {error.name}, which {sys.executable} lacks; install there what pyproject.toml "
            "names as page, or unset the variable that names this Python"
        ) from None


# Options whose output stands alone, and what each does. The others add to the tables.
ALONE = {
    "compare": "prints a table of its own",
    "html": "writes a page of its own",
    "memory": "prints a table of its own",
    "profile": "prints a table of its own",
    "pack": "copies records",
    "docs": "writes documents",
}
ADDED = ("parity", "against")


def read_options(args: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line. Raises `BadInput` where some do not go together."""
    parser = Parser(prog="summarize.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="*", type=path_from, help="record files or folders (default: results/)")
    add("--format", choices=["md", "csv", "json"], default="md", help="default: md")
    add("--parity", action="store_true", help="a column with the largest relative differences")
    add("--memory", action="store_true", help="the table of predicted and measured peaks of memory")
    add("--profile", action="store_true", help="tables of what the steps traced by --profile did")
    add("--against", choices=["published"], help="a table of what stands beside that record's runs")
    add("--strict", action="store_true", help="exit with 1 when a record is broken")
    add(
        "--pack",
        type=path_from,
        metavar="FOLDER",
        help="copy a suite's records to results/measured/DATE-MACHINE/, without what would identify a person",
    )
    add(
        "--docs",
        action="store_true",
        help="write docs/results.md, docs/flags.md and the READMEs' table and picture anew",
    )
    add("--html", type=path_from, metavar="FILE", help="write one page there with all tables, charts and records")
    add("--lang", choices=LANGUAGES, help="the language of --html's page (default: en)")
    add("--watch", action="store_true", help="draw it anew when records change, until Ctrl-C")
    add("--compare", nargs=2, type=path_from, metavar=("OLD", "NEW"), help="speedups of two folders, as advice")
    add(
        "--threshold",
        type=percentage,
        metavar="SHARE",
        help="of runs of run_all.sh --versus: the least change that counts as a regression (default: 3%%)",
    )
    options = parser.parse_args(args)
    given = {name for name in (*ALONE, *ADDED) if getattr(options, name)}
    for name, does in ALONE.items():
        if name in given and len(given) > 1:
            other = next(each for each in (*ALONE, *ADDED) if each in given and each != name)
            raise BadInput(f"--{name} {does}; leave --{other} out")
    if options.html and options.format != "md":
        raise BadInput(f"--html {ALONE['html']}; leave --format out")
    if options.lang and not options.html:
        raise BadInput("--lang is the language of a page; give --html FILE too, or leave --lang out")
    if options.watch and (options.pack or options.docs):
        raise BadInput("--watch draws what it prints anew; leave --pack and --docs out")
    if options.watch and options.compare:
        raise BadInput(f"--compare {ALONE['compare']}; leave --watch out")
    if options.threshold and given - set(ADDED):
        raise BadInput("--threshold is for the table of run_all.sh --versus; leave it out")
    if options.docs and options.paths:
        raise BadInput(f"--docs reads results/measured; leave {options.paths[0]} out")
    if options.compare and options.paths:
        raise BadInput(f"--compare {ALONE['compare']}; leave {options.paths[0]} out")
    if options.pack and options.paths:
        raise BadInput(f"--pack packs the folder that it names; leave {options.paths[0]} out")
    return options


def main(args: Sequence[str] | None = None) -> None:
    """Prints the tables; broken records go to stderr, by name. `args` are by default the command line's."""
    options = read_options(args)
    paths = options.paths or [results_folder()]
    if options.watch:
        words = [word for word in (sys.argv[1:] if args is None else args) if word != "--watch"]
        watch(paths, lambda: main(words))
    if options.pack:
        print(pack(options.pack, results_folder() / "measured", own_names()).told())
    elif options.docs:
        with page_packages():
            texts = documents()
        for path, text in texts.items():
            write_atomically(path, text.encode())
    else:
        broken = compare(options) if options.compare else show(options, paths)
        if broken and options.strict:
            sys.exit(1)


def compare(options: argparse.Namespace) -> list[str]:
    """Prints the comparison of two folders' speedups. Returns the broken records."""
    text, broken = render_comparison(options.compare, options.format)
    name_broken(broken)
    print(text, flush=True)
    return broken


def show(options: argparse.Namespace, paths: list[pathlib.Path]) -> list[str]:
    """Prints the tables of the records under `paths`, or writes their page. Returns the broken records."""
    records, published, broken = load(paths)
    reference, faults = load([FOLDER])[1:] if options.against else ([], [])
    broken = list(dict.fromkeys(broken + faults))
    name_broken(broken)
    if options.html:
        if published:
            print(f"summarize.py: --html leaves {len(published)} published records out", file=sys.stderr)
        write_page(options.html, records, options.lang or "en", paths)
        return broken
    parts = tables(options, records, bool(published), paths)
    if published and not (options.memory or options.profile):
        parts.append(render_published(published, options.format))
    if options.against:
        parts.append(render_against(records, reference, options.format))
    print(combine(parts, options.format), flush=True)
    return broken


def tables(options: argparse.Namespace, records: list[Record], published: bool, paths: list[pathlib.Path]) -> list[str]:
    """The texts of the tables of runs. `published`: whether there are tables of published figures beside them."""
    if not records and options.format == "md" and (options.memory or options.profile or not published):
        return [f"no records in {', '.join(map(str, paths))} yet; make some with: bash run_all.sh"]
    versus = [record for record in records if versus_of(record)]
    if options.threshold and not versus:
        raise BadInput("--threshold is for runs of run_all.sh --versus, and there are none; leave it out")
    if options.memory:
        return [render_memory(records, options.format)]
    if options.profile:
        return [render_profiles(records, options.format)]
    if not records and published:
        return []
    if options.format == "md":
        return [combined(records, options.parity, options.threshold or THRESHOLD)]
    parts = [] if versus and len(versus) == len(records) else [records]
    texts = [render(join(each), options.format, each, options.parity) for each in parts]
    return texts + ([render_regressions(versus, options.format, options.threshold or THRESHOLD)] if versus else [])


def name_broken(faults: list[str]) -> None:
    """Prints the broken records to stderr."""
    for fault in faults:
        print(f"summarize.py: skipped {fault}", file=sys.stderr)


if __name__ == "__main__":
    with one_line_refusals("summarize.py"):
        main()
