"""Ctrl-C: the first asks, the second acts, and the handlers are as before afterwards."""

import contextlib
import os
import queue
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_jax.interrupt import Interrupt, Interrupted, command_to_go_on


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_only_asks(number, status, capfd):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
        ended = interrupt.ended(3, Path("runs/a"))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert isinstance(ended, Interrupted) and isinstance(ended, KeyboardInterrupt)
    assert (ended.step, ended.status) == (3, status)
    assert "after step 3" in str(ended) and "runs/a" in str(ended)
    said, patience = "", time.monotonic() + 120
    while f"{number.name}: the step at hand" not in said:
        assert time.monotonic() < patience
        said += capfd.readouterr().err


def test_what_it_says_goes_above_a_live_display(capfd):
    said = queue.SimpleQueue()
    with contextlib.redirect_stderr(SimpleNamespace(write=said.put, flush=lambda: None)), Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        assert "once more stops at once" in said.get(timeout=120)
    assert capfd.readouterr().err == ""


def test_signals_that_come_together_are_one_request():
    with Interrupt() as interrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert interrupt.ended(1, Path("run")).status == 130


def test_the_second_does_what_it_would_do_without_us(monkeypatch):
    monkeypatch.setattr("grpo_jax.interrupt.TOGETHER", 0.0)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught, Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is before


def test_off_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def look():
        with Interrupt() as interrupt:
            seen.append((signal.getsignal(signal.SIGINT) is before, interrupt.requested))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [(True, False)]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["scripts/train.py"], "python scripts/train.py --output_dir 'runs/a b'"),
        (["/usr/local/bin/grpo-jax", "c.toml"], "grpo-jax c.toml --output_dir 'runs/a b'"),
        (["t.py", "--output_dir=x", "--steps", "3"], "python t.py --output_dir=x --steps 3"),
        (["t.py", "--output_dir", "x y"], "python t.py --output_dir 'x y'"),
    ],
)
def test_the_command_that_goes_on(command, expected):
    assert command_to_go_on(command, Path("runs/a b")) == expected
