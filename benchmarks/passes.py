"""Writes the table of a framework's passes, which forecasts by formula read: tunebench/forecast/passes/NAME.jsonl.

    python benchmarks/passes.py torch
    python benchmarks/passes.py paddle

Run it after a change of the scripts or of a framework's version; tests/forecast/test_formula.py says when. It traces a
step of each kind of run with two layers and with three, on sizes that can be told apart
(tunebench/forecast/symbols.py). The table keeps the moments that are the peak for some model and batch of `samples`,
within TOLERANCE. About 15 minutes for each framework.
"""

import contextlib
import io
import itertools
import multiprocessing
import os
import pathlib
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.queues import SimpleQueue

ROOT = pathlib.Path(__file__).resolve().parents[1]
FRAMEWORK = sys.argv[1] if len(sys.argv) == 2 and sys.argv[1] in ("torch", "paddle") else sys.exit(__doc__)
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"](FRAMEWORK)

import numpy as np
from rich.progress import track

from tunebench.files import write_atomically
from tunebench.forecast.formula import NAMED, at_moments, kinds_of_runs
from tunebench.forecast.layers import Moment, pairs
from tunebench.forecast.passes import AT_END, AT_FORWARD_END, FEWEST, FOLDER, WEIGHTS, Logit, Passes, to_line
from tunebench.forecast.symbols import Amounts, Kind, symbolic
from tunebench.run.unsupported import not_offered

Tracer = Callable[[Kind, int], tuple[list[Moment[Amounts]], Amounts]]
SAMPLES = 150  # models and batches
TOLERANCE = 0.003  # of a peak, for moments that are left out
SMALL_SHARE = 0.0003  # of a peak, for terms that are left out


def main() -> None:
    """Writes the table of FRAMEWORK."""
    traces = {method: tracer(method) for method in ("full", "lora")}
    kinds = [kind for kind in kinds_of_runs(FRAMEWORK) if is_offered(kind)]
    context = multiprocessing.get_context("fork")  # the frameworks are imported once
    made, workers = context.SimpleQueue(), os.cpu_count() or 1
    processes = [
        context.Process(target=work, args=(kinds[i::workers], traces, made), daemon=True) for i in range(workers)
    ]
    for process in processes:
        process.start()
    found = []
    for _ in track(kinds, description=f"{len(kinds)} kinds of runs"):
        while made.empty():
            if any(process.exitcode for process in processes):
                sys.exit("a worker was ended, perhaps for want of memory; no table was written")
            time.sleep(0.05)
        found.append(made.get())
    if failed := [text for _, text in found if text.startswith("Traceback")]:
        sys.exit(failed[0])
    lines = dict(found)
    write_atomically(FOLDER / f"{FRAMEWORK}.jsonl", ("\n".join(lines[kind] for kind in kinds) + "\n").encode())


def work(kinds: list[Kind], traces: dict[str, Tracer], made: SimpleQueue) -> None:
    """Puts each kind and its line of the table into `made`, or in place of the line what went wrong."""
    for kind in kinds:
        try:
            made.put((kind, to_line(kind, reduced(kind, traced(kind, traces[kind.method])))))
        except Exception:
            made.put((kind, f"{traceback.format_exc()}\n{kind}"))


def is_offered(kind: Kind) -> bool:
    """Whether the framework has such runs."""
    with contextlib.redirect_stdout(io.StringIO()):
        flags, checkpoint, _ = symbolic(kind, FEWEST, FRAMEWORK == "torch")
    return not_offered(FRAMEWORK, kind.method, flags, checkpoint) is None


def tracer(method: str) -> Tracer:
    """A function that traces a kind of run with so many layers, by the script's own functions."""
    sys.path.insert(0, str(ROOT / FRAMEWORK))
    sys.argv = ["passes.py", "--model=llama-tiny", "--plan", "--data=fixed:16", "--bsz=1", "--samples=4", "--steps=2"]
    functions = runpy.run_path(str(ROOT / FRAMEWORK / f"finetune_{method}.py"))
    import forecast

    own = [functions[name] for name in ("build_model", "wrap", "to_device")]

    def trace(kind: Kind, layers: int) -> tuple[list[Moment[Amounts]], Amounts]:
        with contextlib.redirect_stdout(io.StringIO()):
            return forecast.moments(*symbolic(kind, layers, FRAMEWORK == "torch"), *own)

    return trace


