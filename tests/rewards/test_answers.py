"""References and answers are read alike: the table of answer_pairs.py, missing values, and what the configs ask for."""

import datetime
import importlib.util
import logging
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import read_toml
from grpo_jax.rewards import REWARDS, resolve
from grpo_jax.rewards.answers import MISSING
from grpo_jax.rewards.votes import vote_of

from .answer_pairs import ALIKE, TEXTS, UNLIKE

MARKS = ["<answer>{}</answer>", "So \\boxed{{{}}}.", "so\n#### {}", "Answer: {}"]
PAIRS = [(*pair[:2], 1.0, len(pair) == 3) for pair in ALIKE] + [(*pair[:2], 0.0, len(pair) == 3) for pair in UNLIKE]
CONFIGS = Path(__file__).parents[2] / "configs"
needs_library = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs grpo_jax[math]")


def judge(name, said, answer, **options):
    (reward,) = resolve(name, **options)(prompts=["?"], completions=[said], completion_ids=[[1]], answer=[answer])
    return reward


def test_the_table_has_its_size():
    assert len(PAIRS) >= 150 and len({pair[:2] for pair in PAIRS}) == len(PAIRS)


def test_answers_in_every_mark():
    wrong = [
        (mark.format(said), answer)
        for said, answer, right, _ in PAIRS
        for mark in MARKS
        if "\n" not in said or mark in MARKS[:2]  # the others end with their line
        if judge("exact_match", mark.format(said), answer) != right
    ]
    assert wrong == []


def test_answers_in_a_box():
    assert [pair for pair in PAIRS if judge("boxed", f"\\boxed{{{pair[0]}}}", pair[1]) != pair[2]] == []


def test_references_may_be_marked_too():
    wrong = [
        (said, mark.format(answer))
        for said, answer, right, _ in PAIRS
        for mark in MARKS
        if judge("exact_match", f"<answer>{said}</answer>", mark.format(answer)) != right
    ]
    assert wrong == []


@needs_library
def test_mathematics_and_what_the_package_itself_says(monkeypatch):
    from math_verify import parse, verify

    monkeypatch.setattr(logging.getLogger("math_verify.parser"), "disabled", True)
    ours, theirs = [], []
    for said, answer, right, differs in PAIRS:
        box = f"\\boxed{{{said}}}"
        ours += [(said, answer)] * (judge("math_verify", box, answer) != right)
        package = verify(parse(f"\\boxed{{{answer}}}", parsing_timeout=None), parse(box, parsing_timeout=None))
        theirs += [(said, answer, package)] * (not differs and package != bool(right))
    assert (ours, theirs) == ([], [])


@pytest.mark.parametrize(("name", "said", "answer", "verdict"), TEXTS)
def test_texts(name, said, answer, verdict):
    options = {"judge": "boxed", "max_completion_len": 10**6} if name == "cosine_length" else {}
    assert judge(name, said, answer, **options) == (pytest.approx(verdict) if verdict else verdict)


class NAType:
    """As pandas' NA: no comparison with it is true or false."""

    def __ne__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")

    def __repr__(self):
        return "<NA>"


ABSENT = [None, float("nan"), np.float32("nan"), np.datetime64("NaT"), Decimal("nan"), NAType(), " ", [], [None]]
ABSENT += sorted(MISSING)


@pytest.mark.parametrize("name", ["exact_match", "gsm8k", "boxed", "math_verify", "quickstart", "cosine_length"])
def test_a_missing_reference_is_not_judged(name):
    if name == "math_verify":
        pytest.importorskip("math_verify")
    options = {"max_completion_len": 10} if name == "cosine_length" else {}
    for said in ("", "#### nan", r"\boxed{None}", "None", "<NA>", "nonsense", "1: NA"):
        assert [value for value in ABSENT if judge(name, said, value, **options) is not None] == []


def test_pandas_missing_values():
    pandas = pytest.importorskip("pandas")
    assert [judge("exact_match", "NaT", value) for value in (pandas.NaT, pandas.NA)] == [None, None]
    assert judge("exact_match", "2024-01-05", pandas.Timestamp("2024-01-05")) == 1.0


def test_values_that_are_no_text():
    assert judge("exact_match", "2024-01-05", datetime.date(2024, 1, 5)) == 1.0
    assert judge("exact_match", "2024-01-05", datetime.datetime(2024, 1, 5)) == 1.0
    assert judge("exact_match", "2024-01-05", np.datetime64("2024-01-05T00:00:00.000000000")) == 1.0
    assert judge("exact_match", "7", np.int64(7)) == judge("exact_match", "3, 4", np.array([3.0, 4.0])) == 1.0
    assert judge("exact_match", "0", 0) == judge("exact_match", "false", False) == 1.0


