"""What users of TRL expect of a reward function: its arguments, what it may log, what may be one, where it may run."""

import functools
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import TrainConfig
from grpo_jax.rewards import REWARDS, RewardPool, TrainerState
from grpo_jax.rewards.lookup import bind
from grpo_jax.rewards.state import MOST_LOGGED
from grpo_jax.scoring import Scorer
from grpo_jax.types import Prompt, Rollout

from . import hostile

HOSTILE = Path(hostile.__file__)
WAYS = ["worker", "here"]
STATE = TrainerState(global_step=3, max_steps=4, epoch=0.5, max_completion_len=20)


def reward(way, name):
    return f"{HOSTILE}:{name}" if way == "worker" else getattr(hostile, name)


def score(pool, completions, **columns):
    return pool.score(completions, completions, [[1] * len(text) for text in completions], columns)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_logged_comes_back(way):
    with RewardPool([reward(way, "logs")], state=STATE) as pool:
        scores = score(pool, ["a", "bc"])
        np.testing.assert_array_equal(scores.rewards, [[0.75, 0.75]])
        assert scores.extra == {
            "size": [1, 2],
            "odd": [{"mark": "a", "of": "{1j}", "share": None}, {"mark": "bc", "of": "{1j}", "share": None}],
        }
        assert scores.metrics == {"seen": 2.0}
        later = pool.score(["?"], ["a"], [[1]], {}, replace(pool.state, global_step=4))
        np.testing.assert_array_equal(later.rewards, [[1.0]])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("short", r"reward 'logs': logged 3 values with log_extra\('size'\) for 2 completions; log one per completion"),
        ("words", r"reward 'logs', row 1: raised ValueError: log_metric\('seen'\): got 'many', which is no number"),
        ("flood", f"reward 'logs': logged 1.* characters with log_extra, more than the {MOST_LOGGED} a call may"),
    ],
)
def test_what_cannot_be_logged(way, order, says):
    with RewardPool([reward(way, "logs")], state=STATE) as pool, pytest.raises(ValueError, match=says):
        score(pool, ["a", order])


def test_what_is_logged_by_several_and_in_pieces():
    def logs(completions, log_extra, log_metric, **columns):
        log_extra("size", ["mine"] * len(completions))
        log_metric("seen", 6)
        return [None] * len(completions)

    with RewardPool([reward("worker", "logs"), logs], state=STATE) as pool:
        scores = score(pool, ["a", "exit", "bc", "d"])
        assert scores.crash_counts == (1, 0)
        assert scores.extra["size"] == [
            1,
            None,
            2,
            1,
        ]  # row by row; the one that killed the process logged nothing
        assert scores.extra["logs_2/size"] == ["mine"] * 4
        assert scores.metrics == {"seen": pytest.approx((1 + 1 + 1 + 6 * 4) / (3 + 4))}


@pytest.mark.parametrize("way", WAYS)
def test_a_function_is_handed_what_it_takes(way):
    with RewardPool([reward(way, "takes_little")]) as pool:
        scores = score(pool, ["a", "b"], answer=["a", "a"], other=[1, 2])
    np.testing.assert_array_equal(scores.rewards, [[1, 0]])


@pytest.mark.parametrize("way", WAYS)
def test_options_are_bound_and_win_over_columns(way):
    specs = [reward(way, "takes_options")] * 2
    options = {"takes_options": {"size": 1}, "takes_options_2": {"size": 2, "scale": 3.0}}
    with RewardPool(specs, options=options) as pool:
        scores = score(pool, ["a", "bc"], size=[7, 7])
        pool.check_columns([])
    np.testing.assert_array_equal(scores.rewards, [[1, 0], [0, 3]])
    assert scores.names == ("takes_options", "takes_options_2")


