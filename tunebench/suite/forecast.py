"""Forecasts the runs of a suite for run_all.sh --plan: each side's own script answers, two at a time."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tunebench.errors import BadInput
from tunebench.files import write_atomically
from tunebench.forecast.report import GB, Answer
from tunebench.processes import dying_with_parent
from tunebench.report.markdown import NOT_AVAILABLE, markdown
from tunebench.suite.file import Planned

AT_ONCE = 2
COLUMNS = ("Run", "Peak GB per GPU", "Verdict", "Effective tokens/s", "90%", "Minutes", "Cost", "What fits")


def forecast_suite(runs: Sequence[Planned], rounds: int, out: Path | None) -> int:
    """Prints a table of the runs' forecasts, and writes them to `out` as a JSON list. Returns 1 where one failed."""
    answers: dict[str, Answer] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        asked = {pool.submit(ask, run, Path(folder) / f"{number}.json"): run for number, run in enumerate(runs)}
        for number, done in enumerate(as_completed(asked), 1):
            name = asked[done].entry.name
            try:
                answers[name] = done.result()
                print(f"[{number}/{len(runs)}] {name}: {answers[name].verdict}", flush=True)
            except BadInput as fault:
                failed += 1
                print(f"[{number}/{len(runs)}] {name}: no forecast: {fault}", flush=True)
    in_order = {run.entry.name: answers[run.entry.name] for run in runs if run.entry.name in answers}
    print(f"\n{markdown(COLUMNS, [row(name, found) for name, found in in_order.items()])}\n")
    print(summary(list(in_order.values()), rounds), flush=True)
    if out is not None:
        content = [{"run": name, **found.model_dump(mode="json")} for name, found in in_order.items()]
        write_atomically(out, (json.dumps(content, indent=1) + "\n").encode())
    return 1 if failed else 0


def ask(run: Planned, out: Path) -> Answer:
    """The answer of the run's own script. Raises `BadInput` with its last line where it gave none."""
    *command, _ = run.command  # --out comes last
    done = subprocess.run(
        [*command, f"--out={out}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=run.cwd,
        preexec_fn=dying_with_parent(),
    )
    if not out.exists():
        said = (done.stderr.strip() or done.stdout.strip() or f"it ended with {done.returncode}").splitlines()
        raise BadInput(said[-1])
    return Answer.model_validate_json(out.read_text())


def row(name: str, found: Answer) -> list[str]:
    """The cells of a run."""
    if found.memory is None or found.interval is None or found.seconds is None:
        return [name, NOT_AVAILABLE, found.verdict, *[NOT_AVAILABLE] * 4, found.reason or ""]
    low, high = found.interval
    cost = NOT_AVAILABLE if found.cost is None else f"${found.cost:.2f}"
    rate = [f"{found.effective_tokens_per_second:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{found.seconds / 60:.1f}"]
    if found.verdict == "out of memory":
        rate, cost = [NOT_AVAILABLE] * 3, NOT_AVAILABLE
    change = found.change.flags if found.change else ""
    return [name, f"{found.memory.peak / GB:.1f}", found.verdict, *rate, cost, change]


def summary(answers: Sequence[Answer], rounds: int) -> str:
    """What all runs that may fit take together."""
    runs = [each for each in answers if each.seconds is not None and each.verdict in ("fits", "marginal")]
    hours = sum(each.seconds or 0 for each in runs) * rounds / 3600
    cost = sum(each.cost or 0 for each in runs) * rounds
    money = f", ${cost:.2f}" * any(each.cost is not None for each in runs)
    count = f"{len(runs)} of {len(answers)} runs fit or are marginal"
    return f"{count}: {hours:.2f} hours of steps in {rounds} round(s){money}; start-up is not counted"
