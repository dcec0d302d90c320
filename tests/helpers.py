"""What several test files share beside the fixtures of conftest.py."""

import json
from pathlib import Path

import pytest
from conftest import run_program

from tunebench.flags import parse_flags
from tunebench.record import Record, read_record
from tunebench.run.run import describe_run

MODEL = "llama-tiny"  # whose bytes are counted
SUITE = """
title = "two short pairs"
[defaults]
steps = 4
"warmup-steps" = 1
bsz = 2
samples = 40
model = "llama-tiny"
recompute = false
[[pair]]
name = "full"
script = "finetune_full.py"
[[pair]]
name = "lora"
script = "finetune_lora.py"
flags = { steps = 20, recompute = true }
"""


def probe(framework: str, method: str, folder: Path, *flags: object) -> tuple[list[dict], Record]:
    """Runs a script for real; the bytes that each rank held, by kind, and the run's record."""
    where = {"TUNEBENCH_PROBE": f"{framework}/finetune_{method}.py", "TUNEBENCH_BYTES": str(folder)}
    run_program("tests/bytes_held.py", *flags, "--out", folder / "record", check=True, env=where)
    record = read_record(folder / "record")
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(record.devices)]
    for held in ranks:
        assert held["passes"][-1] == held["gradients"]
        for kind in ("trainable", "frozen"):  # the step gathers weights: it has to let them go again
            assert held["after"][kind] == held[kind]
    return ranks, record


def close(size: float):
    """Equal, but for what aligns a slice in a buffer."""
    return pytest.approx(size, rel=1e-4)


def record(**changes) -> Record:
    """A record of a run that never started, as a runner would write it, with changes."""
    known = describe_run("torch", "full", parse_flags("full", ["--model=llama-tiny"]), ["finetune_full.py"])
    unknown = {"model": None, "plan": None, "steps": None, "setup_seconds": None, "peak_memory_bytes": [], "log": []}
    return Record(**(known | unknown | {"status": "failed", "reason": "killed by SIGKILL (9)"} | changes))
