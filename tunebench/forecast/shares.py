"""What Paddle's ZeRO and data parallelism make of weights, gradients and optimizer states, by formula."""

import functools
import heapq
from collections.abc import Sequence
from typing import NamedTuple

from tunebench.flags import Flags
from tunebench.recipe import WHOLE_IN_ZERO_3


class Weight(NamedTuple):
    """A parameter: its elements, the bytes of each of them, and whether it is trained."""

    size: int
    width: int
    trained: bool

    @property
    def bytes(self) -> int:
        """The bytes of all of it."""
        return self.size * self.width


class Split(NamedTuple):
    """How a run is split: ZeRO's stage, --mp, replicas, and passes of a step on each."""

    zero: int
    mp: int
    replicas: int
    passes: int

    @classmethod
    def of(cls, flags: Flags) -> "Split":
        """The split of these flags."""
        return cls(flags.zero, flags.mp, flags.replicas, flags.accumulation)


class Shares:
    """What one process of the run holds between two steps beside the model's outputs: that which holds most.

    Frozen weights count among `weights` alone. Paddle's sources are in paddle/distributed/fleet. tests/bytes_held.py
    measures the same.
    """

    def __init__(self, split: Split, weights: Sequence[Weight], hidden: int, masters: bool) -> None:
        """`weights` are those of a process before ZeRO, in the model's order. `masters`: whether there are any."""
        self.split, self.parameters = split, weights
        self.trained = [each for each in self.parameters if each.trained]
        self.masters = masters
        self.segment = WHOLE_IN_ZERO_3 * hidden * self.trained[0].width
        # Of all weights, or of the slices of ZeRO 3.
        self.weights = sum(self.cut(each.bytes) for each in self.parameters)
        self.gradients = sum(self.cut(each.bytes) for each in self.trained)

    def cut(self, size: int) -> int:
        """Bytes of a weight's slice on each process, or of the whole (GroupShardedStage3._flatten_layer_params)."""
        sliced = self.split.zero == 3 and size > self.segment
        return -(-size // self.split.replicas) if sliced else size

    @property
    def adds_up(self) -> bool:
        """Whether gradients are added to those of earlier passes, which stay: then each new one soon goes."""
        return self.split.passes > 1 or self.sends_in_buffers or self.split.zero == 2

    @property
    def sends_in_buffers(self) -> bool:
        """Whether DataParallel's reducer sends the gradients, which it keeps, as its buffers (EagerGroup)."""
        return self.split.zero == 0 and self.split.mp == 1 and self.split.replicas > 1

    @functools.cached_property
    def of_ranks(self) -> list[list[Weight]]:
        """The trained weights that each process updates.

        DygraphShardingOptimizer gives whole weights, largest first, to whom has least, and
        GroupShardedOptimizerStage2 in the model's order (`_partition_parameters`, `_segment_params`).
        """
        if self.split.zero not in (1, 2):
            return [self.trained]
        ranks: list[list[Weight]] = [[] for _ in range(self.split.replicas)]
        least = [(0, rank) for rank in range(len(ranks))]  # a heap of sizes
        largest_first = sorted(self.trained, key=lambda each: each.size, reverse=True)
        for weight in largest_first if self.split.zero == 1 else self.trained:
            size, rank = least[0]
            ranks[rank].append(weight)
            heapq.heapreplace(least, (size + weight.size, rank))
        return ranks

    @functools.cached_property
    def room(self) -> int:
        """Entries of GradStorage, one for each process: those of the largest share, but at most 2**23."""
        return min(max(sum(each.size for each in rank) for rank in self.of_ranks), 2**23)

    def held(self) -> dict[str, int]:
        """Bytes by kind between two steps."""
        return max((self.held_by(own) for own in self.of_ranks), key=lambda held: sum(held.values()))

    def held_by(self, own: list[Weight]) -> dict[str, int]:
        """The same of a process that updates these weights. AdamW's moments and masters are in float32."""
        entries = {id(each): self.cut(each.bytes) // each.width for each in own}
        low = sum(entries[id(each)] for each in own if each.width < 4)
        gradients = buffers = 0
        if self.sends_in_buffers:
            gradients = buffers = self.gradients
        elif self.split.zero == 2:
            # What has no room in the storage, smallest first, has a gradient of its own. The last one that was sent
            # stays (`_comm_task`).
            storage, used = self.room * own[0].width if own else 0, 0
            gradients = storage
            for weight in sorted(own, key=lambda each: each.size):
                if used + weight.size <= self.room:
                    used += weight.size
                else:
                    gradients += weight.bytes
            if not any(each is self.trained[0] for each in own):
                buffers = storage if self.trained[0].size <= self.room else self.trained[0].bytes
        return {
            "weights": self.weights,
            "gradients": gradients,
            "master_weights": 4 * low if self.masters else 0,
            "moments": 2 * 4 * sum(entries.values()),
            "communication_buffers": buffers,
        }

    def in_passes(self) -> int:
        """Bytes of the buffers in which ZeRO 2 sends, one for each other process (`_build_grad_storages`)."""
        if self.split.zero != 2:
            return 0
        return (self.split.replicas - 1) * self.room * self.trained[0].width

    def in_update(self) -> dict[str, int]:
        """Bytes by kind while the weights are updated, beyond those held.

        `parallel.Clip` casts one gradient of low precision after the other. Replicas of tensor-parallel groups gather
        all gradients in buffers (fused_allreduce_gradients in utils/hybrid_parallel_util.py).
        """
        low = [self.cut(each.bytes) * 2 for each in self.trained if each.width < 4]
        replicated = self.split.zero == 0 and self.split.mp > 1 and self.split.replicas > 1
        return {
            "gradients": 0 if self.sends_in_buffers or self.split.zero == 2 else self.gradients,
            "communication_buffers": self.gradients if replicated else 0,
            "workspace": max(low, default=0),
        }