def test_a_text_of_digits_is_text_where_text_is_taken():
    assert bind(REWARDS["regex"], {"pattern": 42}, "regex")(["?"] * 2, ["42", "4"], [[]] * 2) == [1.0, 0.0]
    assert bind(REWARDS["regex"], {"pattern": True}, "regex")(["?"], ["it is true"], [[]]) == [1.0]
    with pytest.raises(ValueError, match=r"reward.options.regex.pattern: got 1.5, a number whose .* put it in quotes"):
        bind(REWARDS["regex"], {"pattern": 1.5}, "regex")
    assert bind(lambda completions, size: size, {"size": 42}, "own")([]) == 42


def test_a_column_is_no_option_of_a_builtin():
    with RewardPool(["regex", "think_format"], options={"regex": {"pattern": "a"}}) as pool:
        scores = score(pool, ["a", "<think>b</think>c"], pattern=["z"] * 2, full=[True] * 2, opened=[True] * 2)
    np.testing.assert_array_equal(scores.rewards, [[1, 0], [0, 1]])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("sice", r"reward.options.takes_options.sice: .* \(did you mean 'size'\?\); it has size, scale$"),
        ("prompts", "reward.options.takes_options.prompts: takes_options has no parameter of that name"),
    ],
)
def test_an_option_that_is_not_there_is_refused_at_once(way, option, says):
    with pytest.raises(ValueError, match=says):
        RewardPool([reward(way, "takes_options")], options={"takes_options": {option: 1}})


def test_an_option_that_is_needed_and_not_given_is_a_missing_column():
    with RewardPool([reward("worker", "takes_options")]) as pool, pytest.raises(ValueError, match="needs a column 's"):
        pool.check_columns(["answer"])


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("regex", {}, "reward 'regex': got no pattern .*; set reward.options.regex.pattern"),
        ("regex", {"pattern": "("}, "reward 'regex': got pattern = '\\(', which is no regular expression"),
        ("regex", {"patern": "a"}, "reward.options.regex.patern: regex has no .*did you mean 'pattern'"),
        (
            "cosine_length",
            {"judge": "me"},
            "reward 'cosine_length': got judge = 'me', which judges no answers; use one",
        ),
        ("repetition_penalty", {"ngram_size": 0}, "got ngram_size = 0"),
        ("repetition_penalty", {"max_penalty": 1.0}, "got max_penalty = 1.0"),
        ("soft_overlong", {"buffer_len": 30}, "got buffer_len = 30 with max_completion_len = 20"),
        ("soft_overlong", {"max_completion_len": 0}, "got max_completion_len = 0"),
    ],
)
def test_a_builtin_refuses_its_options_before_the_run(name, options, says):
    with pytest.raises(ValueError, match=says):
        RewardPool([name], options={name: options}, state=STATE)


def test_builtins_take_the_length_from_the_run():
    with RewardPool(["soft_overlong", "cosine_length"], state=STATE) as pool:
        scores = pool.score(["?"] * 2, ["= 1"] * 2, [[1] * 18, [1] * 20], {"answer": ["1", "2"]})
    np.testing.assert_allclose(scores.rewards[0], [-0.5, -1.0])
    np.testing.assert_allclose(scores.rewards[1], [0.5 + 0.5 * (1 + np.cos(np.pi * 0.9)) / 2, -0.5])


class Length:
    """An object that can be called and has no name of its own."""

    def __call__(self, completions, **columns):
        return [float(len(text)) for text in completions]

    def doubled(self, completions, scale=2, **columns):
        return [float(scale * len(text)) for text in completions]


def test_whatever_can_be_called_is_a_reward():
    factor = 5

    def closure(completions, **columns):
        return [float(factor)] * len(completions)

    judge = Length()
    specs = [judge, judge.doubled, functools.partial(judge.doubled, scale=3), closure, lambda completions: [4.0], len]
    with RewardPool(specs[:-1]) as pool:
        np.testing.assert_array_equal(score(pool, ["ab"]).rewards[:, 0], [2, 4, 6, 5, 4])
        assert pool.names == ("Length", "doubled", "doubled_2", "closure", "<lambda>")
    with RewardPool(specs[-1:]) as pool, pytest.raises(ValueError, match="reward 'len', row 0: raised TypeError: "):
        score(pool, ["ab"])


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+4"}]


