"""All reward functions of a run, scored together: [F, N] rewards and what went wrong."""

import json
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from grpo_jax.rewards.call import RESERVED, Batch, RewardProblem
from grpo_jax.rewards.local import LocalRewards
from grpo_jax.rewards.lookup import Reward, reward_name
from grpo_jax.rewards.process import WorkerDied, WorkerProcess

RETRY_FACTOR = 8
"""After its first failure a batch is given up within this many times (time limit + start of a worker)."""

SMALLEST_SHARE = 1 / 8
"""The least part of the time limit that a retried piece gets."""


@dataclass(frozen=True)
class Scores:
    """What the reward functions said about N completions.

    Attributes:
        names: [F] names for logging, unique.
        rewards: [F, N] float64, NaN where a function gave no answer (None, NaN, out of time, process died).
        timeout_counts: [F] completions that lost this reward to the time limit.
        crash_counts: [F] completions that lost this reward because its process died.
        warnings: one line per loss, to be logged.
    """

    names: tuple[str, ...]
    rewards: np.ndarray
    timeout_counts: tuple[int, ...]
    crash_counts: tuple[int, ...]
    warnings: tuple[str, ...]


class RewardPool:
    """Runs reward functions, each one given by name in a worker process of its own, all at the same time.

    The time limit holds for one call of a function on a whole batch and can always fire, because it kills the
    process. Then, and when the process dies by itself, the batch is tried again in halves, quarters and so on, down
    to the completions that are at fault: they alone get NaN. A retried piece of n of N completions gets
    ``timeout_seconds * max(2n/N, 1/8)``. ``score`` returns within 9 times ``timeout_seconds`` plus 10 times
    the seconds that starting this worker takes; what is unscored then is NaN too, and counted.

    Function objects run in the calling process, one after the other, awaitables of all of them together, without a
    time limit. One thread scores at a time. Use as a context manager, or call ``close``. On Linux no worker outlives
    this process, even one killed with SIGKILL; elsewhere an idle one ends with it and a busy one after its call.
    """

    def __init__(
        self,
        specs: Sequence[str | Reward],
        timeout_seconds: float = 10.0,
        memory_limit_mb: int | None = 4096,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Start a worker for every reward given by name, and load it there.

        Args:
            specs: names as ``resolve`` takes them, or functions.
            timeout_seconds: for one call on a whole batch.
            memory_limit_mb: address space of a worker; None for no limit.
            parameters: spec -> keyword arguments bound to it, such as a run's ``max_completion_len``.

        Raises:
            ValueError: an argument that cannot be, or a reward that is not found or does not load.
        """
        _check_specs(specs)
        _check_limits(timeout_seconds, memory_limit_mb)
        bound = dict(parameters or {})
        unknown = sorted(set(bound) - {spec for spec in specs if isinstance(spec, str)})
        if unknown:
            raise ValueError(f"rewards: got parameters for {unknown}, which are not among the rewards; remove them")
        self.names = _unique([reward_name(spec) for spec in specs])
        self._timeout = timeout_seconds
        self._workers = {
            number: WorkerProcess(spec, bound.get(spec, {}), memory_limit_mb)
            for number, spec in enumerate(specs)
            if isinstance(spec, str)
        }
        self._local = LocalRewards(
            {n: (self.names[n], spec) for n, spec in enumerate(specs) if not isinstance(spec, str)}
        )
        # A worker lives no longer than the thread that starts it: these threads stay until the pool is closed.
        self._threads = ThreadPoolExecutor(max(1, len(self._workers)), thread_name_prefix="grpo_jax rewards")
        self._finalizer = weakref.finalize(self, _stop, self._threads, list(self._workers.values()), self._local)
        try:
            _results([self._threads.submit(worker.ensure) for worker in self._workers.values()])
        except BaseException:
            self.close()
            raise

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> Scores:
        """Rewards of N completions; every argument and column has N entries.

        Raises:
            ValueError: lengths that differ, a column that cannot travel, or a reward function that raised or
                returned something else than N finite numbers or None.
        """
        batch = _checked_batch(prompts, completions, completion_ids, columns)
        parts = self._scored(batch) if len(batch) else {n: _Part.blank(0) for n in range(len(self.names))}
        ordered = [parts[number] for number in range(len(self.names))]
        values = np.stack([part.values for part in ordered])
        return Scores(
            names=self.names,
            rewards=values,
            timeout_counts=tuple(part.timeouts for part in ordered),
            crash_counts=tuple(part.crashes for part in ordered),
            warnings=tuple(warning for part in ordered for warning in part.warnings),
        )

    def close(self) -> None:
        """Kill the workers; the pool cannot be used after this."""
        self._finalizer()

    def __enter__(self) -> "RewardPool":
        """The pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _scored(self, batch: Batch) -> "dict[int, _Part]":
        cancel = threading.Event()
        whole = _encode(batch) if self._workers else b""
        futures = {
            number: self._threads.submit(
                _score_in_worker, worker, self.names[number], batch, whole, self._timeout, cancel
            )
            for number, worker in self._workers.items()
        }
        try:
            local = self._local.score(batch)
            remote = dict(zip(futures, _results(list(futures.values())), strict=True))
        except BaseException:
            cancel.set()
            for worker in self._workers.values():
                worker.kill()
            raise
        return {**remote, **{number: _Part.of(rewards) for number, rewards in local.items()}}


@dataclass
class _Part:
    """One function's row of ``Scores``, while it is filled."""

    values: np.ndarray
    timeouts: int
    crashes: int
    warnings: list[str]

    @staticmethod
    def blank(count: int) -> "_Part":
        return _Part(np.full(count, np.nan), 0, 0, [])

    @staticmethod
    def of(rewards: list[float | None]) -> "_Part":
        part = _Part.blank(len(rewards))
        part.values[:] = np.array(rewards, dtype=np.float64)
        return part


def _score_in_worker(
    worker: WorkerProcess, name: str, batch: Batch, whole: bytes, timeout: float, cancel: threading.Event
) -> _Part:
    """The batch, then its halves, and so on, breadth first, until all is scored, at fault or out of time."""
    part = _Part.blank(len(batch))
    pieces = deque([(0, len(batch))])
    deadline = math.inf
    while pieces and not cancel.is_set():
        start, stop = pieces.popleft()
        first = deadline == math.inf
        limit = timeout if first else timeout * max(2 * (stop - start) / len(batch), SMALLEST_SHARE)
        try:
            worker.ensure()
            request = whole if first else _encode(batch.rows(start, stop))
            limit = min(limit, deadline - time.monotonic())
            answer = worker.ask(request, limit) if limit > 0 else None
        except (TimeoutError, WorkerDied) as failure:
            deadline = min(deadline, time.monotonic() + RETRY_FACTOR * (timeout + worker.start_seconds))
            if stop - start > 1:
                middle = (start + stop) // 2
                pieces += [(start, middle), (middle, stop)]
            else:
                _lose(part, name, start, failure, limit)
            continue
        if answer is None:
            _give_up(part, name, start, stop)
        elif "rewards" in answer:
            part.values[start:stop] = np.array(answer["rewards"], dtype=np.float64)
        else:
            raise RewardProblem(answer["problem"], answer["row"]).error(name, first_row=start)
    return part


def _lose(part: _Part, name: str, row: int, failure: Exception, limit: float) -> None:
    if isinstance(failure, TimeoutError):
        part.timeouts += 1
        part.warnings.append(f"reward {name!r}, row {row}: no answer within {limit:.3g} s, counted as None")
    else:
        part.crashes += 1
        part.warnings.append(f"reward {name!r}, row {row}: its process {failure}, counted as None")


def _give_up(part: _Part, name: str, start: int, stop: int) -> None:
    part.timeouts += stop - start
    part.warnings.append(
        f"reward {name!r}, rows {start} to {stop - 1}: the time to try this batch again is spent, counted as None"
    )


def _encode(batch: Batch) -> bytes:
    message = {name: list(getattr(batch, name)) for name in RESERVED}
    try:
        columns = {name: list(values) for name, values in batch.columns.items()}
        return json.dumps({**message, "columns": columns}, default=_plain).encode() + b"\n"
    except (TypeError, ValueError) as error:
        for name, values in [*batch.columns.items(), *message.items()]:
            try:
                json.dumps(list(values), default=_plain)
            except (TypeError, ValueError):
                raise ValueError(
                    f"column {name!r}: cannot be sent to a reward's process ({error}); "
                    "make it strings, numbers, lists or objects of these, or drop it"
                ) from error
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _results(futures: "list[Future[Any]]") -> list[Any]:
    """Results in order, after all have ended, so that an error leaves nothing running behind it."""
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
    return [future.result() for future in futures]


def _stop(threads: ThreadPoolExecutor, workers: list[WorkerProcess], local: LocalRewards) -> None:
    for worker in workers:
        worker.close()
    threads.shutdown(wait=True, cancel_futures=True)
    local.close()


def _checked_batch(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
) -> Batch:
    reserved = sorted(set(columns) & set(RESERVED))
    if reserved:
        raise ValueError(f"columns {reserved}: these names are arguments of every reward function; rename the columns")
    lengths = {"prompts": len(prompts), "completions": len(completions), "completion_ids": len(completion_ids)}
    lengths |= {f"column {name!r}": len(values) for name, values in columns.items()}
    for name, length in lengths.items():
        if length != len(completions):
            raise ValueError(
                f"{name}: got {length} entries for {len(completions)} completions; repeat it once per completion"
            )
    return Batch(prompts, completions, completion_ids, columns)


def _check_specs(specs: Sequence[str | Reward]) -> None:
    if not specs:
        raise ValueError("rewards: got none, so nothing could be learned; name at least one, such as exact_match")
    for spec in specs:
        if not (isinstance(spec, str) or callable(spec)):
            raise ValueError(f"rewards: got {spec!r}, which is neither a name nor a function; give one of these")


def _check_limits(timeout_seconds: float, memory_limit_mb: int | None) -> None:
    if not 0 < timeout_seconds < math.inf:
        raise ValueError(f"reward timeout_seconds: got {timeout_seconds}, but a limit is positive and finite; use 10")
    if memory_limit_mb is not None and memory_limit_mb < 64:
        raise ValueError(
            f"reward memory_limit_mb: got {memory_limit_mb}, but Python alone needs about 64; use 1024, or None for "
            "no limit"
        )


def _unique(names: list[str]) -> tuple[str, ...]:
    """Names with _2, _3 behind those that come again."""
    unique: list[str] = []
    for name in names:
        copies = (f"{name}_{number}" for number in range(2, len(names) + 2))
        unique.append(name if name not in unique else next(copy for copy in copies if copy not in unique))
    return tuple(unique)