def traced(kind: Kind, trace: Tracer) -> Passes:
    """All moments of a kind of run."""
    (few, few_weights), (many, many_weights) = (trace(kind, layers) for layers in (FEWEST, FEWEST + 1))
    ends = [before_backward(each) for each in (few, many)]
    rows = [row for row in pairs(few, many) if grows(*row[1:])]
    rows += [(AT_FORWARD_END, *ends), (AT_END, few[-1].held, many[-1].held), (WEIGHTS, few_weights, many_weights)]
    terms = sorted({term for _, *both in rows for amounts in both for term in amounts})
    numbers = np.array([[[each.get(term, 0.0) for term in terms] for each in both] for _, *both in rows])
    different = np.unique(numbers[: -len(NAMED)], axis=0, return_index=True)[1]
    index = [*sorted(different), *range(len(rows) - len(NAMED), len(rows))]
    numbers, phases = numbers[index], [rows[i][0] for i in index]
    kinds, exponents = [t[0] for t in terms], np.array([t[1] for t in terms])
    return Passes(phases, kinds, exponents, numbers[:, 0], numbers[:, 1] - numbers[:, 0])


def grows(few: Amounts, many: Amounts) -> bool:
    """Whether a layer more takes nothing away. Otherwise the two operators are alike but not of the same place."""
    return all(many.get(term, 0.0) > size - 1e-6 for term, size in few.items())


def before_backward(moments: list[Moment[Amounts]]) -> Amounts:
    """What is held when the last backward pass begins."""
    return next(each.held for each in reversed(moments) if each.phase != "backward")


def reduced(kind: Kind, passes: Passes) -> Passes:
    """The moments that are a peak for some sizes, without terms that do not count."""
    named = [i for i, phase in enumerate(passes.phases) if phase in NAMED]
    others = [i for i in range(len(passes.phases)) if i not in named]
    amounts = [passes.at(*each) for each in samples(kind)]
    peaks = []
    for each in samples(kind):
        peaks += [moments[others] for moments in at_moments(FRAMEWORK, passes.by_kind(*each))]
    table = np.array(peaks)  # (samples x ways of sharding, moments)
    enough = table >= (1 - TOLERANCE) * table.max(axis=1, keepdims=True)
    kept, open_ = [], np.ones(len(table), dtype=bool)
    while open_.any():
        best = int(enough[open_].sum(axis=0).argmax())
        kept.append(best)
        open_ &= ~enough[:, best]
    rows = [others[i] for i in sorted(kept)] + named
    parts = [np.abs(each[rows]) for each in amounts]
    largest = np.max([each / each.sum(axis=1).max() for each in parts], axis=0)
    weights = np.array([passes.phases[i] == WEIGHTS for i in rows])[:, None]
    counts = (largest >= SMALL_SHARE) | weights
    few, more = (np.where(counts, each[rows], 0.0) for each in (passes.few, passes.more))
    used = ((few != 0) | (more != 0)).any(axis=0)
    kinds = list(itertools.compress(passes.kinds, used))
    return Passes([passes.phases[i] for i in rows], kinds, passes.exponents[used], few[:, used], more[:, used])


def samples(kind: Kind) -> Iterator[tuple[dict[str, float], int, Logit]]:
    """Sizes of models and batches, numbers of layers, and logits. They are the same at each call."""
    random = np.random.default_rng(0)
    for _ in range(SAMPLES):
        mp = int(random.choice([2, 4, 8])) if kind.mp else 1
        head, group = int(random.choice([32, 64, 80, 128, 256])), int(random.choice([1, 1, 2, 4, 8]))
        heads = mp * group * int(random.choice([1, 2, 4, 8, 16]))
        own = kind.family in ("llama", "qwen2", "glm") and FRAMEWORK == "torch"
        hidden = head * float(random.choice([0.5, 1, 1, 1, 1.25])) if own else head
        rows, width = int(random.choice([1, 1, 2, 4, 8, 16])), int(2 ** random.uniform(5, 13))
        yield (
            {
                "mp": mp,
                "kv": heads / group / mp,
                "group": group,
                "joined": group + 2,
                "head": head,
                "hidden": hidden,
                "inner": heads * hidden * random.uniform(2, 6) / mp,
                "vocabulary": 2 ** random.uniform(11, 18) / mp,
                "rows": 1 if kind.padding_free else rows,
                "width": width,
                "squares": (1 if kind.padding_free else rows) * width**2,
                "labels": random.uniform(0.2, 1) * rows * width,
                "rank": int(random.choice([4, 8, 16, 64])),
            },
            int(random.choice([2, 4, 8, 16, 32, 60, 80])),
            Logit.of(FRAMEWORK, kind.types),
        )


if __name__ == "__main__":
    main()
