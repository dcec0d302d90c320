"""Writes the parts of reports: Markdown tables, rates, and the line that says what was measured on which machine."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from tunebench.frameworks import FRAMEWORKS
from tunebench.record import Git, Record

NOT_AVAILABLE = "N/A"
VERSIONS_SHOWN = [name for framework in FRAMEWORKS.values() for name in framework.packages]


def figure(rate: float | None, status: str | None) -> str:
    """The text of a rate in tables. Without a rate, the run's status; without a run, N/A."""
    if rate is not None:
        return f"{rate:.2f}"
    return {"oom": "OOM", None: NOT_AVAILABLE}.get(status, str(status))


def markdown(columns: Sequence[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    table = [list(columns), *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    texts = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts)


def revision_of(git: Git) -> str:
    """The words for a commit."""
    return f"{(git.revision or 'no git')[:10]}{' changed' if git.dirty else ''}"


def packages_of(record: Record) -> list[str]:
    """The frameworks' packages of a run, such as `torch 2.13.0`."""
    return sorted(f"{name} {record.versions[name]}" for name in VERSIONS_SHOWN if name in record.versions)


def measured_on(records: list[Record]) -> str:
    """The caveat above a table: machines, versions, steps and revisions of its records."""
    done = [record for record in records if record.status == "ok"]
    if not done:
        return "No run ended ok."
    machines: dict[tuple[str | None, str, int], set[int]] = defaultdict(set)
    for r in done:
        machines[r.hardware.device, r.hardware.cpu, r.hardware.cores].add(r.hardware.threads)
    texts = []
    for (device, cpu, cores), threads in sorted(machines.items()):
        gpu = "no GPU" if device == "cpu" else f"one {device} per process"
        per_process = " or ".join(map(str, sorted(threads))) + f" thread{'s' * (max(threads) > 1)} per process"
        texts.append(f"{gpu}, {cpu} with {cores} cores, {per_process}")
    versions = {package for r in done for package in packages_of(r)}
    steps = {f"{len(r.steps.seconds) - r.timed_from} of {len(r.steps.seconds)}" for r in done if r.steps}
    caveat = (
        ""
        if all(machine[0] != "cpu" for machine in machines)
        else " It compares CPU kernels: it says nothing about GPUs."
    )
    revisions = {revision_of(r.git) for r in done}
    environment = [r.hardware.environment.get("MKL_DEBUG_CPU_TYPE") for r in done]
    kernels = "".join(f"; MKL_DEBUG_CPU_TYPE={value}" for value in sorted(set(filter(None, environment))))
    return (
        f"Measured on: {'; '.join(texts)}; {', '.join(sorted(versions))}; steps timed: {', '.join(sorted(steps))}"
        f"{kernels}; revision {', '.join(sorted(revisions))}.{caveat}"
    )
