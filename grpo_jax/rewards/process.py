"""The parent's end of one worker process: start it, ask it, kill it. POSIX only (process groups, select on pipes)."""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from grpo_jax.rewards.family import KEPT, OUT_OF_MEMORY
from grpo_jax.rewards.state import MOST_LOGGED, TrainerState
from grpo_jax.rewards.surroundings import ROOT, environment_for, import_path, withheld

START_SECONDS = 120.0
"""A worker that has not imported its reward by then is given up."""

END_SECONDS = 10.0
"""A process that has not ended of itself by then is killed, with its group."""

# Only grpo_jax itself is looked for in its folder, which may hold files that are called like modules of Python.
_PROGRAM = """import sys
sys.path.insert(0, {root!r})
import grpo_jax
del sys.path[0]
from grpo_jax.rewards.worker import main
main({parent}, {memory_limit_mb})"""

_CHUNK = 1 << 16
_LOOK_SECONDS = 3600.0
"""Systems wait for some weeks at a time, at most; a limit may be longer."""


class WorkerDied(Exception):
    """The process ended, or wrote what is no answer, before it answered; the text says how."""


class WorkerProcess:
    """One reward in one process, which is started when it is needed and again after it was killed.

    One thread may use it at a time; ``kill`` and ``close`` may come from any. On Linux the process dies with the
    thread that started it, so that thread has to live as long as the worker is wanted.
    """

    def __init__(
        self,
        name: str,
        spec: str,
        options: Mapping[str, Any],
        memory_limit_mb: int | None,
        state: TrainerState,
        environment: Collection[str] = (),
    ) -> None:
        """Note what to run; nothing is started yet.

        Args:
            name: of the reward in its run.
            spec: as ``find_reward`` takes it.
            options: bound to it.
            memory_limit_mb: of the process and all it starts; None for no limit.
            state: before the first step, with which a built-in is tried.
            environment: names of variables it gets although they look like secrets.
        """
        self.start_seconds = 0.0
        self.needs: tuple[str, ...] = ()
        self._spec = spec
        self._start = {"name": name, "spec": spec, "options": dict(options), "state": asdict(state)}
        self._memory_limit_mb = memory_limit_mb
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = environment
        self._asked = 0
        self._closed = False
        self._lock = threading.Lock()
        self._turn = threading.RLock()

    @property
    def pid(self) -> int | None:
        """The process id, None where no process runs."""
        process = self._process
        return None if process is None else process.pid

    def ensure(self) -> None:
        """Start the process and load its reward, unless it runs already.

        Raises:
            ValueError: the reward is not found or does not load.
            WorkerDied: ``close`` was called.
        """
        if self._process is not None:
            return
        begun = time.monotonic()
        with self._lock:
            if self._closed:
                raise WorkerDied("was closed")
            self._process = self._popen()
        problem = self._load(json.dumps(self._start | {"path": import_path()}).encode() + b"\n")
        if problem is not None:
            self.kill()
            raise ValueError(problem)
        self.start_seconds = self.start_seconds or time.monotonic() - begun

    def ask(self, request: bytes, limit_seconds: float) -> dict[str, Any]:
        """Send one line and return the answer to it.

        Raises:
            TimeoutError: no answer within ``limit_seconds``; the process is killed.
            WorkerDied: no answer at all; the process is gone.
        """
        with self._turn:
            process = self._process
            if process is None:
                raise WorkerDied("does not run")
            self._asked += 1
            try:
                answer = json.loads(_exchange(process, self._asked, request, time.monotonic() + limit_seconds))
                if not isinstance(answer, dict):
                    raise ValueError
                return answer
            except TimeoutError:
                self.kill()
                raise
            except (EOFError, OSError, ValueError) as error:
                if not isinstance(error, ValueError):
                    with suppress(subprocess.TimeoutExpired):  # how it ended is known when its keeper has ended too
                        process.wait(END_SECONDS)
                self.kill()
                raise WorkerDied(self._how_it_ended(process.returncode, error)) from error

    def kill(self) -> None:
        """End the process and all it started."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            if KEPT:
                with suppress(subprocess.TimeoutExpired):
                    process.terminate()
                    process.wait(END_SECONDS)
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with self._turn:  # a thread that is reading these pipes sees their end now and lets go
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()

    def close(self) -> None:
        """Kill, and never start again."""
        with self._lock:
            self._closed = True
        self.kill()

    def hint(self, problem: str) -> str:
        """What to add to a problem that speaks of an environment variable which the process did not get."""
        spoken = [name for name in withheld(os.environ, self._environment) if name in problem]
        if not spoken:
            return ""
        return f" (a reward's process does not get {spoken[0]}, as it looks like a secret; reward.environment gives it)"

    def _popen(self) -> "subprocess.Popen[bytes]":
        limits = {"parent": os.getpid(), "memory_limit_mb": self._memory_limit_mb}
        return subprocess.Popen(
            # -P: what lies in the working directory is not imported.
            [sys.executable, "-P", "-c", _PROGRAM.format(root=str(ROOT), **limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment_for(os.environ, self._environment),
            start_new_session=True,  # its own group: killed whole, and deaf to the terminal's Ctrl-C
        )

    def _load(self, start: bytes) -> str | None:
        try:
            answer = self.ask(start, START_SECONDS)
        except TimeoutError:
            return f"reward {self._spec!r}: not loaded after {START_SECONDS:g} s; import less in its module"
        except WorkerDied as death:
            return f"reward {self._spec!r}: its process {death} while loading; see stderr, or raise the memory limit"
        self.needs = tuple(answer.get("needs", ()))
        return f"{answer['problem']}{self.hint(answer['problem'])}" if "problem" in answer else None

    def _how_it_ended(self, status: int | None, error: Exception) -> str:
        if status == OUT_OF_MEMORY:
            limit = "" if self._memory_limit_mb is None else f" of {self._memory_limit_mb} MB"
            return f"ran out of its memory{limit}"
        if isinstance(error, ValueError):
            return "wrote what is no answer"
        if status is not None and status < 0:
            return f"died of signal {signal.Signals(-status).name}"
        return f"ended with exit status {status}"


def _exchange(process: "subprocess.Popen[bytes]", number: int, request: bytes, deadline: float) -> bytes:
    """Write ``request`` with its number, read the answer of that number; never blocks past ``deadline``."""
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    stdin, stdout = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(stdin, False)
    left, received = memoryview(b"%d " % number + request), bytearray()
    # A row is at least 8 bytes of the request and at most 30 of the answer; a character at most 12 bytes of JSON.
    most = _CHUNK + 8 * len(request) + 12 * MOST_LOGGED
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        selector.register(stdin, selectors.EVENT_WRITE)
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            for key, _ in selector.select(min(remaining, _LOOK_SECONDS)):
                if key.fd == stdin:
                    left = left[os.write(stdin, left[:_CHUNK]) :]
                    if not left:
                        selector.unregister(stdin)
                    continue
                chunk = os.read(stdout, _CHUNK)
                received += chunk
                if received.endswith(b"\n"):
                    answers = dict(_numbered(line) for line in bytes(received).splitlines())
                    if number in answers:
                        return answers[number]
                    received.clear()  # answers to what was asked before
                if not chunk:
                    raise EOFError
                if len(received) > most:
                    raise ValueError("an answer without an end")


def _numbered(line: bytes) -> tuple[int, bytes]:
    number, _, answer = line.partition(b" ")
    return int(number), answer
