"""A completion is hostile input: it costs its own row, within a time that is known beforehand."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.rewards import RewardPool
from grpo_jax.rewards.scores import few

from . import hostile

HOSTILE = Path(hostile.__file__)
PATIENCE = 1.5
"""Seconds in which a worker surely answers, also on a machine that others use too."""

TIMED_OUT = ["spin", "swallow", "regex", "sleep", "stop"]
DIED = {
    "exit": "ended with exit status 7",
    "segfault": "died of signal SIGSEGV",
    "memory": "ran out of its memory of 512 MB",
}


def score(pool, completions, **columns):
    return pool.score(completions, completions, [[1]] * len(completions), columns)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within(condition, seconds=120.0):
    """Whether it comes true before everybody has lost patience."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def gone(pid):
    return within(lambda: not alive(pid))


def busy_soon(pid):
    """Whether what a keeper keeps comes to compute: a tenth of a second of processor time more than it has had."""
    (kept,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def ticks():
        words = Path(f"/proc/{kept}/stat").read_text().rpartition(")")[2].split()
        return int(words[11]) + int(words[12])

    enough = ticks() + os.sysconf("SC_CLK_TCK") // 10
    return within(lambda: ticks() >= enough)


@pytest.fixture(scope="module")
def obey():
    with RewardPool([f"{HOSTILE}:obey"], timeout_seconds=2.0, memory_limit_mb=512) as pool:
        yield pool


@pytest.fixture(scope="module")
def impatient():
    with RewardPool([f"{HOSTILE}:obey"], timeout_seconds=PATIENCE) as pool:
        yield pool


@pytest.mark.parametrize(
    "order",
    [pytest.param(order, marks=[] if order in ("swallow", "stop") else pytest.mark.slow) for order in TIMED_OUT],
)
def test_one_row_out_of_time_loses_only_itself(impatient, order):
    begun = time.monotonic()
    scores = score(impatient, ["abc", order])
    took = time.monotonic() - begun
    np.testing.assert_array_equal(scores.rewards, [[3, np.nan]])
    assert scores.timeout_counts == (1,) and scores.crash_counts == (0,)
    assert len(scores.warnings) == 1 and "reward 'obey', row 1: no answer within" in scores.warnings[0]
    assert took >= PATIENCE


@pytest.mark.parametrize("order", DIED)
def test_one_row_that_kills_the_process_loses_only_itself(obey, order):
    completions, place = ["ab"] * 7, 4
    completions[place] = order
    scores = score(obey, completions)
    wanted = np.full((1, 7), 2.0)
    wanted[0, place] = np.nan
    np.testing.assert_array_equal(scores.rewards, wanted)
    assert scores.crash_counts == (1,) and scores.timeout_counts == (0,)
    assert scores.warnings == (f"reward 'obey', row {place}: its process {DIED[order]}, not scored",)


def test_several_hostile_rows(obey):
    scores = score(obey, ["exit", "a", "segfault", "ab", "memory", "spin", "abc", "exit"])
    np.testing.assert_array_equal(scores.rewards, [[np.nan, 1, np.nan, 2, np.nan, np.nan, 3, np.nan]])
    assert scores.crash_counts == (4,) and scores.timeout_counts == (1,)
    assert len(scores.warnings) == 4 and "2 more such losses" in scores.warnings[-1]


def test_other_functions_are_not_held_back():
    with RewardPool([f"{HOSTILE}:obey", "exact_match", f"{HOSTILE}:process_id"], timeout_seconds=PATIENCE) as pool:
        first = score(pool, ["a", "spin"], answer=["a", "a"])
        second = score(pool, ["a", "b"], answer=["a", "a"])
    np.testing.assert_array_equal(first.rewards[:2], [[1, np.nan], [1, 0]])
    np.testing.assert_array_equal(first.rewards[2], second.rewards[2])
    assert first.timeout_counts == (1, 0, 0)


@pytest.mark.parametrize(("rows", "order"), [(64, "spin"), pytest.param(512, "exit", marks=pytest.mark.slow)])
def test_when_all_rows_are_hostile_the_time_is_bounded(rows, order):
    with RewardPool([f"{HOSTILE}:obey"], timeout_seconds=0.25) as pool:
        scores = score(pool, [order] * rows)
        assert np.isnan(scores.rewards).all()
        assert scores.timeout_counts[0] + scores.crash_counts[0] == rows
        assert any("the time to try this batch again is spent" in message for message in scores.warnings)
        np.testing.assert_array_equal(score(pool, ["abcd"]).rewards, [[4.0]])


def test_a_function_too_slow_for_many_rows_is_asked_row_by_row():
    with RewardPool([f"{HOSTILE}:slow_for_many"], timeout_seconds=PATIENCE) as pool:
        scores = score(pool, ["a"] * 14)
    np.testing.assert_array_equal(scores.rewards, np.ones((1, 14)))
    assert scores.warnings == ()


def test_prints_and_reads_do_not_touch_the_protocol(obey, capfd):
    np.testing.assert_array_equal(score(obey, ["print", "read", "print"]).rewards, [[5, 0, 5]])
    out, err = capfd.readouterr()
    assert "99.0" not in out and err.count('{"rewards": [99.0]}') == 6


def test_a_huge_completion(obey):
    np.testing.assert_array_equal(score(obey, ["a" * 20_000_000, "b"]).rewards, [[20_000_000, 1]])


def test_what_the_reward_started_dies_with_it(tmp_path):
    note = tmp_path / "pid"
    with RewardPool([f"{HOSTILE}:leaves_a_child"], timeout_seconds=1.5) as pool:
        assert score(pool, ["a"], path=[str(note)]).timeout_counts == (1,)
    assert gone(int(note.read_text()))


def test_close_ends_the_workers():
    with RewardPool([f"{HOSTILE}:process_id", "exact_match"]) as pool:
        pid = int(score(pool, ["a"], answer=["a"]).rewards[0, 0])
        assert alive(pid)
    assert not alive(pid)
    pool.close()


def test_an_error_here_does_not_wait_for_a_worker_there():
    def fails(completions, **columns):
        raise RuntimeError("no")

    with RewardPool([f"{HOSTILE}:obey", fails], timeout_seconds=600.0) as pool:
        begun = time.monotonic()
        with pytest.raises(ValueError, match="reward 'fails', row 0: raised RuntimeError: no"):
            score(pool, ["spin"])
        assert time.monotonic() - begun < 600  # the worker's limit
    with RewardPool([f"{HOSTILE}:obey"], timeout_seconds=600.0) as pool:
        pid = pool._workers[0].all[0].pid
        threading.Thread(target=lambda: busy_soon(pid) and pool.close()).start()
        assert score(pool, ["spin"]).crash_counts == (1,)


PARENT = """
import os, sys, threading
from grpo_jax.rewards import RewardPool
pool = RewardPool([{spec!r}, {spec!r}], timeout_seconds=600.0)
pids = [worker.pid for each in pool._workers.values() for worker in each.all]
if {busy}:
    threading.Thread(target=pool.score, args=(["a"], ["regex"], [[1]], {{}}), daemon=True).start()
print(*pids, flush=True)
{then}
"""


@pytest.mark.parametrize("busy", [False, True])
def test_no_worker_outlives_a_parent_killed_with_9(busy):
    code = PARENT.format(spec=f"{HOSTILE}:obey", busy=busy, then="sys.stdin.read()")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        assert not busy or all(busy_soon(pid) for pid in pids)
        os.kill(parent.pid, signal.SIGKILL)
    assert all(gone(pid) for pid in pids)


def test_a_program_that_forgets_to_close_ends_quietly():
    code = PARENT.format(spec=f"{HOSTILE}:obey", busy=False, then="")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stderr == ""
    assert all(gone(int(word)) for word in done.stdout.split())


def test_ctrl_c_ends_scoring_and_leaves_no_worker(tmp_path):
    code = textwrap.dedent(
        """
        import sys
        from grpo_jax.rewards import RewardPool
        with RewardPool([sys.argv[1]], timeout_seconds=600.0) as pool:
            print(pool._workers[0].all[0].pid, flush=True)
            pool.score(["a"], ["spin"], [[1]], {})
        """
    )
    command = [sys.executable, "-c", code, f"{HOSTILE}:obey"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert busy_soon(pid)
        parent.send_signal(signal.SIGINT)
        _, err = parent.communicate(timeout=240)
    assert "KeyboardInterrupt" in err and parent.returncode != 0
    assert gone(pid)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import os; os._exit(3)", "its process ended with exit status 3 while loading"),
        ("raise SystemExit", "loading it raised SystemExit"),
        ("x = bytearray(4 * 2**30)", "its process ran out of its memory of 512 MB while loading"),
        ("def f(:", "raised SyntaxError"),
        ("print('hello')\ndef g(): pass", "has no function 'f'; use one of those it has: g"),
    ],
)
def test_a_reward_that_does_not_load(tmp_path, body, says):
    file = tmp_path / "mine.py"
    file.write_text(body)
    with pytest.raises(ValueError, match=says):
        RewardPool([f"{file}:f"], memory_limit_mb=512)


def test_many_losses_of_a_function_are_a_few_lines():
    losses = [f"row {row}" for row in range(5)]
    assert few("judge", losses[:3]) == losses[:3]
    assert few("judge", losses) == [*losses[:3], "reward 'judge': 2 more such losses in this batch"]
