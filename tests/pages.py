"""Records for the tests of the page: measured ones, and edited copies with the ends that these lack."""

from conftest import ROOT

from tunebench.record import Record
from tunebench.report.load import load_records

MEASURED = ROOT / "results" / "measured"
SERIES = {
    **dict.fromkeys(("quick", "cpu", "tuned"), "20261128-epyc-2-cores"),
    "peers": "20261201-epyc-2-cores",
}
UNKIND = "</script><img src=x onerror=alert(1)>"  # a model's name that must stay a name


def mixed_records() -> list[Record]:
    """All kept records; the quick suite's again as those of another machine; and runs that failed in each way."""
    suites = {suite: load_records([MEASURED / machine / suite])[0] for suite, machine in SERIES.items()}
    one = suites["quick"][0].hardware  # --pack gave this machine another digest
    suites["peers"] = [record.model_copy(update={"hardware": one}) for record in suites["peers"]]
    elsewhere = {"machine": "feedbeef0001", "cpu": "Other CPU", "cores": 64, "threads": 3}
    other = [r.model_copy(update={"hardware": r.hardware.model_copy(update=elsewhere)}) for r in suites["quick"]]
    llama = [r for r in suites["cpu"] if r.model and r.model.name == "llama-tiny"]
    torch, paddle = ([r for r in llama if r.framework == side] for side in ("torch", "paddle"))
    ends = [
        ended(torch[0], "oom", 64),
        ended(paddle[0], "unsupported", 64),
        ended(paddle[1], "failed", 32),
        ended(torch[1], "timeout", 32),
        disturbed(paddle[2]),
        disturbed(torch[2]),
    ]
    return [*(record for suite in suites.values() for record in suite), *other, *ends]


def ended(record: Record, status: str, bsz: int) -> Record:
    """A record as a run of this batch size with this end would have written it."""
    setup = record.setup.model_copy(update={"bsz": bsz, "micro_bsz": bsz})
    unknown = {"steps": None, "peak_memory_bytes": [], "conditions": None, "kernels": None}
    log = [f"{UNKIND} said nothing more"]
    return record.model_copy(
        update={"status": status, "reason": f"ended by {status}", "setup": setup, "log": log} | unknown
    )


def disturbed(record: Record) -> Record:
    """A record of which others took half a core, of a model with an unkind name."""
    assert record.conditions and record.model
    busy = record.conditions.own_core_seconds + record.conditions.seconds / 2
    conditions = record.conditions.model_copy(update={"busy_core_seconds": busy})
    model = record.model.model_copy(update={"name": UNKIND})
    return record.model_copy(update={"conditions": conditions, "model": model})
