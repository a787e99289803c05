"""A rollout and its advantages -> rows to train on: one TrainBatch an optimizer update, on the host, in NumPy.

Three kinds of rows give the same log-probability to each completion token: `padded` holds one completion a row,
`packed` several behind each other, `group` a prompt once with several of its completions, which attend to it.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from grpo_jax.types import Rollout, TrainBatch

RowKind = Literal["padded", "packed", "group"]
ROW_COUNT_STEPS = 8
"""Packed rows come in multiples of this part of the padded row count, so that few shapes are ever compiled."""


@dataclass(frozen=True)
class Layout:
    """The shapes of a run's updates, all known before it starts.

    Attributes:
        kind: how completions share rows.
        row_len: tokens in a row (T).
        sample_count: completions in one update.
        row_multiple: what the number of rows must divide by (devices times microbatches).
    """

    kind: RowKind
    row_len: int
    sample_count: int
    row_multiple: int = 1

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Every number of rows an update can have, ascending."""
        if self.kind == "padded":
            return (_round_up(self.sample_count, self.row_multiple),)
        steps = range(1, ROW_COUNT_STEPS + 1)
        return tuple(
            sorted({_round_up(-(-self.sample_count * s // ROW_COUNT_STEPS), self.row_multiple) for s in steps})
        )


@dataclass(frozen=True)
class _Item:
    """Completions that share one prompt's tokens in a row: the samples' rows of the rollout."""

    samples: tuple[int, ...]
    length: int


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
        ValueError: a prompt with its completion is longer than a row.
    """
    longest = int((rollout.prompt_len + rollout.completion_len).max())
    if longest > layout.row_len:
        raise ValueError(
            f"batch.row_len: a prompt with its completion has {longest} tokens and a row holds {layout.row_len}. "
            "Make batch.row_len larger, or data.max_prompt_len and rollout.max_new_tokens smaller."
        )
    rows = _rows(rollout, layout)
    count = next(c for c in layout.row_counts if c >= len(rows))
    batch = _empty(count, layout)
    for row, items in enumerate(rows):
        column, segment = 0, 1
        for item in items:
            column, segment = _place(batch, row, column, segment, item, rollout, advantages, mask, layout.kind)
    return TrainBatch(**batch)


def minibatches(rollout: Rollout, count: int) -> list[slice]:
    """Rows of each of ``count`` equal updates; groups stay whole because prompts follow each other."""
    size = rollout.tokens.shape[0] // count
    return [slice(i * size, (i + 1) * size) for i in range(count)]


def _rows(rollout: Rollout, layout: Layout) -> list[list[_Item]]:
    lengths = (rollout.prompt_len + rollout.completion_len).tolist()
    if layout.kind == "padded":
        return [[_Item((n,), lengths[n])] for n in range(len(lengths))]
    if layout.kind == "packed":
        items = [_Item((n,), lengths[n]) for n in range(len(lengths))]
    else:
        items = _share_prompts(rollout, layout.row_len)
    return _first_fit(items, layout.row_len)


def _share_prompts(rollout: Rollout, row_len: int) -> list[_Item]:
    """Neighbouring rows with the same prompt become one item, as many as fit in a row."""
    items: list[_Item] = []
    key: bytes | None = None
    for n, (start, extra) in enumerate(zip(rollout.prompt_len, rollout.completion_len, strict=True)):
        prompt = rollout.tokens[n, :start].tobytes()
        if prompt == key and items[-1].length + int(extra) <= row_len:
            items[-1] = _Item((*items[-1].samples, n), items[-1].length + int(extra))
        else:
            items.append(_Item((n,), int(start + extra)))
        key = prompt
    return items


def _first_fit(items: list[_Item], row_len: int) -> list[list[_Item]]:
    """First fit, longest first; ties keep their order, so the rows depend on the lengths only."""
    rows: list[list[_Item]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda item: -item.length):
        row = next((r for r, free in enumerate(room) if free >= item.length), None)
        if row is None:
            rows.append([item])
            room.append(row_len - item.length)
        else:
            rows[row].append(item)
            room[row] -= item.length
    return rows


def _empty(count: int, layout: Layout) -> dict[str, Any]:
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
    batch: dict[str, Any],
    row: int,
    column: int,
    segment: int,
    item: _Item,
    rollout: Rollout,
    advantages: np.ndarray,
    mask: np.ndarray,
    kind: RowKind,
) -> tuple[int, int]:
    """Write one item from ``column`` on; returns the next free column and segment id."""
    start = int(rollout.prompt_len[item.samples[0]])
    prompt = slice(column, column + start)
    last = column + start - 1
    arrays = {name: array[row] for name, array in batch.items() if array is not None}
    arrays["tokens"][prompt] = rollout.tokens[item.samples[0], :start]
    arrays["positions"][prompt] = np.arange(start)
    arrays["segment_ids"][prompt] = segment
    column, context = column + start, segment
    for n in item.samples:
        extra = int(rollout.completion_len[n])
        there, here = slice(column, column + extra), slice(start, start + extra)
        if kind == "group":
            segment += 1
            arrays["context_ids"][there] = context
            if extra:
                arrays["source"][column] = last
        arrays["tokens"][there] = rollout.tokens[n, here]
        arrays["positions"][there] = np.arange(start, start + extra)
        arrays["segment_ids"][there] = segment
        arrays["mask"][there] = mask[n, here]
        arrays["advantages"][there] = advantages[n]
        arrays["sampler_logp"][there] = rollout.sampler_logp[n, here]
        arrays["sample_ids"][there] = n
        arrays["places"][there] = np.arange(extra)
        column += extra
    return column, segment + 1


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
