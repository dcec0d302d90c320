"""Which samples make a row and which rows a global batch: in the data's order, grouped by length, or packed.

An order that is not the data's comes from the seed, and both sides read it from the plan.
"""

import numpy as np

from tunebench.plan import Rows, ranges

POOL = 64  # global batches that are sorted together: enough to leave little padding, few enough to stay mixed


def single(samples: int) -> Rows:
    """A row for each sample."""
    return Rows(np.arange(samples), np.arange(samples + 1))


def pack(lengths: np.ndarray, capacity: int) -> Rows:
    """First-fit-decreasing: each sample, the longest first, goes to the first row that has room for its tokens.

    No sample may be longer than `capacity`. Samples of one length are placed at once, which gives the same rows: they
    fill up one row after the other. That takes (different lengths × rows) operations.
    """
    room = np.zeros(0, dtype=np.int64)
    row_of = np.empty(len(lengths), dtype=np.int64)
    for length in np.unique(lengths)[::-1]:
        members = np.flatnonzero(lengths == length)
        fits = room // length
        before = np.cumsum(fits) - fits
        taken = np.clip(len(members) - before, 0, fits)  # by each row that is there
        new = np.full(-(-(len(members) - int(taken.sum())) // (capacity // length)), capacity // length)
        if len(new):
            new[-1] = len(members) - taken.sum() - new[:-1].sum()
        taken, room = np.concatenate([taken, new]), np.concatenate([room, np.full(len(new), capacity)])
        room -= taken * length
        row_of[members] = np.repeat(np.arange(len(room)), taken)
    counts = np.bincount(row_of, minlength=len(room))
    return Rows(np.argsort(row_of, kind="stable"), np.concatenate([[0], np.cumsum(counts)]))


def in_turn(epoch: Rows, rows: int) -> Rows:
    """`rows` rows: those of an epoch in their order, again and again."""
    return _take(epoch, np.arange(rows) % _count(epoch))


def shuffled(epoch: Rows, rows: int, seed: int) -> Rows:
    """`rows` rows, each epoch in an order of its own."""
    return _take(epoch, _epochs(epoch, rows, seed)[:rows])


def grouped(epoch: Rows, rows: int, seed: int, lengths: np.ndarray, bsz: int) -> Rows:
    """`rows` rows in batches of about the same length: each epoch is shuffled, then pools of batches are sorted by
    `lengths`, that of each row of an epoch, and the batches of a pool shuffled. Within a batch the rows are so ordered
    that replicas, which take contiguous shares of it, get about as many tokens each, if these are of 2, 4, 8 … rows."""
    drawn = _epochs(epoch, rows, seed)
    drawn = drawn[: len(drawn) // bsz * bsz]
    generator, parts = np.random.default_rng([seed, 1]), []
    for first in range(0, len(drawn), POOL * bsz):
        pool = drawn[first : first + POOL * bsz]
        batches = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, bsz)[:, folded(bsz)]
        parts.append(generator.permutation(batches).reshape(-1))
    return _take(epoch, np.concatenate(parts)[:rows])


def paired_halves(rows: Rows, bsz: int, warmup: int) -> Rows:
    """The same batches, but those of the second half of the steps after `warmup` are those of the first half again.

    Of an odd number of steps the middle one stands alone.
    """
    steps = np.arange(_count(rows)).reshape(-1, bsz)
    half = (len(steps) - warmup) // 2
    steps[len(steps) - half :] = steps[warmup : warmup + half]
    return _take(rows, steps.reshape(-1))


def drawn(samples: int, seed: int) -> np.ndarray:
    """The indices of all samples in the order in which they are drawn: their own for seed 0."""
    return np.random.default_rng([seed, 2]).permutation(samples) if seed else np.arange(samples)


def folded(rows: int) -> list[int]:
    """An order for sorted rows: the shortest beside the longest and so on, then such pairs likewise."""
    blocks = [[row] for row in range(rows)]
    while len(blocks) > 1:
        half = len(blocks) // 2
        blocks = [*(blocks[i] + blocks[-1 - i] for i in range(half)), *blocks[half : len(blocks) - half]]
    return blocks[0]


def _epochs(epoch: Rows, rows: int, seed: int) -> np.ndarray:
    """The rows of as many whole epochs as `rows` rows need."""
    generator, count = np.random.default_rng(seed), _count(epoch)
    return np.concatenate([generator.permutation(count) for _ in range(-(-rows // count))])


def _count(rows: Rows) -> int:
    return len(rows.starts) - 1


def _take(epoch: Rows, picked: np.ndarray) -> Rows:
    counts = np.diff(epoch.starts)[picked]
    order = epoch.order[ranges(epoch.starts[picked], counts)]
    return Rows(order, np.concatenate([[0], np.cumsum(counts)]))
