"""What a trace tells of a rank: shares of time, time by kind of kernel, the longest kernels, and memory.

On a GPU, kernels are what ran on its streams. On a CPU they are operators. Each has its own time alone, without that of
the operators it calls, so that no moment counts twice.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tunebench.profile.kinds import is_bookkeeping, kind_on_device, name_of, told_by
from tunebench.profile.trace import ATTENTION, CPU, GPU, NORM_BEGINS, NORM_ENDS, OPERATOR, Event, Trace, read_trace
from tunebench.record import KERNEL_KINDS, LONGEST, Kernel, KernelKind, RankProfile, Shares

POINTS = 48  # of the curve of memory
SLACK = 0.01  # microseconds: spans that begin or end together may differ by rounding


class Span(NamedTuple):
    """A time in which a kernel ran, in microseconds. `kind` is None where only the framework's bookkeeping did.

    `event` is counted as a call of the kernel `name`.
    """

    start: float
    end: float
    kind: KernelKind | None
    name: str
    event: Event


def rank_profile(path: Path, steps: int) -> RankProfile:
    """The profile of a rank from its trace of `steps` steps. Raises ValueError where the file holds no such trace."""
    trace = read_trace(path)
    host = [span for events in trace.threads.values() for span in own_spans(events)]  # sets the events' parents
    launches: dict[int | None, Event] = {
        event.correlation: event
        for events in trace.threads.values()
        for event in events
        if event.correlation is not None
    }
    if trace.device:
        spans = [on_device(event, launches) for event in trace.device]
        parts = shares_on_gpu(trace, spans, launches)
    else:
        spans, parts = host, shares_on_cpu(trace, host)
    seconds, calls = _add_up(trace, spans)
    kinds: dict[KernelKind, float] = dict.fromkeys(KERNEL_KINDS, 0.0)
    for (_, kind), time in seconds.items():
        kinds[kind] += time / steps
    longest = sorted(seconds, key=lambda key: -seconds[key])[:LONGEST]
    return RankProfile(
        seconds=(trace.end - trace.start) / 1e6 / steps,
        shares=parts,
        kinds=kinds,
        longest=[
            Kernel(name=name, kind=kind, seconds=seconds[name, kind] / steps, calls=len(calls[name, kind]) / steps)
            for name, kind in longest
        ],
        memory=memory_over_time(trace),
        trace=path.name,
    )


def own_spans(events: list[Event]) -> list[Span]:
    """The spans of one thread's operators, each without the spans of the events in it. Sets `parent` of each event.

    An event that begins in another one and ends after it ran on a thread of its own, such as a collective of gloo.
    """
    spans: list[Span] = []
    stack: list[Event] = []
    at, in_norm = 0.0, False

    def until(time: float) -> None:
        nonlocal at
        if stack and time > at and stack[-1].category == OPERATOR:
            spans.append(_span(at, time, stack[-1]))
        at = max(at, time)

    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        while stack and stack[-1].end <= event.start + SLACK:
            until(stack[-1].end)
            stack.pop()
        event.parent = stack[-1] if stack else None
        event.of_norm = in_norm
        if event.name in (NORM_BEGINS, NORM_ENDS):
            in_norm = event.name == NORM_BEGINS
        if event.parent is not None and event.name == ATTENTION:
            event.parent.attends = event.parent.category == OPERATOR
        if stack and event.end > stack[-1].end + SLACK:
            if event.category == OPERATOR:
                spans.append(_span(event.start, event.end, event))
            continue
        until(event.start)
        at = max(at, event.start)
        stack.append(event)
    while stack:
        until(stack[-1].end)
        stack.pop()
    return spans


def on_device(event: Event, launches: dict[int | None, Event]) -> Span:
    """The span of what ran on a GPU."""
    kind = kind_on_device(event, launches.get(event.correlation))
    return Span(event.start, event.end, kind, event.name, event)


def shares_on_cpu(trace: Trace, spans: list[Span]) -> Shares:
    """The shares of the traced time on a CPU: where no operator runs, Python does."""
    times, is_covered = _cover(trace, _by_class(spans))
    return _shares(times, is_covered, waiting=~is_covered["bookkeeping"])


def shares_on_gpu(trace: Trace, spans: list[Span], launches: dict[int | None, Event]) -> Shares:
    """The shares of the traced time on a GPU.

    Where nothing runs, the GPU waits for the host until the call ends that launches what runs next.
    """
    ordered = sorted(spans, key=lambda span: span.start)
    starts = np.array([span.start for span in ordered])
    called = [launches.get(span.event.correlation) for span in ordered]
    launched = np.array([np.inf if c is None else c.end for c in called] + [np.inf])
    times, is_covered = _cover(trace, _by_class(spans), extra=[c.end for c in called if c is not None])
    following = np.searchsorted(starts, times[1:] - SLACK)
    return _shares(times, is_covered, waiting=times[1:] <= launched[following] + SLACK)


def memory_over_time(trace: Trace) -> list[tuple[float, int]]:
    """Seconds since the start, and the bytes that tensors held above those of the start.

    Each of `POINTS` stretches has the point at which they held most. The last point is that of the end.
    """
    device = GPU if any(kind == GPU for _, _, kind in trace.memory) and trace.device else CPU
    events = [(t, n) for t, n, kind in trace.memory if kind == device and trace.start <= t <= trace.end]
    if not events:
        return []
    held = np.cumsum([change for _, change in events])
    seconds = (np.array([time for time, _ in events]) - trace.start) / 1e6
    stretch = np.minimum(seconds / ((trace.end - trace.start) / 1e6) * POINTS, POINTS - 1).astype(int)
    most = [max(np.flatnonzero(stretch == each).tolist(), key=lambda i: held[i]) for each in np.unique(stretch)]
    points = [(float(seconds[i]), int(held[i])) for i in dict.fromkeys([*most, len(held) - 1])]
    return [(0.0, 0), *points]


def _span(start: float, end: float, event: Event) -> Span:
    if is_bookkeeping(event):
        return Span(start, end, None, event.name, event)
    kind, teller = told_by(event) or ("other", event)
    return Span(start, end, kind, name_of(teller), outermost(teller))


def outermost(event: Event) -> Event:
    """The outermost of the events of one name that an operator has on its thread."""
    found, around = event, event.parent
    while around is not None:
        if name_of(around) == name_of(event):
            found = around
        around = around.parent
    return found


def _by_class(spans: list[Span]) -> dict[str, list[Span]]:
    """The spans that compute, communicate, copy, or are bookkeeping."""
    classes: dict[str, list[Span]] = {"computing": [], "communication": [], "copies": [], "bookkeeping": []}
    for span in spans:
        kind = span.kind or "bookkeeping"
        classes[kind if kind in classes else "computing"].append(span)
    return classes


def _cover(
    trace: Trace, classes: dict[str, list[Span]], extra: Iterable[float] = ()
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Times that cut the traced time into pieces, and by class whether some span of it covers each piece."""
    bounds = [(span.start, span.end) for spans in classes.values() for span in spans]
    times = np.array([trace.start, trace.end, *(time for pair in bounds for time in pair), *extra])
    times = np.unique(np.clip(times, trace.start, trace.end))
    covered = {}
    for name, spans in classes.items():
        change = np.zeros(len(times), dtype=int)
        for sign, ends in ((1, [span.start for span in spans]), (-1, [span.end for span in spans])):
            np.add.at(change, np.searchsorted(times, np.clip(ends, trace.start, trace.end)), sign)
        covered[name] = np.cumsum(change)[:-1] > 0
    return times, covered


