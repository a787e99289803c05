"""The shapes that decode, listed before the first row is: how many rows, how they share prompts, how long they get."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_SHAPES = 12
FIRST_LENGTH = 64
"""Completions up to so many tokens have one cache length: growing a cache that small saves less than it compiles."""
LONG = 512
"""Beyond so many tokens cache lengths are four times apart instead of twice."""
FRACTIONS: dict[int, tuple[tuple[float, ...], ...]] = {
    1: ((1, 1 / 2, 1 / 4),),
    2: ((1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8), (1, 1 / 2, 1 / 4, 3 / 16, 1 / 8, 1 / 16)),
    3: ((1, 3 / 4, 1 / 2), (1, 1 / 2, 3 / 8, 1 / 4), (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)),
}
"""Number of cache lengths -> for each the rows, as shares of all. Few rows are left where the cache is long."""
FEWEST_ROWS = 8
"""Below so many rows a step costs what it costs: no shape has fewer, unless there never were more."""


@dataclass(frozen=True, order=True)
class Shape:
    """What one compiled decode program is for.

    Attributes:
        rows: B, the slots.
        length: C, columns of a row's own cache: it can run while it has fewer tokens.
        group: g, rows that stand together and share a prompt's cache; B is a multiple.
    """

    rows: int
    length: int
    group: int


@dataclass(frozen=True)
class Ladder:
    """The shapes of a call, and the schedule they are for.

    Attributes:
        shapes: every shape that may decode, at most `MOST_SHAPES`.
        samples: G.
        pool: prompts prefilled together.
        refill: whether rows wait in a queue for slots; else all start together (cohort).
    """

    shapes: tuple[Shape, ...]
    samples: int
    pool: int
    refill: bool

    @property
    def slots(self) -> int:
        """Rows of the largest shape."""
        return max(shape.rows for shape in self.shapes)

    @property
    def worth(self) -> int:
        """Free slots for which it is worth taking rows in from the queue."""
        return max(self.top(0).group, self.slots // 8, 1)

    def fitting(self, counts: Sequence[int], length: int) -> Shape:
        """The smallest shape for so many rows of each prompt, the longest of them of ``length`` tokens."""
        return min(s for s in self.shapes if s.length > length and blocks_needed(counts, s.group) * s.group <= s.rows)

    def top(self, length: int) -> Shape:
        """The shape of all slots with the shortest cache that goes on from ``length`` tokens."""
        return min(s for s in self.shapes if s.length > length and s.rows == self.slots)

    def smaller(self, shape: Shape, length: int) -> Shape | None:
        """The next one below in rows that could go on from ``length`` tokens."""
        return max((s for s in self.shapes if s.length > length and s.rows < shape.rows), default=None)


def blocks_needed(counts: Sequence[int], group: int) -> int:
    """Blocks of ``group`` rows for so many rows of each prompt, a block holding rows of one prompt."""
    return sum(-(-count // group) for count in counts)


def ladder(
    prompts: int, samples: int, limit: int, slots: int | None, shards: int, refill: bool | None = None
) -> Ladder:
    """The shapes for ``prompts`` times ``samples`` rows of up to ``limit`` tokens.

    While all rows of a prompt run they stand on one copy of its cache. Afterwards blocks shrink with the rows, so that
    about twice as many copies as prompts are kept and few slots stand empty in blocks that are not full.

    Args:
        prompts: Q.
        samples: G.
        limit: longest completion.
        slots: most rows alive at once; None is no limit.
        shards: devices over which rows are cut; every shape divides.
        refill: the schedule; None takes cohort where all rows fit.
    """
    fits = slots is None or prompts * samples <= slots
    if refill is None:
        refill = not fits
    if refill:
        wanted = min(slots or prompts * samples, prompts * samples)
        group = _power_of_two(samples / 4)
        top = _multiple(wanted, group * shards, down=wanted >= group * shards)
        pool = _multiple(min(prompts, max(1, top // samples)), shards)
    elif fits:
        group, pool = samples, _multiple(prompts, shards)
        top = pool * samples
    else:
        raise ValueError(f"rollout.slots: got {slots} for {prompts * samples} rows that start together. Use refill.")
    lengths = cache_lengths(limit)
    shapes = {
        _shape(fraction, top, length, group, samples, shards)
        for length, fractions in zip(lengths, FRACTIONS[len(lengths)], strict=True)
        for fraction in fractions
    }
    assert len(shapes) <= MOST_SHAPES
    return Ladder(tuple(sorted(shapes)), samples, pool, refill)


def cache_lengths(limit: int) -> list[int]:
    """At most three lengths up to ``limit``, each a part of the next."""
    lengths = [limit]
    while len(lengths) < len(FRACTIONS) and lengths[0] > FIRST_LENGTH:
        lengths.insert(0, math.ceil(lengths[0] / (4 if lengths[0] > LONG else 2)))
    return lengths


def _shape(fraction: float, top: int, length: int, group: int, samples: int, shards: int) -> Shape:
    if fraction == 1:
        return Shape(top, length, group)
    smaller = min(group, _power_of_two(samples * fraction / 2))
    rows = _multiple(max(math.ceil(top * fraction), FEWEST_ROWS), smaller * shards)
    return Shape(rows, length, smaller) if rows < top else Shape(top, length, group)


def arrange(rows: np.ndarray, samples: int, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``q * G + g`` -> who sits where: [B] rows, -1 in empty slots, and [B / g] the prompt of each block, or -1.

    Raises:
        ValueError: they do not fit.
    """
    seats = np.full((shape.rows // shape.group, shape.group), -1)
    prompts = np.full(len(seats), -1)
    block = 0
    for prompt in dict.fromkeys((rows // samples).tolist()):
        mine = rows[rows // samples == prompt]
        for start in range(0, len(mine), shape.group):
            if block == len(seats):
                raise ValueError(f"got {len(rows)} rows, which do not fit into {shape}")
            some = mine[start : start + shape.group]
            seats[block, : len(some)], prompts[block] = some, prompt
            block += 1
    return seats.reshape(-1), prompts


def _power_of_two(most: float) -> int:
    return 1 << max(0, math.floor(math.log2(max(most, 1))))


def _multiple(value: int, unit: int, down: bool = False) -> int:
    return (value // unit if down else -(-value // unit)) * unit
