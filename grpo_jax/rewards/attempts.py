"""A batch in a reward's process: tried whole, then in halves and so on, until only what is at fault is lost."""

import json
import math
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass

from grpo_jax.rewards.call import Batch, RewardProblem
from grpo_jax.rewards.lookup import SAMPLES
from grpo_jax.rewards.process import WorkerDied, WorkerProcess
from grpo_jax.rewards.scores import Part
from grpo_jax.rewards.travel import plain

RETRY_FACTOR = 8
"""After its first failure a batch is given up within this many times (time limit + start of a worker)."""

SMALLEST_SHARE = 1 / 8
"""The least part of the time limit that a retried piece gets."""


class RewardTraceback(Exception):
    """The traceback of a function that raised in its process, as text."""


@dataclass
class Patience:
    """Seconds that failures of a function, and the tries after them, may still cost in a batch.

    Attributes:
        left: no bound before the first failure.
    """

    left: float = math.inf

    def spend(self, seconds: float, allowance: float = math.inf) -> None:
        """Take off ``seconds``; the first failure brings its ``allowance`` instead."""
        self.left = allowance if self.left == math.inf else self.left - seconds


@dataclass(frozen=True)
class Attempts:
    """How a batch is asked of one worker, in as many groups of rows as it comes in.

    Attributes:
        worker: one thread at a time uses it.
        name: of the reward, for errors.
        timeout: seconds for a call on all rows that came together.
        cancel: set by whoever wants no more answers.
        patience: shared by all groups of the batch.
    """

    worker: WorkerProcess
    name: str
    timeout: float
    cancel: threading.Event
    patience: Patience

    def score(self, batch: Batch, request: bytes, start: int) -> Part:
        """All rows, then their halves, and so on, breadth first, until all is scored, at fault or out of time.

        Args:
            batch: the rows.
            request: they, encoded.
            start: the place of the first one in the whole batch, for errors and warnings.

        Raises:
            ValueError: the function raised or broke its contract.
        """
        part, pieces = Part.blank(len(batch)), deque([(0, len(batch))])
        while pieces and not self.cancel.is_set():
            first, last = pieces.popleft()
            whole, begun = last - first == len(batch), time.monotonic()
            limit = self.timeout * (1 if whole else max(2 * (last - first) / len(batch), SMALLEST_SHARE))
            try:
                self.worker.ensure()
                piece = request if whole else encode(batch.rows(first, last))
                limit = min(limit, self.patience.left - (time.monotonic() - begun))
                answer = self.worker.ask(piece, limit) if limit > 0 else None
            except (TimeoutError, WorkerDied) as failure:
                allowance = RETRY_FACTOR * (self.timeout + self.worker.start_seconds)
                self.patience.spend(time.monotonic() - begun, allowance)
                if last - first > 1:
                    middle = (first + last) // 2
                    pieces += [(first, middle), (middle, last)]
                else:
                    _lose(part, self.name, start + first, failure, limit)
                continue
            if not whole:
                self.patience.spend(time.monotonic() - begun)
            if answer is None:
                _give_up(part, self.name, start + first, start + last)
            elif "rewards" in answer:
                part.put(first, answer["rewards"], answer["extra"], answer["metrics"])
            else:
                error = RewardProblem(answer["problem"], answer["row"]).error(self.name, start + first)
                raise error from (RewardTraceback(answer["trace"]) if answer["trace"] else None)
        return part


def _lose(part: Part, name: str, row: int, failure: Exception, limit: float) -> None:
    if isinstance(failure, TimeoutError):
        part.timeouts += 1
        part.warnings.append(f"reward {name!r}, row {row}: no answer within {limit:.3g} s, counted as None")
    else:
        part.crashes += 1
        part.warnings.append(f"reward {name!r}, row {row}: its process {failure}, counted as None")


def _give_up(part: Part, name: str, start: int, stop: int) -> None:
    part.timeouts += stop - start
    part.warnings.append(
        f"reward {name!r}, rows {start} to {stop - 1}: the time to try this batch again is spent, counted as None"
    )


def encode(batch: Batch) -> bytes:
    """The line that a worker is asked with.

    Raises:
        ValueError: a column that JSON cannot hold.
    """
    message = {name: list(getattr(batch, name)) for name in SAMPLES}
    try:
        columns = {name: list(values) for name, values in batch.columns.items()}
        whole = {**message, "columns": columns, "state": asdict(batch.state)}
        return json.dumps(whole, default=plain).encode() + b"\n"
    except (TypeError, ValueError) as error:
        for name, values in [*batch.columns.items(), *message.items()]:
            try:
                json.dumps(list(values), default=plain)
            except (TypeError, ValueError):
                raise ValueError(
                    f"column {name!r}: cannot be sent to a reward's process ({error}); "
                    "make it strings, numbers, lists or objects of these, or drop it"
                ) from error
        raise
