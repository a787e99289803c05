"""The shipped model before any reinforcement learning: it has the form, and seldom the answer."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import grpo_jax
from grpo_jax.quickstart import task

SHIPPED = Path(grpo_jax.__file__).parent / "quickstart"


@pytest.fixture(scope="module")
def sample():
    model, params = grpo_jax.load_model(SHIPPED / "model")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "model")
    rows = [json.loads(line) for line in (SHIPPED / "eval.jsonl").read_text(encoding="utf-8").splitlines()][:256]
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]

    def run(**options):
        rollout = grpo_jax.generate(model, params, prompts, max_new_tokens=task.MAX_COMPLETION_TOKENS, **options)
        count = len(rollout.finish)
        texts = [tokenizer.decode(rollout.completion_ids(row), skip_special_tokens=True) for row in range(count)]
        answers = [row["answer"] for row in rows for _ in range(count // len(rows))]
        return texts, answers, rollout.finish

    return run


def test_greedy_accuracy_leaves_room_and_is_not_nothing(sample):
    texts, answers, _ = sample(num_samples=1, temperature=0.0)
    accuracy = np.mean([task.parse(text) == answer for text, answer in zip(texts, answers, strict=True)])
    assert 0.15 <= accuracy <= 0.45


def test_samples_stop_by_themselves_and_parse(sample):
    texts, _, finish = sample(num_samples=1, temperature=1.0)
    fine = [task.parse(text) is not None and reason == "stop" for text, reason in zip(texts, finish, strict=True)]
    assert np.mean(fine) >= 0.95
