"""Prompts as token ids, and the order in which a run draws them. Host only."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np

from grpo_jax.config import TrainConfig
from grpo_jax.data.chat import PromptFormat
from grpo_jax.data.prompt_set import PromptSet
from grpo_jax.data.sources import Kind, load_dataset
from grpo_jax.data.template import TemplateFault
from grpo_jax.functions import nearest
from grpo_jax.types import Prompt

BLOCK = 4096
"""Draws of a mixture whose sources are decided by one generator."""


class PromptStream:
    """Prompts for training, epoch after epoch, each epoch every row once in an order of its own.

    The order of an epoch is a function of (seed, epoch, number of the dataset) alone, and where a run stands is one
    integer, the number of prompts drawn. A batch may begin in one epoch and end in the next.

    Of several datasets each draw takes one, with a chance in proportion to its weight: a function of (seed, draw).
    Each is gone through in epochs of its own, so a small one with a large weight is repeated more often.

    The request id of a prompt is ``epoch * rows + row``, with row its place in all datasets, one behind the other, and
    rows their length together, so it does not depend on what was filtered, on the batch size or on the order.
    """

    def __init__(
        self,
        sets: Sequence[PromptSet],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        prompts_per_step: int,
        shuffle: bool = True,
    ) -> None:
        """Stand before the first draw.

        Args:
            sets: the datasets, at least one.
            weights: one above 0 for each; None weighs all alike.
            seed: at least 0.
            prompts_per_step: how many ``next`` gives, at least 1.
            shuffle: False draws every epoch in the order of the file.

        Raises:
            ValueError: an argument out of range.
        """
        weights = [1.0] * len(sets) if weights is None else weights
        if not sets or len(weights) != len(sets) or not all(0 < w < np.inf for w in weights):
            raise ValueError(
                f"data.train: got {len(sets)} datasets with weights {list(weights)}; give each one above 0"
            )
        if seed < 0:
            raise ValueError(f"seed: got {seed}, but a seed is at least 0; use 0")
        if prompts_per_step < 1:
            raise ValueError(f"prompts_per_step: got {prompts_per_step}, but a step needs a prompt; use at least 1")
        starts = np.cumsum([0, *(part.row_count for part in sets)])
        self._row_count = int(starts[-1])
        self._parts = [_Part(part, int(starts[n]), seed, n, shuffle) for n, part in enumerate(sets)]
        self._kept = {start + p.request_id: p for start, part in zip(starts, sets, strict=False) for p in part.prompts}
        self._choices = _Choices(seed, weights)
        self._count = prompts_per_step
        self._cursor = 0
        self.filtered_count = sum(part.filtered_count for part in sets)
        """Prompts left out because they are too long."""
        self.longest = max(part.longest for part in sets)
        """Tokens of the longest prompt that is drawn."""
        self.columns = frozenset[str]().union(*(part.columns for part in sets))
        """Names of what the rows have besides the prompt; a row of a dataset without one gives None."""
        self.reports = tuple(dict.fromkeys(report for part in sets for report in part.reports))
        """What a run should know of its prompts, in words; see `PromptSet`."""
        self.sets = tuple(sets)
        """The datasets."""

    def __len__(self) -> int:
        """Prompts that can be drawn; with one dataset, those of an epoch."""
        return len(self._kept)

    def digest(self) -> str:
        """SHA-256 of what the rows of all datasets say."""
        each = [part.digest() for part in self.sets]
        return each[0] if len(each) == 1 else hashlib.sha256(" ".join(each).encode()).hexdigest()

    def next(self, count: int | None = None) -> list[Prompt]:
        """The next ``count`` prompts; None is ``prompts_per_step``."""
        count = self._count if count is None else count
        batch = [self._at(draw) for draw in range(self._cursor, self._cursor + count)]
        self._cursor += count
        return batch

    def by_request(self, request_id: int) -> Prompt:
        """The prompt that was drawn under a request id."""
        return replace(self._kept[request_id % self._row_count], request_id=request_id)

    def state(self) -> int:
        """How many prompts were drawn: all there is to save."""
        return self._cursor

    def restore(self, cursor: int) -> None:
        """Go on from a ``state``.

        Raises:
            ValueError: below 0.
        """
        if cursor < 0:
            raise ValueError(f"prompt cursor: got {cursor}, but it counts prompts drawn; use what state() returned")
        self._cursor = cursor

    def _at(self, draw: int) -> Prompt:
        number, place = self._choices(draw)
        epoch, row = self._parts[number].at(place)
        return self.by_request(epoch * self._row_count + row)


class _Part:
    """One dataset of a stream: which row its draws give."""

    def __init__(self, part: PromptSet, start: int, seed: int, number: int, shuffle: bool) -> None:
        self._kept = np.array([prompt.request_id for prompt in part.prompts])
        self._row_count, self._start, self._shuffle = part.row_count, start, shuffle
        self._seed, self._number = seed, number
        self._order: tuple[int, np.ndarray] = (-1, self._kept)

    def at(self, place: int) -> tuple[int, int]:
        """Epoch, and row among all datasets, of its draw number ``place``."""
        epoch, within = divmod(place, len(self._kept))
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch) if self._shuffle else self._kept)
        return epoch, self._start + int(self._order[1][within])

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Rows in the order of an epoch; raw Philox words are ranked, as NumPy fixes these for all its versions.

        The entropy of the first dataset, [seed, epoch, 0], is that of [seed, epoch]: the sequence is padded with 0.
        """
        entropy = np.random.SeedSequence([self._seed, epoch, self._number])
        order = np.argsort(np.random.Philox(entropy).random_raw(self._row_count), kind="stable")
        return order[np.isin(order, self._kept)]