@pytest.mark.parametrize(
    ("said", "nums", "target", "reward"),
    [
        ("<answer>(3 + 5) * 4</answer>", [3.0, 4.0, 5.0], 32.0, 1.0),
        ("<answer>(3 + 5) * 4</answer>", "[3.0, 4.0, 5.0]", "32", 1.0),
        ("<answer>(3 + 5) * 4</answer>", "3 4 5", "32.0", 1.0),
        ("<answer>(3 + 5) × 4</answer>", [3, 4, 5], "32", 1.0),
        ("<answer>x = (3 + 5) * 4</answer>", [3, 4, 5], 32, 1.0),
        ("<answer>32 = (3 + 5) * 4</answer>", [3, 4, 5], 32, 1.0),
        ("<answer>\\boxed{(3 + 5) \\cdot 4}</answer>", [3, 4, 5], 32, 1.0),
        ("**Answer:** (3 + 5) * 4", [3, 4, 5], 32, 1.0),
        ("<answer>**(3 + 5) * 4**</answer>", [3, 4, 5], 32, 1.0),
        ("<answer>4 − 5 + 3</answer>", [3, 4, 5], 2, 1.0),
        ("<answer>3 + 4</answer>", [3, 4], "1,007", 0.0),
        ("<answer>3 + 4</answer>", [3, 4], "seven", None),
        ("<answer>3 + 4</answer>", [3, 4.5], 7, None),
        ("<answer>3 + 4</answer>", "3, four", 7, None),
    ],
)
def test_countdown_reads_columns_as_files_have_them(said, nums, target, reward):
    countdown = REWARDS["countdown"]
    assert countdown(["?"], [said], [[]], nums=[nums], target=[target]) == [reward]


def test_countdown_does_not_judge_what_is_missing():
    countdown, said = REWARDS["countdown"], "<answer>3 + 4</answer>"
    for value in ABSENT:
        assert countdown(["?"], [said], [[]], nums=[value], target=[7]) == [None]
        assert countdown(["?"], [said], [[]], nums=[[3, value]], target=[7]) == [None]
        assert countdown(["?"], [said], [[]], nums=[[3, 4]], target=[value]) == [None]


ASKED = {
    "behind ####": ("#### First, add\n3 + 4 = 7\n\n#### 7", {"answer": ["3+4=<<3+4=7>>7\n#### 7"]}),
    r"in \boxed{}": ("#### First, add\n3 + 4\n\n#### Result\n\\boxed{7}", {"answer": ["7"]}),
    "inside <answer> </answer>": ("I add.</think><answer>3 + 4</answer>", {"nums": [[3, 4]], "target": [7]}),
}
"""What a prompt asks for -> a completion in that form, and the columns of its row."""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_what_a_config_asks_for_is_what_its_reward_reads(path):
    tables = read_toml(path)
    asks = tables.get("data", {}).get("prompt_template", "") + tables.get("data", {}).get("system_prompt", "")
    said, columns = next((ASKED[form] for form in ASKED if form in asks), (None, {}))
    if said is None:
        assert "reward" not in tables  # the quickstart's, whose model was trained to answer so
        return
    for name in tables["reward"]["functions"]:
        if name == "math_verify":
            pytest.importorskip("math_verify")
        reward = resolve(name, **tables["reward"].get("options", {}).get(name, {}))
        assert reward(prompts=["?"], completions=[said], completion_ids=[[1]], **columns) == [1.0]


@pytest.mark.parametrize(
    ("name", "said", "vote"),
    [
        ("exact_match", "#### Result\n\\boxed{x = 4}", "4"),
        ("exact_match", " 4.0 ", "4"),
        ("exact_match", "", None),
        ("boxed", "x = 4", None),
        ("boxed", r"\boxed{\dfrac{1}{2}} = 4", "1/2"),
        ("gsm8k", "#### $1,000 or 2", "1000"),
        ("gsm8k", "1000", None),
        ("math_verify", r"\boxed{0.50}", "1/2"),
        ("math_verify", r"<answer>\frac{2}{4}</answer>", "1/2"),
        ("math_verify", r"The final answer is $\frac{1}{2}$.", "1/2"),
        ("math_verify", r"\boxed{1e999999999}", "1e999999999"),
        ("countdown", "<answer>3 + 4 = 7</answer>", "3 + 4"),
        ("countdown", "none", None),
        ("quickstart", "1+1=2: 2", "2"),
        ("my.py:own", "so 1 + 1 = 2", "2"),
    ],
)
def test_a_vote_is_what_the_reward_reads(name, said, vote):
    assert vote_of(name)(said) == vote
