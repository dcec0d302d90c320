"""Joins the records of runs into tables: one per model family, Paddle beside Torch.

python summarize.py                       every record under results/
python summarize.py results/cpu --format csv
"""

import pathlib
import runpy
import sys

BOOTSTRAP = pathlib.Path(__file__).resolve().parent / "tunebench" / "bootstrap.py"
runpy.run_path(str(BOOTSTRAP))["enter"]("torch", "paddle")

from tunebench.cache import results_folder
from tunebench.errors import one_line_refusals
from tunebench.flags import Parser
from tunebench.join import join, load_records
from tunebench.tables import render


def main() -> None:
    """Prints the tables; broken records go to stderr, by name."""
    parser = Parser(prog="summarize.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("paths", nargs="*", type=pathlib.Path, help="record files or folders (default: results/)")
    parser.add_argument("--format", choices=["md", "csv", "json"], default="md", help="default: md")
    parser.add_argument("--parity", action="store_true", help="a column with the largest relative loss difference")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a record is broken")
    options = parser.parse_args()
    paths = options.paths or [results_folder()]
    records, broken = load_records(paths)
    for fault in broken:
        print(f"summarize.py: skipped {fault}", file=sys.stderr)
    if records or options.format != "md":
        print(render(join(records), options.format, records, options.parity))
    else:
        print(f"no records in {', '.join(map(str, paths))} yet; make some with: bash run_all.sh")
    if broken and options.strict:
        sys.exit(1)


if __name__ == "__main__":
    with one_line_refusals("summarize.py"):
        main()
