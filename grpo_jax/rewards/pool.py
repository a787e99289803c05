"""All reward functions of a run, scored together: [F, N] rewards and what went wrong."""

import math
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from grpo_jax.functions import nearest
from grpo_jax.rewards import REWARDS
from grpo_jax.rewards.attempts import Attempts, Piece, Workers, chunks, encode
from grpo_jax.rewards.call import Batch, RewardProblem, missing_column
from grpo_jax.rewards.local import LocalCall, LocalRewards
from grpo_jax.rewards.lookup import RESERVED, SAMPLES, Reward, bind, needed_columns, unique_names
from grpo_jax.rewards.process import WorkerProcess
from grpo_jax.rewards.scores import Part, Scores
from grpo_jax.rewards.state import TrainerState

__all__ = ["RewardPool", "Scores", "Scoring"]

MOST_WORKERS = 1024
"""Processes of one function."""


class RewardPool:
    """Runs reward functions, each one given by name in worker processes of its own, all at the same time.

    The time limit is for 16 completions; a call on more has it for every 16 of them. It can always fire, because it
    kills the process. Then, and when the process dies by itself, its completions are asked 16 at a time, and those of
    16 without an answer one by one: only what is at fault gets NaN. All that has no answer, and what is asked again
    for it, takes at most 9 times ``timeout_seconds`` and the seconds that starting a worker takes; what is unscored
    then is NaN too, and counted. A function that raises is not asked again.

    A built-in given by name, what ``stream`` names, and with several workers every function given by name is called
    on at most 16 completions; `begin` calls the first two on each group that is handed over while others come. The
    other functions get the whole batch at its end.

    Function objects run in the calling process, one after the other, awaitables of all of them together, without a
    time limit. One thread scores at a time. Use as a context manager, or call ``close``. On Linux no worker, and
    nothing a worker started, outlives this process, even one killed with SIGKILL; elsewhere an idle worker ends with
    it and a busy one after its call.
    """

    def __init__(
        self,
        specs: Sequence[str | Reward],
        timeout_seconds: float = 10.0,
        memory_limit_mb: int | None = 4096,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        state: TrainerState | None = None,
        stream: Collection[str] = (),
        workers: int = 1,
        environment: Collection[str] = (),
    ) -> None:
        """Start a worker for every reward given by name, and load it there.

        Args:
            specs: names as ``resolve`` takes them, or functions.
            timeout_seconds: for 16 completions.
            memory_limit_mb: of a worker and all it starts together; None for no limit.
            options: parameters bound to a reward, by its name in ``unique_names(specs)``.
            state: what is known before the first step: the length of the run and of its completions.
            stream: rewards, by their names in ``unique_names(specs)``, that judge a completion by itself and so may
                be called on each group as soon as it is sampled; built-ins given by name always are.
            workers: processes of each reward given by name, started when there is work for them.
            environment: names of variables that workers get although they look like tokens, keys and the like.

        Raises:
            ValueError: an argument or option that cannot be, or a reward that is not found or does not load.
        """
        _check_specs(specs)
        _check_limits(timeout_seconds, memory_limit_mb, workers)
        self.names = unique_names(specs)
        self.state = state or TrainerState()
        bound = _checked_options(options or {}, self.names)
        named = _checked_names("reward.stream", stream, self.names)
        built_in = (n for n, spec in enumerate(specs) if isinstance(spec, str) and spec in REWARDS)
        self._streamed = {*map(self.names.index, named), *built_in}
        self._timeout = timeout_seconds
        self._workers = {
            n: Workers(
                partial(WorkerProcess, self.names[n], spec, bound[n], memory_limit_mb, self.state, environment), workers
            )
            for n, spec in enumerate(specs)
            if isinstance(spec, str)
        }
        self._in_chunks = self._streamed | (set(self._workers) if workers > 1 else set())
        functions = {
            n: (self.names[n], bind(spec, bound[n], self.names[n]))
            for n, spec in enumerate(specs)
            if not isinstance(spec, str)
        }
        self._needs = {name: needed_columns(function) for name, function in functions.values()}
        self._local = LocalRewards(functions)
        self._finalizer = weakref.finalize(self, _stop, list(self._workers.values()), self._local)
        try:
            first = {n: workers.do(_started) for n, workers in self._workers.items()}
            errors = [started.exception() for started in first.values()]
            for error in filter(None, errors):
                raise error
        except BaseException:
            self.close()
            raise
        self._needs |= {self.names[number]: started.result() for number, started in first.items()}

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

    def begin(self, only: Collection[int] | None = None) -> "Scoring":
        """A batch that is scored while its completions come; end one before the next.

        Args:
            only: places of the functions to ask, the others give no answer; None for all.
        """
        return Scoring(self, range(len(self.names)) if only is None else only)

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

    def __init__(self, pool: RewardPool, asked: Collection[int]):
        """Nothing is asked yet; ``asked`` are the places of the functions that will be."""
        self._pool, self._asked, self._cancel = pool, asked, threading.Event()
        self._remote = {
            n: Attempts(workers, pool.names[n], pool._timeout, self._cancel) for n, workers in pool._workers.items()
        }
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
        self._begin([n for n in self._asked if n in self._pool._streamed], start, batch)

    def finish(self, batch: Batch) -> Scores:
        """Ask the others, and wait for all.

        Args:
            batch: all rows, those that were added among them, all of them or none.

        Raises:
            ValueError: as `RewardPool.score`.
        """
        if self._added not in (0, len(batch)):
            raise ValueError(f"got {len(batch)} completions at the end and {self._added} before it; add all or none")
        self._begin([n for n in self._asked if not self._added or n not in self._pool._streamed], 0, batch)
        local = {n: {at: self._pool._local.finish(c) for at, c in calls.items()} for n, calls in self._local.items()}
        pieces = {n: {at: Part.of(answer) for at, answer in answers.items()} for n, answers in local.items()}
        pieces |= {n: attempts.parts() for n, attempts in self._remote.items()}
        return Scores.of(
            self._pool.names, [Part.joined(len(batch), pieces.get(n, {})) for n in range(len(self._pool.names))]
        )

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
        whole, cut = list[Piece](), list[Piece]()
        for number in remote:
            if number in self._pool._in_chunks:
                cut = cut or chunks(start, batch)
            else:
                whole = whole or [Piece(start, batch, encode(batch))]
            self._remote[number].ask(cut if number in self._pool._in_chunks else whole)
        for number in sorted(set(numbers) - set(remote)):
            self._local.setdefault(number, {})[start] = self._pool._local.begin(number, batch, start)


def _started(worker: WorkerProcess) -> tuple[str, ...]:
    worker.ensure()
    return worker.needs


def _stop(workers: list[Workers], local: LocalRewards) -> None:
    for each in workers:
        each.close()
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


def _check_limits(timeout_seconds: float, memory_limit_mb: int | None, workers: int) -> None:
    if workers < 1:
        raise ValueError(f"reward.workers: got {workers}, but each function needs a process; use 1, or more")
    if workers > MOST_WORKERS:
        raise ValueError(f"reward.workers: got {workers}, but each is a process; use at most {MOST_WORKERS}")
    if not 0 < timeout_seconds < math.inf:
        raise ValueError(f"reward.timeout_seconds: got {timeout_seconds}, but a limit is positive and finite; use 10")
    if memory_limit_mb is not None and memory_limit_mb < 64:
        raise ValueError(
            f"reward.memory_limit_mb: got {memory_limit_mb}, but Python alone needs about 64; use 1024, or None for "
            "no limit"
        )
