"""Reward functions that run in this process: closures, bound methods, coroutines; without a time limit."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from grpo_jax.rewards.call import Answer, Batch, RewardProblem, answered, raised
from grpo_jax.rewards.lookup import Reward
from grpo_jax.rewards.state import Notes

CLOSE_SECONDS = 5.0
"""How long closing waits for cancelled coroutines to end."""


class LoopThread:
    """An event loop in a thread of its own, so that awaiting works whether or not the caller has a loop running.

    One loop for all calls: a client (an HTTP session, say) that an async reward keeps stays usable.
    """

    def __init__(self) -> None:
        """Start the thread."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpo_jax rewards", daemon=True)
        self._thread.start()

    def submit(self, awaitable: Awaitable[Any]) -> "Future[Any]":
        """Begin to await; the future gives the result."""

        async def result_of() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(result_of(), self._loop)

    def close(self) -> None:
        """Cancel what is still awaited, stop the loop and end the thread."""
        with suppress(TimeoutError):  # a task that refuses to be cancelled is left
            asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result(CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True)
class LocalCall:
    """A call that has begun.

    Attributes:
        number: of the function.
        batch: what it was called with.
        start: the place of the batch's first row in the whole batch.
        result: what it returned, or will give.
        notes: what it logs.
    """

    number: int
    batch: Batch
    start: int
    result: Any
    notes: Notes

    def cancel(self) -> None:
        """Await it no longer."""
        if isinstance(self.result, Future):
            self.result.cancel()


class LocalRewards:
    """Several reward functions, called in this thread one after the other; what they leave to await overlaps."""

    def __init__(self, functions: Mapping[int, tuple[str, Reward]]) -> None:
        """Take (name, function) by any number that tells them apart."""
        self._functions = functions
        self._loop: LoopThread | None = None

    def begin(self, number: int, batch: Batch, start: int) -> LocalCall:
        """Call a function; one that is ``async def`` goes on while others are called.

        Raises:
            ValueError: it raised.
        """
        function, notes = self._functions[number][1], Notes()

        def call() -> Any:
            result = function(**batch.arguments(function, notes))
            return self._running_loop().submit(result) if isinstance(result, Awaitable) else result

        return LocalCall(number, batch, start, self._guard(number, batch, start, call), notes)

    def finish(self, call: LocalCall) -> Answer:
        """What it says.

        Raises:
            ValueError: it raised or broke its contract.
        """
        return self._guard(call.number, call.batch, call.start, partial(_finish, call))

    def close(self) -> None:
        """End the event loop, if one was needed."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _guard(self, number: int, batch: Batch, start: int, do: Callable[[], Any]) -> Any:
        name = self._functions[number][0]
        try:
            return do()
        except (KeyboardInterrupt, MemoryError):
            raise
        except RewardProblem as problem:
            raise problem.error(name, start) from None
        except BaseException as error:
            raise raised(batch, error).error(name, start) from error

    def _running_loop(self) -> LoopThread:
        self._loop = self._loop or LoopThread()
        return self._loop


def _finish(call: LocalCall) -> Answer:
    result = call.result.result() if isinstance(call.result, Future) else call.result
    return answered(result, call.notes, len(call.batch))
