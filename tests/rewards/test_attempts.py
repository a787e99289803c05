"""How a batch is asked: in which calls, under which limits, and what is asked again; no process is started here."""

import signal
import threading
import time

import numpy as np
import pytest

from grpo_jax.rewards.attempts import CHUNK, RETRY_FACTOR, Attempts, Piece, Workers, chunks
from grpo_jax.rewards.call import Batch
from grpo_jax.rewards.process import WorkerDied
from grpo_jax.rewards.scores import Part
from grpo_jax.rewards.state import TrainerState

TIMEOUT = 100.0


class Worker:
    """Answers with the number in each completion; one that is in ``hostile`` makes its call fail."""

    def __init__(self, hostile=(), failure=TimeoutError, fails=None):
        self.start_seconds, self.calls = 0.0, []
        self.hostile, self.failure, self.fails = set(hostile), failure, fails

    def ensure(self):
        pass

    def hint(self, problem):
        return ""

    def kill(self):
        pass

    close = kill

    def ask(self, request, limit):
        rows = [int(text) for text in request]
        self.calls.append((rows, limit))
        if self.hostile & set(rows):
            raise self.failure()
        if self.fails in rows:
            return {"problem": "raised", "row": rows.index(self.fails), "trace": ""}
        return {"rewards": [float(row) for row in rows], "extra": {}, "metrics": {}}


@pytest.fixture(autouse=True)
def texts_as_they_are(monkeypatch):
    monkeypatch.setattr("grpo_jax.rewards.attempts.encode", lambda batch: list(batch.completions))


def test_rows_of_a_batch_come_with_their_columns_and_the_state():
    texts = [str(n) for n in range(5)]
    batch = Batch(texts, texts[::-1], [[n] for n in range(5)], {"answer": [7, 8, 9, 10, 11]}, TrainerState(max_steps=3))
    part = batch.rows(1, 3)
    assert (part.prompts, part.completions, part.completion_ids) == (["1", "2"], ["3", "2"], [[1], [2]])
    assert part.columns == {"answer": [8, 9]} and part.state == TrainerState(max_steps=3) and len(part) == 2


def asked(worker, count, cut=False):
    """The part, or the error, and what the worker was called with."""
    texts = [str(n) for n in range(count)]
    batch = Batch(texts, texts, [[1]] * count)
    workers = Workers(lambda: worker, 1)
    attempts = Attempts(workers, "f", TIMEOUT, threading.Event())
    try:
        attempts.ask(chunks(0, batch) if cut else [Piece(0, batch, texts)])
        return Part.joined(count, attempts.parts())
    finally:
        workers.close()


@pytest.mark.parametrize("cut", [False, True])
def test_the_limit_is_for_so_many_completions_and_not_for_a_call_of_any_size(cut):
    worker = Worker()
    part = asked(worker, 400, cut)
    np.testing.assert_array_equal(part.values, np.arange(400))
    sizes = [CHUNK] * 25 if cut else [400]
    assert [(len(rows), limit) for rows, limit in worker.calls] == [(n, TIMEOUT * n / CHUNK) for n in sizes]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("failure", [TimeoutError, WorkerDied])
def test_only_what_is_at_fault_is_lost_and_nothing_is_asked_more_than_three_times(cut, failure):
    worker = Worker({3, 37}, failure)
    part = asked(worker, 50, cut)
    expected = np.arange(50.0)
    expected[[3, 37]] = np.nan
    np.testing.assert_array_equal(part.values, expected)
    assert (part.timeouts, part.crashes) == ((2, 0) if failure is TimeoutError else (0, 2))
    assert [warning.partition(":")[0] for warning in part.warnings] == ["reward 'f', row 3", "reward 'f', row 37"]
    times = [sum(n in rows for rows, _ in worker.calls) for n in range(50)]
    assert times == [
        1 if cut and n in (*range(16, 32), 48, 49) else 2 + (not cut and n // 16 not in (1, 3)) for n in range(50)
    ]
    assert all(limit <= TIMEOUT for rows, limit in worker.calls if len(rows) <= CHUNK)


def test_where_nothing_answers_the_rest_is_given_up_and_counted(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Hangs(Worker):
        def ask(self, request, limit):
            clock[0] += limit
            return super().ask(request, limit)

    part = asked(Hangs(range(640)), 640, True)
    assert np.isnan(part.values).all() and part.given_up + part.timeouts == 640
    assert clock[0] <= (RETRY_FACTOR + 1) * TIMEOUT
    assert (
        part.said_of("f")[-1]
        == f"reward 'f': the time to try this batch again is spent, {part.given_up} are not scored"
    )
    hostile = [n for n in range(640) if n // CHUNK % 2]  # what answers is asked to the end
    part = asked(Hangs(hostile), 640, True)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(part.values)), hostile)


def test_what_raised_is_not_asked_again_and_neither_is_the_rest():
    worker = Worker(fails=20)
    with pytest.raises(ValueError, match="reward 'f', row 20: raised"):
        asked(worker, 160, True)
    assert [rows[0] for rows, _ in worker.calls] == [0, 16]


def test_a_signal_that_another_thread_was_given_ends_the_wait():
    """The system may give a process's signal to any thread, and the main one alone acts on it."""
    waits, released, ended = threading.Event(), threading.Event(), threading.Event()

    class Signalled(Worker):
        def ask(self, request, limit):
            waits.wait(240)
            time.sleep(0.3)  # until the main thread does: earlier, it would meet the signal while it runs
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            released.wait(240)
            ended.set()
            return super().ask(request, limit)

    workers = Workers(lambda: Signalled(), 1)
    attempts = Attempts(workers, "f", TIMEOUT, threading.Event())
    try:
        attempts.ask([Piece(0, Batch(["0"], ["0"], [[1]]), ["0"])])
        with pytest.raises(KeyboardInterrupt):
            waits.set()
            attempts.parts()
        assert not ended.is_set()
    finally:
        released.set()
        workers.close()