class _Choices:
    """Which dataset each draw takes, and how many draws took it before; from one Philox word a draw."""

    def __init__(self, seed: int, weights: Sequence[float]) -> None:
        self._seed = seed
        self._bounds = np.cumsum(np.asarray(weights, np.float64) / np.sum(weights))[:-1]
        self._numbers = np.zeros(0, np.int64)
        self._places = np.zeros(0, np.int64)
        self._taken = np.zeros(len(weights), np.int64)

    def __call__(self, draw: int) -> tuple[int, int]:
        if not len(self._bounds):
            return 0, draw
        if draw >= len(self._numbers):
            self._decide(1 + draw // BLOCK)
        return int(self._numbers[draw]), int(self._places[draw])

    def _decide(self, blocks: int) -> None:
        """Decide the draws of so many blocks, those that are not decided yet."""
        known = len(self._numbers) // BLOCK
        entropies = (np.random.SeedSequence([self._seed, block, 0, 1]) for block in range(known, blocks))
        words = np.concatenate([np.random.Philox(entropy).random_raw(BLOCK) for entropy in entropies])
        numbers = np.searchsorted(self._bounds, (words >> np.uint64(11)) * 2.0**-53, side="right")
        places = np.zeros(len(numbers), np.int64)
        for number in range(len(self._taken)):
            chosen = numbers == number
            places[chosen] = self._taken[number] + np.arange(chosen.sum())
            self._taken[number] += chosen.sum()
        self._numbers, self._places = np.append(self._numbers, numbers), np.append(self._places, places)


def training_prompts(
    config: TrainConfig, tokenizer: Any, source: Any = None, now: datetime | None = None
) -> PromptStream:
    """What a run trains on, as ``data.*`` says.

    Args:
        config: of the run.
        tokenizer: of its model.
        source: instead of ``data.train``: one source as `load_dataset` takes it, or a mapping of names to weights.
        now: the time that a chat template is told; None: this one.

    Raises:
        ValueError: as `load_dataset`, `PromptFormat` and `PromptSet`.
    """
    source = config.data.train if source is None else source
    weights = dict(source) if _is_mixture(source) else None
    named = {f"data.train {name!r}": name for name in weights} if weights else {"data.train": source}
    form = PromptFormat.from_config(config.data, now)
    sets = [_load(config, tokenizer, "train", name, part, form) for name, part in named.items()]
    _check_names(config, sets)
    return PromptStream(
        sets,
        None if weights is None else list(weights.values()),
        seed=config.seed,
        prompts_per_step=config.rollout.prompts_per_step,
        shuffle=config.data.shuffle,
    )


def held_out_prompts(
    config: TrainConfig, tokenizer: Any, source: Any = None, now: datetime | None = None
) -> dict[str, PromptSet]:
    """What a run is judged by, as ``data.*`` says: the sets by name, none where there is no evaluation.

    Args:
        config: of the run; of each set the first ``eval.prompts`` rows are taken.
        tokenizer: of its model.
        source: instead of ``data.eval``: one source as `load_dataset` takes it, or a mapping of names to sources
            (a ``datasets.DatasetDict`` is one).
        now: the time that a chat template is told; None: this one.

    Raises:
        ValueError: as `load_dataset`, `PromptFormat` and `PromptSet`.
    """
    source = config.data.eval if source is None else source
    if source is None:
        return {}
    named = {f"data.eval.{name}": (name, part) for name, part in source.items()} if isinstance(source, Mapping) else {}
    form = PromptFormat.from_config(config.data, now)
    sets = {
        name: _load(config, tokenizer, "eval", label, part, form)
        for label, (name, part) in (named or {"data.eval": ("eval", source)}).items()
    }
    _check_names(config, list(sets.values()))
    return sets


def _load(config: TrainConfig, tokenizer: Any, kind: Kind, name: str, source: Any, form: PromptFormat) -> PromptSet:
    """One dataset; ``name`` is what errors call it."""
    data = config.data
    column = data.prompt_column if form.template is None else None
    try:
        rows = load_dataset(
            source, prompt_column=column, rename_columns=data.rename_columns, columns=data.columns, kind=kind
        )
        return PromptSet(
            rows[: config.eval.prompts] if kind == "eval" else rows,
            tokenizer,
            data.max_prompt_len,
            data.prompt_column,
            form=form,
            long_prompts=data.long_prompts,
            name=source if isinstance(source, str) else name,
            columns=data.columns,
        )
    except TemplateFault:
        raise
    except ValueError as error:
        if str(error).startswith("data."):
            raise
        raise ValueError(f"{name}: {error}") from error


def _check_names(config: TrainConfig, sets: Sequence[PromptSet]) -> None:
    """Refuse a name in ``data.columns`` that no dataset has."""
    there = frozenset[str]().union(*(part.columns | {config.data.prompt_column} for part in sets))
    known = frozenset[str]().union(*(part.available for part in sets))
    for name in config.data.columns or ():
        if name not in there:
            raise ValueError(
                f"data.columns: no column {name!r}{nearest(name, known)}; there are {', '.join(sorted(known))}"
            )


def _is_mixture(source: Any) -> bool:
    return isinstance(source, Mapping) and all(isinstance(weight, int | float) for weight in source.values())
