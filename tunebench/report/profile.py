"""The tables of --profile: what both sides did in their traced steps, beside each other."""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tunebench.models.families import FAMILIES
from tunebench.record import KERNEL_KINDS, Kernel, RankProfile, Record, Shares
from tunebench.report.identity import METHODS, group_of, heading_of, place_of, setup_of
from tunebench.report.markdown import NOT_AVAILABLE, markdown, measured_on
from tunebench.report.pairing import SIDES
from tunebench.report.tables import Column, as_csv

PARTS = ("shares", "kinds", "longest", "memory")
SHARES = {
    "computing": "Computing",
    "communication_hidden": "Communication under computing",
    "communication_alone": "Communication alone",
    "copies": "Copies",
    "waiting_for_host": "Waiting for the host",
    "idle": "Other idle",
}
CAPTION = (
    "Traced: further steps after the timed ones. The profiler slows them down, Paddle's and Torch's not alike: "
    "compare shares, and rates in the other tables. Each moment is in one share. On a CPU kernels are operators, "
    "waiting for the host is the time of Python, and other idle is the framework's own bookkeeping. Kernels that run "
    "at the same time count each in the seconds by kind. Kinds and the longest kernels are those of rank 0, with "
    "their seconds and calls in a step. Memory: the most that tensors held above the bytes at the start. 1 MB = 10⁶ "
    "bytes. docs/profiles.md defines all."
)


@dataclass(frozen=True)
class Row:
    """A figure of both sides' traced steps, None where a side has none.

    `part` is one of `PARTS`. Shares are of the traced time. Kinds and the longest kernels have seconds per step. The
    longest kernels are counted from 1 in `name`, and `paddle_kernel` and `torch_kernel` name them. Memory has bytes:
    the most that tensors held above those at the start.
    """

    family: str
    model: str
    method: str
    num_gpus: int
    batch_size: int
    setup: str
    rank: int
    part: str
    name: str
    paddle: float | None
    torch: float | None
    paddle_kernel: str | None = None
    torch_kernel: str | None = None


def _column(name: str) -> Column:
    """The column of a field of `Row`."""
    return Column(name.replace("_", " ").title().replace("Gpus", "GPUs"), lambda row: _plain(getattr(row, name)))


CSV_COLUMNS = [_column(name) for name in Row.__dataclass_fields__]


def profile_rows(records: list[Record]) -> list[Row]:
    """The rows of all setups that have a profile. Of several runs of a side with one setup the last one counts."""
    return [row for key, sides in _by_setup(records) for row in _rows(key, sides)]


def render_profiles(records: list[Record], form: str) -> str:
    """The profiles as `md`, `csv` or `json`. Markdown has tables for each setup."""
    setups = _by_setup(records)
    rows = [row for key, sides in setups for row in _rows(key, sides)]
    if form == "json":
        return json.dumps([asdict(row) for row in rows], indent=1)
    if form == "csv":
        return as_csv(CSV_COLUMNS, rows)
    if not setups:
        return "No record has a profile: run the scripts with --profile DIR."
    return "\n".join([*(text for key, sides in setups for text in _tables(key, sides)), CAPTION])


def _by_setup(records: list[Record]) -> list[tuple[tuple[Any, ...], dict[str, Record]]]:
    """The last profiled run of each side, by the key of the model and the words of the setup.

    Each library of models of Paddle's has a key of its own, beside the same run of Torch.
    """
    found: dict[tuple[Any, ...], dict[str, Record]] = defaultdict(dict)
    profiled = [record for record in sorted(records, key=lambda record: record.started_at) if record.profile]
    headings: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for record in profiled:
        if record.framework == "paddle":
            headings[*group_of(record), setup_of(record)].add(heading_of(record))
    for record in profiled:
        group, setup = group_of(record), setup_of(record)
        beside = {heading_of(record)} if record.framework == "paddle" else headings[*group, setup] or {setup}
        for heading in beside:
            found[*group, heading][record.framework] = record
    return sorted(found.items(), key=lambda item: (place_of(item[0][:-1]), item[0][-1]))


