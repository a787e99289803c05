"""One call of a reward function: its arguments, the check of what it returned, and whose fault an error is.

Used on both sides of the pipe, so it imports only the standard library.
"""

import math
import reprlib
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from grpo_jax.rewards.lookup import Reward

RESERVED = ("prompts", "completions", "completion_ids")
"""Argument names that a dataset's column cannot have."""

LARGEST = 3.4028234663852886e38
"""Rewards become float32; what is larger would be infinite there."""

Wait = Callable[[Awaitable[Any]], Any]


@dataclass(frozen=True)
class Batch:
    """What a reward function is called with; every list has one entry per completion."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        """Number of completions."""
        return len(self.completions)

    def rows(self, start: int, stop: int) -> "Batch":
        """The completions from ``start`` up to ``stop``."""
        cut = slice(start, stop)
        columns = {name: values[cut] for name, values in self.columns.items()}
        return Batch(self.prompts[cut], self.completions[cut], self.completion_ids[cut], columns)

    def arguments(self) -> dict[str, list[Any]]:
        """Keyword arguments, in lists of their own, so that no function can change what the next one gets."""
        columns = {name: list(values) for name, values in self.columns.items()}
        own = {name: list(getattr(self, name)) for name in RESERVED}
        return {**columns, **own}


class RewardProblem(Exception):
    """A reward function broke its contract; ``row`` counts within the batch of the call, None if unknown."""

    def __init__(self, problem: str, row: int | None = None) -> None:
        """Keep the problem in words and the row it is about."""
        super().__init__(problem)
        self.problem = problem
        self.row = row

    def error(self, name: str, first_row: int = 0) -> ValueError:
        """The error for the user; ``first_row`` is the place of the call's first row in the whole batch."""
        where = "" if self.row is None else f", row {first_row + self.row}"
        return ValueError(f"reward {name!r}{where}: {self.problem}")


def call_reward(function: Reward, batch: Batch, wait: Wait) -> list[float | None]:
    """Call ``function`` and check what it returned; ``wait`` gives the result of an awaitable.

    Raises:
        RewardProblem: it raised, or returned something else than a finite number, NaN or None per completion.
        KeyboardInterrupt, MemoryError: passed through; they are about the process, not about the function.
    """
    try:
        result = function(**batch.arguments())
        return checked(wait(result) if isinstance(result, Awaitable) else result, len(batch))
    except (RewardProblem, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        raise raised(function, batch, wait, error) from error


def raised(function: Reward, batch: Batch, wait: Wait, error: BaseException) -> RewardProblem:
    """The problem of a function that raised ``error`` on ``batch``; its traceback goes to stderr.

    The row is found by calling again on halves, at most twice the work of the call that failed; where no single
    row raises, it stays unknown.
    """
    import traceback

    traceback.print_exception(error, file=sys.stderr)
    start, stop = 0, len(batch)
    while stop - start > 1:
        middle = (start + stop) // 2
        first_half = _raises_alike(function, batch.rows(start, middle), wait, error)
        start, stop = (start, middle) if first_half else (middle, stop)
    row = start if len(batch) == 1 or _raises_alike(function, batch.rows(start, stop), wait, error) else None
    said = " ".join(_words(error)[:1000].split())
    return RewardProblem(f"raised {type(error).__name__}: {said}; its traceback is on stderr", row)


def checked(result: Any, count: int) -> list[float | None]:
    """The returned rewards as floats, NaN as None.

    Raises:
        RewardProblem: not one finite number, NaN or None per completion.
    """
    wanted = f"return a list of {count} floats (None where it has no answer), one per completion"
    if isinstance(result, (str, bytes, Mapping, set, frozenset)) or not isinstance(result, Iterable):
        raise RewardProblem(f"returned {_show(result)}, a {type(result).__name__}, which has no rows; {wanted}")
    values = list(result)
    if len(values) != count:
        raise RewardProblem(f"returned {len(values)} rewards for {count} completions; {wanted}")
    return [_number(value, row) for row, value in enumerate(values)]


def _number(value: Any, row: int) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, SupportsFloat) else None
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise RewardProblem(
            f"returned {_show(value)}, a {type(value).__name__}, which is no number; return a float", row
        )
    if abs(number) > LARGEST:
        raise RewardProblem(
            f"returned {_show(value)}, which no advantage can be computed from (float32 ends at 3.4e38); "
            "return a finite float, or None for no answer",
            row,
        )
    return None if math.isnan(number) else number


def _raises_alike(function: Reward, batch: Batch, wait: Wait, error: BaseException) -> bool:
    try:
        result = function(**batch.arguments())
        checked(wait(result) if isinstance(result, Awaitable) else result, len(batch))
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as another:
        return type(another) is type(error)
    return False


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its message could not be made)"


def _show(value: Any) -> str:
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 80
    try:
        return brief.repr(value)
    except Exception:  # reprlib covers most objects that cannot be shown, not all
        return "(a value that cannot be shown)"
