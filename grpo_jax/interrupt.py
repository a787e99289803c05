"""Ctrl-C and SIGTERM: the first lets the step at hand end and be saved, a second one acts at once.

How a loop uses it; ``Interrupted`` is raised once, after everything is on the disk:

    with Interrupt() as interrupt:
        for step in ...:
            ...  # sample, train, log, evaluate, save when it is time
            if interrupt.requested and step + 1 < steps:
                save(step + 1); store.wait()
                raise interrupt.ended(step + 1, directory)

A look at ``requested`` before the first step ends a run that has sampled nothing yet: ``ended(0, directory)``.
On several processes the answer must be everyone's, since the signal reaches each at another time:
``bool(process_allgather(np.array(interrupt.requested)).any())``.
"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What a terminal sends for Ctrl-C, and what a scheduler sends before it takes the machine away."""


TOGETHER = 1.0
"""Seconds in which signals are one request: launchers pass on what the terminal has sent to all of its group anyway."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to end, and has saved what it had.

    Attributes:
        summary: what happened, in words.
        step: rollouts trained on and saved; 0 when there was nothing to save.
        directory: of the run.
        status: exit status of a command that ends so: 128 and the signal's number.
    """

    def __init__(self, step: int, directory: Path, number: int = signal.SIGINT) -> None:
        """Keep where the run can go on from."""
        self.summary = f"interrupted after step {step}, which is saved" if step else "interrupted before the first step"
        super().__init__(f"{self.summary}; output_dir = {str(directory)!r} goes on from there")
        self.step, self.directory, self.status = step, directory, 128 + number


class Interrupt:
    """A context in which the first SIGINT or SIGTERM only asks; leaving it restores what the signals did before.

    Off the main thread, where Python allows no handlers, it changes nothing and ``requested`` stays False.
    """

    def __init__(self) -> None:
        """Nothing is installed yet; `with` does it."""
        self._number: int | None = None
        self._asked = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Put the earlier handlers back."""
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def requested(self) -> bool:
        """Whether the run was asked to end."""
        return self._number is not None

    def ended(self, step: int, directory: Path) -> Interrupted:
        """What to raise once step ``step`` is saved (0: nothing was trained on yet)."""
        return Interrupted(step, directory, self._number or signal.SIGTERM)

    def _ask(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested:
            if now - self._asked > TOGETHER:  # a second one does what it would do without us
                self.__exit__()
                os.kill(os.getpid(), number)
            return
        self._number, self._asked = number, now
        name = signal.Signals(number).name
        text = f"\n{name}: the step at hand is finished and saved; once more stops at once and loses it"
        # A thread, since print is not safe in a handler; sys.stderr, which a live display puts above itself.
        threading.Thread(target=lambda: print(text, file=sys.stderr, flush=True), daemon=True).start()


def command_to_go_on(command: Sequence[str], directory: Path) -> str:
    """The command line that goes on with a run.

    Args:
        command: the one that started it, as ``sys.argv`` has it.
        directory: of the run.

    >>> command_to_go_on(["scripts/train.py", "mine.toml", "--steps", "9"], Path("runs/mine-1"))
    'python scripts/train.py mine.toml --steps 9 --output_dir runs/mine-1'
    """
    program, *arguments = command
    start = ["python", program] if program.endswith(".py") else [Path(program).name]
    named = any(argument == "--output_dir" or argument.startswith("--output_dir=") for argument in arguments)
    return shlex.join([*start, *arguments, *([] if named else ["--output_dir", str(directory)])])