def _rows(key: tuple[Any, ...], sides: dict[str, Record]) -> Iterator[Row]:
    family, model, method, devices, bsz, setup = key

    def row(rank: int, part: str, name: str, values: list[Any], kernels: tuple[Any, ...] = (None, None)) -> Row:
        return Row(family, model, method, devices, bsz, setup, rank, part, name, *values, *kernels)

    for rank in range(devices):
        ranks = _ranks(sides, rank)
        for name in Shares.model_fields:
            yield row(rank, "shares", name, [each and getattr(each.shares, name) for each in ranks])
        for kind in KERNEL_KINDS:
            yield row(rank, "kinds", kind, [each and each.kinds.get(kind, 0.0) for each in ranks])
        for i in range(max(len(each.longest) for each in ranks if each)):
            kernels = [_kernel(each, i) for each in ranks]
            names = tuple(kernel and kernel.name for kernel in kernels)
            yield row(rank, "longest", str(i + 1), [kernel and kernel.seconds for kernel in kernels], names)
        yield row(rank, "memory", "most", [each and _most(each) for each in ranks])


def _tables(key: tuple[Any, ...], sides: dict[str, Record]) -> Iterator[str]:
    family, model, method, devices, bsz, setup = key
    title = FAMILIES[family].title if family in FAMILIES else family
    count = f", {devices} GPUs (or processes, where there are none)" if devices > 1 else ""
    yield f"### {title}: {model}, {METHODS[method]}, bsz {bsz}, {setup}{count}: the traced steps\n"
    yield measured_on(list(sides.values())) + "\n"
    plans = {record.plan.sha256 for record in sides.values() if record.plan}
    if len(plans) > 1:
        yield "The two sides had different batches.\n"
    names = [side.title() for side in SIDES]
    lines = []
    for rank in range(devices):
        for name, each in zip(names, _ranks(sides, rank), strict=True):
            if each:
                shares = [f"{getattr(each.shares, share):.1%}" for share in SHARES]
                memory = f"{_most(each) / 1e6:.1f}" if each.memory else NOT_AVAILABLE
                lines.append([str(rank), name, f"{each.seconds:.3f}", *shares, memory, each.trace])
    yield markdown(["Rank", "Side", "Step s", *SHARES.values(), "Memory MB", "Trace"], lines) + "\n"
    first = _ranks(sides, 0)
    totals = [sum(each.kinds.values()) if each else 0.0 for each in first]
    lines = [
        [kind, *(_part(each, kind, total) for each, total in zip(first, totals, strict=True))] for kind in KERNEL_KINDS
    ]
    yield markdown(["Kind of kernel", *(f"{name} s per step" for name in names)], lines) + "\n"
    most = max(len(each.longest) for each in first if each)
    lines = [[str(i + 1), *(_words(_kernel(each, i)) for each in first)] for i in range(most)]
    yield markdown(["Longest", *names], lines) + "\n"


def _ranks(sides: dict[str, Record], rank: int) -> list[RankProfile | None]:
    """The profile of this rank on each side."""
    found = [sides[side].profile if side in sides else None for side in SIDES]
    return [profile.ranks[rank] if profile else None for profile in found]


def _kernel(profile: RankProfile | None, i: int) -> Kernel | None:
    return profile.longest[i] if profile and i < len(profile.longest) else None


def _most(profile: RankProfile) -> int:
    return max((size for _, size in profile.memory), default=0)


def _part(profile: RankProfile | None, kind: Any, total: float) -> str:
    if profile is None or not total:
        return NOT_AVAILABLE
    seconds = profile.kinds.get(kind, 0.0)
    return f"{seconds:.3f} ({seconds / total:.1%})"


def _words(kernel: Kernel | None) -> str:
    if kernel is None:
        return NOT_AVAILABLE
    name = kernel.name if len(kernel.name) <= 60 else kernel.name[:57] + "..."
    return f"`{name}`, {kernel.kind}: {kernel.seconds:.3f} s, {kernel.calls:g} calls"


def _plain(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
