"""Rewards asked while others decode: who is asked when, and that nothing else changes."""

import asyncio
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.collect import Collector
from grpo_jax.config import TrainConfig
from grpo_jax.data import PromptSet, PromptStream
from grpo_jax.metrics import Phases
from grpo_jax.rewards import REWARDS, RewardPool, TrainerState
from grpo_jax.rewards.call import Batch
from grpo_jax.rollout import ContinuousEngine, Group, Sampling
from grpo_jax.scoring import Scorer
from grpo_jax.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
QUESTIONS = [{"prompt": f"{a}+{a + 1}=", "answer": str(2 * a + 1)} for a in range(4)]
SAMPLES, LIMIT = 3, 24
WAIT = 60.0
"""Seconds after which a test of order gives up; none is waited for where the order holds."""
JUDGE = """
import time
from pathlib import Path

def judge(prompts, completions, note, **columns):
    with Path(note[0]).open("a") as file:
        print(len(completions), prompts[0], file=file)
    return [float(len(text) % 5) for text in completions]
"""


def score_of(text):
    return float(sum(map(ord, text)) % 97)


def collector(functions, stream, engine=None, rows=QUESTIONS, timeout=WAIT):
    model, params = tiny_model()
    engine = engine or ContinuousEngine(model, 16)
    names = [f if isinstance(f, str) else f.__name__ for f in functions]
    config = TrainConfig.from_tables(
        {
            "rollout": {"prompts_per_step": len(rows), "num_samples": SAMPLES, "max_new_tokens": LIMIT},
            "reward": {"functions": names, "stream": stream, "timeout_seconds": timeout},
        }
    )
    prompts = PromptStream([PromptSet(rows, TOKENIZER)], seed=0, prompts_per_step=len(rows), shuffle=False)
    pool = RewardPool(functions, timeout, None, stream=config.reward.stream)
    scorer = Scorer(pool, TOKENIZER, frozenset({1}), config)
    sampling = Sampling(max_new_tokens=LIMIT, stop_ids=(1, *range(56, 61)))
    return Collector(prompts, engine, scorer, sampling, config, Phases()), params, pool


def test_streamed_or_not_the_batch_is_bitwise_the_same():
    calls = []

    async def judge(completions, log_extra, **columns):
        calls.append(len(completions))
        log_extra("letters", [len(text) for text in completions])
        return [score_of(text) for text in completions]

    def whole(completions, answer, **columns):
        calls.append(-len(completions))
        return [float(len(set(completions)) == len(completions)) + score_of(text) for text in completions]

    made = []
    for stream in ((), ("judge",)):
        parts, params, pool = collector([judge, whole, "exact_match"], stream)
        with pool:
            made.append(parts.next(params, 0))
    rows = len(QUESTIONS) * SAMPLES
    assert sorted(calls) == [-rows, -rows, *[SAMPLES] * len(QUESTIONS), rows]
    one, two = made
    assert len(np.unique(one.rollout.completion_len)) > 3 and np.abs(one.scored.advantages).min() > 0
    for name in ("tokens", "completion_len", "sampler_logp", "finish"):
        np.testing.assert_array_equal(getattr(one.rollout, name), getattr(two.rollout, name))
    for name in ("by_function", "reward", "advantages", "mask"):
        np.testing.assert_array_equal(getattr(one.scored, name), getattr(two.scored, name))
    assert one.scored.completions == two.scored.completions and one.scored.extra == two.scored.extra


class OneByOne:
    """An engine that gives a group only when what it is told to wait for, about the group before, is there."""

    def __init__(self, wait):
        self.inner, self.wait, self.given = ContinuousEngine(tiny_model()[0], 16), wait, []

    def stream(self, *arguments, **options):
        groups = list(self.inner.stream(*arguments, **options))
        for group in sorted(groups, key=lambda group: -group.prompt):
            if self.given:
                assert self.wait(self.given), f"nobody was asked about {self.given} before the next group"
            self.given.append(group.prompt)
            yield Group(group.prompt, group.rollout)


def test_a_function_here_is_asked_and_answers_while_others_decode():
    asked = threading.Semaphore(0)
    judged = []

    async def judge(prompts, completions, **columns):
        judged.append(prompts[0])
        asked.release()
        return [score_of(text) for text in completions]

    engine = OneByOne(lambda given: asked.acquire(timeout=WAIT))
    parts, params, pool = collector([judge], ("judge",), engine)
    with pool:
        batch = parts.next(params, 0)
    assert engine.given == [3, 2, 1, 0] and judged == [row["prompt"] for row in reversed(QUESTIONS)]
    np.testing.assert_array_equal(batch.scored.by_function[0], [score_of(text) for text in batch.scored.completions])


