"""The shapes that decode, listed before the first row is: how many rows, how they share prompts, how long they get."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

MOST_SHAPES = 12
FEWEST_SHAPES = 3
STEPS_A_SHAPE = 12
"""A shape for so many tokens of the longest completion: each takes seconds to compile."""
LEAST_STEP = 4
"""A shape has at least so many rows less than the one before: a step of few rows costs what it costs."""
LONG = 512
"""Rows that start together and may get longer than this start in a cache of a quarter of the length."""
SHORT_SHAPES = 3
"""Shapes of that one: after so many tokens few rows are left."""


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

    def grows(self, other: "Shape") -> bool:
        """Whether this is ``other`` with a longer cache, so that every row may stay where it is."""
        return (self.rows, self.group) == (other.rows, other.group) and self.length > other.length


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
        return max(self.first.group, self.slots // 8, 1)

    @property
    def lengths(self) -> list[int]:
        """Of the caches, shortest first."""
        return sorted({shape.length for shape in self.shapes})

    @property
    def first(self) -> Shape:
        """Where rows start: all slots, the shortest cache."""
        return min(s for s in self.shapes if s.rows == self.slots)

    def grown(self, shape: Shape) -> Shape | None:
        """The one to go to when the cache is full: the next length, the fewest rows that are not fewer."""
        longer = [length for length in self.lengths if length > shape.length]
        return min((s for s in self.shapes if longer and s.length == longer[0] and s.rows >= shape.rows), default=None)

    def closer(self, shape: Shape) -> Shape | None:
        """The next one below in rows: of this length, or with none left of the next."""
        for length in [x for x in self.lengths if x >= shape.length][:2]:
            below = [s for s in self.shapes if s.length == length and s.rows < shape.rows]
            if below:
                return max(below)
        return None

    @property
    def moves(self) -> list[tuple[Shape, Shape, int]]:
        """Every change of shape that may happen: from, to, and from how many contexts the prompts come.

        A cache that grows while all stay where they are leaves the prompts alone; the queue's prompts are a second one.
        """
        out = []
        for shape in self.shapes:
            grown, closer = self.grown(shape), self.closer(shape)
            if grown is not None:
                out.append((shape, grown, 0 if grown.grows(shape) else 1))
            if closer is not None:
                out.append((shape, closer, 1))
            if self.refill and shape.rows == self.slots:
                out.append((shape, shape, 2))
        return out


def blocks_needed(counts: Sequence[int], group: int) -> int:
    """Blocks of ``group`` rows for so many rows of each prompt, a block holding rows of one prompt."""
    return sum(-(-count // group) for count in counts)


def ladder(
    prompts: int, samples: int, limit: int, slots: int | None, shards: int, refill: bool | None = None
) -> Ladder:
    """The shapes for ``prompts`` times ``samples`` rows of up to ``limit`` tokens.

    While all rows of a prompt run they stand on one copy of its cache. Afterwards blocks shrink with the rows, so that
    few slots stand empty in blocks that are not full.

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
        group = _power_of_two(samples / 8)
        top = _multiple(wanted, group * shards, down=wanted >= group * shards)
        pool = _multiple(min(prompts, max(1, top // samples)), shards)
    elif fits:
        group, pool = samples, _multiple(prompts, shards)
        top = pool * samples
    else:
        raise ValueError(f"rollout.slots: got {slots} for {prompts * samples} rows that start together. Use refill.")
    lengths = [limit] if refill else cache_lengths(limit)
    most = MOST_SHAPES - SHORT_SHAPES * (len(lengths) - 1)
    count = min(max(limit // STEPS_A_SHAPE, FEWEST_SHAPES), most)
    shapes = _falling(count, Shape(top, limit, group), samples, shards)
    shapes += [replace(shape, length=length) for length in lengths[:-1] for shape in shapes[:SHORT_SHAPES]]
    return Ladder(tuple(sorted(shapes)), samples, pool, refill)


def cache_lengths(limit: int) -> list[int]:
    """The lengths of the caches of rows that start together."""
    return [limit] if limit <= LONG else [math.ceil(limit / 4), limit]


def _falling(count: int, first: Shape, samples: int, shards: int) -> list[Shape]:
    """At most ``count`` shapes of one length, their rows falling as a parabola does.

    The share of empty slots is then small while there are many, and grows only where a step costs little.
    """
    shapes = [first]
    for place in range(1, count):
        share = (1 - place / count) ** 2
        group = min(first.group, _power_of_two(samples * share / 4))
        rows = _multiple(math.ceil(first.rows * share), group * shards)
        if shapes[-1].rows - rows >= LEAST_STEP:
            shapes.append(Shape(rows, first.length, group))
    return shapes


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
