"""What reward functions said of a batch: [F, N] rewards, what was logged, what was lost; put together from pieces."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.rewards.call import Answer

MOST_SAID = 3
"""Losses of a function that a batch tells one by one."""


@dataclass(frozen=True)
class Scores:
    """What the reward functions said about N completions.

    Attributes:
        names: [F] names for logging, unique.
        rewards: [F, N] float64, NaN where a function gave no answer (None, NaN, out of time, process died).
        timeout_counts: [F] completions that lost this reward to the time limit, or had no time left to be tried again.
        crash_counts: [F] completions that lost this reward because its process died.
        warnings: one line per loss, to be logged; of many of a function the first ones and their number.
        extra: columns that functions logged, N values each, None where a function that logs had no time. A column
            that a second function logs as well goes by "function/column".
        metrics: figures that functions logged; of one name several times, their mean.
    """

    names: tuple[str, ...]
    rewards: np.ndarray
    timeout_counts: tuple[int, ...]
    crash_counts: tuple[int, ...]
    warnings: tuple[str, ...]
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of(names: "tuple[str, ...]", parts: "Sequence[Part]") -> "Scores":
        """One part a function, in the order of ``names``."""
        return Scores(
            names=names,
            rewards=np.stack([part.values for part in parts]),
            timeout_counts=tuple(part.timeouts + part.given_up for part in parts),
            crash_counts=tuple(part.crashes for part in parts),
            warnings=tuple(line for name, part in zip(names, parts, strict=True) for line in part.said_of(name)),
            extra=_columns(names, parts),
            metrics=_figures(parts),
        )


def few(name: str, losses: list[str]) -> list[str]:
    """What is said of a function's losses in a batch: at most ``MOST_SAID`` of them, and how many more there are."""
    more = len(losses) - MOST_SAID
    return losses if more <= 0 else [*losses[:MOST_SAID], f"reward {name!r}: {more} more such losses in this batch"]


@dataclass
class Part:
    """One function's row of ``Scores``, while it is filled; figures with the number of completions they are of."""

    values: np.ndarray
    start: int = 0  # the place of the first value in the whole batch
    timeouts: int = 0
    crashes: int = 0
    given_up: int = 0
    warnings: list[str] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    figures: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    @staticmethod
    def blank(count: int, start: int = 0) -> "Part":
        """No answer to any of ``count`` completions."""
        return Part(np.full(count, np.nan), start)

    @staticmethod
    def of(answer: Answer) -> "Part":
        """What one call said of a whole batch."""
        part = Part.blank(len(answer.rewards))
        part.put(0, answer.rewards, answer.logged.extra, answer.logged.metrics)
        return part

    @staticmethod
    def joined(count: int, pieces: "Mapping[int, Part]") -> "Part":
        """Parts of a batch of ``count`` completions by the row each begins with -> the part of all."""
        out = Part.blank(count)
        for start, piece in sorted(pieces.items()):
            rows = slice(start, start + len(piece.values))
            out.values[rows] = piece.values
            out.timeouts += piece.timeouts
            out.crashes += piece.crashes
            out.given_up += piece.given_up
            out.warnings += piece.warnings
            for column, values in piece.extra.items():
                out.extra.setdefault(column, [None] * count)[rows] = values
            for name, figures in piece.figures.items():
                out.figures.setdefault(name, []).extend(figures)
        return out

    def said_of(self, name: str) -> list[str]:
        """What is said of its losses, where the function is called ``name``."""
        said = few(name, self.warnings)
        if self.given_up:
            said.append(f"reward {name!r}: the time to try this batch again is spent, {self.given_up} are not scored")
        return said

    def put(
        self,
        start: int,
        rewards: list[float | None],
        extra: Mapping[str, list[Any]],
        metrics: Mapping[str, float],
    ) -> None:
        """Note what was said of the completions from ``start`` on."""
        rows = slice(start, start + len(rewards))
        self.values[rows] = np.array(rewards, dtype=np.float64)
        for column, values in extra.items():
            self.extra.setdefault(column, [None] * len(self.values))[rows] = values
        for name, value in metrics.items():
            self.figures.setdefault(name, []).append((value, len(rewards)))


def _columns(names: Sequence[str], parts: Sequence[Part]) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    for name, part in zip(names, parts, strict=True):
        out |= {f"{name}/{column}" if column in out else column: values for column, values in part.extra.items()}
    return out


def _figures(parts: Sequence[Part]) -> dict[str, float]:
    said: dict[str, list[tuple[float, int]]] = {}
    for part in parts:
        for name, figures in part.figures.items():
            said.setdefault(name, []).extend(figures)
    return {
        name: math.fsum(value * rows for value, rows in figures) / max(1, sum(rows for _, rows in figures))
        for name, figures in said.items()
    }
