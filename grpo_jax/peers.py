"""Several processes end together: an error of one, or its death, is said by all of them, and none waits for ever."""

import atexit
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from jax._src import distributed

from grpo_jax.interrupt import Interrupted
from grpo_jax.mesh import wait_for_all
from grpo_jax.rundir import no_space, what_is_safe

BEAT = 1.0
"""Seconds between two signs of life."""
SILENT = 20
"""Looks of one's own, a `BEAT` apart, in which a process that gives no sign of life is dead."""
EXCHANGE = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION)\b")
"""How an error begins, of whatever class, that may be the end of another process as this one sees it."""
PARTING = 10.0
"""Seconds that a process which failed waits for the others to read why, and that they have to finish writing."""


class Peers:
    """A context of all that the processes of a run do together; with one process it does nothing.

    Leaving it with an error tells the others, who end with a line that says what happened where. One that is killed
    tells nothing, and is missed.
    """

    def __init__(self, directory: Path):
        """Args: of the run, for what is safe in it."""
        state = distributed.global_state
        self._client: Any = state.client
        self._me, self._count, self._directory = state.process_id, state.num_processes, directory
        self._leaving, self._over = threading.Lock(), threading.Event()
        self._settle: list[Callable[[float], None]] = []

    def before_leaving(self, settle: Callable[[float], None]) -> None:
        """Call it with so many seconds before the process ends for another's sake."""
        self._settle.append(settle)

    def __enter__(self) -> Self:
        """Give signs of life, and look for those of the others."""
        if self._count > 1:
            threading.Thread(target=self._watch, name="grpo_jax peers", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the others where all is well; else tell them."""
        if self._count == 1:
            return
        if error is None or isinstance(error, Interrupted):  # which all processes raise together
            wait_for_all("the end of the run")
            self._over.set()
            return
        cause = self._cause(patient=EXCHANGE.match(str(error)) is not None)
        if cause is not None:
            self._leave(cause)
        with self._leaving:
            self._over.set()
        said = json.dumps({"host": socket.gethostname(), "text": _in_a_line(error)})
        patience = time.monotonic() + PARTING
        with suppress(jax.errors.JaxRuntimeError):  # nobody is left to be told
            self._client.key_value_set(f"grpo_jax/failed/{self._me}", said)
            while self._left() < self._count - 1 and time.monotonic() < patience:
                time.sleep(BEAT / 4)
        # At its exit jax would wait for processes that are gone, and then abort.
        atexit.register(_exit, 130 if isinstance(error, KeyboardInterrupt) else 1 + _is_request(error))

    def _left(self) -> int:
        return len(self._client.key_value_dir_get("grpo_jax/gone/"))

    def _watch(self) -> None:
        life = _Life(self._me)
        while not self._over.wait(BEAT):
            cause = self._look(life)
            if cause is not None:
                self._leave(cause)

    def _cause(self, patient: bool) -> str | None:
        """Why another process ended, if one has; an exchange that broke is a sign that one will be missed."""
        life = _Life(self._me)
        for _ in range(SILENT + 5 if patient else 1):
            cause = self._look(life)
            if cause is not None:
                return cause
            if patient:
                time.sleep(BEAT)
        return None

    def _look(self, life: "_Life") -> str | None:
        """Give a sign of life and look for the others; what to say where one has ended."""
        try:
            self._client.key_value_set(f"grpo_jax/alive/{self._me}", str(time.monotonic()), allow_overwrite=True)
            failed = dict(self._client.key_value_dir_get("grpo_jax/failed/"))
            alive = dict(self._client.key_value_dir_get("grpo_jax/alive/"))
        except jax.errors.JaxRuntimeError:
            failed, alive = {}, {"grpo_jax/alive/0": "its service does not answer"}
        for place, said in sorted(failed.items()):
            told = json.loads(said)
            return f"process {_number(place)} on {told['host']}: {told['text']}"
        signs = {_number(place): sign for place, sign in alive.items()}
        dead = life.missed({number: signs.get(number, "none yet") for number in range(self._count)})
        return f"process {dead} died: no sign of life for {SILENT * BEAT:.0f} s" if dead is not None else None

    def _leave(self, cause: str) -> None:
        """End this process for another's sake: its main thread may be waiting for what never comes."""
        with self._leaving:
            if self._over.is_set():
                return
            for settle in self._settle:
                settle(PARTING / 2)
            safe = what_is_safe(self._directory)
            print("\n".join([f"error: {cause}", *([safe] if safe else [])]), file=sys.stderr, flush=True)
            try:
                self._client.key_value_set(f"grpo_jax/gone/{self._me}", "")
            finally:
                _exit(1)


class _Life:
    """How many looks ago each other process gave a new sign of life."""

    def __init__(self, me: int):
        self._me = me
        self._signs: dict[int, str] = {}
        self._looks: dict[int, int] = {}

    def missed(self, signs: dict[int, str]) -> int | None:
        """A process that has given none for too long, if there is one."""
        for number, sign in signs.items():
            same = self._signs.get(number) == sign
            self._looks[number] = self._looks.get(number, 0) + 1 if same else 0
        self._signs = signs
        return next((n for n, looks in sorted(self._looks.items()) if n != self._me and looks >= SILENT), None)


def _number(place: str) -> int:
    return int(place.rpartition("/")[2])


def _in_a_line(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"[:500]


def _is_request(error: BaseException) -> bool:
    return isinstance(error, ValueError) and no_space(error) is None


def _exit(status: int) -> None:
    """At once, past what other handlers would wait for."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
