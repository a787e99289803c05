"""A rollout and its advantages -> rows to train on: one TrainBatch an optimizer update, on the host, in NumPy.

Three kinds of rows give the same log-probability to each completion token: `padded` holds one completion a row,
`packed` several behind each other, `group` a prompt once with several of its completions, which attend to it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np

from grpo_jax.types import Rollout, Shared, TrainBatch

RowKind = Literal["padded", "packed", "group"]
ROW_COUNTS = 8
"""Most numbers of rows that an update of packed or group rows can have, so that few shapes are ever compiled."""
BLOCKS = 4
"""Of a group row, unless its length is given: one more makes rows that are half empty, one less repeats prompts."""


@dataclass(frozen=True)
class Layout:
    """The shapes of a run's updates, all known before it starts; `layout_for` makes one.

    Attributes:
        kind: how completions share rows.
        row_len: tokens in a row (T).
        sample_count: completions in one update.
        row_multiple: what the number of rows must divide by (devices times microbatches).
        samples: completions of a prompt (G).
        shared: how group rows are cut; None for the others.
    """

    kind: RowKind
    row_len: int
    sample_count: int
    row_multiple: int = 1
    samples: int = 1
    shared: Shared | None = None

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Every number of rows an update can have, ascending."""
        most, least = self.sample_count, self.sample_count
        if self.shared is not None:
            blocks = (self.row_len - self.shared.prompt_len) // self.shared.block_len
            least = self.sample_count // self.samples
            most = least * -(-self.samples // blocks)
        elif self.kind == "packed":
            least = -(-self.sample_count // ROW_COUNTS)
        ratio = (most / least) ** (1 / (ROW_COUNTS - 1))
        steps = (min(most, math.ceil(least * ratio**step - 1e-9)) for step in range(ROW_COUNTS))
        return tuple(sorted({_round_up(count, self.row_multiple) for count in (*steps, most)}))


def layout_for(
    kind: RowKind,
    prompt_len: int,
    completion_len: int,
    sample_count: int,
    samples: int,
    row_multiple: int = 1,
    row_len: int | None = None,
) -> Layout:
    """The shapes of updates whose prompts and completions are at most so long.

    Args:
        kind: how completions share rows.
        prompt_len: most tokens of a prompt.
        completion_len: most tokens of a completion.
        sample_count: completions in one update.
        samples: completions of a prompt.
        row_multiple: what the number of rows must divide by.
        row_len: most tokens in a row; None chooses. Padded rows have no choice.

    Raises:
        ValueError: a prompt with its completion could be longer than ``row_len``.
    """
    width = prompt_len + completion_len
    if row_len is not None and row_len < width:
        raise ValueError(
            f"batch.row_len: got {row_len}, and a prompt with its completion has up to {prompt_len} + "
            f"{completion_len} tokens; raise it to {width}, or lower data.max_prompt_len or rollout.max_new_tokens."
        )
    if kind != "group":
        whole = width if kind == "padded" else row_len or 2 * width
        return Layout(kind, whole, sample_count, row_multiple, samples)
    most = max(1, sample_count // row_multiple)  # with more, full rows would be fewer than the devices
    behind = row_len - prompt_len if row_len else min(BLOCKS, samples, most) * completion_len
    blocks = behind // completion_len
    shared = Shared(prompt_len, behind // blocks)
    return Layout(kind, prompt_len + blocks * shared.block_len, sample_count, row_multiple, samples, shared)


class _Spot(NamedTuple):
    """Where a completion goes in its row, and the prompt it goes on from.

    Attributes:
        sample: its row of the rollout.
        prompt: first column of the prompt.
        column: its own first column.
        segment: its own.
        context: the prompt's segment where that is another, 0 where it is the same.
    """

    sample: int
    prompt: int
    column: int
    segment: int
    context: int = 0


def pack(rollout: Rollout, advantages: np.ndarray, mask: np.ndarray, layout: Layout) -> TrainBatch:
    """Lay one update's completions out in rows.

    Args:
        rollout: N rows, those of this update only.
        advantages: [N] float.
        mask: [N, T] bool in the rollout's columns, True where trained.
        layout: the shapes.

    Returns:
        TrainBatch of NumPy arrays; its number of rows is one of ``layout.row_counts``.

    Raises:
        ValueError: a prompt or a completion is longer than the layout is for.
    """
    _check(rollout, layout)
    rows = list(_ROWS[layout.kind](rollout, layout))
    count = next(c for c in layout.row_counts if c >= len(rows))
    batch = empty_rows(count, layout)
    for row, spots in enumerate(rows):
        arrays = {name: array[row] for name, array in batch.items() if array is not None}
        for spot in spots:
            _place(arrays, spot, rollout, advantages, mask)
    return TrainBatch(**batch, shared=layout.shared)


def minibatches(rollout: Rollout, count: int) -> list[slice]:
    """Rows of each of ``count`` equal updates; groups stay whole because prompts follow each other."""
    size = rollout.tokens.shape[0] // count
    return [slice(i * size, (i + 1) * size) for i in range(count)]


def _check(rollout: Rollout, layout: Layout) -> None:
    parts = [("a prompt with its completion", rollout.prompt_len + rollout.completion_len, layout.row_len)]
    if layout.shared is not None:
        parts = [
            ("a prompt", rollout.prompt_len, layout.shared.prompt_len),
            ("a completion", rollout.completion_len, layout.shared.block_len),
        ]
    for name, lengths, room in parts:
        if lengths.max() > room:
            raise ValueError(
                f"batch.row_len: {name} has {lengths.max()} tokens and a row holds {room}. "
                "Make batch.row_len larger, or data.max_prompt_len and rollout.max_new_tokens smaller."
            )


def _padded(rollout: Rollout, layout: Layout) -> Iterator[list[_Spot]]:
    for n, start in enumerate(rollout.prompt_len.tolist()):
        yield [_Spot(n, 0, start, 1)]


def _packed(rollout: Rollout, layout: Layout) -> Iterator[list[_Spot]]:
    lengths = rollout.prompt_len + rollout.completion_len
    for row in _first_fit(range(len(lengths)), lengths, layout.row_len):
        spots: list[_Spot] = []
        column = 0
        for n in row:
            spots.append(_Spot(n, column, column + int(rollout.prompt_len[n]), len(spots) + 1))
            column += int(lengths[n])
        yield spots


def _group(rollout: Rollout, layout: Layout) -> Iterator[list[_Spot]]:
    """Each prompt's completions in blocks that none crosses, and as many blocks a row as it has."""
    shared = layout.shared
    assert shared is not None
    prompt = lambda n: rollout.tokens[n, : rollout.prompt_len[n]].tobytes()  # noqa: E731
    for _, samples in groupby(range(len(rollout.tokens)), prompt):
        blocks = _first_fit(samples, rollout.completion_len, shared.block_len)
        size = (layout.row_len - shared.prompt_len) // shared.block_len
        for first in range(0, len(blocks), size):
            spots: list[_Spot] = []
            for place, block in enumerate(blocks[first : first + size]):
                column = shared.prompt_len + place * shared.block_len
                for n in block:
                    spots.append(_Spot(n, 0, column, len(spots) + 2, 1))
                    column += int(rollout.completion_len[n])
            yield spots


_ROWS: Mapping[RowKind, Callable[[Rollout, Layout], Iterator[list[_Spot]]]] = {
    "padded": _padded,
    "packed": _packed,
    "group": _group,
}


def _first_fit(items: Any, lengths: np.ndarray, room: int) -> list[list[int]]:
    """Bins of ``room``: first fit, longest first; ties keep their order, so the bins depend on the lengths only."""
    bins: list[list[int]] = []
    free: list[int] = []
    for item in sorted(items, key=lambda item: -lengths[item]):
        length = int(lengths[item])
        place = next((i for i, left in enumerate(free) if left >= length), len(bins))
        if place == len(bins):
            bins.append([])
            free.append(room)
        bins[place].append(item)
        free[place] -= length
    return bins


def empty_rows(count: int, layout: Layout) -> dict[str, Any]:
    """The arrays of a TrainBatch of ``count`` rows without a token, by name."""
    shape = (count, layout.row_len)
    column = np.arange(layout.row_len, dtype=np.int32)
    return {
        "tokens": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "context_ids": np.zeros(shape, np.int32) if layout.kind == "group" else None,
        "source": np.broadcast_to(np.maximum(column - 1, 0), shape).copy(),
        "mask": np.zeros(shape, bool),
        "advantages": np.zeros(shape, np.float32),
        "sampler_logp": np.zeros(shape, np.float32),
        "sample_ids": np.full(shape, -1, np.int32),
        "places": np.zeros(shape, np.int32),
    }


def _place(
    arrays: dict[str, np.ndarray], spot: _Spot, rollout: Rollout, advantages: np.ndarray, mask: np.ndarray
) -> None:
    """Write one completion and its prompt into a row; a prompt that others have written is written again, the same."""
    n = spot.sample
    start, extra = int(rollout.prompt_len[n]), int(rollout.completion_len[n])
    prompt, there = slice(spot.prompt, spot.prompt + start), slice(spot.column, spot.column + extra)
    here = slice(start, start + extra)
    arrays["tokens"][prompt] = rollout.tokens[n, :start]
    arrays["positions"][prompt] = np.arange(start)
    arrays["segment_ids"][prompt] = spot.context or spot.segment
    if spot.context:
        arrays["context_ids"][there] = spot.context
    if extra:
        arrays["source"][spot.column] = spot.prompt + start - 1
    arrays["tokens"][there] = rollout.tokens[n, here]
    arrays["positions"][there] = np.arange(start, start + extra)
    arrays["segment_ids"][there] = spot.segment
    arrays["mask"][there] = mask[n, here]
    arrays["advantages"][there] = advantages[n]
    arrays["sampler_logp"][there] = rollout.sampler_logp[n, here]
    arrays["sample_ids"][there] = n
    arrays["places"][there] = np.arange(extra)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
