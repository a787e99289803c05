"""The shipped task: its splits, its workings, its parser and reward, its tokenizer."""

import importlib.util
import itertools
import json
import random
import re
import sys
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

import grpo_jax
from grpo_jax.quickstart import task
from grpo_jax.rewards import resolve

SHIPPED = Path(grpo_jax.__file__).parent / "quickstart"
SCRIPT = Path(__file__).parent.parent / "scripts" / "make_quickstart_model.py"


def read_rows(split):
    return [json.loads(line) for line in (SHIPPED / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def read_problem(prompt):
    left, operator, right = re.fullmatch(r"([1-9]\d\d)([+-])([1-9]\d\d)=", prompt).groups()
    return task.Problem(int(left), operator, int(right))


def draw(count, seed=0):
    rng = random.Random(seed)
    return list(itertools.islice(task.problems("pretrain", rng), count)), rng


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_quickstart_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_splits_are_disjoint():
    train, held_out = ({row["prompt"] for row in read_rows(split)} for split in ("train", "eval"))
    pretraining = {prompt for prompt, _ in itertools.islice(task.pretraining_texts(task.Mixture(), seed=0), 20_000)}
    assert len(train) == 2048 and len(held_out) == 512
    assert not train & held_out and not pretraining & held_out and not pretraining & train


def test_every_problem_has_one_split_and_a_swapped_sum_has_the_same():
    """What a sample of the stream cannot show: no seed and no length of pretraining meets a held-out prompt."""
    for split in ("train", "eval"):
        assert {task.split_of(read_problem(row["prompt"])) for row in read_rows(split)} == {split}
    stream, _ = draw(2_000)
    assert {task.split_of(problem) for problem in stream} == {"pretrain"}
    sums = [problem for problem in stream if problem.operator == "+"]
    assert {task.split_of(task.Problem(p.right, "+", p.left)) for p in sums} == {"pretrain"}


def test_shipped_files_are_what_the_script_writes(script, tmp_path):
    script.write_data(tmp_path)
    for split in ("train", "eval"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (SHIPPED / f"{split}.jsonl").read_bytes()


def test_answers_of_the_shipped_rows():
    for row in read_rows("train") + read_rows("eval"):
        problem = read_problem(row["prompt"])
        value = problem.left + problem.right if problem.operator == "+" else problem.left - problem.right
        assert row == {"prompt": problem.prompt, "answer": str(value)} and value >= 0


@pytest.mark.parametrize(
    ("prompt", "sound", "careless"),
    [
        ("407+385=", "7+5=12, 0+8+1=9, 4+3=7: 792", "7+5=12, 0+8=8, 4+3=7: 782"),
        ("402-385=", "12-5=7, 10-1-8=1, 4-1-3=0: 17", "12-5=7, 10-8=2, 4-3=1: 127"),
        ("999+101=", "9+1=10, 9+0+1=10, 9+1+1=11: 1100", "9+1=10, 9+0=9, 9+1=10: 1090"),
        ("500-500=", "0-0=0, 0-0=0, 5-5=0: 0", "0-0=0, 0-0=0, 5-5=0: 0"),
    ],
)
def test_workings_by_hand(prompt, sound, careless):
    problem = read_problem(prompt)
    assert task.write_working(problem, 1.0, random.Random(0)) == sound
    assert task.write_working(problem, 0.0, random.Random(0)) == careless
    assert task.write_guess(problem) == careless[careless.index(": ") :]


def test_sound_workings_are_right_and_the_mixture_is_as_stated():
    stream, rng = draw(4_000)
    assert all(task.parse(task.write_working(problem, 1.0, rng)) == problem.answer for problem in stream)
    mixture = task.Mixture(keep_carry=0.25, guess=0.5)
    texts = [task.sample_completion(problem, mixture, rng) for problem in stream]
    assert all(task.parse(text) is not None for text in texts)
    guesses = [text.startswith(": ") for text in texts]
    assert 0.47 < sum(guesses) / len(guesses) < 0.53
    ones = [
        (text, problem)
        for text, problem, guess in zip(texts, stream, guesses, strict=True)
        if not guess and problem.operator == "+" and problem.left % 10 + problem.right % 10 > 9
    ]
    kept = [re.search(r", \d\+\d\+1=", text.partition(", ")[1] + text.split(", ")[1]) is not None for text, _ in ones]
    assert 0.2 < sum(kept) / len(kept) < 0.3


@pytest.mark.parametrize(
    ("completion", "stated"),
    [
        ("7+5=12, 0+8+1=9, 4+3=7: 792", "792"),
        (": 792", "792"),
        ("12-5=7, 10-8=2, 4-3=1: 127", "127"),
        (": 0", "0"),
        (": 0792", None),
        (": 792 ", None),
        (": 792\n", None),
        (": ", None),
        ("792", None),
        (": 7,92", None),
        (": ٧٩٢", None),
        (": " + "9" * 10_000, None),
        ("<eos>", None),
        ("", None),
    ],
)
def test_parse(completion, stated):
    assert task.parse(completion) == stated


def test_reward_on_right_wrong_garbage_and_empty():
    reward = resolve("quickstart")
    completions = ["7+5=12, 0+8+1=9, 4+3=7: 792", "7+5=12, 0+8=8, 4+3=7: 782", ": 792", "792", "=+: , ", ""]
    scores = reward(
        prompts=["407+385="] * 6, completions=completions, completion_ids=[[1]] * 6, answer=["792"] * 6, other=[0] * 6
    )
    assert scores == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_shuffled_control_deals_the_same_rewards_out_anew():
    stream, rng = draw(64)
    texts = [task.write_working(problem, 0.5, rng) for problem in stream]
    batch = {
        "prompts": [problem.prompt for problem in stream],
        "completions": texts,
        "completion_ids": [[]] * 64,
        "answer": [problem.answer for problem in stream],
    }
    true, control = resolve("quickstart")(**batch), resolve("grpo_jax.quickstart.controls:shuffled")(**batch)
    assert sum(control) == sum(true) and control != true
    assert control == resolve("grpo_jax.quickstart.controls:shuffled")(**batch)


@given(st.text(max_size=80))
def test_any_string_gets_a_reward(text):
    (score,) = resolve("quickstart")(prompts=["1"], completions=[text], completion_ids=[[]], answer=["792"])
    assert score in (0.0, 1.0)


def test_tokenizer_round_trip(script):
    stream, rng = draw(500)
    tokenizer = script.build_tokenizer()
    assert len(tokenizer) == 32 and tokenizer.eos_token_id != tokenizer.pad_token_id
    for problem in stream:
        text = task.write_working(problem, 0.5, rng)
        prompt, completion = (tokenizer(part)["input_ids"] for part in (problem.prompt, text + task.EOS))
        assert len(prompt) == script.PROMPT_TOKENS and len(completion) <= task.MAX_COMPLETION_TOKENS
        assert completion[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in prompt + completion
        assert tokenizer.decode(prompt) == problem.prompt
        assert tokenizer.decode(completion) == text + task.EOS
        assert tokenizer.decode(completion, skip_special_tokens=True) == text
        assert tokenizer(problem.prompt + text + task.EOS)["input_ids"] == prompt + completion


@pytest.mark.parametrize("loader", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_shipped_tokenizer_is_the_one_the_script_builds(script, loader):
    """Under either class: transformers chooses one of its own for a directory whose config.json says qwen2."""
    shipped, built = getattr(transformers, loader).from_pretrained(SHIPPED / "model"), script.build_tokenizer()
    assert shipped.get_vocab() == built.get_vocab() and len(shipped) == 32
    assert (shipped.eos_token, shipped.pad_token) == (task.EOS, task.PAD)
    stream, rng = draw(50)
    for problem in stream:
        text = problem.prompt + task.write_working(problem, 0.5, rng) + task.EOS
        ids = built(text)["input_ids"]
        assert shipped(text)["input_ids"] == ids
        assert shipped.decode(ids) == text
        assert shipped.decode(ids, skip_special_tokens=True) == text.removesuffix(task.EOS)
    assert shipped("1 x\n")["input_ids"] == shipped("1")["input_ids"]


def test_a_pretraining_batch_trains_completions_with_their_end(script):
    tokenizer = script.build_tokenizer()
    batch = next(script.pretraining_batches(tokenizer, seed=0, rows=31))
    for row in range(31):
        trained = batch.tokens[row][batch.mask[row]]
        assert task.parse(tokenizer.decode(trained, skip_special_tokens=True)) is not None
        assert trained[-1] == tokenizer.eos_token_id and not batch.mask[row, : script.PROMPT_TOKENS].any()
        length = script.PROMPT_TOKENS + len(trained)
        assert batch.segment_ids[row].tolist() == [1] * length + [0] * (script.ROW_TOKENS - length)
