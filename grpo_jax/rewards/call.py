"""One call of a reward function: its arguments, the check of what it returned, and whose fault an error is.

Used on both sides of the pipe, so it imports only the standard library.
"""

import math
import reprlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

from grpo_jax.functions import words_of
from grpo_jax.rewards.lookup import SAMPLES, Reward, needed_columns, parameters
from grpo_jax.rewards.state import Logged, Notes, TrainerState

LARGEST = 3.4028234663852886e38
"""Rewards become float32; what is larger would be infinite there."""

Wait = Callable[[Awaitable[Any]], Any]


@dataclass(frozen=True)
class Batch:
    """What a reward function is called with; every list has one entry per completion."""

    prompts: Sequence[Any] = ()
    completions: Sequence[Any] = ()
    completion_ids: Sequence[Sequence[int]] = ()
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    state: TrainerState = TrainerState()

    def __len__(self) -> int:
        """Number of completions."""
        return len(self.completions)

    def rows(self, start: int, stop: int) -> "Batch":
        """The completions from ``start`` up to ``stop``."""
        cut = slice(start, stop)
        columns = {name: values[cut] for name, values in self.columns.items()}
        return Batch(self.prompts[cut], self.completions[cut], self.completion_ids[cut], columns, self.state)

    def arguments(self, function: Reward, notes: Notes) -> dict[str, Any]:
        """Keyword arguments that ``function`` takes, in lists of its own, so that it changes nothing for the next.

        Raises:
            RewardProblem: it needs a column that the data does not have.
        """
        everything: dict[str, Any] = {name: list(values) for name, values in self.columns.items()}
        everything |= {name: list(getattr(self, name)) for name in SAMPLES}
        everything |= {"trainer_state": self.state, "log_extra": notes.log_extra, "log_metric": notes.log_metric}
        missing = missing_column(needed_columns(function), self.columns)
        if missing is not None:
            raise RewardProblem(missing)
        taken = parameters(function)
        return everything if taken is None else {name: everything[name] for name in everything if name in taken}


@dataclass(frozen=True)
class Answer:
    """What a function said of a batch: a reward for each completion, None for no answer, and what it logged."""

    rewards: list[float | None]
    logged: Logged = Logged()


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


def missing_column(needed: Iterable[str], columns: Iterable[str]) -> str | None:
    """What to say where a function needs a column that is none of ``columns``; None where it has all."""
    there = sorted(columns)
    missing = [name for name in needed if name not in there]
    if not missing:
        return None
    return (
        f"needs a column {missing[0]!r}, but the data's columns are {there}; add it, or rename one "
        "(data.rename_columns), or give the function's parameter a default"
    )


def call_reward(function: Reward, batch: Batch, wait: Wait) -> Answer:
    """Call ``function`` and check what it returned; ``wait`` gives the result of an awaitable.

    Raises:
        RewardProblem: it raised, or returned something else than a finite number, NaN or None per completion; caused
            by what it raised.
        KeyboardInterrupt, MemoryError: passed through; they are about the process, not about the function.
    """
    try:
        return _called(function, batch, wait)
    except (RewardProblem, KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        raise raised(batch, error) from error


def raised(batch: Batch, error: BaseException) -> RewardProblem:
    """The problem of a function that raised ``error`` on ``batch``; it is not called again to find the row."""
    row = _row_at_hand(batch, error)
    having = "" if row is None else f" with completion {_show(_text(batch.completions[row]))} at hand"
    return RewardProblem(
        f"raised {type(error).__name__}: {words_of(error)}{_place(error)}{having}; "
        "repair it, or return None for what it cannot judge",
        row,
    )


def answered(result: Any, notes: Notes, count: int) -> Answer:
    """What came back from a call, checked: rewards and what was logged.

    Raises:
        RewardProblem: not one finite number, NaN or None per completion, or a log that cannot be.
    """
    rewards = checked(result, count)
    try:
        return Answer(rewards, notes.logged(count))
    except ValueError as error:
        raise RewardProblem(str(error)) from None


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


def _called(function: Reward, batch: Batch, wait: Wait) -> Answer:
    notes = Notes()
    result = function(**batch.arguments(function, notes))
    return answered(wait(result) if isinstance(result, Awaitable) else result, notes, len(batch))


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


def _row_at_hand(batch: Batch, error: BaseException) -> int | None:
    """The one row that the innermost variables of the function were about when it raised; None where none shows."""
    if len(batch) == 1:
        return 0
    rows: dict[int, int | None] = {}  # by the identity of what a row consists of; None for what several rows share
    for values in (batch.completions, *batch.columns.values()):
        for row, value in enumerate(values):
            for part in (value, *value[-1:], _text(value)) if isinstance(value, list) else (value,):
                if isinstance(part, list | dict) or (isinstance(part, str) and len(part) > 1):  # Python shares "a"
                    rows[id(part)] = row if rows.get(id(part), row) == row else None
    frames = list(_frames(error))
    for local in reversed(frames):
        at_hand = {rows[id(value)] for value in local.values() if rows.get(id(value)) is not None}
        if len(at_hand) == 1:
            return at_hand.pop()
    return None


def _frames(error: BaseException) -> Iterator[dict[str, Any]]:
    """The variables of each call that the error went through, the outermost first."""
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_locals
        trace = trace.tb_next


def _place(error: BaseException) -> str:
    """Where the function raised, or nothing where calling it did."""
    import traceback

    own = Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent != own]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _text(completion: Any) -> Any:
    """The content of a completion's last message, or the completion, for an error."""
    message = completion[-1] if isinstance(completion, list) and completion else None
    return message.get("content") if isinstance(message, Mapping) else completion


def _show(value: Any) -> str:
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 80
    try:
        return brief.repr(value)
    except Exception:  # reprlib covers most objects that cannot be shown, not all
        return "(a value that cannot be shown)"
