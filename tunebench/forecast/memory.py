"""What a run is expected to hold in the memory of one GPU, by kind of tensor."""

from pydantic import Field, model_validator

from tunebench.flags import Flags
from tunebench.plan import MicroBatch, Plan
from tunebench.record import Amount, Strict

# In the order in which they are printed. `weights` include frozen ones, `gradients` what is accumulated for the
# optimizer, `workspace` what lives only within an operator, a layer's backward pass or the optimizer's step.
PARTS = (
    "weights",
    "gradients",
    "master_weights",
    "moments",
    "activations",
    "logits_and_loss",
    "communication_buffers",
    "workspace",
)


# Public peaks of runs on GPUs exceed the forecast tensors by 8% of what a step adds to those that last. That is the
# median over tests/data/peaks.json (benchmarks/peaks.py). Kernels have buffers of their own, and programs other than
# these scripts keep tensors longer.
UNSEEN = 0.08


class Memory(Strict):
    """Bytes of tensors on one GPU, as the framework's allocator counts them (`max_memory_allocated`).

    `peak` is the sum of `parts`, which are those of the moment of the peak. `held` are the same kinds between two
    steps: weights, master weights, moments and buffers that last. `kept` are the activations when the forward pass
    ends, and `accumulated` the gradients when a step's last backward pass ends. `moment` says in which phase of a step
    the peak is.
    """

    peak: Amount
    parts: dict[str, Amount]
    held: dict[str, Amount] = Field(default_factory=dict)
    kept: Amount
    accumulated: Amount
    moment: str

    @model_validator(mode="after")
    def _adds_up(self) -> "Memory":
        if set(self.parts) != set(PARTS) or sum(self.parts.values()) != self.peak:
            raise ValueError("the parts do not add up to the peak")
        return self


def with_unseen(memory: Memory, share: float = UNSEEN) -> Memory:
    """The forecast tensors and, as workspace, such a share of what a step adds to those that last."""
    return with_more(memory, int(share * max(0, memory.peak - sum(memory.held.values()))))


def with_more(memory: Memory, more: int) -> Memory:
    """The memory with so many bytes more, as workspace. A negative number is taken from the last of PARTS first."""
    parts = dict(memory.parts)
    for kind in reversed(PARTS):
        change = max(more, -parts[kind])
        parts[kind] += change
        more -= change
    return memory.model_copy(update={"peak": sum(parts.values()), "parts": parts})


def largest_batch(flags: Flags, plan: Plan) -> MicroBatch:
    """The micro-batch of the plan that needs most memory: that with most tokens, the longest samples among equals."""
    best: tuple[tuple[int, int, int], int, int] | None = None
    for step in range(plan.steps):
        share = plan.bsz // flags.replicas
        lengths = plan.row_lengths(step)
        for first in range(0, plan.bsz, flags.micro_bsz):
            rows = lengths[first : first + flags.micro_bsz]
            tokens = int(rows.sum()) if plan.padding_free else int(lengths.max()) * flags.micro_bsz
            size = (tokens, int((rows**2).sum()), int(rows.sum()))
            if best is None or size > best[0]:
                best = size, step, first
    assert best is not None
    _, step, first = best
    replica, within = divmod(first, share)
    return list(plan.passes(step, flags.micro_bsz, replica, flags.replicas))[within // flags.micro_bsz][1]
