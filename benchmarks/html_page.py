"""Measures the page of many runs: how long it takes to build, its size, and how soon it can be used in Chromium.

    .venv/torch/bin/python -P benchmarks/html_page.py --runs 500

The runs are copies of kept records with other models' names and other setups, four rounds of each side.
"""

import argparse
import functools
import itertools
import math
import pathlib
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"]("torch", "paddle")

from selenium import webdriver

from tunebench.errors import BadInput, one_line_refusals
from tunebench.flags import positive
from tunebench.record import Record
from tunebench.report.load import load_records

KEPT = ROOT / "results" / "measured" / "20261128-epyc-2-cores" / "quick"
SWITCHES = ("recompute", "padding_free", "lean", "keep_memory", "compile", "overlap")


def main() -> None:
    """Prints the figures, each in a line."""
    parser = argparse.ArgumentParser(description="Time and size of the page of many runs.")
    parser.add_argument("--runs", type=positive, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, page = pathlib.Path(name) / "records", pathlib.Path(name) / "report.html"
        for i, record in enumerate(itertools.islice(copies(), options.runs)):
            record.write(folder / f"{i}.json")
        start = time.perf_counter()
        command = [sys.executable, "-P", ROOT / "summarize.py", folder, "--html", page]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
        wall, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = f"built in {wall:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of a processor"
        print(f"{seconds}, {page.stat().st_size / 1e6:.2f} MB", flush=True)
        browse(page)


def copies() -> Iterator[Record]:
    """Copies of the kept runs, without end: in turn as other models and with other setups."""
    records, broken = load_records([KEPT])
    if broken:
        raise BadInput(broken[0])
    records = [record for record in records if record.aa is None]
    for number in itertools.count():
        for record in map(functools.partial(_with_own_digits, number=number), records):
            assert record.model is not None
            if number % 2:
                switches = {name: bool(number >> i & 2) for i, name in enumerate(SWITCHES)}
                yield record.model_copy(update={"setup": record.setup.model_copy(update=switches)})
            else:
                model = record.model.model_copy(update={"name": f"{record.model.name}-{number}"})
                yield record.model_copy(update={"model": model})


def _with_own_digits(record: Record, number: int) -> Record:
    """A record whose figures have other digits, the same change on both sides: equal ones would compress too well."""
    assert record.steps is not None
    factor = 1 + math.sqrt(number) / 100
    changed = {
        name: [None if value is None else value * factor for value in getattr(record.steps, name)]
        for name in ("seconds", "loss", "grad_norm")
    }
    return record.model_copy(update={"steps": record.steps.model_copy(update=changed)})


def browse(page: pathlib.Path) -> None:
    """Opens the page in headless Chromium and prints the times."""
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not browser or not driver:
        raise BadInput("Chromium or its chromedriver is not on the path; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        running.get(page.as_uri())
        ready = int(running.execute_script("return document.documentElement.dataset.ready"))
        rows = running.execute_script("return document.querySelectorAll('tr[data-row]').length")
        print(f"{rows} rows, interactive {ready} ms after the navigation began")
        print(f"filter: {milliseconds(running, FILTER)} ms; row opened: {milliseconds(running, OPEN)} ms")
    finally:
        running.quit()


# Scripts that call `done` when what they did can be seen.
FILTER = """
const select = document.querySelector("select[name=method]");
select.value = "LoRA";
select.dispatchEvent(new Event("change", { bubbles: true }));
requestAnimationFrame(() => requestAnimationFrame(done));
"""
OPEN = """
document.querySelector("tr[data-row]:not([hidden]) button.open").click();
const look = () => (document.querySelectorAll(".detail figure svg").length >= 3 ? done() : requestAnimationFrame(look));
look();
"""


def milliseconds(running: webdriver.Chrome, script: str) -> int:
    """How long a script takes until it calls `done`."""
    timed = "const start = performance.now(), tell = arguments[0], done = () => tell(performance.now() - start);"
    return round(running.execute_async_script(timed + script))


if __name__ == "__main__":
    with one_line_refusals("html_page.py"):
        main()
