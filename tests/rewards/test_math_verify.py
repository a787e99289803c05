"""The judge of mathematics: what is equal, what is bounded, and what happens when its library fails."""

import importlib
import importlib.util

import pytest

from grpo_jax.rewards import RewardPool, math_verify

needs_library = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs grpo_jax[math]")


def judge(wanted, said, **options):
    (reward,) = math_verify(["?"], [said], [[]], answer=[wanted], **options)
    return reward


@needs_library
@pytest.mark.parametrize(
    ("wanted", "said", "reward"),
    [
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"\frac{1}{2}", r"The final answer is $\frac{2}{4}$.", 1.0),
        (r"so \boxed{\frac{1}{2}}", r"\boxed{\frac12}", 1.0),
        ("3\\sqrt{2}", r"\boxed{\sqrt{18}}", 1.0),
        ("x^2 + 2x + 1", r"\boxed{(x+1)^2}", 1.0),
        ("1,200", r"\boxed{1200}", 1.0),
        ("72", "6 * 12\n#### 72", 1.0),
        ("72", "<think>\\boxed{3}</think><answer>72.0</answer>", 1.0),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1.0),
        (r"\text{North}", r"\boxed{north}", 1.0),
        ("(1,2)", r"\boxed{[1, 2]}", 0.0),
        ("72", r"\boxed{73}", 0.0),
        ("72", r"72 or \boxed{73}", 0.0),
        ("72", r"\boxed{}", 0.0),
        ("72", "####", 0.0),
        ("72", "", 0.0),
        ("", r"\boxed{72}", None),
        (None, r"\boxed{72}", None),
    ],
)
def test_verdicts(wanted, said, reward):
    assert judge(wanted, said) == reward
    assert judge(wanted, [{"role": "assistant", "content": said}]) == reward


HOSTILE = [
    r"\boxed{9^{9^{9}}}",
    r"\boxed{" + "(" * 140 + ")" * 140 + "}",
    "9**9**9**9",
    r"\boxed{" + "9" * 100_000 + "}",
    "\\frac{" * 150,
    "$" * 100_000,
    "\ud800\0",
]


@needs_library
def test_hostile_answers_are_wrong_within_the_limits_of_a_worker():
    said = [r"\boxed{10/2}", *HOSTILE, "The answer is 5."]
    with RewardPool(["math_verify"], 60.0, options={"math_verify": {"timeout_seconds": 1}}) as pool:
        scores = pool.score(["?"] * 9, said, [[1]] * 9, {"answer": ["5"] * 9})
    assert scores.rewards.tolist() == [[1.0, *[0.0] * 7, 1.0]] and scores.warnings == ()


def test_what_is_the_same_or_too_long_is_not_parsed(monkeypatch):
    def refuse(*texts):
        raise AssertionError(f"parsed {texts}")

    module = importlib.import_module("grpo_jax.rewards.math_verify")
    monkeypatch.setattr(module, "_comparison", lambda seconds: refuse)
    assert judge(r"\dfrac{1}{2}", r"\boxed{ \frac{1}{2} }") == 1.0
    assert judge("1" * 400, r"\boxed{" + "1" * 400 + "}") == 0.0
    assert judge("1" * 400, r"\boxed{" + "1" * 400 + "}", max_answer_chars=400) == 1.0
    assert judge("7", "7") == 1.0
    with pytest.raises(AssertionError, match="parsed"):
        judge("7", r"\boxed{14/2}")


@needs_library
@pytest.mark.parametrize(("broken", "reward"), [("parse", None), ("verify", 0.0)])
def test_its_timeout_is_no_exception_and_kills_nothing(monkeypatch, broken, reward):
    import math_verify as library
    from math_verify.errors import TimeoutException

    assert not issubclass(TimeoutException, Exception)

    def late(*arguments, **options):
        raise TimeoutException("late")

    monkeypatch.setattr(library, broken, late)
    assert judge("7", r"\boxed{14/2}") == reward
    assert judge("7", r"\boxed{7}") == 1.0


def test_without_the_package_the_error_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package math-verify, .*; pip install grpo_jax\[math\]"):
        math_verify([], [], [], answer=[])
