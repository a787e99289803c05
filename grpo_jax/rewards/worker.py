"""The process that runs one reward: lines in on stdin, lines out on stdout, each a number and JSON.

Started by ``grpo_jax.rewards.process``. The first line names the reward, each further one is a batch; every line gets
one line back with its number: ``{"needs": [columns]}``, ``{"rewards": [...], "extra": {...}, "metrics": {...}}`` or
``{"problem": ..., "row": ..., "trace": ...}``. What the reward prints goes to stderr, what it reads from stdin is
empty. It ends when stdin closes, and on Linux with its parent, and all it started with it.
"""

import io
import json
import os
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from grpo_jax.functions import words_of
from grpo_jax.rewards import REWARDS, load_reward
from grpo_jax.rewards.call import Batch, RewardProblem, Wait, call_reward
from grpo_jax.rewards.family import OUT_OF_MEMORY, keep
from grpo_jax.rewards.lookup import Reward, needed_columns
from grpo_jax.rewards.state import Notes, TrainerState


def main(parent: int, memory_limit_mb: int | None) -> None:
    """Answer until stdin ends; a MemoryError ends the process, which is not worth keeping then."""
    keep(parent, memory_limit_mb)
    pipes = Pipes()
    try:
        serve(pipes)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BrokenPipeError:
        pass  # the parent is gone
    sys.stdout.flush()
    os._exit(0)  # threads a reward left behind do not keep the process


class Pipes:
    """The protocol's two ends, which belong to this process alone: a fork of it has neither."""

    def __init__(self) -> None:
        """Take stdin and stdout; what the reward calls so are other files from here on."""
        self._requests, self._answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
        self._process = os.getpid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        os.register_at_fork(after_in_child=self._close)

    def read(self) -> tuple[bytes, Any] | None:
        """The next request and its number; None at the end."""
        number, _, request = self._requests.readline().partition(b" ")
        return (number, json.loads(request)) if request else None

    def answer(self, number: bytes, message: dict[str, Any]) -> None:
        """Answer the request of that number; a fork that comes back from the reward's code ends here."""
        if os.getpid() != self._process:
            os._exit(0)
        self._answers.write(number + b" " + json.dumps(message).encode() + b"\n")
        self._answers.flush()

    def _close(self) -> None:
        for pipe in (self._requests, self._answers):
            with suppress(OSError):
                os.close(pipe.fileno())


def serve(pipes: Pipes) -> None:
    """Load the reward that the first line names, then score a batch per line.

    Raises:
        MemoryError: from the reward or from this function; it ends the process.
    """
    first = pipes.read()
    if first is None:
        return
    number, start = first
    try:
        function = _load(start)
    except MemoryError:
        raise
    except BaseException as error:
        raised = f"reward {start['name']!r}: loading it raised {type(error).__name__}: {words_of(error)}; repair it"
        return pipes.answer(number, {"problem": str(error) if isinstance(error, ValueError) else raised})
    pipes.answer(number, {"needs": needed_columns(function)})
    wait = _waiter()
    while (asked := pipes.read()) is not None:
        pipes.answer(asked[0], _scored(function, asked[1], wait))


def _scored(function: Reward, request: dict[str, Any], wait: Wait) -> dict[str, Any]:
    try:
        state = TrainerState(**request.pop("state"))
        answer = call_reward(function, Batch(**request, state=state), wait)
    except RewardProblem as problem:
        return {"problem": problem.problem, "row": problem.row, "trace": _trace(problem.__cause__)}
    except KeyboardInterrupt:
        return {"problem": "raised KeyboardInterrupt; raise an Exception instead", "row": None, "trace": ""}
    return {"rewards": answer.rewards, "extra": answer.logged.extra, "metrics": answer.logged.metrics}


def _trace(error: BaseException | None) -> str:
    """The traceback of what the function raised; shown only to those who look for it."""
    import traceback

    return "" if error is None else "".join(traceback.format_exception(error))[-20_000:]


def _load(start: dict[str, Any]) -> Reward:
    """Find the reward and bind its options; a built-in is tried on no completions, to refuse options now."""
    sys.path[:] = start["path"]
    with _no_process_spawned(start["name"]):
        function = load_reward(start["spec"], start["options"], start["name"], as_main=True)
    if start["spec"] in REWARDS:
        nothing: dict[str, list[Any]] = {column: [] for column in needed_columns(function)}
        batch = Batch(columns=nothing, state=TrainerState(**start["state"]))
        try:
            function(**batch.arguments(function, Notes()))
        except ValueError as error:
            raise ValueError(f"reward {start['name']!r}: {error}") from error
    return function


@contextmanager
def _no_process_spawned(name: str) -> Iterator[None]:
    """Refuse processes under spawn and forkserver: each would read the reward's file too, and start such itself."""
    from multiprocessing.process import current_process

    here = vars(current_process())
    here["_inheriting"] = True  # so multiprocessing marks a process that reads its main file
    try:
        yield
    except ValueError as error:
        if "bootstrapping phase" not in str(error):
            raise
        raise ValueError(
            f"reward {name!r}: starts a process under spawn or forkserver while its file is read, as each such process "
            "would again; start it in the function, at its first call"
        ) from error
    finally:
        del here["_inheriting"]


def _waiter() -> Wait:
    """Runs awaitables one by one on one event loop, made when the first one comes and kept for its clients."""
    runners: list[Any] = []

    async def result_of(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    def wait(awaitable: Awaitable[Any]) -> Any:
        if not runners:
            import asyncio

            runners.append(asyncio.Runner())
        return runners[0].run(result_of(awaitable))

    return wait
