"""Measures the seconds that embedded samples take to generate, and to generate and tokenize at once, in each language.

python benchmarks/data.py [--samples 10000]
"""

import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"]("torch", "paddle")
sys.path.insert(0, str(ROOT / "data"))

import argparse
import tempfile
import time

import prepare
import sources
import tokenizer


def main() -> None:
    """Trains the tokenizer anew, then prints the seconds of each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        embedded = tokenizer.embedded(pathlib.Path(folder))
        print(f"tokenizer trained in {time.perf_counter() - start:.1f} s")
    for data in ("synthetic-en", "synthetic-zh"):
        start = time.perf_counter()
        sources.load(data, options.samples, skip_bad=False)
        generated = time.perf_counter()
        prepare.encode(embedded, sources.Source(data, options.samples, skip_bad=False), tokenizer.EOS_ID)
        done = time.perf_counter()
        print(f"{data}: generated in {generated - start:.1f} s; generated and tokenized in {done - generated:.1f} s")


if __name__ == "__main__":
    main()
