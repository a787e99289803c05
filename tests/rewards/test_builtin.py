import doctest
import importlib
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rewards import REWARDS, resolve, reward_name
from grpo_jax.rewards.answers import completion_text, final_answer, marked_answer, normalise

OPTIONS: dict[str, dict] = {
    "soft_overlong": {"max_completion_len": 40},
    "cosine_length": {"max_completion_len": 40},
    "regex": {"pattern": "^.?[0-9]+$"},
}
MODULES = ["grpo_jax.rewards"]
MODULES += [f"grpo_jax.rewards.{name}" for name in ("answers", "lookup", "state", *REWARDS)]
CHEAP = [name for name in REWARDS if name != "math_verify"]


def score(name, completions, ids=None, **columns):
    function = resolve(name, **(OPTIONS.get(name, {}) | columns.pop("options", {})))
    count = len(completions)
    given = {"answer": ["?"] * count, "nums": [[1, 2]] * count, "target": [3] * count} | columns
    ids = [[1]] * count if ids is None else ids
    return function(prompts=["?"] * count, completions=completions, completion_ids=ids, **given)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    if module.endswith("math_verify"):
        pytest.importorskip("math_verify")
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 0 and failed == 0


def test_every_builtin_has_a_file_and_its_name():
    for name, function in REWARDS.items():
        assert function.__name__ == name and function.__module__ == f"grpo_jax.rewards.{name}"


text = st.text(alphabet=st.characters(codec=None, exclude_categories=[]))
markers = st.sampled_from(
    ["####", "\\boxed{", "}", "{", "=", "Answer:", ".", ",", "$", "\n", "1", "-", "000", "\ud800", "\0", " "]
)
hostile = text | st.lists(markers, max_size=30).map("".join)


@pytest.mark.parametrize("name", CHEAP)
@settings(max_examples=100, deadline=1000)
@given(completion=hostile, answer=hostile | st.none() | st.integers() | st.floats(), length=st.integers(0, 60))
def test_any_string_gives_a_finite_float_or_none(name, completion, answer, length):
    (reward,) = score(name, [completion], [[1] * length], answer=[answer])
    assert reward is None or (isinstance(reward, float) and math.isfinite(reward))


UNITS = ["a", "=", "####", "\\boxed{", "{}", "1,", "\n", "Answer:", " ", "<answer>", "<think>", "(", "-", "\\left "]


@pytest.mark.parametrize("name", CHEAP)
def test_a_long_completion_takes_a_moment(name):
    longest = 0.0
    for unit in UNITS:
        long = unit * (300_000 // len(unit))
        texts = [long, "\\boxed{" + long, "# = " + long, "<answer>" + long + "</answer>", "#### " + long]
        begun = time.process_time()
        score(name, texts, answer=[long] * 5)
        longest = max(longest, time.process_time() - begun)
    assert longest < 2.0  # linear, tenths of a second; quadratic would take an hour


@pytest.mark.parametrize(
    ("said", "marked"),
    [
        ("1 + 2 = 3", "3"),
        ("#### 1 <answer> 2 </answer> = 3", "2"),
        ("<answer></answer> = 3", None),
        ("</answer> = 3 <answer>", "3 <answer>"),
        ("1 = 2\nAnswer: 4", "4"),
        ("Answer: 4\n5 = 6", "6"),
        ("= 3\n#### 8", "8"),
        ("#### 8\n9 = 9", "8"),
        ("#### 7 #### 8", "8"),
        (r"\boxed{1} then \boxed{2} = 9", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{ }", None),
        ("####\n\n 12 \nbye", "12"),
        ("Answer:", None),
        ("x =", None),
        ("no mark", None),
        ("", None),
    ],
)
def test_marked_answer(said, marked):
    assert marked_answer(said) == marked
    assert final_answer(said) == (said.strip() if marked is None else marked)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1,234", "1234"),
        ("1,234,567.50", "1234567.5"),
        ("$5.", "5"),
        ("+7", "7"),
        ("007", "7"),
        (".50", "0.5"),
        ("5.", "5.0"),
        ("-0", "0"),
        ("-3.0", "-3"),
        ("New\n York", "new york"),
        ("STRASSE", "straße"),
    ],
)
def test_equal_answers(left, right):
    assert normalise(left) == normalise(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1", "-1"),
        ("1,2", "12"),
        ("12,34", "1234"),
        ("0.1", "0.10000000000000000000000000001"),
        ("1e3", "1000"),
        ("10", "1"),
    ],
)
def test_unequal_answers(left, right):
    assert normalise(left) != normalise(right)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.integers(0, 4))
