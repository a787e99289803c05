"""All reward functions of a run, scored together: [F, N] rewards and what went wrong."""

import math
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from grpo_jax.functions import nearest
from grpo_jax.rewards import REWARDS
from grpo_jax.rewards.attempts import Attempts, Patience, encode
from grpo_jax.rewards.call import Batch, RewardProblem, missing_column
from grpo_jax.rewards.local import LocalCall, LocalRewards
from grpo_jax.rewards.lookup import RESERVED, SAMPLES, Reward, bind, needed_columns, unique_names
from grpo_jax.rewards.process import WorkerProcess
from grpo_jax.rewards.scores import Part, Scores
from grpo_jax.rewards.state import TrainerState

__all__ = ["RewardPool", "Scores", "Scoring"]


class RewardPool:
    """Runs reward functions, each one given by name in a worker process of its own, all at the same time.

    The time limit holds for one call of a function on a whole batch and can always fire, because it kills the
    process. Then, and when the process dies by itself, the batch is tried again in halves, quarters and so on, down
    to the completions that are at fault: they alone get NaN. A retried piece of n of N completions gets
    ``timeout_seconds * max(2n/N, 1/8)``. ``score`` returns within 9 times ``timeout_seconds`` plus 10 times
    the seconds that starting this worker takes; what is unscored then is NaN too, and counted.

    `begin` scores a batch while its completions come: a built-in given by name, and what ``stream`` names, is called
    on each group that is handed over instead of once on all, each call under the time limit, and failures together
    cost no more than above. The other functions get the whole batch at its end.

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
        stream: Collection[str] = (),
    ) -> None:
        """Start a worker for every reward given by name, and load it there.

        Args:
            specs: names as ``resolve`` takes them, or functions.
            timeout_seconds: for one call on a whole batch.
            memory_limit_mb: address space of a worker; None for no limit.
            options: parameters bound to a reward, by its name in ``unique_names(specs)``.
            state: what is known before the first step: the length of the run and of its completions.
            stream: rewards, by their names in ``unique_names(specs)``, that judge a completion by itself and so may
                be called on each group as soon as it is sampled; built-ins given by name always are.

        Raises:
            ValueError: an argument or option that cannot be, or a reward that is not found or does not load.
        """
        _check_specs(specs)
        _check_limits(timeout_seconds, memory_limit_mb)
        self.names = unique_names(specs)
        self.state = state or TrainerState()
        bound = _checked_options(options or {}, self.names)
        named = _checked_names("reward.stream", stream, self.names)
        built_in = (n for n, spec in enumerate(specs) if isinstance(spec, str) and spec in REWARDS)
        self._streamed = {*map(self.names.index, named), *built_in}
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
        self._threads = {n: ThreadPoolExecutor(1, thread_name_prefix="grpo_jax rewards") for n in self._workers}
        parts = list(self._threads.values()), list(self._workers.values()), self._local
        self._finalizer = weakref.finalize(self, _stop, *parts)
        try:
            _results([self._threads[n].submit(worker.ensure) for n, worker in self._workers.items()])
        except BaseException:
            self.close()
            raise
        self._needs |= {self.names[number]: worker.needs for number, worker in self._workers.items()}

    @property
    def remote(self) -> bool:
        """Whether some function runs in a process of its own, so that columns have to get there."""
        return bool(self._workers)

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
        with self.begin() as scoring:
            return scoring.finish(Batch(prompts, completions, completion_ids, columns, state or self.state))

    def begin(self) -> "Scoring":
        """A batch that is scored while its completions come; end one before the next."""
        return Scoring(self)

    def close(self) -> None:
        """Kill the workers; the pool cannot be used after this."""
        self._finalizer()

    def __enter__(self) -> "RewardPool":
        """The pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class Scoring:
    """One batch: `add` the groups that are done, in any order, and `finish` with all. What is left at its exit ends."""

    def __init__(self, pool: RewardPool):
        """Nothing is asked yet."""
        self._pool, self._cancel = pool, threading.Event()
        self._patience = {number: Patience() for number in pool._workers}
        self._remote: dict[int, dict[int, Future[Part]]] = {}  # by function and by the first row of a group
        self._local: dict[int, dict[int, LocalCall]] = {}
        self._added = 0

    def add(self, start: int, batch: Batch) -> None:
        """Ask the functions that are called by group.

        Args:
            start: place of the group's first row in the whole batch.
            batch: the group; its columns are those of the whole batch.

        Raises:
            ValueError: as `RewardPool.score`.
        """
        self._added += len(batch)
        self._begin(self._pool._streamed, start, batch)

    def finish(self, batch: Batch) -> Scores:
        """Ask the others, and wait for all.

        Args:
            batch: all rows, those that were added among them, all of them or none.

        Raises:
            ValueError: as `RewardPool.score`.
        """
        if self._added not in (0, len(batch)):
            raise ValueError(f"got {len(batch)} completions at the end and {self._added} before it; add all or none")
        everyone = range(len(self._pool.names))
        self._begin([n for n in everyone if not self._added or n not in self._pool._streamed], 0, batch)
        local = {n: {at: self._pool._local.finish(c) for at, c in calls.items()} for n, calls in self._local.items()}
        pieces = {n: {at: Part.of(answer) for at, answer in answers.items()} for n, answers in local.items()}
        for number, futures in self._remote.items():
            ordered = dict(sorted(futures.items()))
            pieces[number] = dict(zip(ordered, _results(list(ordered.values())), strict=True))
        return Scores.of(self._pool.names, [Part.joined(len(batch), pieces.get(n, {})) for n in everyone])

    def __enter__(self) -> "Scoring":
        """Itself."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """After an error: cancel what is awaited, and kill the workers."""
        for calls in self._local.values():
            for call in calls.values():
                call.cancel()
        if kind is not None:
            self._cancel.set()
            for worker in self._pool._workers.values():
                worker.kill()

    def _begin(self, numbers: Collection[int], start: int, batch: Batch) -> None:
        _check_batch(batch)
        if not len(batch):
            return
        remote = [number for number in sorted(numbers) if number in self._pool._workers]
        request = encode(batch) if remote else b""
        for number in remote:
            self._remote.setdefault(number, {})[start] = self._submit(number, batch, request, start)
        for number in sorted(set(numbers) - set(remote)):
            self._local.setdefault(number, {})[start] = self._pool._local.begin(number, batch, start)

    def _submit(self, number: int, batch: Batch, request: bytes, start: int) -> "Future[Part]":
        pool = self._pool
        attempts = Attempts(
            pool._workers[number], pool.names[number], pool._timeout, self._cancel, self._patience[number]
        )
        return pool._threads[number].submit(attempts.score, batch, request, start)


def _results(futures: "list[Future[Any]]") -> list[Any]:
    """Results in order, after all have ended, so that an error leaves nothing running behind it."""
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
    return [future.result() for future in futures]


def _stop(threads: list[ThreadPoolExecutor], workers: list[WorkerProcess], local: LocalRewards) -> None:
    for worker in workers:
        worker.close()
    for thread in threads:
        thread.shutdown(wait=True, cancel_futures=True)
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
    _checked_names("reward.options", options, names)
    return [options.get(name, {}) for name in names]


def _checked_names(field: str, given: Collection[str], names: Sequence[str]) -> Collection[str]:
    for name in given:
        if name not in names:
            raise ValueError(
                f"{field}.{name}: no reward function of that name in this run{nearest(name, names)}; "
                f"they are {', '.join(names)}"
            )
    return given


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