def test_a_function_in_its_process_is_asked_while_others_decode(tmp_path):
    (tmp_path / "own.py").write_text(JUDGE)
    note = tmp_path / "note"

    def lines():
        return note.read_text().splitlines() if note.exists() else []

    def wait(given):
        end = time.monotonic() + WAIT
        while len(lines()) < len(given) and time.monotonic() < end:
            time.sleep(0.01)
        return len(lines()) == len(given)

    rows = [{**row, "note": str(note)} for row in QUESTIONS]
    parts, params, pool = collector([f"{tmp_path / 'own.py'}:judge"], ("judge",), OneByOne(wait), rows)
    with pool:
        parts.next(params, 0)
    assert lines() == [f"{SAMPLES} {row['prompt']}" for row in reversed(QUESTIONS)]


def test_an_error_while_others_decode_ends_what_is_asked():
    asked, cancelled = threading.Event(), threading.Event()

    async def forever(completions, **columns):
        asked.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    class Breaks(OneByOne):
        def stream(self, *arguments, **options):
            yield from list(self.inner.stream(*arguments, **options))[:2]
            assert asked.wait(WAIT)
            raise KeyboardInterrupt

    parts, params, pool = collector([forever, "exact_match"], ("forever",), Breaks(None))
    with pool:
        with pytest.raises(KeyboardInterrupt):
            parts.next(params, 0)
        assert cancelled.wait(WAIT)


def rows_of(texts, **columns):
    return Batch(texts, texts, [[5] * len(text) for text in texts], columns, TrainerState(max_completion_len=40))


BUILT_IN = {
    "options": {"regex": {"pattern": "[13579]$"}, "cosine_length": {"judge": "exact_match"}},
    "columns": {"answer": [str(n) for n in range(12)], "nums": [[1, n] for n in range(12)], "target": [3] * 12},
}


def test_every_built_in_judges_a_completion_by_itself():
    """What `stream` takes for granted of them: any cut into groups, in any order, gives the same."""
    names = sorted(REWARDS)
    texts = [f"<think>1 + {n}</think> <answer>{n + n % 2}</answer> {n}" for n in range(12)]
    columns = BUILT_IN["columns"] | {"prompt": texts}
    with RewardPool([REWARDS[n] for n in names], options=BUILT_IN["options"], stream=names) as pool:
        needed = {c for needs in pool._needs.values() for c in needs}
        whole = rows_of(texts, **{name: columns[name] for name in sorted(needed | {"answer"})})
        expected = pool.score(whole.prompts, whole.completions, whole.completion_ids, whole.columns, whole.state)
        with pool.begin() as scoring:
            cuts = [(0, 5), (5, 6), (6, 12)]
            random.Random(0).shuffle(cuts)
            for start, stop in cuts:
                scoring.add(start, whole.rows(start, stop))
            streamed = scoring.finish(whole)
    np.testing.assert_array_equal(streamed.rewards, expected.rewards)
    assert np.ptp(expected.rewards[names.index("exact_match")]) > 0


def test_errors_and_losses_name_the_row_in_the_whole_batch():
    def refuses(completions, **columns):
        return [1 / (len(text) - 3) for text in completions]

    hostile = Path(__file__).parent / "rewards" / "hostile.py"
    for function, name in [(refuses, "refuses"), (f"{hostile}:divides", "divides")]:
        with (
            RewardPool([function], stream=[name]) as pool,
            pool.begin() as scoring,
            pytest.raises(ValueError, match=f"reward '{name}', row 5: raised ZeroDivisionError"),
        ):
            scoring.add(4, rows_of(["a", "abc"]))
            scoring.add(0, rows_of(["a"] * 4))
            scoring.finish(rows_of(["a"] * 5 + ["abc"]))
    with RewardPool([f"{hostile}:obey"], stream=["obey"]) as pool, pool.begin() as scoring:
        texts = ["a", "exit", "ab", "abc"]
        scoring.add(2, rows_of(texts[2:]))
        scoring.add(0, rows_of(texts[:2]))
        scores = scoring.finish(rows_of(texts))
    np.testing.assert_array_equal(scores.rewards, [[1, np.nan, 2, 3]])
    assert scores.crash_counts == (1,) and "reward 'obey', row 1: its process" in scores.warnings[0]


def test_figures_of_groups_are_averaged_by_their_rows():
    def judge(completions, log_metric, **columns):
        log_metric("length", sum(map(len, completions)) / len(completions))
        return [0.0] * len(completions)

    texts = ["a", "bb", "cccccc"]
    with RewardPool([judge], stream=["judge"]) as pool, pool.begin() as scoring:
        scoring.add(0, rows_of(texts[:2]))
        scoring.add(2, rows_of(texts[2:]))
        assert scoring.finish(rows_of(texts)).metrics == {"length": 3.0}


def test_what_cannot_be_streamed_is_refused():
    with pytest.raises(
        ValueError, match=r"reward.stream.exact: no reward function .* \(did you mean 'exact_match'\?\)"
    ):
        RewardPool(["exact_match"], stream=["exact"])
    with RewardPool([lambda completions, **columns: [0.0] * len(completions)]) as pool, pool.begin() as scoring:
        scoring.add(0, rows_of(["a"]))
        with pytest.raises(ValueError, match="got 2 completions at the end and 1 before it"):
            scoring.finish(rows_of(["a", "b"]))
