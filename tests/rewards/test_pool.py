"""The contract of rewards: what a function says arrives exactly, and what it must not say is named."""

import asyncio
import inspect
import subprocess
import sys
import textwrap
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rewards import REWARDS, RewardPool, TrainerState
from grpo_jax.rewards.call import Batch, RewardProblem, checked

from . import hostile

HOSTILE = Path(hostile.__file__)
WAYS = ["worker", "here"]
CHEAP = [name for name in REWARDS if name != "math_verify"]


def reward(way, name):
    return f"{HOSTILE}:{name}" if way == "worker" else getattr(hostile, name)


def score(pool, completions, **columns):
    completions = list(completions)
    return pool.score(completions, completions, [[len(text)] for text in completions], columns)


@pytest.mark.parametrize("way", WAYS)
def test_values_none_and_nan(way):
    with RewardPool([reward(way, "answers")]) as pool:
        said = [1, 0.1, True, None, "nan", "fraction", -0.0]
        scores = score(pool, ["x"] * 7, given=said)
    np.testing.assert_array_equal(scores.rewards, [[1, 0.1, 1, np.nan, np.nan, 0.25, 0]])
    assert scores.rewards.dtype == np.float64 and scores.names == ("answers",)
    assert scores.warnings == () and scores.timeout_counts == (0,) and scores.crash_counts == (0,)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", ["inf", "-inf", "huge", "large", "a string", [1.0], {"a": 1}, [1.0, 2.0]])
def test_a_wrong_value_names_function_row_and_value(way, value):
    shown = {"huge": "10000", "large": "1e\\+39", "a string": "'a string'"}.get(value if isinstance(value, str) else "")
    with RewardPool([reward(way, "answers")]) as pool:
        with pytest.raises(ValueError, match=f"reward 'answers', row 2: returned {shown or ''}"):
            score(pool, ["x"] * 4, given=[0.0, None, value, 1.0])
        np.testing.assert_array_equal(score(pool, ["x"], given=[2.0]).rewards, [[2.0]])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wrong_length", "returned 4 rewards for 3 completions"),
        ("text", "returned '111', a str"),
        ("nothing", "returned None, a NoneType"),
    ],
)
def test_a_wrong_return_names_the_function(way, name, says):
    with (
        RewardPool([reward(way, name)]) as pool,
        pytest.raises(ValueError, match=f"reward '{name}': {says}.*list of 3"),
    ):
        score(pool, "abc")


@pytest.mark.parametrize("way", WAYS)
def test_what_iterates_is_enough(way):
    with RewardPool([reward(way, "generator")]) as pool:
        np.testing.assert_array_equal(score(pool, ["", "ab"]).rewards, [[0, 2]])


@pytest.mark.parametrize("value", [np.float32(0.5), np.int64(2), np.bool_(True), np.array(3.0)])
def test_numpy_numbers_are_numbers(value):
    assert checked([value, None], 2) == [float(value), None]
    assert checked(np.array([1.0, np.nan]), 2) == [1.0, None]
    with pytest.raises(RewardProblem):
        checked([1 + 2j], 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [0, 3, 4])
def test_an_exception_names_the_row_the_message_and_the_place(way, bad, capfd):
    completions = ["12345"] * 5
    completions[bad] = "123"
    with RewardPool([reward(way, "divides")]) as pool:
        with pytest.raises(ValueError) as caught:
            score(pool, completions)
        np.testing.assert_array_equal(score(pool, ["12345"]).rewards, [[0.5]])
    line = inspect.getsourcelines(hostile.divides)[1] + 1
    assert str(caught.value) == (
        f"reward 'divides', row {bad}: raised ZeroDivisionError: float division by zero ({HOSTILE}, line {line}) "
        "with completion '123' at hand; repair it, or return None for what it cannot judge"
    )
    assert capfd.readouterr().err == ""  # the traceback is for those who look at the cause
    trace = "".join(traceback.format_exception(caught.value))
    assert "ZeroDivisionError" in trace and "in divides" in trace


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("how", "kind"), [("quits", "Quits"), ("exit", "SystemExit"), ("cancel", "CancelledError")])
def test_exceptions_that_are_no_exception(way, how, kind):
    with RewardPool([reward(way, "quits")]) as pool:
        with pytest.raises(ValueError, match=f"reward 'quits', row 1: raised {kind}"):
            score(pool, "abc", how=["", how, ""])
        np.testing.assert_array_equal(score(pool, "a", how=[""]).rewards, [[1.0]])


