"""Puts samples into rows and rows into global batches: in the data's order, grouped by length, or packed.

Any other order than the data's comes from the seed. Both sides read it from the plan.
"""

import numpy as np

from tunebench.plan import Rows, ranges

POOL = 64  # global batches sorted together: many enough for little padding, few enough to keep the order mixed


def single(samples: int) -> Rows:
    """A row for each sample."""
    return Rows(np.arange(samples), np.arange(samples + 1))


def pack(lengths: np.ndarray, capacity: int) -> Rows:
    """First-fit-decreasing bin packing: each sample, the longest first, goes into the first row with room for it.

    No sample may be longer than `capacity` tokens. Samples of one length are placed together. That gives the same rows,
    since they fill one row after the other, and takes (different lengths × rows) operations.
    """
    room = np.zeros(0, dtype=np.int64)
    row_of = np.empty(len(lengths), dtype=np.int64)
    for length in np.unique(lengths)[::-1]:
        members = np.flatnonzero(lengths == length)
        fits = room // length
        before = np.cumsum(fits) - fits
        taken = np.clip(len(members) - before, 0, fits)  # samples that each existing row takes
        new = np.full(-(-(len(members) - int(taken.sum())) // (capacity // length)), capacity // length)
        if len(new):
            new[-1] = len(members) - taken.sum() - new[:-1].sum()
        taken, room = np.concatenate([taken, new]), np.concatenate([room, np.full(len(new), capacity)])
        room -= taken * length
        row_of[members] = np.repeat(np.arange(len(room)), taken)
    counts = np.bincount(row_of, minlength=len(room))
    return Rows(np.argsort(row_of, kind="stable"), np.concatenate([[0], np.cumsum(counts)]))


def in_turn(epoch: Rows, rows: int) -> Rows:
    """The first `rows` rows of an epoch that repeats in the same order."""
    return _take(epoch, np.arange(rows) % _count(epoch))


def shuffled(epoch: Rows, rows: int, seed: int) -> Rows:
    """The first `rows` rows of repeated epochs, each shuffled anew."""
    return _take(epoch, _epochs(epoch, rows, seed)[:rows])


def grouped(epoch: Rows, rows: int, seed: int, lengths: np.ndarray, bsz: int) -> Rows:
    """`rows` rows in batches whose rows have about the same length.

    Each epoch is shuffled. Then each pool of batches is sorted by `lengths`, the tokens of each row of an epoch, and
    the batches of a pool are shuffled. Replicas take contiguous shares of a batch. The order of rows in a batch gives
    shares of 2, 4, 8 … rows about as many tokens each.
    """
    drawn = _epochs(epoch, rows, seed)
    drawn = drawn[: len(drawn) // bsz * bsz]
    generator, parts = np.random.default_rng([seed, 1]), []
    for first in range(0, len(drawn), POOL * bsz):
        pool = drawn[first : first + POOL * bsz]
        batches = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, bsz)[:, folded(bsz)]
        parts.append(generator.permutation(batches).reshape(-1))
    return _take(epoch, np.concatenate(parts)[:rows])


def paired_halves(rows: Rows, bsz: int, warmup: int) -> Rows:
    """Repeats batches: after `warmup` steps, the second half of the steps has the batches of the first half.

    The middle step of an odd number has its own batch.
    """
    steps = np.arange(_count(rows)).reshape(-1, bsz)
    half = (len(steps) - warmup) // 2
    steps[len(steps) - half :] = steps[warmup : warmup + half]
    return _take(rows, steps.reshape(-1))


def drawn(samples: int, seed: int) -> np.ndarray:
    """The indices of all samples in the order in which they are drawn. Seed 0 keeps the data's order."""
    return np.random.default_rng([seed, 2]).permutation(samples) if seed else np.arange(samples)


def folded(rows: int) -> list[int]:
    """An order for sorted rows: the shortest next to the longest and so on, then the same with these pairs."""
    blocks = [[row] for row in range(rows)]
    while len(blocks) > 1:
        half = len(blocks) // 2
        blocks = [*(blocks[i] + blocks[-1 - i] for i in range(half)), *blocks[half : len(blocks) - half]]
    return blocks[0]


def _epochs(epoch: Rows, rows: int, seed: int) -> np.ndarray:
    """The row numbers of the shuffled whole epochs that `rows` rows need."""
    generator, count = np.random.default_rng(seed), _count(epoch)
    return np.concatenate([generator.permutation(count) for _ in range(-(-rows // count))])


def _count(rows: Rows) -> int:
    return len(rows.starts) - 1


def _take(epoch: Rows, picked: np.ndarray) -> Rows:
    counts = np.diff(epoch.starts)[picked]
    order = epoch.order[ranges(epoch.starts[picked], counts)]
    return Rows(order, np.concatenate([[0], np.cumsum(counts)]))
