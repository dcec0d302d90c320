"""The cheapest change of a setup that makes it fit."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tunebench.flags import WITHOUT_FORMULA, Flags, in_words
from tunebench.forecast.formula import tensors_of
from tunebench.forecast.machine import Machine
from tunebench.forecast.memory import Memory
from tunebench.run.run import Job
from tunebench.run.unsupported import not_offered

MOST_TRIES = 4  # forecasts of memory, which take seconds each


class Change(NamedTuple):
    """Flags that replace those given, as on a command line; the peak in bytes and the rate with them."""

    flags: str
    peak: int
    effective_tokens_per_second: float


def changes(framework: str, flags: Flags, of_states: bool) -> Iterator[dict[str, Any]]:
    """What may be changed so that a step does the same work: one flag, or one that goes with recomputation.

    With `of_states` only what makes weights, gradients or optimizer states smaller.
    """
    single: list[dict[str, Any]] = []
    if not of_states:
        single += smaller_activations(framework, flags)
    if flags.mp == 1 and flags.replicas > 1:
        single += [{"zero": stage} for stage in range(flags.zero + 1, 4)]
    for degree in (2, 4, 8):
        fits = (
            not flags.sharding
            and flags.mp < degree
            and flags.nproc % degree == 0
            and flags.bsz % (flags.world_size // degree) == 0
        )
        if fits and flags.head == "all":
            single.append({"zero": 0, "mp": degree, "micro_bsz": flags.bsz // (flags.world_size // degree)})
    yield from single
    if not flags.recompute:
        yield from [{"recompute": True}] * (not of_states)
        yield from (change | {"recompute": True} for change in single)


def smaller_activations(framework: str, flags: Flags) -> list[dict[str, Any]]:
    """The changes of one flag that make activations or logits smaller."""
    single: list[dict[str, Any]] = []
    if framework == "paddle" and not flags.lean:
        single.append({"lean": True})
    if flags.attention == "eager":
        single.append({"attention": "sdpa"})
    if not flags.padding_free:
        single.append({"attention": "sdpa", "padding_free": True})
    if flags.head == "all" and flags.mp == 1:
        single.append({"head": "labels"})
    if flags.mp > 1 and not flags.sequence_parallel:
        single.append({"sequence_parallel": True})
    return single + [{"micro_bsz": size} for size in range(1, flags.micro_bsz) if flags.micro_bsz % size == 0]


def cheapest(
    framework: str, method: str, job: Job, memory: Memory, forecast: Callable[[Job], Memory], machine: Machine
) -> Change | None:
    """The fastest change that fits, among those that the framework offers; None where none of the fastest few fits.

    `memory` is that of the job, which does not fit. What does not fit by formula is not forecast.
    """
    flags = job.flags
    passing = memory.parts["activations"] + memory.parts["logits_and_loss"]
    of_states = machine.judge(memory.peak - passing, flags).verdict != "fits"
    ranked: list[tuple[float, dict[str, Any], Job]] = []
    for change in changes(framework, flags, of_states):
        changed = flags.model_copy(update=change)
        plan = job.plan.of_run(changed)
        candidate = job._replace(flags=changed, plan=plan)
        offered = not_offered(framework, method, changed, job.checkpoint) is None
        if offered and may_fit(framework, method, candidate, machine):
            speed = machine.speed(framework, method, changed, job.checkpoint, plan)
            ranked.append((speed.effective_tokens_per_second, change, candidate))
    ranked.sort(key=lambda each: -each[0])
    for rate, change, candidate in ranked[:MOST_TRIES]:
        peak = forecast(candidate).peak
        if machine.judge(peak, flags).verdict == "fits":
            return Change(in_words(change), peak, rate)
    return None


def may_fit(framework: str, method: str, job: Job, machine: Machine) -> bool:
    """Whether a job fits by formula, with its error to spare, or no formula knows runs like it.

    Sequence parallelism has no formula. It leaves a process at least its share of the activations.
    """
    flags = job.flags
    like = flags.model_copy(update=dict.fromkeys(WITHOUT_FORMULA, False))
    found = tensors_of(framework, method, like, job.checkpoint, job.plan.of_run(like))
    if found is None:
        return True
    saved = found.parts["activations"] * (1 - 1 / flags.mp) if flags.sequence_parallel else 0
    return machine.judge(int(0.97 * (machine.memory(found).peak - saved)), flags).verdict == "fits"