def test_keyboard_interrupt_is_a_problem_there_and_the_users_here():
    with RewardPool([reward("worker", "quits")]) as pool, pytest.raises(ValueError, match="KeyboardInterrupt"):
        score(pool, "a", how=["interrupt"])
    with RewardPool([reward("here", "quits")]) as pool, pytest.raises(KeyboardInterrupt):
        score(pool, "a", how=["interrupt"])


def test_what_raised_is_not_asked_again():
    calls = []

    def asks(completions, **columns):
        calls.append(len(completions))
        texts = [completion[0]["content"] for completion in completions]
        for text in texts:
            if text == "bad":
                raise RuntimeError("no money left")
        return [0.0] * len(completions)

    said = [[{"role": "assistant", "content": text}] for text in ["good", "bad", *["text"] * 60]]
    with RewardPool([asks]) as pool, pytest.raises(ValueError) as caught:
        score(pool, said)
    assert calls == [62]
    assert str(caught.value).startswith("reward 'asks', row 1: raised RuntimeError: no money left (")
    assert "with completion 'bad' at hand; repair" in str(caught.value)


def test_an_error_about_no_single_row_names_none():
    def fails(completions, **columns):
        pairs = list(zip(completions, completions[1:], strict=False))
        first, second = pairs[0]
        return [len(first) / (len(second) - len(second))]

    with RewardPool([fails]) as pool, pytest.raises(ValueError, match="reward 'fails': raised ZeroDivisionError"):
        score(pool, ["one", "two", "three"])


def test_arguments_arrive_by_keyword_as_they_were():
    texts = ["", "\0", "\ud800 lone", "\u2028\r\n\x85", "🦀" * 3, "a" * 1_000_000, '"}\n{"']
    lengths = [len(text) for text in texts]
    with RewardPool([reward("worker", "columns_back"), reward("here", "columns_back")]) as pool:
        scores = score(pool, texts, number=np.array(lengths), other=[None, {"a": [1, 2.5]}, "x", True, [], "\ud800", 3])
    np.testing.assert_array_equal(scores.rewards, np.ones((2, 7)))


@pytest.fixture(scope="module")
def builtins():
    state = TrainerState(max_completion_len=9)
    with RewardPool(CHEAP, options={"regex": {"pattern": "a|b"}}, state=state) as pool:
        yield pool


@settings(max_examples=30)
@given(completions=st.lists(st.text(st.characters(codec=None, exclude_categories=[])), min_size=1, max_size=5))
def test_any_string_through_the_builtins(builtins, completions):
    count = len(completions)
    columns = {"answer": [f"7{text}" for text in completions], "nums": [[1, 2]] * count, "target": [3] * count}
    for form in (completions, [[{"role": "assistant", "content": text}] for text in completions]):
        scores = builtins.score(completions, form, [[0]] * count, columns)
        answered = np.isfinite(scores.rewards)
        assert answered[[name != "gsm8k" for name in CHEAP]].all() and scores.warnings == ()


def test_a_function_cannot_change_what_others_get():
    def clears(prompts, completions, completion_ids, answer, **columns):
        rewards = [1.0] * len(completions)
        for argument in (prompts, completions, completion_ids, answer):
            argument.clear()
        return rewards

    with RewardPool([clears, clears, "exact_match"]) as pool:
        np.testing.assert_array_equal(score(pool, ["3", "4"], answer=["3", "5"]).rewards, [[1, 1], [1, 1], [1, 0]])


