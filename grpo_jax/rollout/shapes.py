"""The shapes that decode, listed before the first row is: how many rows, how they share prompts, how long they get."""

import math
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
        blocks: R, copies of prompts' caches that the rows stand on.
        group: M, rows that stand on one at most.
    """

    rows: int
    length: int
    blocks: int
    group: int

    @property
    def even(self) -> bool:
        """Whether there is a slot for every place on every block, so that the one follows from the other."""
        return self.rows == self.blocks * self.group

    def grows(self, other: "Shape") -> bool:
        """Whether this is ``other`` with a longer cache, so that every row may stay where it is."""
        return replace(self, length=other.length) == other and self.length > other.length


@dataclass(frozen=True)
class Ladder:
    """The shapes of a call, and the schedule they are for.

    Attributes:
        shapes: every shape that may decode, at most `MOST_SHAPES`.
        samples: G.
        pool: prompts prefilled together.
        refill: whether rows wait in a queue for slots; else all start together (cohort).
        shards: devices over which rows and blocks are cut.
    """

    shapes: tuple[Shape, ...]
    samples: int
    pool: int
    refill: bool
    shards: int = 1

    @property
    def slots(self) -> int:
        """Rows of the largest shape."""
        return max(shape.rows for shape in self.shapes)

    @property
    def worth(self) -> int:
        """Free slots for which it is worth taking rows in from the queue."""
        return max(1, self.slots // 8)

    @property
    def whole(self) -> bool:
        """Whether rows start on the prompts as they are prefilled."""
        return self.first.even and (self.first.blocks, self.first.group) == (self.pool, self.samples)

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


def ladder(
    prompts: int, samples: int, limit: int, slots: int | None, shards: int, refill: bool | None = None
) -> Ladder:
    """The shapes for ``prompts`` times ``samples`` rows of up to ``limit`` tokens.

    Each prompt's cache is read once for up to M rows, and kept once where they are not spread over more. Rows lie
    close together whatever prompts they go on from.

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
        top = _multiple(wanted, shards, down=wanted >= shards)
        pool = _multiple(min(prompts, max(1, top // samples)), shards)
        group = min(top, _power_of_two(samples / 2))
        blocks = _multiple(min(top, math.ceil(2 * top / group)), shards)
    elif fits:
        pool, top = _multiple(prompts, shards), _multiple(prompts * samples, shards)
        group, blocks = samples, pool
        if top < pool * samples:  # whole prompts would leave devices idle: a prompt's rows lie on several
            each = top // shards
            group, blocks = min(samples, each), shards * min(each, math.ceil((each - 1) / samples) + 1)
    else:
        raise ValueError(f"rollout.slots: got {slots} for {prompts * samples} rows that start together. Use refill.")
    lengths = [limit] if refill else cache_lengths(limit)
    most = MOST_SHAPES - SHORT_SHAPES * (len(lengths) - 1)
    count = min(max(limit // STEPS_A_SHAPE, FEWEST_SHAPES), most)
    shapes = _falling(count, Shape(top, limit, blocks, group), samples, shards)
    shapes += [replace(shape, length=length) for length in lengths[:-1] for shape in shapes[:SHORT_SHAPES]]
    return Ladder(tuple(sorted(shapes)), samples, pool, refill, shards)


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
        rows = _multiple(math.ceil(first.rows * share), shards)
        # Twice as many places as a prompt has rows on the average, and blocks for the prompts that have more.
        group = min(samples, 2 * _power_of_two(1.5 * samples * share))
        blocks = _multiple(min(rows, first.blocks + (rows // (2 * group) if group < samples else 0)), shards)
        if shapes[-1].rows - rows >= LEAST_STEP:
            shapes.append(Shape(rows, first.length, blocks, group))
    return shapes


@dataclass(frozen=True)
class Arranged:
    """Who sits where in a shape; host arrays. Numbers of slots and blocks count within a shard.

    Attributes:
        row: [B] the row in each slot, -1 where there is none.
        prompt: [R] the prompt of each block, or -1.
        block: [B] int32, the block of each slot; any where there is no row.
        place: [B] int32, its place on the block.
        at: [R, M] int32, the slot of each place; any where there is no row.
    """

    row: np.ndarray
    prompt: np.ndarray
    block: np.ndarray
    place: np.ndarray
    at: np.ndarray


def arrange(rows: np.ndarray, samples: int, shape: Shape, shards: int) -> Arranged | None:
    """Seats for rows ``q * G + g``, in their order; None when they do not fit."""
    size, blocks = shape.rows // shards, shape.blocks // shards
    row, prompt = np.full((shards, size), -1), np.full((shards, blocks), -1)
    block, place = np.zeros((shards, size), np.int32), np.zeros((shards, size), np.int32)
    at = np.zeros((shards, blocks, shape.group), np.int32)
    shard = slot = number = 0
    for first, count in _runs(rows // samples):
        last = first + count
        while first < last:
            if slot >= size or number >= blocks:
                shard, slot, number = shard + 1, 0, 0
            if shard == shards:
                return None
            some = min(last - first, shape.group, size - slot)
            seats = np.arange(slot, slot + some)
            row[shard, seats], prompt[shard, number] = rows[first : first + some], rows[first] // samples
            block[shard, seats], place[shard, seats] = number, np.arange(some)
            at[shard, number, :some] = seats
            first, number = first + some, number + 1
            slot = number * shape.group if shape.even else slot + some
    places = at.reshape(-1, shape.group)
    return Arranged(row.reshape(-1), prompt.reshape(-1), block.reshape(-1), place.reshape(-1), places)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Where each run of equal values starts, and its length."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return list(zip(starts.tolist(), np.diff(starts, append=len(values)).tolist(), strict=True))


def _power_of_two(most: float) -> int:
    return 1 << max(0, math.floor(math.log2(max(most, 1))))


def _multiple(value: int, unit: int, down: bool = False) -> int:
    return (value // unit if down else -(-value // unit)) * unit