def _shares(times: np.ndarray, covered: dict[str, np.ndarray], waiting: np.ndarray) -> Shares:
    """Each piece goes to one share: `waiting` or idle where nothing computes, communicates or copies."""
    lengths = np.diff(times) / (times[-1] - times[0])
    computes, communicates, copies = (covered[name] for name in ("computing", "communication", "copies"))
    free = ~(computes | communicates | copies)

    def share(pieces: np.ndarray) -> float:
        return min(1.0, float(lengths[pieces].sum()))  # rounding may exceed 1

    return Shares(
        computing=share(computes & ~communicates),
        communication_alone=share(communicates & ~computes),
        communication_hidden=share(communicates & computes),
        copies=share(copies & ~computes & ~communicates),
        waiting_for_host=share(free & waiting),
        idle=share(free & ~waiting),
    )


def _add_up(
    trace: Trace, spans: list[Span]
) -> tuple[dict[tuple[str, KernelKind], float], dict[tuple[str, KernelKind], set[Event]]]:
    """The seconds and the calls of each kernel within the traced time."""
    seconds: dict[tuple[str, KernelKind], float] = defaultdict(float)
    calls: dict[tuple[str, KernelKind], set[Event]] = defaultdict(set)
    for span in spans:
        time = min(span.end, trace.end) - max(span.start, trace.start)
        if span.kind is not None and time > 0:
            seconds[span.name, span.kind] += time / 1e6
            calls[span.name, span.kind].add(span.event)
    return seconds, calls