def test_silence_is_nan():
    def first(completions, **columns):
        return [1.0, None, 3.0, None]

    def second(completions, **columns):
        return [0.5, 0.25, float("nan"), None]

    with RewardPool([first, second]) as pool:
        rewards = score(pool, "abcd").rewards
    np.testing.assert_array_equal(rewards, [[1.0, np.nan, 3.0, np.nan], [0.5, 0.25, np.nan, np.nan]])


def test_only_those_that_are_wanted_are_asked():
    calls = []

    def costs(completions, **columns):
        calls.append(len(completions))
        return [1.0] * len(completions)

    texts = ["3", "4"]
    with RewardPool(["exact_match", costs], stream=["costs"]) as pool:
        for only in ((0,), None):
            with pool.begin(only) as scoring:
                rewards = scoring.finish(Batch(texts, texts, [[1], [1]], {"answer": ["3", "3"]})).rewards
            np.testing.assert_array_equal(rewards, [[1, 0], [1, 1] if only is None else [np.nan, np.nan]])
            assert calls == ([2] if only is None else [])


def test_names_are_unique():
    with RewardPool(["exact_match", "exact_match", lambda completions, **columns: [0.0]]) as pool:
        assert pool.names == ("exact_match", "exact_match_2", "<lambda>")


def test_no_completions():
    with RewardPool(["exact_match", reward("here", "obey")]) as pool:
        scores = pool.score([], [], [], {"answer": []})
    assert scores.rewards.shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"specs": []}, "got none"),
        ({"specs": [3]}, "got 3, which is neither"),
        ({"specs": ["exact_match"], "timeout_seconds": 0}, "got 0"),
        ({"specs": ["exact_match"], "memory_limit_mb": 8}, "got 8"),
        ({"specs": ["regex"], "options": {"regexp": {}}}, "reward.options.regexp: no reward .*did you mean 'regex'"),
        ({"specs": ["exakt_match"]}, r"no built-in of that name \(did you mean 'exact_match'\?\); use one of answer_f"),
        ({"specs": ["soft_overlong"]}, "reward 'soft_overlong': got no max_completion_len"),
        ({"specs": ["no_file.py:f", "exact_match"]}, "no file 'no_file.py'"),
    ],
)
def test_a_pool_that_cannot_be_is_refused_at_once(arguments, says):
    with pytest.raises(ValueError, match=says):
        RewardPool(**arguments)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"answer": ["1"]}, "column 'answer': got 1 entries for 2 completions"),
        ({"prompts": ["1", "2"]}, r"columns \['prompts'\]: these names are arguments"),
        ({"answer": ["1", "2"], "when": [object(), 1]}, "column 'when': cannot be sent"),
    ],
)
def test_columns_that_cannot_be(columns, says):
    with RewardPool(["exact_match"]) as pool, pytest.raises(ValueError, match=says):
        pool.score(["a", "b"], ["a", "b"], [[1], [1]], columns)


def test_a_missing_column_says_so():
    says = r"reward 'exact_match': needs a column 'answer', but the data's columns are \['solution'\]; add it"
    with RewardPool(["exact_match"]) as pool:
        with pytest.raises(ValueError, match=says):
            score(pool, "ab", solution=["a", "b"])
        with pytest.raises(ValueError, match=says):
            pool.check_columns(["solution"])
        pool.check_columns(["solution", "answer"])
        with pytest.raises(ValueError, match=r"columns \['trainer_state'\]: these names are arguments"):
            pool.check_columns(["answer", "trainer_state"])


class Judge:
    """A callable object whose call is a coroutine; it answers when ``count`` of its kind have been asked."""

    def __init__(self, count=1):
        self.barrier = asyncio.Barrier(count)

    async def __call__(self, completions, **columns):
        await self.barrier.wait()
        return [float(len(text)) for text in completions]