class Tokenizer:
    """Bytes are tokens."""

    def decode(self, ids, **options):
        return bytes(ids).decode()


def rollout(*completions):
    tokens = np.array([[63, *text.encode(), 0] for text in completions])
    count = len(completions)
    lengths = np.full(count, tokens.shape[1] - 1)
    return Rollout(tokens, np.ones(count, np.int32), lengths, np.zeros(tokens.shape), np.array(["stop"] * count))


def test_the_run_hands_messages_to_messages_and_strings_to_strings():
    seen = {}

    def look(prompts, completions, completion_ids, level, trainer_state, log_extra, log_metric):
        seen.update(prompts=prompts, completions=completions, level=level, step=trainer_state.global_step)
        log_extra("level", level)
        log_metric("tokens", sum(map(len, completion_ids)))
        return [1.0, None, 3.0, 4.0]

    prompts = [Prompt(0, (63,), MESSAGES, {"level": 1}), Prompt(1, (63,), "3+4", {"level": 2})]
    with RewardPool([look]) as pool:
        scorer = Scorer(pool, Tokenizer(), frozenset([0]), TrainConfig())
        answers = scorer.rewards(prompts, rollout("a", "b", "c", "d"), STATE)
    assert seen["prompts"] == [MESSAGES, MESSAGES, "3+4", "3+4"]
    assert seen["completions"] == [*([{"role": "assistant", "content": text}] for text in "ab"), "c", "d"]
    assert (seen["level"], seen["step"]) == ([1, 1, 2, 2], 3)
    assert answers.completions == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(answers.by_function, np.array([[1, np.nan, 3, 4]], np.float32))
    assert answers.extra == {"level": [1, 1, 2, 2]} and answers.metrics == {"tokens": 8.0}


def test_messages_are_judged_like_strings_by_every_builtin():
    said = ["<think>t</think><answer>1 + 2</answer>", "= 3", r"\boxed{3}", "#### 3", "Answer: 3"]
    columns = {"answer": ["3"] * 5, "nums": [[1, 2]] * 5, "target": [3] * 5}
    names = [name for name in REWARDS if name != "math_verify"]
    with RewardPool([REWARDS[name] for name in names], options={"regex": {"pattern": "A"}}, state=STATE) as pool:
        ids = [[1] * 12] * 5
        plain = pool.score(["?"] * 5, said, ids, columns).rewards
        chat = pool.score([MESSAGES] * 5, [[{"role": "assistant", "content": text}] for text in said], ids, columns)
    np.testing.assert_array_equal(chat.rewards, plain)
    row = dict(zip(names, plain.tolist(), strict=True))
    assert row["countdown"] == [1, 0, 0, 0, 0] and row["boxed"] == [0, 0, 1, 0, 0] and row["gsm8k"] == [0, 0, 0, 1, 0]
    assert row["answer_format"] == row["think_format"] == [1, 0, 0, 0, 0] and row["exact_match"] == [0, 1, 1, 1, 1]


def test_a_script_without_a_main_guard_runs_once_and_in_a_loop(tmp_path):
    (tmp_path / "mine.py").write_text("def one(completions, log_metric): log_metric('n', 2); return [1.0]\n")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            print("script runs")
            import asyncio
            from grpo_jax.rewards import RewardPool
            async def waits(completions, trainer_state):
                await asyncio.sleep(0)
                return [float(trainer_state.global_step)]
            async def cell():
                specs, options = ["mine:one", "mine.py:one", "regex", waits], {"regex": {"pattern": "a"}}
                with RewardPool(specs, options=options) as pool:
                    return pool.score(["a"], ["a"], [[1]], {})
            scores = asyncio.run(cell())
            print(scores.names, scores.rewards.tolist(), scores.metrics)
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    said = "('one', 'one_2', 'regex', 'waits') [[1.0], [1.0], [1.0], [0.0]] {'n': 2.0}"
    assert (done.stdout.splitlines(), done.stderr, done.returncode) == (["script runs", said], "", 0)
