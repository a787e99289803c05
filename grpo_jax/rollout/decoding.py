"""One call of the engine, from the first prompt to the last token: the host's side of it."""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from grpo_jax.mesh import fetch
from grpo_jax.models.model import View
from grpo_jax.models.seats import Seats
from grpo_jax.rollout.programs import Programs
from grpo_jax.rollout.requests import Requests, Sampled
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.rollout.shapes import Arranged, Ladder, Shape, arrange
from grpo_jax.rollout.slots import SEGMENT, Context, Seating, Slots, row_key_data
from grpo_jax.rollout.stops import StopStrings
from grpo_jax.types import Rollout

WATCHED = 4
"""Most steps between two looks where somebody watches the rows grow; `SEGMENT` where nobody does."""


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


Watch = Callable[[int, np.ndarray, bool], None]
"""(row, its tokens so far, whether it is done)"""


class Decoding:
    """Iterates over finished groups while the others decode.

    Whatever it decides follows from integers that every host holds: lengths, limits, who is done (contract 12).

    Attributes:
        sampled: completions that are done.
        counts: what was done so far.
    """

    def __init__(
        self,
        programs: Programs,
        view: View,
        shapes: Ladder,
        asked: Requests,
        sampling: Sampling,
        round_: int,
        decode: Callable[[list[int]], str] | None = None,
        watch: Watch | None = None,
    ):
        """Nothing decodes before the first group is asked for.

        Args:
            programs: compiled.
            view: from `Model.decode_view`.
            shapes: that may decode.
            asked: the prompts.
            sampling: what to draw from.
            round_: the step that samples.
            decode: token ids to text, needed for stop strings.
            watch: is told of each row after each segment it decoded in.
        """
        self._watch = watch
        self._programs, self._view, self._ladder, self._asked = programs, view, shapes, asked
        self._sampling = sampling
        self._stops = StopStrings(sampling.stop_strings, decode, sampling.min_tokens)
        self.sampled = Sampled(asked, sampling.max_new_tokens, sampling.changed)
        self.counts = Counts()
        self._keys = np.asarray(row_key_data(asked.address, np.uint32(round_)))
        self._waiting = 0  # the first row that has had no slot yet
        self._missing = np.full(len(asked.length), asked.samples)  # rows of each prompt that are not done
        self._length = np.zeros(len(asked.limit), np.int32)  # tokens of each row
        self._pool: Context | None = None  # prompts that were prefilled last, and the first of them
        self._pool_start = -shapes.pool
        self._shape = shapes.first
        self._slots: Slots | None = None
        self._context: Context | None = None
        seated = self._arrange(np.zeros(0, int), self._shape)
        assert seated is not None
        self._seated = seated
        self._seats = seated.row  # the row in each slot; -1 where there is none or it is done

    def __iter__(self) -> Iterator[Group]:
        """Groups in the order in which they are done."""
        ready: list[int] = []
        while self._rearrange():
            status = self._run()
            yield from map(self._group, ready)  # while the device works
            ready = self._read(status)
        yield from map(self._group, ready)

    def segment_memory(self) -> Any:
        """What the compiler says of the memory of a decode segment in the first shape."""
        return self._programs("segment", self._ladder.first).memory_analysis()

    def _group(self, prompt: int) -> Group:
        samples = self._asked.samples
        return Group(prompt, self.sampled.rollout(np.arange(prompt * samples, (prompt + 1) * samples)))

    def _rearrange(self) -> bool:
        """Take rows in, close up, or lengthen the cache where that is due; False when nothing is left to decode."""
        new = self._admissible()
        if len(new):
            self._move(self._shape, np.concatenate([self._live, new]))
        while len(self._live):
            target = None
            if self._length[self._live].max() >= self._shape.length:
                target = self._ladder.grown(self._shape)
                assert target is not None
            elif not self._queued:
                target = self._ladder.closer(self._shape)
            if target is None or not self._fits(target):
                return True
            self._move(target, self._live)
        return False

    @property
    def _live(self) -> np.ndarray:
        """The rows that decode."""
        return self._seats[self._seats >= 0]

    def _fits(self, shape: Shape) -> bool:
        return self._arrange(self._live, shape) is not None

    def _arrange(self, rows: np.ndarray, shape: Shape) -> Arranged | None:
        return arrange(np.sort(rows), self._asked.samples, shape, self._ladder.shards)

    @property
    def _queued(self) -> int:
        return len(self._asked.limit) - self._waiting

    def _admissible(self) -> np.ndarray:
        """Rows of the queue that get a slot now: in order, of the prompts that are prefilled, enough to be worth it."""
        live, slots, worth = self._live, self._ladder.slots, self._ladder.worth
        if not self._queued or len(live) > slots - worth:
            return live[:0]
        last = min(len(self._asked.limit), self._pool_rows())
        queue = np.arange(self._waiting, min(last, self._waiting + slots - len(live)))

        def too_many(count: int) -> bool:
            return self._arrange(np.concatenate([live, queue[:count]]), self._ladder.first) is None

        new = queue[: bisect.bisect_left(range(1, len(queue) + 1), True, key=too_many)]
        if self._waiting + len(new) < last and len(new) < worth and len(live):
            return live[:0]
        self._waiting += len(new)
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
            length = np.pad(length, (0, short), constant_values=1)
            self._pool = self._programs("prefill")(self._view, tokens, length)
        return (self._pool_start + size) * samples

    def _move(self, shape: Shape, rows: np.ndarray) -> None:
        """To ``shape``: rows stay where they are when only the cache grows, and close up when not."""
        before = np.full(len(self._asked.limit), -1)
        before[self._live] = np.flatnonzero(self._seats >= 0)
        stay = shape.grows(self._shape)
        if not stay:
            seated = self._arrange(rows, shape)
            assert seated is not None
        else:
            seated = replace(self._seated, row=self._seats)
        seats = seated.row
        row, prompt = np.maximum(seats, 0), np.maximum(seats, 0) // self._asked.samples
        source = np.arange(shape.rows) if stay else np.maximum(before[row], 0)
        seating = Seating(
            source=source.astype(np.int32),
            fresh=before[row] < 0,
            token=self._asked.last[prompt],
            limit=self._asked.limit[row],
            keys=self._keys[row],
            prompt=self._sources(seated.prompt),
        )
        self._settle(shape, seating, stay)
        self._shape, self._seats, self._seated = shape, seats.copy(), seated
        self.counts.moves += 1
        self.counts.shapes += (shape,)
        if not self._queued:
            self._pool = None

    def _sources(self, blocks: np.ndarray) -> np.ndarray:
        """Where the prompt of each block stands: in a block of now, or counted on from these in the pool."""
        held = {prompt: block for block, prompt in enumerate(self._seated.prompt.tolist()) if prompt >= 0}
        first = self._pool_start - (0 if self._context is None else len(self._seated.prompt))
        return np.asarray([held.get(p, p - first) if p >= 0 else i for i, p in enumerate(blocks.tolist())], np.int32)

    def _settle(self, shape: Shape, seating: Seating, stay: bool) -> None:
        slots, context, pool = self._slots, self._context, self._pool
        self._slots = self._context = None
        if slots is None or context is None:
            assert pool is not None
            self._slots = self._programs("open", shape)(seating)
            self._context = pool if self._ladder.whole else self._programs("seat", shape)(pool, seating.prompt)
            return
        contexts = [] if stay else [context] if pool is None else [context, pool]
        which = (self._shape, shape, len(contexts))
        small = [(each.length, each.tokens) for each in contexts]
        rows, small = self._programs("rows", *which)(slots.rows, small, seating)
        own, prompts = list(slots.cache), [list(each.cache) for each in contexts]
        del slots, contexts
        if not stay:
            del context, pool
        cache, moved = [], []
        while own:
            values = own[0][1][0]
            kind = values.shape[1], values.shape[3]
            program = self._programs("layer", *which, kind)
            layer, prompt = program(own.pop(0), [each.pop(0) for each in prompts], seating)
            cache.append(layer)
            moved += prompt
        self._slots = Slots(rows, tuple(cache))
        self._context = context if stay else Context(tuple(moved), *small[0])

    def _run(self) -> jax.Array:
        """Start a segment; what it returns is read later."""
        most = SEGMENT if self._watch is None else WATCHED
        steps = min(most, self._shape.length - int(self._length[self._live].max()))
        scalars = np.float32(self._sampling.temperature), np.int32(steps), np.int32(self._few())
        slots, self._slots = self._slots, None
        program = self._programs("segment", self._shape)
        seats = Seats(self._shape.blocks, self._ladder.shards)
        if not self._shape.even:
            seats = replace(seats, at=self._seated.at, block=self._seated.block, place=self._seated.place)
        self._slots, status = program(self._view, self._context, slots, self._seats >= 0, seats, *scalars)
        return status

    def _few(self) -> int:
        """At how many live rows a look is due: when the queue or a smaller shape may be worth a move."""
        count = len(self._live)
        if self._queued:
            return min(self._ladder.slots - self._ladder.worth, count - self._ladder.worth // 2 - 1)
        closer = self._ladder.closer(self._shape)
        if closer is None:
            return 0
        return max(0, min(closer.rows, count - max(1, closer.rows // 16)))

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
        if not done.any() and self._watch is None:
            return []
        state = self._slots.rows
        tokens, logp, drawn = fetch((state.tokens, state.logp, state.drawn_logp))
        if self._watch is not None:
            for slot in np.flatnonzero(held).tolist():
                self._watch(int(self._seats[slot]), tokens[slot, : length[slot]], bool(done[slot]))
        for slot in np.flatnonzero(done).tolist():
            n = int(length[slot])
            kept = None if drawn is None else drawn[slot, :n]
            self.sampled.put(int(self._seats[slot]), tokens[slot, :n], logp[slot, :n], kept, bool(stopped[slot]))
        prompts, counts = np.unique(self._seats[done] // self._asked.samples, return_counts=True)
        self._missing[prompts] -= counts
        self._seats[done] = -1
        return prompts[self._missing[prompts] == 0].tolist()

    def _count(self, steps: int, kept: int) -> None:
        self.counts.steps += steps
        self.counts.slot_steps += steps * self._shape.rows
        self.counts.live_steps += kept
