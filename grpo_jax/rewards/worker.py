"""The process that runs one reward: JSON lines in on stdin, JSON lines out on stdout.

Started by ``grpo_jax.rewards.process`` as ``python -m grpo_jax.rewards.worker``. The first line names the reward
and the limits, each further one is a batch; every line gets one line back: ``{"needs": [columns]}``,
``{"rewards": [...], "extra": {...}, "metrics": {...}}`` or ``{"problem": ..., "row": ..., "trace": ...}``. What the
reward prints goes to stderr, what it reads from stdin is empty. It ends when stdin closes, and on Linux with its
parent.
"""

import io
import json
import os
import signal
import sys
from collections.abc import Awaitable
from typing import Any, BinaryIO

from grpo_jax.functions import words_of
from grpo_jax.rewards import REWARDS, load_reward
from grpo_jax.rewards.call import Batch, RewardProblem, Wait, call_reward
from grpo_jax.rewards.lookup import Reward, needed_columns
from grpo_jax.rewards.state import Notes, TrainerState

OUT_OF_MEMORY = 86
"""Exit status after a MemoryError: the process is not worth keeping, and its parent is to know why."""

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer until stdin ends."""
    requests, answers = _take_pipes()
    try:
        serve(requests, answers)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BrokenPipeError:
        pass  # the parent is gone
    sys.stdout.flush()
    os._exit(0)  # threads a reward left behind do not keep the process


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Load the reward that the first line names, then score a batch per line.

    Raises:
        MemoryError: from the reward or from this function; it ends the process.
    """
    line = requests.readline()
    if not line:
        return
    start = json.loads(line)
    try:
        function = _load(start)
    except MemoryError:
        raise
    except BaseException as error:
        raised = f"reward {start['name']!r}: loading it raised {type(error).__name__}: {words_of(error)}; repair it"
        return _answer(answers, {"problem": str(error) if isinstance(error, ValueError) else raised})
    _answer(answers, {"needs": needed_columns(function)})
    wait = _waiter()
    for line in requests:
        _answer(answers, _scored(function, json.loads(line), wait))


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


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The protocol's two ends; what the reward calls stdin and stdout are other files from here on."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    return requests, answers


def _load(start: dict[str, Any]) -> Reward:
    """Find the reward and bind its options; a built-in is tried on no completions, to refuse options now."""
    _end_with_parent(start["parent"])
    _limit_memory(start["memory_limit_mb"])
    sys.path[:] = start["path"]
    function = load_reward(start["spec"], start["options"], start["name"])
    if start["spec"] in REWARDS:
        nothing: dict[str, list[Any]] = {column: [] for column in needed_columns(function)}
        batch = Batch(columns=nothing, state=TrainerState(**start["state"]))
        try:
            function(**batch.arguments(function, Notes()))
        except ValueError as error:
            raise ValueError(f"reward {start['name']!r}: {error}") from error
    return function


def _end_with_parent(parent: int) -> None:
    """Linux kills this process when the thread that started it ends, however busy it is."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _limit_memory(megabytes: int | None) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if megabytes is None:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = megabytes * 2**20 if hard == resource.RLIM_INFINITY else min(megabytes * 2**20, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError) as error:
        print(f"reward worker: this system sets no memory limit ({error}); it runs without", file=sys.stderr)


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


def _answer(answers: BinaryIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
