import doctest
import importlib
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rewards import REWARDS, resolve, reward_name
from grpo_jax.rewards.answers import completion_text, final_answer, marked_answer
from grpo_jax.rewards.equality import normalise

OPTIONS: dict[str, dict] = {
    "soft_overlong": {"max_completion_len": 40},
    "cosine_length": {"max_completion_len": 40},
    "regex": {"pattern": "^.?[0-9]+$"},
}
MODULES = ["grpo_jax.rewards"]
MODULES += [f"grpo_jax.rewards.{name}" for name in ("answers", "equality", "votes", "lookup", "state", *REWARDS)]
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
@settings(max_examples=100)
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
    assert longest < 60  # linear, tenths of a second; quadratic would take an hour


@pytest.mark.parametrize(
    ("said", "marked"),
    [
        ("1 + 2 = 3", "3"),
        ("#### 1 <answer> 2 </answer> = 3", "2"),
        ("<answer></answer> = 3", None),
        ("</answer> = 3 <answer>", "3 <answer>"),
        ("1 = 2\nAnswer: 4", "4"),
        ("Answer: 4\n5 = 6", "4"),
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
    assert score("exact_match", ["2+2 = 4", "2+2 = 5", "", "x"], answer=["4", 4, "x", None]) == [1.0, 0.0, 0.0, None]
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


@pytest.mark.parametrize(
    ("name", "said", "options", "reward"),
    [
        ("think_format", " <think>a</think>\nb ", {}, 1.0),
        ("think_format", "<think></think>b", {}, 0.0),
        ("think_format", "<think>a</think> ", {}, 0.0),
        ("think_format", "so <think>a</think>b", {}, 0.0),
        ("think_format", "<think>a<think>b</think>c", {}, 0.0),
        ("think_format", "<think>a</think>b</think>c", {}, 0.0),
        ("think_format", "<think>a</think>b", {"opened": True}, 0.0),
        ("think_format", "a</think>b", {}, 0.0),
        ("answer_format", "<think>a</think>\n<answer>b</answer>\n", {}, 1.0),
        ("answer_format", "a</think><answer>b</answer>", {"opened": True}, 1.0),
        ("answer_format", "<think>a</think><answer>b</answer> c", {}, 0.0),
        ("answer_format", "<think>a</think>c<answer>b</answer>", {}, 0.0),
        ("answer_format", "<think>a</think><answer> </answer>", {}, 0.0),
        ("answer_format", "<think>a</think><answer></answer>", {}, 0.0),
        ("answer_format", "<think>a</think><answer>", {}, 0.0),
        ("answer_format", "<think>a</think></answer>", {}, 0.0),
        ("answer_format", "<think></think><answer>b</answer>", {}, 0.0),
        ("answer_format", "<think>a<answer>c</answer></think><answer>b</answer>", {}, 0.0),
        ("answer_format", "<think>a</think><answer>b</answer><answer>c</answer>", {}, 0.0),
        ("regex", "x\nAnswer: 7", {"pattern": "(?m)^Answer: [0-9]$"}, 1.0),
        ("regex", "x\nAnswer: 7", {"pattern": "^Answer: [0-9]$"}, 0.0),
        ("regex", "7", {"pattern": "[0-9]", "full": True}, 1.0),
        ("regex", "7.", {"pattern": "[0-9]", "full": True}, 0.0),
    ],
)
def test_forms(name, said, options, reward):
    assert score(name, [said], options=options) == [reward]


@pytest.mark.parametrize(
    ("said", "wanted", "reward"),
    [
        ("#### 72", "6*12=72\n#### 72", 1.0),
        ("#### 1,072.00 dollars", "1072", 1.0),
        ("#### $72", "#### 72", 1.0),
        ("#### -3", "3", 0.0),
        ("#### -$5", "-5", 1.0),
        ("#### 3\n#### 4", "4", 1.0),
        ("72", "72", 0.0),
        ("####", "72", 0.0),
        ("#### none", "72", 0.0),
        ("#### 72", "none", None),
        ("#### 72", None, None),
    ],
)
def test_gsm8k(said, wanted, reward):
    assert score("gsm8k", [said], answer=[wanted]) == [reward]


def test_gsm8k_flexible():
    said = ["so 70 and then 72.", "#### 71, not 72", "none", "1,000, say"]
    assert score("gsm8k", said, answer=["72", "72", "72", "1000"], options={"flexible": True}) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("said", "wanted", "reward"),
    [
        (r"\boxed{\frac{1}{2}} \boxed{x_{1}^{2}}", "x_{1}^{2}", 1.0),
        (r"\boxed{\left(1,\, 2\right)}", "$(1,2)$", 1.0),
        (r"\boxed{\text{Yes}}", "yes", 1.0),
        (r"\boxed{2}", r"thus \boxed{2}", 1.0),
        (r"\boxed{2", "2", 0.0),
        ("2", "2", 0.0),
        (r"\boxed{}", "", None),
        (r"\boxed{0.5}", r"\frac{1}{2}", 0.0),
        (r"\boxed{2}", None, None),
    ],
)
def test_boxed(said, wanted, reward):
    assert score("boxed", [said], answer=[wanted]) == [reward]


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ("<answer>(3 + 5) * 4</answer>", 1.0),
        ("<answer>4 * (5 + 3) = 32</answer>", 1.0),
        (r"\boxed{4 \times (5 + 3)}", 1.0),
        ("so I get\n4 × (5 + 3)\n", 1.0),
        ("<answer>-4 * -(5 + 3)</answer>", 1.0),
        ("<answer>3 + 4 + 5</answer>", 0.1),
        ("<answer>3 / (4 - 5)</answer>", 0.1),
        ("<answer>32</answer>", 0.0),
        ("<answer>(3 + 5) * 4 + 4 - 4</answer>", 0.0),
        ("<answer>(3 + 5) * (4</answer>", 0.0),
        ("<answer>3 / (5 - 5) + 4</answer>", 0.0),
        ("<answer>35 - 4</answer>", 0.0),
        ("<answer>4 ** 3 // 5</answer>", 0.0),
        ("<answer>3 4 5</answer>", 0.0),
        ("<answer>03 + 4 + 5</answer>", 0.0),
        ("<answer>__import__('os').abort(), 3, 4, 5</answer>", 0.0),
        ("<answer>" + "(" * 90 + "3 + 4 + 5" + ")" * 90 + "</answer>", 0.1),
        ("<answer>" + "-" * 180 + "3 + 4 + 5</answer>", 0.1),
        ("<answer>" + " " * 300 + "3 + 4 + 5" + "+" * 300 + "</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_countdown(said, reward):
    for nums in ([3, 4, 5], ["5", "4", "3"], "3 4 5"):
        assert score("countdown", [said], nums=[nums], target=[32], options={"near": 0.1}) == [reward]
    assert score("countdown", [said], nums=[None], target=[32]) == [None]
    assert score("countdown", [said], nums=[[3, 4, 5]], target=[None]) == [None]


def test_countdown_computes_exactly():
    assert score("countdown", ["1 / 3 * 3"], nums=[[1, 3, 3]], target=["1"]) == [1.0]
    assert score("countdown", ["1 / 3 * 2"], nums=[[1, 2, 3]], target=[0.6666666666666666]) == [0.0]


def test_cosine_length():
    ids = [[0] * n for n in (0, 50, 100, 200)]
    limits = {"max_completion_len": 100}
    right = score("cosine_length", ["= 1"] * 4, ids, answer=["1"] * 4, options=limits)
    wrong = score("cosine_length", ["= 1"] * 4, ids, answer=["2"] * 4, options=limits)
    assert right == pytest.approx([1.0, 0.75, 0.5, 0.5]) and wrong == pytest.approx([-1.0, -0.75, -0.5, -0.5])
    own = {"judge": "gsm8k", "right_short": 3.0, "right_long": 2.0, "wrong_short": 0.0, "wrong_long": -1.0} | limits
    said = ["#### 1", "= 1", "#### 1"]
    assert score("cosine_length", said, [[], [], [0] * 100], answer=["1"] * 3, options=own) == [3.0, 0.0, 2.0]
    assert score("cosine_length", ["= 1"], answer=[None], options=limits) == [None]


def test_repetition_penalty():
    ids = [[], [1, 2], [1, 2, 3], [1, 2, 3, 1, 2, 3], [7] * 102]
    got = score("repetition_penalty", [""] * 5, ids)
    assert got == pytest.approx([0, 0, 0, -0.25, -0.99]) and math.copysign(1, got[2]) == 1
    assert score("repetition_penalty", [""], [[1, 1]], options={"ngram_size": 1, "max_penalty": -3.0}) == [-1.5]


def test_resolve_module_and_file(tmp_path):
    (tmp_path / "neighbour_of_rewards.py").write_text("TWO = 2.0\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from neighbour_of_rewards import TWO\ndef two(completions, **columns): return [TWO] * len(completions)\n"
    )
    assert resolve(f"{file}:two")(completions=["a", "b"]) == [2.0, 2.0]
    assert resolve("grpo_jax.rewards.exact_match:exact_match") is REWARDS["exact_match"]
    assert resolve("grpo_jax:TrainConfig").__name__ == "TrainConfig"  # a module that loads its names when asked
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