async def fails(completions, **columns):
    await asyncio.sleep(0)
    return [1 / len(text) for text in completions]


def test_async_functions_and_closures():
    seen = []

    async def closure(completions, **columns):
        seen.append(threading.current_thread())
        await asyncio.sleep(0.01)
        return [float(len(seen))] * len(completions)

    with RewardPool([reward("worker", "waits"), reward("here", "waits"), closure, Judge()]) as pool:
        np.testing.assert_array_equal(score(pool, ["a", "bcd"]).rewards, [[1, 3], [1, 3], [1, 1], [1, 3]])
        assert pool.names == ("waits", "waits_2", "closure", "Judge")


@pytest.mark.parametrize("way", WAYS)
def test_one_event_loop_for_all_calls(way):
    with RewardPool([reward(way, "same_loop")]) as pool:
        for _ in range(3):
            np.testing.assert_array_equal(score(pool, "ab").rewards, [[1, 1]])


def test_async_functions_overlap():
    with RewardPool([Judge(10)] * 10, timeout_seconds=120.0) as pool:  # one after the other they would wait for ever
        np.testing.assert_array_equal(score(pool, ["abc"]).rewards, np.full((10, 1), 3.0))


def test_inside_a_running_event_loop():
    async def notebook_cell():
        with RewardPool([reward("worker", "waits"), reward("here", "waits"), Judge(), fails]) as pool:
            scores = score(pool, ["a", "bcd"])
            with pytest.raises(ValueError, match="reward 'fails': raised ZeroDivisionError"):
                score(pool, ["a", ""])
        return scores.rewards

    np.testing.assert_array_equal(asyncio.run(notebook_cell()), [[1, 3], [1, 3], [1, 3], [1, 1 / 3]])


def test_a_failure_cancels_what_others_await(capfd):
    ended = []

    async def forever(completions, **columns):
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(len(completions))

    def bad(completions, **columns):
        return ["x"]

    with RewardPool([bad, forever]) as pool, pytest.raises(ValueError, match="reward 'bad', row 0: returned 'x'"):
        score(pool, ["a"])
    assert ended == [1]
    assert "was destroyed" not in capfd.readouterr().err


def test_workers_run_at_the_same_time_and_apart(tmp_path):
    functions = [reward("worker", "meets_others")] * 4 + [reward("worker", "process_id")] * 2
    with RewardPool(functions, timeout_seconds=120.0) as pool:  # one after the other they would wait for ever
        scores = score(pool, "ab", place=[str(tmp_path)] * 2, count=[4] * 2)
    np.testing.assert_array_equal(scores.rewards[:4], np.ones((4, 2)))
    assert scores.rewards[4, 0] != scores.rewards[5, 0]


def test_the_worker_imports_little_and_rewards_never_import_jax(tmp_path):
    heavy = tmp_path / "heavy.py"
    heavy.write_text(
        "import sys\n"
        "HEAVY = ('jax', 'numpy', 'transformers', 'asyncio')\n"
        "def heavy(completions, **columns): return [float(sum(name in sys.modules for name in HEAVY))]\n"
    )
    with RewardPool([f"{heavy}:heavy"]) as pool:
        np.testing.assert_array_equal(score(pool, "a").rewards, [[0.0]])
    code = "import sys, grpo_jax.rewards; print([m for m in ('jax', 'numpy', 'asyncio') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import sys, grpo_jax.rewards.pool; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    (tmp_path / "beside.py").write_text("def one(completions, **columns): return [1.0] * len(completions)\n")
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            print("script runs")
            from grpo_jax.rewards import RewardPool
            pool = RewardPool(["beside:one", "exact_match", lambda completions, **columns: [2.0]])
            print(pool.score(["a"], ["3"], [[1]], {"answer": ["3"]}).rewards.tolist())
            """
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, cwd="/")
    assert done.stdout.splitlines() == ["script runs", "[[1.0], [1.0], [2.0]]"]
    assert done.returncode == 0 and done.stderr == ""
