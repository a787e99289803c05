"""What a reward function may know of the run, and what it may tell the run besides its rewards."""

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

MOST_LOGGED = 4 * 2**20
"""Characters that one call may log with ``log_extra``."""


@dataclass(frozen=True)
class TrainerState:
    """How far the run is; handed to a reward function that has a parameter ``trainer_state``.

    Attributes:
        global_step: steps trained on before this rollout.
        max_steps: steps of the whole run; 0 where nobody said.
        epoch: how often every prompt was drawn, with fractions.
        max_completion_len: tokens a completion may have; None where nobody said.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    max_completion_len: int | None = None


@dataclass(frozen=True)
class Logged:
    """What one call of a reward function logged.

    Attributes:
        extra: columns with one plain value per completion.
        metrics: figures of the whole call; NaN stands for none.
    """

    extra: Mapping[str, list[Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Notes:
    """Keeps what a reward function logs during one call."""

    def __init__(self) -> None:
        """Start empty."""
        self._extra: dict[str, list[Any]] = {}
        self._figures: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Add values to a column of completions.jsonl; in the end it holds one per completion, in their order."""
        self._extra.setdefault(str(column), []).extend(plain(value) for value in values)

    def log_metric(self, name: str, value: SupportsFloat) -> None:
        """Note a figure of the whole batch for metrics.jsonl; several of one name are averaged.

        Raises:
            ValueError: no number.
        """
        try:
            self._figures.setdefault(str(name), []).append(float(value))
        except (TypeError, ValueError) as error:
            raise ValueError(f"log_metric({name!r}): got {value!r}, which is no number; log a float") from error

    def logged(self, count: int) -> Logged:
        """All of it, for ``count`` completions.

        Raises:
            ValueError: a column of another length, or more than ``MOST_LOGGED`` characters.
        """
        for column, values in self._extra.items():
            if len(values) != count:
                raise ValueError(
                    f"logged {len(values)} values with log_extra({column!r}) for {count} completions; "
                    "log one per completion, None where there is none"
                )
        size = sum(len(str(value)) for values in self._extra.values() for value in values)
        if size > MOST_LOGGED:
            raise ValueError(
                f"logged {size} characters with log_extra, more than the {MOST_LOGGED} a call may; log shorter values"
            )
        return Logged(self._extra, {name: math.fsum(v) / len(v) for name, v in self._figures.items()})


def plain(value: Any) -> Any:
    """A value as JSON has it: what it cannot hold becomes a number or text, a float that is not finite None.

    >>> from fractions import Fraction
    >>> plain({"a": (1, float("nan"), Fraction(1, 4)), "b": {2.5j}})
    {'a': [1, None, 0.25], 'b': '{2.5j}'}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    for number in (operator.index, float):
        try:
            return plain(number(value))
        except (TypeError, ValueError, OverflowError):
            continue
    return str(value)


def completion_limit(given: int | None, state: TrainerState | None, name: str) -> int:
    """Tokens a completion may have: what the option says, else what the run says.

    Raises:
        ValueError: neither says anything, or not a positive number.
    """
    limit = given if given is not None or state is None else state.max_completion_len
    if limit is None:
        raise ValueError(
            "got no max_completion_len, but lengths are measured against it; outside a run, give it: "
            f"resolve({name!r}, max_completion_len=512)"
        )
    if limit < 1:
        raise ValueError(f"got max_completion_len = {limit}, but a completion has at least one token; use 512")
    return limit
