"""A batch in the processes of a reward: asked in calls, and what gets no answer asked again, smaller, once or twice."""

import json
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from grpo_jax.rewards.call import Batch, RewardProblem
from grpo_jax.rewards.lookup import SAMPLES
from grpo_jax.rewards.process import WorkerDied, WorkerProcess
from grpo_jax.rewards.scores import Part
from grpo_jax.rewards.travel import plain

CHUNK = 16
"""Completions that the time limit is for; a call on more has it for every so many."""

RETRY_FACTOR = 8
"""Calls without an answer and what follows from them may take this many times (time limit + start) of each process."""

AWAKE_SECONDS = 0.2
"""A thread that waits for answers wakes so often: a signal that another thread was given does not wake it, and the main
thread alone acts on signals."""

T = TypeVar("T")


class RewardTraceback(Exception):
    """The traceback of a function that raised in its process, as text."""


class Workers:
    """The processes of one reward, each started when there is work for it, and the threads that ask them."""

    def __init__(self, make: Callable[[], WorkerProcess], count: int) -> None:
        """Nothing is started yet."""
        self.all = [make() for _ in range(count)]
        self._idle: queue.LifoQueue[WorkerProcess] = queue.LifoQueue()
        for worker in reversed(self.all):
            self._idle.put(worker)
        # A worker lives no longer than the thread that starts it: these threads stay until the pool is closed.
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="grpo_jax rewards")

    def do(self, work: Callable[[WorkerProcess], T]) -> "Future[T]":
        """Begin some work with a worker that has none."""
        return self._threads.submit(self._with_one, work)

    def kill(self) -> None:
        """End what runs; it is started again where it is needed."""
        for worker in self.all:
            worker.kill()

    def close(self) -> None:
        """End all for good."""
        for worker in self.all:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _with_one(self, work: Callable[[WorkerProcess], T]) -> T:
        worker = self._idle.get_nowait()  # there are as many as threads
        try:
            return work(worker)
        finally:
            self._idle.put(worker)


@dataclass(frozen=True)
class Piece:
    """Rows for one call.

    Attributes:
        start: the place of the first one in the whole batch, for errors and warnings.
        batch: the rows.
        request: they, encoded; None for not yet.
        again: they were asked already, together with others.
    """

    start: int
    batch: Batch
    request: bytes | None = None
    again: bool = False

    @property
    def smaller(self) -> "list[Piece]":
        """What is asked where this has no answer: ``CHUNK`` rows at a time, or each by itself; none of one row."""
        count = len(self.batch)
        size = CHUNK if count > CHUNK else 1
        cuts = range(0, count, size) if count > 1 else ()
        return [Piece(self.start + n, self.batch.rows(n, min(n + size, count)), None, True) for n in cuts]


def chunks(start: int, batch: Batch) -> list[Piece]:
    """A batch cut into calls of at most ``CHUNK`` rows, encoded."""
    cuts = (batch.rows(n, min(n + CHUNK, len(batch))) for n in range(0, len(batch), CHUNK))
    return [Piece(start + n * CHUNK, rows, encode(rows)) for n, rows in enumerate(cuts)]


class Attempts:
    """How one reward is asked about a batch, in as many pieces as it comes in."""

    def __init__(self, workers: Workers, name: str, timeout: float, cancel: threading.Event) -> None:
        """Nothing is asked yet.

        Args:
            workers: of the reward.
            name: of the reward, for errors.
            timeout: seconds for ``CHUNK`` completions.
            cancel: set by whoever wants no more answers, and by the first error.
        """
        self._workers, self._name, self._timeout, self._cancel = workers, name, timeout, cancel
        self._futures: list[Future[Part | list[Piece]]] = []
        self._lock = threading.Lock()
        self._spent, self._answered = 0.0, False

    def ask(self, pieces: Sequence[Piece]) -> None:
        """Begin to ask."""
        self._futures += [self._begin(piece) for piece in pieces]

    def parts(self) -> dict[int, Part]:
        """What was said of each piece, by its first row, after all have ended.

        Raises:
            ValueError: the function raised or broke its contract.
        """
        parts: dict[int, Part] = {}
        left, errors = deque(self._futures), list[BaseException]()
        while left:
            future = left.popleft()
            error = _error_of(future)
            if error is not None:
                errors.append(error)
                continue
            said = future.result()
            if isinstance(said, Part):
                parts[said.start] = said
            else:
                left.extend(self._begin(piece) for piece in said)
        if errors:
            raise errors[0]
        return parts

    def _begin(self, piece: Piece) -> "Future[Part | list[Piece]]":
        def work(worker: WorkerProcess) -> Part | list[Piece]:
            try:
                return self._said(piece, worker)
            except BaseException:
                self._cancel.set()  # nothing is asked for what nobody will read
                raise

        return self._workers.do(work)

    def _said(self, piece: Piece, worker: WorkerProcess) -> Part | list[Piece]:
        count = len(piece.batch)
        limit = self._timeout * math.ceil(count / CHUNK)
        left = self._left(worker)
        if piece.again:
            limit = min(limit, left)
        part = Part.blank(count, piece.start)
        if self._cancel.is_set():
            return part
        if limit <= 0 or (left <= 0 and not self._answered):
            part.given_up = count
            return part
        begun = time.monotonic()
        try:
            worker.ensure()
            answer = worker.ask(piece.request or encode(piece.batch), limit)
        except (TimeoutError, WorkerDied) as failure:
            with self._lock:
                self._spent += min(time.monotonic() - begun, self._timeout + worker.start_seconds)
            if smaller := piece.smaller:
                return smaller
            _lose(part, self._name, failure, limit)
            return part
        with self._lock:
            self._spent += time.monotonic() - begun if piece.again else 0.0
            self._answered = True
        if "rewards" not in answer:
            problem = f"{answer['problem']}{worker.hint(answer['problem'])}"
            error = RewardProblem(problem, answer["row"]).error(self._name, piece.start)
            raise error from (RewardTraceback(answer["trace"]) if answer["trace"] else None)
        part.put(0, answer["rewards"], answer["extra"], answer["metrics"])
        return part

    def _left(self, worker: WorkerProcess) -> float:
        """Seconds that may still be lost in this batch."""
        with self._lock:
            return RETRY_FACTOR * (self._timeout + worker.start_seconds) * len(self._workers.all) - self._spent


def _error_of(future: "Future[Any]") -> BaseException | None:
    """What its work raised, once it has ended."""
    while True:
        with suppress(TimeoutError):
            return future.exception(AWAKE_SECONDS)


def _lose(part: Part, name: str, failure: Exception, limit: float) -> None:
    if isinstance(failure, TimeoutError):
        part.timeouts += 1
        part.warnings.append(f"reward {name!r}, row {part.start}: no answer within {limit:.3g} s, not scored")
    else:
        part.crashes += 1
        part.warnings.append(f"reward {name!r}, row {part.start}: its process {failure}, not scored")


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
