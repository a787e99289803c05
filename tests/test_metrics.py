"""What a run records: lines that survive any text, whole groups, the text of each token."""

import json
from dataclasses import replace

import numpy as np
import pytest
from callbacks.synthetic import NAMES, Words, step_of
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.metrics import (
    JsonLines,
    Phases,
    TokenTexts,
    completion_rows,
    prompt_text,
    read_json_lines,
    reward_metrics,
    scalars,
)

SEPARATORS = "a\u2028b\x85c\x0bd\x0ce\x1cf\u2029\r\n"


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(exclude_categories=()))))
def test_any_text_is_read_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    file = JsonLines(path)
    for n, text in enumerate(texts):
        file.write({"step": n, text: text})
    file.close()
    # Two halves of a surrogate pair, one behind the other, are one character to JSON.
    assert read_json_lines(path) == [json.loads(json.dumps({"step": n, text: text})) for n, text in enumerate(texts)]


def test_going_on_keeps_the_lines_below_a_step_whatever_they_hold(tmp_path):
    path = tmp_path / "x.jsonl"
    file = JsonLines(path)
    for step in range(4):
        file.write({"step": step, "text": SEPARATORS + "\ud800", "value": float("nan"), "np": np.float32(0.5)})
    file.close()
    with path.open("a") as raw:
        raw.write('{"step": 4, "te')  # a kill
    again = JsonLines(path, keep_below=3)
    again.write({"step": 3})
    again.close()
    rows = read_json_lines(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[2] == {"step": 2, "text": SEPARATORS + "\ud800", "value": None, "np": 0.5}


@pytest.mark.parametrize(("most", "kept"), [(0, 0), (1, 4), (4, 4), (5, 8), (12, 12), (99, 12)])
def test_completions_are_kept_in_whole_groups(most, kept):
    step = step_of(3)
    rows = completion_rows(3, step.prompts, step.rollout, step.scored, NAMES, most)
    assert [(row["group"], row["sample"]) for row in rows] == [divmod(n, 4) for n in range(kept)]
    for n, row in enumerate(rows):
        assert row["completion"] == step.scored.completions[n] and row["prompt"] == step.prompts[n // 4].text
        assert row["advantage"] == step.scored.advantages[n] and row["length"] == step.rollout.completion_len[n]
        assert row["extra"] == {"parsed": f"w{n}", "depth": n}
        assert "tokens" not in row


def test_groups_that_only_fill_the_batch_are_left_out():
    step = step_of(3)
    step.scored.counted[:] = [False, True, True]
    rows = completion_rows(3, step.prompts, step.rollout, step.scored, NAMES, 5)
    assert [row["group"] for row in rows] == [1] * 4 + [2] * 4
    assert rows[0]["completion"] == step.scored.completions[4]


def test_figures_of_rewards_are_of_what_was_scored():
    step = step_of(3)
    reward = step.scored.reward + 2.0
    scored = np.ones_like(step.scored.scored)
    scored[0, :2] = False
    reward[0, :2] = 0.0  # what stands where nothing was scored
    figures = reward_metrics(NAMES, replace(step.scored, reward=reward, scored=scored))
    assert figures["reward"] == pytest.approx(reward[scored].mean()) != pytest.approx(reward.mean())
    assert figures["reward_std"] == pytest.approx(reward[scored].std())


def test_tokens_spell_the_completion_and_have_their_log_probs():
    step = step_of(2)
    rows = completion_rows(2, step.prompts, step.rollout, step.scored, NAMES, 12, TokenTexts(Words()))
    for n, row in enumerate(rows):
        end = "<end>" if row["finish"] == "stop" else ""
        assert "".join(row["tokens"]) == row["completion"] + end
        assert len(row["logp"]) == len(row["tokens"]) == row["length"]
        start = step.rollout.prompt_len[n]
        expected = step.rollout.sampler_logp[n, start : start + row["length"]]
        np.testing.assert_allclose(row["logp"], expected, atol=0.0051)


def test_values_that_json_does_not_know_are_kept_as_text():
    step = step_of(2)
    step.scored.extra.update(
        array=[np.zeros(2)] * 12, number=np.arange(12.0), none=[None] * 12, bad=[float("inf")] * 12
    )
    row = completion_rows(2, step.prompts, step.rollout, step.scored, NAMES, 4)[1]
    assert row["extra"] | {"array": "[0. 0.]", "number": 1.0, "none": None, "bad": None} == row["extra"]
    json.dumps(row, allow_nan=False)


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer whose tokens are bytes, so that most characters are several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@settings(max_examples=80)
@given(st.text(max_size=12))
def test_characters_of_several_tokens_are_whole(byte_level, text):
    ids = byte_level(text, add_special_tokens=False)["input_ids"] + [byte_level.eos_token_id]
    texts = TokenTexts(byte_level)(ids)
    assert len(texts) == len(ids) and "".join(texts) == f"{text}<eos>"


@settings(max_examples=80)
@given(st.lists(st.integers(0, 256), max_size=12))
def test_any_tokens_give_one_text_each(byte_level, ids):
    texts = TokenTexts(byte_level)(ids)
    assert len(texts) == len(ids)
    whole = byte_level.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" not in whole:
        assert "".join(texts) == whole


def test_a_space_that_begins_a_word_is_kept():
    class Dropping:
        """Drops the space a text begins with, as SentencePiece tokenizers do."""

        def decode(self, ids, **_):
            return "".join(f" w{i}" for i in ids).removeprefix(" ")

    assert TokenTexts(Dropping())([3, 4]) == [" w3", " w4"]


def test_scalars_and_prompts():
    row = {"step": 3, "a": 1, "b": 2.5, "c": float("nan"), "d": None, "e": ["x"], "f": True, "g": "text"}
    assert scalars(row) == {"a": 1.0, "b": 2.5}
    assert prompt_text("x") == "x"
    assert prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": ["y"]}]) == (
        'system: Be brief.\nuser: ["y"]'
    )


def test_phases_are_counted_by_step_and_in_all(monkeypatch):
    now = iter([0.0, 1.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr("grpo_jax.metrics.time.perf_counter", lambda: next(now))
    phases = Phases({"a": 5.0})
    for name in ("a", "b"):
        with phases(name):
            pass
    assert phases.take_step() == {"a": 1.0, "b": 2.0} and phases.take_step() == {}
    with phases("a"):
        pass
    assert dict(phases.total) == {"a": 9.0, "b": 2.0} and phases.take_step() == {"a": 3.0}


def test_completions_without_a_reward_are_counted_in_all_and_by_function():
    scored = step_of(3).scored
    by_function = np.nan_to_num(scored.by_function)
    by_function[0, :3] = by_function[1, 2:4] = np.nan
    valid = np.isfinite(by_function).any(0).reshape(scored.scored.shape)
    row = reward_metrics(NAMES, replace(scored, by_function=by_function, scored=valid))
    assert (row["unscored"], *(row[f"rewards/{name}/unscored"] for name in NAMES)) == (1, 3, 2)
    assert row[f"rewards/{NAMES[0]}/mean"] == pytest.approx(by_function[0, 3:].mean())
