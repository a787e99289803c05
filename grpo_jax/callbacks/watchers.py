"""All callbacks of a run, as the loop calls them: what one of them does wrong costs neither the run nor the others."""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.callbacks import Callback, Evaluation, Run, Step
from grpo_jax.callbacks.table import build
from grpo_jax.config import TrainConfig
from grpo_jax.functions import words_of
from grpo_jax.mesh import from_first, is_first
from grpo_jax.rundir import no_space


class Watchers:
    """The callbacks of a run, called on the first process; what one of them decides is told to all (contract 12).

    Before the first step an error is the user's to mend, and ends the run. After that a callback that raises is warned
    of, once for each of its methods, and the run goes on: it looks on, and hours of training do not hang on it. A
    ValueError of one that the config names still ends the run, as it is about the config.
    """

    def __init__(self, config: TrainConfig, directory: Path, own: Sequence[Callback]):
        """Make those of the config; ``own`` come behind them."""
        self._named = build(config, directory, self.warn) if is_first() else []
        self._all = [*self._named, *own] if is_first() else []
        self._run: Run | None = None
        self._said: set[tuple[int, str]] = set()

    def __enter__(self) -> "Watchers":
        """Nothing is to be opened yet."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Close each, the last one first, whatever the others do; a full disk that ended the run is not said again."""
        for callback in reversed(self._all):
            try:
                callback.close()
            except Exception as another:
                if no_space(error) is None or no_space(another) is None:
                    self.warn(_raised(callback, "close", another, "all else is closed"))

    def start(self, run: Run) -> bool:
        """Tell of the run; whether it had already ended."""
        self._run = run
        return self._agreed([self._ends(c, "on_start", c.on_start(run)) for c in self._all])

    def begin(self, step: int) -> None:
        """What is warned of from here on is about this step."""
        if self._run is not None:
            self._run.course.step = step

    def step(self, step: Step) -> bool:
        """Tell of a step; whether the run ends after it."""
        return self._ask("on_step", step)

    def evaluation(self, evaluation: Evaluation) -> bool:
        """Tell of an evaluation; whether the run ends after it."""
        return self._ask("on_eval", evaluation)

    def warn(self, text: str) -> None:
        """Tell of something to warn of."""
        for callback in self._all:
            try:
                callback.on_warning(text)
            except Exception as error:  # not by another warning, which it would raise at again
                if self._first(callback, "on_warning"):
                    print(f"warning: {_raised(callback, 'on_warning', error)}", file=sys.stderr, flush=True)

    def state(self) -> dict[str, Any]:
        """What the callbacks must know to go on from here, by the name of their class."""
        states = {_name(c): self._shielded(c, "state", partial(_kept, c)) for c in self._all}
        return {name: state for name, state in states.items() if state is not None}

    def end(self, summary: dict[str, Any]) -> None:
        """Tell of the end."""
        for callback in self._all:
            self._shielded(callback, "on_end", partial(callback.on_end, summary))

    def _ask(self, method: str, told: Any) -> bool:
        answers = [self._shielded(c, method, partial(getattr(c, method), told)) for c in self._all]
        return self._agreed([self._ends(c, method, answer) for c, answer in zip(self._all, answers, strict=True)])

    def _agreed(self, decisions: list[bool]) -> bool:
        stopped = self._run is not None and self._run.course.stop
        return bool(from_first(np.asarray(any(decisions) or stopped)))

    def _ends(self, callback: Callback, method: str, answer: Any) -> bool:
        """Whether the answer is True; any other but False and None is a slip, and ends nothing."""
        if answer is None or isinstance(answer, bool | np.bool_):
            return bool(answer)
        if self._first(callback, f"{method}'s answer"):
            self.warn(
                f"{_name(callback)}.{method} returned {type(answer).__name__}, which ends nothing; return True to end "
                "the run, or None"
            )
        return False

    def _shielded(self, callback: Callback, method: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            if isinstance(error, ValueError) and callback in self._named:
                raise
            if self._first(callback, method):
                self.warn(_raised(callback, method, error))
            return None

    def _first(self, callback: Callback, what: str) -> bool:
        new = (id(callback), what) not in self._said
        self._said.add((id(callback), what))
        return new


def _kept(callback: Callback) -> Any:
    """What a checkpoint holds of a callback's state; one that JSON does not hold raises here, not in the save."""
    return json.loads(json.dumps(callback.state()))


def _raised(callback: Callback, method: str, error: Exception, still: str = "the run goes on without it") -> str:
    return f"{_name(callback)}.{method} raised {type(error).__name__}: {words_of(error)}; {still}; repair the callback"


def _name(callback: Callback) -> str:
    return type(callback).__name__
