"""What compiles, when, and beside what: each program once, errors where they are waited for, an end that is clean."""

import subprocess
import sys
import threading
import time

import pytest
from fast_set import slow_but

from grpo_jax.rollout import ContinuousEngine, Sampling, engine
from grpo_jax.rollout.programs import Programs
from grpo_jax.rollout.shapes import ladder
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt

ASKED = [Prompt(0, (5, 6, 7)), Prompt(1, (8,))]


class Lowered:
    """Stands for what XLA compiles."""

    def __init__(self, key, log):
        self.key, self.log = key, log

    def compile(self):
        self.log.append((self.key, threading.current_thread().name))
        time.sleep(0.002)
        if self.key[0] == "segment" and "fail" in self.log:
            raise RuntimeError("no memory")
        return self.key


@pytest.fixture
def made(monkeypatch):
    """Programs that compile nothing, and the log of what they would have."""
    model, params = tiny_model()
    log: list = []
    monkeypatch.setattr(Programs, "lower", lambda self, key: Lowered(key, log))
    shapes = ladder(4, 8, 256, None, 1)
    return Programs(model, Sampling().rules, shapes, 16, model.decode_view(params)), log


def test_each_program_is_compiled_once_beside_who_asked(made):
    compiled, log = made
    compiled.prepare()
    assert log[0] == (("prefill",), threading.current_thread().name)
    last = compiled.keys[-1]
    assert compiled(*last) == last
    compiled.prepare()
    compiled.wait()
    assert sorted(map(str, compiled.keys)) == sorted(str(key) for key, _ in log)
    assert any(thread.startswith("compile-") for _, thread in log)
    with pytest.raises(ValueError, match="none of the shapes"):
        compiled("segment", "another")


def test_they_come_in_the_order_of_a_call(made):
    keys = made[0].keys
    first = made[0]._ladder.first
    assert keys[:3] == (("prefill",), ("open", first), ("segment", first))
    reached = {first}
    for name, *what in keys[3:]:
        if name == "segment":
            assert what[0] in reached
        else:
            assert what[0] in reached
            reached.add(what[1])
    assert reached == set(made[0]._ladder.shapes)


def test_an_error_is_raised_where_the_program_is_needed(made):
    compiled, log = made
    log.append("fail")
    compiled.prepare()
    with pytest.raises(RuntimeError, match="no memory"):
        compiled.wait()
    log.remove("fail")
    compiled.wait()


def test_programs_of_old_kinds_of_calls_are_given_back(monkeypatch):
    model, params = tiny_model()
    monkeypatch.setattr(engine, "PROGRAMS", {})
    monkeypatch.setattr(engine, "MOST_KINDS", 2)
    monkeypatch.setattr(Programs, "lower", lambda self, key: Lowered(key, []))
    view = model.decode_view(params)
    sampler, rules = ContinuousEngine(model, 16), Sampling().rules
    made = [sampler._compiled(rules, sampler.shapes(n, 2, 8), 16, view) for n in (1, 2, 1, 3, 1)]
    assert made[0] is made[2] is made[4] and len(engine.PROGRAMS) == 2
    assert sampler._compiled(rules, sampler.shapes(2, 2, 8), 16, view) is not made[1]


def test_what_never_compiled_for_an_engine_is_not_waited_for_by_the_next(monkeypatch):
    model, params = tiny_model()
    monkeypatch.setattr(engine, "PROGRAMS", {})
    monkeypatch.setattr(Programs, "lower", lambda self, key: Lowered(key, []))
    monkeypatch.setattr(Programs, "prepare", lambda self: None)
    view, rules = model.decode_view(params), Sampling().rules
    first, second = (ContinuousEngine(model, 16, ahead=True) for _ in range(2))
    first._compiled(rules, first.shapes(2, 2, 8), 16, view).lower = lambda key: Lowered(key, ["fail"])
    second._compiled(rules, second.shapes(1, 2, 8), 16, view)
    second.wait()
    with pytest.raises(RuntimeError, match="no memory"):
        first.wait()


ENDINGS = {"the script ends": "", "Ctrl-C": "raise KeyboardInterrupt", "an error": "raise RuntimeError('mine')"}


@pytest.mark.parametrize("how", slow_but(("Ctrl-C",), ENDINGS))
def test_a_process_ends_cleanly_while_others_compile(how):
    script = f"""
import threading
from grpo_jax.rollout import ContinuousEngine, Sampling
from grpo_jax.testing import tiny_model
from grpo_jax.types import Prompt
model, params = tiny_model()
engine = ContinuousEngine(model, 16, ahead=True)
engine.generate(params, [Prompt(0, (5, 6))] * 2, num_samples=8, sampling=Sampling(max_new_tokens=200), seed=0, step=0,
                limits=[1] * 16)
print(sum(t.name.startswith("compile-") for t in threading.enumerate()), flush=True)
{ENDINGS[how]}
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert int(done.stdout) > 0, "they were done before the end"
    assert done.returncode == (0 if not ENDINGS[how] else 1 if "Runtime" in ENDINGS[how] else -2), done.stderr
    assert done.stderr.count("Traceback") == (1 if ENDINGS[how] else 0)
