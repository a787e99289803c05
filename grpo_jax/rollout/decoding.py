"""One call of the engine, from the first prompt to the last token: the host's side of it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from grpo_jax.mesh import fetch
from grpo_jax.models.model import Model, View
from grpo_jax.rollout.requests import Requests, Sampled
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.rollout.shapes import Ladder, Shape, arrange, blocks_needed
from grpo_jax.rollout.slots import (
    Context,
    Seating,
    Slots,
    move,
    move_context,
    open_slots,
    prefill,
    row_key_data,
    segment,
)
from grpo_jax.rollout.stops import StopStrings
from grpo_jax.types import Rollout

SEGMENT = 32
"""Most steps between two looks at the rows."""


@dataclass(frozen=True)
class Group:
    """All samples of one prompt.

    Attributes:
        prompt: its place in the call, q.
        rollout: its G rows.
    """

    prompt: int
    rollout: Rollout


@dataclass
class Counts:
    """What a call did; figures for a log.

    Attributes:
        steps: decode steps.
        slot_steps: slots times steps.
        live_steps: those of them that sampled a token that is kept.
        moves: times that rows changed slots.
        shapes: those that decoded, in order.
    """

    steps: int = 0
    slot_steps: int = 0
    live_steps: int = 0
    moves: int = 0
    shapes: tuple[Shape, ...] = ()

    @property
    def occupancy(self) -> float:
        """Share of slot-steps that held a live row."""
        return self.live_steps / max(self.slot_steps, 1)


class Decoding:
    """Iterates over finished groups while the others decode.

    Whatever it decides follows from integers that every host holds: lengths, limits, who is done (contract 12).

    Attributes:
        sampled: completions that are done.
        counts: what was done so far.
    """

    def __init__(
        self,
        model: Model,
        view: View,
        shapes: Ladder,
        asked: Requests,
        sampling: Sampling,
        round_: int,
        decode: Callable[[list[int]], str] | None = None,
    ):
        """Nothing runs before the first group is asked for.

        Args:
            model: static.
            view: from `Model.decode_view`.
            shapes: that may decode.
            asked: the prompts.
            sampling: what to draw from.
            round_: the step that samples.
            decode: token ids to text, needed for stop strings.
        """
        self._model, self._view, self._ladder, self._asked = model, view, shapes, asked
        self._sampling, self._rules = sampling, sampling.rules
        self._stops = StopStrings(sampling.stop_strings, decode)
        self.sampled = Sampled(asked, sampling.max_new_tokens, self._rules.changed)
        self.counts = Counts()
        self._keys = np.asarray(row_key_data(asked.address, np.uint32(round_)))
        self._waiting = 0  # the first row that has had no slot yet
        self._missing = np.full(len(asked.length), asked.samples)  # rows of each prompt that are not done
        self._length = np.zeros(len(asked.limit), np.int32)  # tokens of each row
        self._pool: Context | None = None  # prompts that were prefilled last, and the first of them
        self._pool_start = -shapes.pool
        self._shape: Shape | None = None
        self._slots: Slots | None = None
        self._context: Context | None = None
        self._seats = np.zeros(0, int)  # the row in each slot; -1 where it is done
        self._blocks = np.zeros(0, int)  # the prompt of each block of slots; -1 for none

    def __iter__(self) -> Iterator[Group]:
        """Groups in the order in which they are done."""
        ready: list[int] = []
        while self._rearrange():
            status = self._run()
            yield from map(self._group, ready)  # while the device works
            ready = self._read(status)
        yield from map(self._group, ready)

    def _group(self, prompt: int) -> Group:
        samples = self._asked.samples
        return Group(prompt, self.sampled.rollout(np.arange(prompt * samples, (prompt + 1) * samples)))

    def _rearrange(self) -> bool:
        """Take rows in, close up, or lengthen the cache where that is due; False when nothing is left to decode."""
        live = self._seats[self._seats >= 0]
        new = self._admissible(live)
        rows = np.concatenate([live, new])
        if not len(rows):
            return False
        longest = int(self._length[rows].max())
        shape = self._shape
        if len(new) or shape is None or shape.length <= longest or not self._queued:
            better = self._ladder.top(longest) if self._queued else self._ladder.fitting(self._counted(rows), longest)
            if len(new) or shape is None or shape.length <= longest or better.rows < shape.rows:
                self._move(better, np.sort(rows))
        return True

    @property
    def _queued(self) -> int:
        return len(self._asked.limit) - self._waiting

    def _counted(self, rows: np.ndarray) -> list[int]:
        """How many there are of each prompt."""
        return np.unique(rows // self._asked.samples, return_counts=True)[1].tolist()

    def _admissible(self, live: np.ndarray) -> np.ndarray:
        """Rows of the queue that get a slot now: in order, of the prompts that are prefilled, enough to be worth it."""
        slots, samples = self._ladder.slots, self._asked.samples
        if not self._queued or len(live) > slots - self._ladder.worth:
            return live[:0]
        group = self._ladder.top(0).group
        counts = dict(Counter((live // samples).tolist()))
        blocks, end = blocks_needed(list(counts.values()), group), self._waiting
        last = min(len(self._asked.limit), self._pool_rows())
        while end < last:
            prompt = end // samples
            if counts.get(prompt, 0) % group == 0:
                if (blocks + 1) * group > slots:
                    break
                blocks += 1
            counts[prompt] = counts.get(prompt, 0) + 1
            end += 1
        enough = end == last or end - self._waiting >= self._ladder.worth or not len(live)
        if not enough:
            return live[:0]
        new = np.arange(self._waiting, end)
        self._waiting = end
        return new

    def _pool_rows(self) -> int:
        """The first row whose prompt is not prefilled, after the next prompts are where all before have their slots."""
        samples, size = self._asked.samples, self._ladder.pool
        if self._waiting >= (self._pool_start + size) * samples:
            self._pool_start += size
            some = slice(self._pool_start, self._pool_start + size)
            tokens, length = self._asked.tokens[some], self._asked.length[some]
            short = size - len(length)
            tokens = np.pad(tokens, ((0, short), (0, 0)))
            self._pool = prefill(self._model, self._view, tokens, np.pad(length, (0, short), constant_values=1))
        return (self._pool_start + size) * samples

    def _move(self, shape: Shape, rows: np.ndarray) -> None:
        seats, blocks = arrange(rows, self._asked.samples, shape)
        row, prompt = np.maximum(seats, 0), np.maximum(seats, 0) // self._asked.samples
        before = np.full(len(self._asked.limit), -1)
        before[self._seats[self._seats >= 0]] = np.flatnonzero(self._seats >= 0)
        seating = Seating(
            source=np.maximum(before[row], 0).astype(np.int32),
            fresh=before[row] < 0,
            token=self._asked.last[prompt],
            limit=self._asked.limit[row],
            keys=self._keys[row],
            prompt=self._sources(blocks),
        )
        self._settle(shape, seating, same=np.array_equal(blocks, self._blocks))
        self._shape, self._seats, self._blocks = shape, seats, blocks
        self.counts.moves += 1
        self.counts.shapes += (shape,)
        if not self._queued:
            self._pool = None

    def _sources(self, blocks: np.ndarray) -> np.ndarray:
        """Where the prompt of each block stands: in a block of now, or counted on from these in the pool."""
        held = {int(prompt): block for block, prompt in enumerate(self._blocks) if prompt >= 0}
        first = self._pool_start - len(self._blocks)
        return np.asarray([held.get(p, p - first) if p >= 0 else i for i, p in enumerate(blocks.tolist())], np.int32)

    def _settle(self, shape: Shape, seating: Seating, same: bool) -> None:
        slots, context, pool = self._slots, self._context, self._pool
        self._slots = self._context = None
        if slots is None or context is None:
            assert pool is not None
            self._slots = open_slots(self._model, shape, self._rules, seating)
            stays = np.array_equal(seating.prompt, np.arange(self._ladder.pool))
            self._context = pool if stays else move_context(self._model, pool, seating.prompt)
            return
        contexts = [] if same else [context] if pool is None else [context, pool]
        self._slots, moved = move(self._model, shape, slots, contexts, seating)
        self._context = context if moved is None else moved

    def _run(self) -> jax.Array:
        """Start a segment; what it returns is read later."""
        assert self._shape is not None and self._slots is not None and self._context is not None
        live = self._seats >= 0
        rows = self._seats[live]
        longest = int(self._length[rows].max())
        steps = min(SEGMENT, self._shape.length - longest)
        scalars = np.float32(self._sampling.temperature), np.int32(steps), np.int32(self._few(rows, longest))
        slots, self._slots = self._slots, None
        self._slots, status = segment(self._model, self._rules, self._view, self._context, slots, live, *scalars)
        return status

    def _few(self, rows: np.ndarray, longest: int) -> int:
        """At how many live rows a look is due: when the queue or a smaller shape may be worth a move."""
        assert self._shape is not None
        if self._queued:
            return min(self._ladder.slots - self._ladder.worth, len(rows) - self._ladder.worth // 2 - 1)
        smaller = self._ladder.smaller(self._shape, longest)
        if smaller is None:
            return 0
        empty = len(self._counted(rows)) * (smaller.group - 1) // 2  # in blocks that are not full
        return max(0, min(smaller.rows - empty, len(rows) - max(1, smaller.rows // 16)))

    def _read(self, status: jax.Array) -> list[int]:
        """Take in what a segment did; the prompts whose last row is done now."""
        assert self._slots is not None
        length, live, stopped, steps = fetch(status)
        held = self._seats >= 0
        rows = self._seats[held]
        old = self._length[rows]
        self._length[rows] = length[held]
        done = held & (live == 0)
        if self._stops.strings:
            cut = self._stops.cut(self._seats, old, length, np.asarray(fetch(self._slots.rows.tokens)))
            done |= cut > 0
            stopped, length = np.where(cut > 0, 1, stopped), np.where(cut > 0, cut, length)
            self._length[rows] = length[held]
        self._count(int(steps[0]), int((self._length[rows] - old).sum()))
        if not done.any():
            return []
        state = self._slots.rows
        tokens, logp, drawn = fetch((state.tokens, state.logp, state.drawn_logp))
        for slot in np.flatnonzero(done).tolist():
            n = int(length[slot])
            kept = None if drawn is None else drawn[slot, :n]
            self.sampled.put(int(self._seats[slot]), tokens[slot, :n], logp[slot, :n], kept, bool(stopped[slot]))
        prompts, counts = np.unique(self._seats[done] // self._asked.samples, return_counts=True)
        self._missing[prompts] -= counts
        self._seats[done] = -1
        return prompts[self._missing[prompts] == 0].tolist()

    def _count(self, steps: int, kept: int) -> None:
        assert self._shape is not None
        self.counts.steps += steps
        self.counts.slot_steps += steps * self._shape.rows
        self.counts.live_steps += kept
