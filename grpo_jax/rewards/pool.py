"""All reward functions of a run, scored together: [F, N] rewards and what went wrong."""

import json
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from grpo_jax.rewards.call import Answer, Batch, RewardProblem, missing_column
from grpo_jax.rewards.local import LocalRewards
from grpo_jax.rewards.lookup import RESERVED, SAMPLES, Reward, bind, nearest, needed_columns, unique_names
from grpo_jax.rewards.process import WorkerDied, WorkerProcess
from grpo_jax.rewards.state import TrainerState

RETRY_FACTOR = 8
"""After its first failure a batch is given up within this many times (time limit + start of a worker)."""

SMALLEST_SHARE = 1 / 8
"""The least part of the time limit that a retried piece gets."""


MOST_SAID = 3
"""Losses of a function that a batch tells one by one."""


@dataclass(frozen=True)
class Scores:
    """What the reward functions said about N completions.

    Attributes:
        names: [F] names for logging, unique.
        rewards: [F, N] float64, NaN where a function gave no answer (None, NaN, out of time, process died).
        timeout_counts: [F] completions that lost this reward to the time limit.
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


def few(name: str, losses: list[str]) -> list[str]:
    """What is said of a function's losses in a batch: at most ``MOST_SAID`` of them, and how many more there are."""
    more = len(losses) - MOST_SAID
    return losses if more <= 0 else [*losses[:MOST_SAID], f"reward {name!r}: {more} more such losses in this batch"]


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
        options: Mapping[str, Mapping[str, Any]] | None = None,
        state: TrainerState | None = None,
    ) -> None:
        """Start a worker for every reward given by name, and load it there.

        Args:
            specs: names as ``resolve`` takes them, or functions.
            timeout_seconds: for one call on a whole batch.
            memory_limit_mb: address space of a worker; None for no limit.
            options: parameters bound to a reward, by its name in ``unique_names(specs)``.
            state: what is known before the first step: the length of the run and of its completions.

        Raises:
            ValueError: an argument or option that cannot be, or a reward that is not found or does not load.
        """
        _check_specs(specs)
        _check_limits(timeout_seconds, memory_limit_mb)
        self.names = unique_names(specs)
        self.state = state or TrainerState()
        bound = _checked_options(options or {}, self.names)
        self._timeout = timeout_seconds
        self._workers = {
            number: WorkerProcess(self.names[number], spec, bound[number], memory_limit_mb, self.state)
            for number, spec in enumerate(specs)
            if isinstance(spec, str)
        }
        functions = {
            n: (self.names[n], bind(spec, bound[n], self.names[n]))
            for n, spec in enumerate(specs)
            if not isinstance(spec, str)
        }
        self._needs = {name: needed_columns(function) for name, function in functions.values()}
        self._local = LocalRewards(functions)
        # A worker lives no longer than the thread that starts it: these threads stay until the pool is closed.
        self._threads = ThreadPoolExecutor(max(1, len(self._workers)), thread_name_prefix="grpo_jax rewards")
        self._finalizer = weakref.finalize(self, _stop, self._threads, list(self._workers.values()), self._local)
        try:
            _results([self._threads.submit(worker.ensure) for worker in self._workers.values()])
        except BaseException:
            self.close()
            raise
        self._needs |= {self.names[number]: worker.needs for number, worker in self._workers.items()}

    def check_columns(self, columns: Collection[str]) -> None:
        """Refuse a dataset that cannot be scored, before anything is sampled.

        Args:
            columns: names of what the dataset has besides the prompt.

        Raises:
            ValueError: a name that every function has for something else, or a function whose column is not there.
        """
        _check_column_names(columns)
        for name in self.names:
            missing = missing_column(self._needs[name], columns)
            if missing is not None:
                raise RewardProblem(missing).error(name)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        state: TrainerState | None = None,
    ) -> Scores:
        """Rewards of N completions; every argument and column has N entries.

        Args:
            prompts: strings, or lists of chat messages.
            completions: strings, or lists of one message of the assistant.
            completion_ids: token ids, the stop token among them.
            columns: of the dataset, repeated per sample.
            state: how far the run is; None for ``self.state``.

        Raises:
            ValueError: lengths that differ, a column that cannot travel, or a reward function that raised or
                returned something else than N finite numbers or None.
        """
        batch = Batch(prompts, completions, completion_ids, columns, state or self.state)
        _check_batch(batch)
        parts = self._scored(batch) if len(batch) else {n: _Part.blank(0) for n in range(len(self.names))}
        ordered = [parts[number] for number in range(len(self.names))]
        values = np.stack([part.values for part in ordered])
        return Scores(
            names=self.names,
            rewards=values,
            timeout_counts=tuple(part.timeouts for part in ordered),
            crash_counts=tuple(part.crashes for part in ordered),
            warnings=tuple(
                line for name, part in zip(self.names, ordered, strict=True) for line in few(name, part.warnings)
            ),
            extra=_columns(self.names, ordered),
            metrics=_figures(ordered),
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
        return {**remote, **{number: _Part.of(answer) for number, answer in local.items()}}


@dataclass
class _Part:
    """One function's row of ``Scores``, while it is filled; figures with the number of completions they are of."""

    values: np.ndarray
    timeouts: int = 0
    crashes: int = 0
    warnings: list[str] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    figures: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    @staticmethod
    def blank(count: int) -> "_Part":
        return _Part(np.full(count, np.nan))

    @staticmethod
    def of(answer: Answer) -> "_Part":
        part = _Part.blank(len(answer.rewards))
        part.put(0, answer.rewards, answer.logged.extra, answer.logged.metrics)
        return part

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


def _columns(names: Sequence[str], parts: Sequence[_Part]) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {}
    for name, part in zip(names, parts, strict=True):
        out |= {f"{name}/{column}" if column in out else column: values for column, values in part.extra.items()}
    return out


def _figures(parts: Sequence[_Part]) -> dict[str, float]:
    said: dict[str, list[tuple[float, int]]] = {}
    for part in parts:
        for name, figures in part.figures.items():
            said.setdefault(name, []).extend(figures)
    return {
        name: math.fsum(value * rows for value, rows in figures) / max(1, sum(rows for _, rows in figures))
        for name, figures in said.items()
    }


class RewardTraceback(Exception):
    """The traceback of a function that raised in its process, as text."""


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
            part.put(start, answer["rewards"], answer["extra"], answer["metrics"])
        else:
            error = RewardProblem(answer["problem"], answer["row"]).error(name, first_row=start)
            raise error from (RewardTraceback(answer["trace"]) if answer["trace"] else None)
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
    message = {name: list(getattr(batch, name)) for name in SAMPLES}
    try:
        columns = {name: list(values) for name, values in batch.columns.items()}
        whole = {**message, "columns": columns, "state": asdict(batch.state)}
        return json.dumps(whole, default=_plain).encode() + b"\n"
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


def _check_batch(batch: Batch) -> None:
    _check_column_names(batch.columns)
    lengths = {name: len(getattr(batch, name)) for name in SAMPLES}
    lengths |= {f"column {name!r}": len(values) for name, values in batch.columns.items()}
    for name, length in lengths.items():
        if length != len(batch):
            raise ValueError(
                f"{name}: got {length} entries for {len(batch)} completions; repeat it once per completion"
            )


def _check_column_names(columns: Collection[str]) -> None:
    reserved = sorted(set(columns) & set(RESERVED))
    if reserved:
        raise ValueError(
            f"columns {reserved}: these names are arguments of every reward function; rename them (data.rename_columns)"
        )


def _checked_options(options: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[Mapping[str, Any]]:
    """The options of each reward, in their order."""
    for name in options:
        if name not in names:
            raise ValueError(
                f"reward.options.{name}: no reward function of that name in this run{nearest(name, names)}; "
                f"they are {', '.join(names)}"
            )
    return [options.get(name, {}) for name in names]


def _check_specs(specs: Sequence[str | Reward]) -> None:
    if not specs:
        raise ValueError(
            "reward.functions: got none, so nothing could be learned; name at least one, such as exact_match"
        )
    for spec in specs:
        if not (isinstance(spec, str) or callable(spec)):
            raise ValueError(
                f"reward.functions: got {spec!r}, which is neither a name nor a function; give one of these"
            )


def _check_limits(timeout_seconds: float, memory_limit_mb: int | None) -> None:
    if not 0 < timeout_seconds < math.inf:
        raise ValueError(f"reward.timeout_seconds: got {timeout_seconds}, but a limit is positive and finite; use 10")
    if memory_limit_mb is not None and memory_limit_mb < 64:
        raise ValueError(
            f"reward.memory_limit_mb: got {memory_limit_mb}, but Python alone needs about 64; use 1024, or None for "
            "no limit"
        )