def test_a_number_is_normalised_to_itself_and_once(number, zeros):
    plain = normalise(f"{number:f}" + "0" * zeros)
    assert normalise(plain) == plain
    assert float(plain) == float(number)


def test_exact_match():
    assert score("exact_match", ["2+2 = 4", "2+2 = 5", "", "x"], answer=["4", 4, "", None]) == [1.0, 0.0, 0.0, None]
    assert score("exact_match", ["#### 1,000"], answer=["so 10 * 100 = 1000\n#### 1000"]) == [1.0]
    assert score("exact_match", ["7.0", "7"], answer=[7, 7.0]) == [1.0, 1.0]


def test_messages_are_read_by_their_last_content():
    assert completion_text([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]) == "b"
    assert score("exact_match", [[{"role": "assistant", "content": "#### 4"}], []], answer=["4", "4"]) == [1.0, 0.0]


def test_soft_overlong_is_piecewise_linear_and_counts_the_stop_token():
    lengths = [0, 79, 80, 81, 90, 99, 100, 101, 10_000]
    overlong = resolve("soft_overlong", max_completion_len=100, buffer_len=20)
    got = overlong(prompts=None, completions=None, completion_ids=[[0] * n for n in lengths])
    assert got == pytest.approx([0, 0, 0, -0.05, -0.5, -0.95, -1, -1, -1], abs=1e-15)
    assert math.copysign(1, got[0]) == 1
    double = resolve("soft_overlong", max_completion_len=100, buffer_len=20, factor=2.0)
    assert double(prompts=None, completions=None, completion_ids=[[0] * n for n in lengths]) == [2 * r for r in got]
    whole = resolve("soft_overlong", max_completion_len=4, buffer_len=4)
    assert whole(prompts=None, completions=None, completion_ids=[[], [0], [0] * 4]) == [0, -0.25, -1]


@pytest.mark.parametrize(
    "parameters",
    [{}, {"max_completion_len": 10, "buffer_len": 0}, {"max_completion_len": 10, "buffer_len": 11}]
    + [{"max_completion_len": 10, "factor": factor} for factor in (-1.0, math.nan, math.inf)],
)
def test_soft_overlong_refuses(parameters):
    with pytest.raises(ValueError, match="^got "):
        resolve("soft_overlong", **parameters)([""], [""], [[1]])


def test_resolve_module_and_file(tmp_path):
    (tmp_path / "neighbour_of_rewards.py").write_text("TWO = 2.0\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from neighbour_of_rewards import TWO\ndef two(completions, **columns): return [TWO] * len(completions)\n"
    )
    assert resolve(f"{file}:two")(completions=["a", "b"]) == [2.0, 2.0]
    assert resolve("grpo_jax.rewards.exact_match:exact_match") is REWARDS["exact_match"]
    assert reward_name(f"{file}:two") == "two"
    assert resolve("soft_overlong", max_completion_len=9).__name__ == "soft_overlong"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("exakt", "no built-in of that name.*; use one of answer_format, boxed, cosine_length, countdown, exact_match"),
        ("no.such.module:f", "importing 'no.such.module' raised ModuleNotFoundError"),
        ("nofile.py:f", "no file 'nofile.py' under"),
        ("json:f", "json has no function 'f'; use one of those it has: .*dumps"),
        ("broken.py:f", "running broken.py raised ZeroDivisionError: division by zero"),
        ("data.py:number", "data.py has no function 'number'; use one of those it has: real"),
        ("__main__:f", "the running script is not run again"),
    ],
)
def test_resolve_refuses(spec, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "data.py").write_text("number = 3\ndef real(): pass\n")
    with pytest.raises(ValueError, match=says):
        resolve(spec)
