"""What a callback does wrong costs neither the run nor the other callbacks; what ends a run, and what does not."""

import errno

import numpy as np
import pytest

from grpo_jax.callbacks import Callback
from grpo_jax.callbacks import watchers as module
from grpo_jax.callbacks.watchers import Watchers

from .synthetic import config_for, evaluation_of, run_of, step_of


class Seen(Callback):
    """Remembers what it was told, and answers and raises what it is given for a method."""

    def __init__(self, seen, name, **gives):
        self.seen, self.name, self.gives = seen, name, gives

    def _told(self, method, *told):
        self.seen.append((self.name, method, *(t for t in told if isinstance(t, str))))
        given = self.gives.get(method)
        if isinstance(given, BaseException):
            raise given
        return given

    def on_start(self, run):
        self.run = run
        return self._told("on_start")

    def on_step(self, step):
        return self._told("on_step")

    def on_eval(self, evaluation):
        return self._told("on_eval")

    def on_warning(self, text):
        return self._told("on_warning", text)

    def on_end(self, summary):
        return self._told("on_end")

    def close(self):
        return self._told("close")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Watchers of a run that has started: own callbacks, and some in the place of those that a config names."""

    def make(*own, named=()):
        monkeypatch.setattr(module, "build", lambda config, directory, warn: list(named))
        watchers = Watchers(config_for(tmp_path), tmp_path, own)
        assert not watchers.start(run_of(tmp_path))
        return watchers

    return make


def test_what_raises_is_warned_of_once_and_the_others_are_told(made):
    seen = []
    broken = {m: RuntimeError("full\nof it") for m in ("on_step", "on_eval", "on_end", "close")}
    with made(Seen(seen, "bad", **broken), Seen(seen, "good")) as watchers:
        assert not watchers.step(step_of(1)) and not watchers.step(step_of(2))
        assert not watchers.evaluation(evaluation_of(2, 0.5))
        watchers.end({})
    of_good = [told[1] for told in seen if told[0] == "good"]
    assert [m for m in of_good if m != "on_warning"] == ["on_start", "on_step", "on_step", "on_eval", "on_end", "close"]
    warned = [told[2] for told in seen if told[:2] == ("good", "on_warning")]
    assert warned[0].startswith("Seen.on_step raised RuntimeError: full of it; the run goes on")
    assert [text.split()[0] for text in warned] == ["Seen.on_step", "Seen.on_eval", "Seen.on_end", "Seen.close"]


def test_a_state_that_no_checkpoint_can_hold_costs_no_run(made):
    seen = []
    bad, good = Seen(seen, "bad"), type("Good", (Seen,), {"state": lambda self: (1, 2)})(seen, "good")
    bad.state = object
    assert made(bad, good).state() == {"Good": [1, 2]}
    assert [told[2].split(":")[0] for told in seen if told[1] == "on_warning"] == ["Seen.state raised TypeError"] * 2


def test_a_warning_that_cannot_be_taken_goes_to_the_terminal(made, capsys):
    seen = []
    watchers = made(Seen(seen, "bad", on_warning=OSError("no")), Seen(seen, "good"))
    watchers.warn("a")
    watchers.warn("b")
    assert [told[2] for told in seen if told[:2] == ("good", "on_warning")] == ["a", "b"]
    assert capsys.readouterr().err.count("Seen.on_warning raised OSError: no") == 1


def test_all_are_closed_the_last_first(made):
    seen = []
    with made(Seen(seen, "b", close=ValueError("no")), Seen(seen, "c"), named=[Seen(seen, "a")]):
        seen.clear()
    assert [told[0] for told in seen if told[1] == "close"] == ["c", "b", "a"]


def test_a_full_disk_that_ends_the_run_is_said_once(made):
    seen = []
    with pytest.raises(OSError), made(Seen(seen, "good"), Seen(seen, "bad", close=OSError(errno.ENOSPC, "full"))):
        raise OSError(errno.ENOSPC, "full")
    assert [told for told in seen if told[1] == "on_warning"] == []


def test_an_error_about_the_config_or_before_the_first_step_ends_the_run(made):
    watchers = made(named=[Seen([], "config", on_eval=ValueError("eval.stop.metric: no"))])
    with pytest.raises(ValueError, match="eval.stop.metric"):
        watchers.evaluation(evaluation_of(1, 0.5))
    with pytest.raises(RuntimeError, match="early"):
        made(Seen([], "own", on_start=RuntimeError("early")))
    with pytest.raises(KeyboardInterrupt):
        made(Seen([], "own", on_step=KeyboardInterrupt())).step(step_of(1))


@pytest.mark.parametrize(
    ("answer", "ends"), [(True, True), (np.True_, True), (None, False), (False, False), (1, False), ("no", False)]
)
def test_only_true_ends_a_run(made, answer, ends):
    seen = []
    watchers = made(Seen(seen, "own", on_step=answer))
    assert [watchers.step(step_of(n)) for n in (1, 2)] == [ends, ends]
    slips = [told[2] for told in seen if told[1] == "on_warning"]
    assert len(slips) == (answer in (1, "no") and answer is not True and not isinstance(answer, np.bool_))
    assert all("which ends nothing; return True to end the run" in text for text in slips)


def test_a_run_can_be_stopped_from_anywhere(made):
    own = Seen([], "own")
    watchers = made(own)
    assert not watchers.step(step_of(1))
    own.run.stop()
    assert watchers.step(step_of(2)) and watchers.evaluation(evaluation_of(2, 0.5))


def test_what_was_made_before_one_that_cannot_be_is_closed(tmp_path, monkeypatch):
    from grpo_jax.callbacks import table

    closed = []
    monkeypatch.setattr(table.Curves, "close", lambda self: closed.append("curves"))
    monkeypatch.setattr(table, "Terminal", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        table.build(config_for(tmp_path), tmp_path, print)
    assert closed == ["curves"]
