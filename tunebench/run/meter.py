"""Measures the time of a run's steps, and what others took of the machine meanwhile."""

import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tunebench import conditions
from tunebench.flags import Flags
from tunebench.plan import Plan
from tunebench.progress import Step
from tunebench.record import Conditions, Steps
from tunebench.run.outcome import RUN_SUPERVISOR
from tunebench.world import World


class Meter:
    """The measurements of a running run.

    `seconds`, `losses` and `grad_norms` have a value for each finished step. Losses and norms stay the framework's
    scalars until the last step is done: reading one would make the device wait. `say` prints a line.
    """

    def __init__(self, flags: Flags, plan: Plan, world: World, say: Callable[[str], None]) -> None:
        self.flags, self.plan, self.world, self.say = flags, plan, world, say
        self.seconds: list[float] = []
        self.losses: list[Any] = []
        self.grad_norms: list[Any] = []
        self.conditions: Conditions | None = None
        self._before: conditions.Reading | None = None  # taken before the timed steps
        self._synchronize: Callable[[], None] = lambda: None
        self._clock = 0.0

    def start(self, synchronize: Callable[[], None]) -> None:
        """Starts the clock of the first step. `synchronize` waits until the device has done all queued work."""
        self._synchronize = synchronize
        synchronize()
        if not self.flags.warmup_steps:
            self._look_before()
        self._clock = time.perf_counter()

    def end_step(self, loss: Any, grad_norm: Any) -> None:
        """Ends a step. The next step's clock starts at the same moment, so that no time falls between two steps."""
        done = len(self.seconds) + 1
        if done in (self.flags.warmup_steps, self.plan.steps):
            self._synchronize()
        if done == self.flags.warmup_steps:
            self._look_before()
        now = time.perf_counter()
        if done == self.plan.steps:
            self._look_after()
        self.seconds.append(now - self._clock)
        self._clock = now
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        rate = self.plan.effective_tokens(done - 1) / self.seconds[-1]
        self.say(Step(done, self.plan.steps, self.seconds[-1], rate).line())

    def steps(self) -> Steps:
        """The steps so far, up to the first whose loss or gradient norm is not finite."""
        loss = [float(x) for x in self.losses]
        grad_norm = [norm if math.isfinite(norm) else None for norm in map(float, self.grad_norms)]
        may_skip = self.flags.dtype == "fp16"
        finite = [math.isfinite(a) and (b is not None or may_skip) for a, b in zip(loss, grad_norm, strict=True)]
        kept = range(finite.index(False) if False in finite else len(finite))
        return Steps(
            seconds=[self.seconds[i] for i in kept],
            effective_tokens=[self.plan.effective_tokens(i) for i in kept],
            padded_tokens=[self.plan.padded_tokens(i) for i in kept],
            label_tokens=[self.plan.label_tokens(i) for i in kept],
            loss=[loss[i] for i in kept],
            grad_norm=[grad_norm[i] for i in kept],
            squared_lengths=[self.plan.squared_lengths(i) for i in kept],
        )

    def _look_before(self) -> None:
        """Reads the machine before the timed steps, on rank 0. The others wait for it at their next exchange."""
        if not self.world.rank:
            with self._said_alone():
                self._before = conditions.read(self._roots)

    def _look_after(self) -> None:
        if self._before:
            with self._said_alone():
                self.conditions = conditions.between(self._before, conditions.read(self._roots))

    @contextlib.contextmanager
    def _said_alone(self) -> Iterator[None]:
        """Prints a warning where the machine's conditions cannot be read. The run goes on."""
        try:
            yield
        except Exception as error:
            self.say(f"warning: the machine's conditions cannot be read: {type(error).__name__}: {error}")

    @functools.cached_property
    def _roots(self) -> set[int]:
        """The processes from which all processes of this run on this node descend."""
        if RUN_SUPERVISOR in os.environ:
            return {int(os.environ[RUN_SUPERVISOR])}
        return conditions.roots_of_run(sys.argv[0], self.world.nproc) if self.world.size > 1 else {os.getpid()}
