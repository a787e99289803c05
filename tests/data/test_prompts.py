"""The order of prompts, epochs, mixtures and lengths."""

import json
import subprocess
import sys
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.config import TrainConfig
from grpo_jax.data import PromptSet, PromptStream, held_out_prompts, training_prompts

from .cases import TOKENIZER, ids, make_tokenizer


def stream(count=7, per_step=3, **more):
    rows = [{"prompt": "x" * (1 + i), "number": i} for i in range(count)]
    limit = more.pop("max_prompt_len", None)
    return PromptStream([PromptSet(rows, TOKENIZER, limit)], **{"seed": 5, "prompts_per_step": per_step} | more)


def draw(prompts, steps):
    return [prompt.request_id for _ in range(steps) for prompt in prompts.next()]


GOLDEN = [3, 6, 2, 4, 5, 0, 1, 9, 7, 13, 8, 12, 11, 10]
"""Two epochs of 7 rows at seed 5: words of Philox4x64 keyed by SeedSequence([5, epoch]), ranked."""
MIXED = [5, 3, 8, 7, 2, 4, 0, 1, 14, 12, 13, 16]
"""Of 5 and 7 rows, weights 3 and 1, seed 5: a word of Philox4x64 keyed by SeedSequence([5, 0, 0, 1]) for each draw."""


@settings(max_examples=60)
@given(
    count=st.integers(1, 13),
    per_step=st.integers(1, 17),
    seed=st.integers(0, 2**64),
    shuffle=st.booleans(),
    cut=st.integers(0, 13),
)
def test_each_row_once_per_epoch_whatever_the_batch(count, per_step, seed, shuffle, cut):
    limit = max(1, count - cut)
    prompts = stream(count, per_step, seed=seed, shuffle=shuffle, max_prompt_len=limit)
    kept = min(limit, count)
    assert len(prompts) == kept and prompts.filtered_count == count - kept and prompts.longest == kept
    drawn = draw(prompts, 3 * kept)
    for start in range(0, len(drawn), kept):
        epoch = start // kept
        assert sorted(drawn[start : start + kept]) == [epoch * count + row for row in range(kept)]
    one_by_one = draw(stream(count, 1, seed=seed, shuffle=shuffle, max_prompt_len=limit), len(drawn))
    assert drawn == one_by_one
    if not shuffle:
        assert drawn[:kept] == list(range(kept))


@settings(max_examples=40)
@given(steps=st.integers(0, 12), more=st.integers(1, 5))
def test_restoring_is_the_same_as_not_stopping(steps, more):
    whole = draw(stream(), steps + more)
    first = stream()
    assert draw(first, steps) == whole[: 3 * steps]
    again = stream()
    again.next()
    again.restore(json.loads(json.dumps(first.state())))
    assert again.state() == 3 * steps
    assert draw(again, more) == whole[3 * steps :]


def test_the_order_depends_on_seed_and_epoch_and_is_the_same_everywhere():
    orders = {
        tuple(row % 50 for row in draw(stream(50, 50, seed=seed), 3)[50 * e : 50 * e + 50])
        for seed in range(4)
        for e in range(3)
    }
    assert len(orders) == 12 and tuple(range(50)) not in orders
    assert draw(stream(7, 7), 2) == GOLDEN


def test_filtering_keeps_the_order_and_the_request_ids_of_the_rest():
    whole = draw(stream(11, 11), 2)
    assert draw(stream(11, 1, max_prompt_len=6), 12) == [request for request in whole if request % 11 < 6]
    long_first = [{"prompt": "x" * (11 - i)} for i in range(11)]
    rest = PromptStream([PromptSet(long_first, TOKENIZER, 6)], seed=5, prompts_per_step=12)
    assert draw(rest, 1) == [request for request in whole if request % 11 >= 5]


def test_all_too_long_says_how_long():
    with pytest.raises(ValueError, match="data.max_prompt_len: got 2, but all 3 .* shortest 4 tokens, the longest 6"):
        PromptSet([{"prompt": "a" * n} for n in (5, 4, 6)], TOKENIZER, max_prompt_len=2)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"per_step": 0}])
def test_arguments_out_of_range(wrong):
    with pytest.raises(ValueError, match="got (-1|0), but"):
        stream(**wrong)
    with pytest.raises(ValueError, match="got -3"):
        stream().restore(-3)


def test_prompts_carry_their_row():
    rows = [
        {"question": "ab", "answer": 3, "prompt": "other"},
        {"question": [{"role": "user", "content": "c"}], "answer": None, "prompt": ""},
    ]
    held_out = PromptSet(rows, TOKENIZER, prompt_column="question")
    assert [prompt.request_id for prompt in held_out.prompts] == [0, 1] and len(held_out) == 2
    assert [prompt.text for prompt in held_out.prompts] == [row["question"] for row in rows]
    assert [prompt.tokens for prompt in held_out.prompts] == [ids("ab"), (3, *ids("c"), 4)]
    assert held_out.prompts[0].columns == {"answer": 3, "prompt": "other"}
    second = PromptStream([held_out], seed=0, prompts_per_step=2, shuffle=False)
    second.next()
    drawn = second.next()
    assert [(p.request_id, p.columns["answer"]) for p in drawn] == [(2, 3), (3, None)]
    assert [second.by_request(p.request_id) for p in drawn] == drawn


def test_importing_data_loads_nothing_heavy():
    heavy = "{'transformers', 'huggingface_hub', 'datasets', 'pyarrow'}"
    code = f"import sys, grpo_jax.data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def mixture(seed=5, per_step=3, weights=(3.0, 1.0), counts=(5, 7), limits=(None, None), shuffle=True):
    sets = [
        PromptSet([{"prompt": "x" * (1 + i), "from": name} for i in range(count)], TOKENIZER, limit)
        for name, count, limit in zip("ab", counts, limits, strict=True)
    ]
    return PromptStream(sets, weights, seed=seed, prompts_per_step=per_step, shuffle=shuffle)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), weight=st.floats(0.2, 5), limit=st.integers(1, 7), shuffle=st.booleans())
def test_a_mixture_goes_through_each_dataset_in_epochs_of_its_own(seed, weight, limit, shuffle):
    drawn = draw(mixture(seed, 1, (weight, 1.0), limits=(None, limit), shuffle=shuffle), 60)
    assert len(set(drawn)) == len(drawn)
    for start, count, kept in [(0, 5, 5), (5, 7, limit)]:
        own = [(request // 12, request % 12 - start) for request in drawn if start <= request % 12 < start + count]
        for epoch in range(len(own) // kept):
            part = own[epoch * kept : (epoch + 1) * kept]
            assert {e for e, _ in part} == {epoch} and sorted(row for _, row in part) == list(range(kept))
            assert shuffle or [row for _, row in part] == list(range(kept))


def test_a_mixture_draws_by_weight_and_a_seed_fixes_it():
    stream = mixture(weights=(3.0, 1.0), per_step=10_000)
    share = sum(prompt.columns["from"] == "a" for prompt in stream.next()) / 10_000
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 10_000) ** 0.5
    orders = {tuple(draw(mixture(seed), 10)) for seed in range(4)}
    assert len(orders) == 4 and tuple(draw(mixture(0), 10)) in orders
    assert draw(mixture(5, 6), 2) == MIXED


def test_a_mixture_goes_on_from_one_number():
    whole = draw(mixture(per_step=1000), 9)
    for cursor in (0, 1, 4095, 4096, 4097, 8191, 8192, 8989):
        again = mixture(per_step=11)
        again.restore(cursor)
        assert draw(again, 1) == whole[cursor : cursor + 11]


def test_columns_of_a_mixture_are_those_of_all():
    sets = [PromptSet([{"prompt": "a", name: 1}], TOKENIZER) for name in ("x", "y")]
    assert PromptStream(sets, seed=0, prompts_per_step=1).columns == {"x", "y"} and sets[0].columns == {"x"}


def test_one_dataset_of_a_mixture_is_drawn_as_it_is_alone():
    alone = draw(stream(7, 1), 60)
    both = mixture(counts=(7, 3), weights=(1.0, 1.0), per_step=60)
    own = [prompt.request_id for prompt in both.next() if prompt.columns["from"] == "a"]
    assert [(request // 10, request % 10) for request in own] == [divmod(request, 7) for request in alone[: len(own)]]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_weights_that_cannot_be(weights):
    with pytest.raises(ValueError, match="data.train: got 2 datasets with weights"):
        mixture(weights=weights)


def test_too_long_is_counted_or_refused():
    rows = [{"prompt": "a" * n} for n in (5, 2, 6)]
    held_out = PromptSet(rows, TOKENIZER, max_prompt_len=4, name="x.jsonl")
    assert held_out.report == (
        "x.jsonl: 2 of 3 prompts are longer than data.max_prompt_len = 4 tokens and are left out, the longest has 6 "
        "(rows 0, 2)"
    )
    assert PromptSet(rows, TOKENIZER, max_prompt_len=6).report == ""
    with pytest.raises(ValueError, match="2 of 3 prompts are longer than data.max_prompt_len = 4 .*the first is row 0"):
        PromptSet(rows, TOKENIZER, max_prompt_len=4, long_prompts="error")
    assert len(PromptSet(rows, TOKENIZER, max_prompt_len=6, long_prompts="error")) == 3


def config(**data):
    return TrainConfig.from_tables({"seed": 5, "rollout": {"prompts_per_step": 3}, "data": data})


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_run_gets_its_prompts_from_the_config_or_from_what_it_is_handed(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"q": "x" * (1 + i), "solution": str(i)} for i in range(7)])
    b = write(tmp_path / "b.jsonl", [{"q": "b", "solution": "0"}])
    options = {"prompt_column": "q", "rename_columns": {"solution": "answer"}, "max_prompt_len": 6}
    single = config(train=a, eval=b, **options)
    prompts = training_prompts(single, TOKENIZER)
    assert draw(prompts, 4) == draw(stream(7, 3, max_prompt_len=6), 4)
    assert prompts.reports == (
        f"{a}: 1 of 7 prompts are longer than data.max_prompt_len = 6 tokens and are left out, the longest has 7 "
        "(row 6)",
    )
    assert prompts.next()[0].columns.keys() == prompts.columns == {"answer"}
    assert {name: len(part) for name, part in held_out_prompts(single, TOKENIZER).items()} == {"eval": 1}
    assert held_out_prompts(config(train=a, eval=None), TOKENIZER) == {}

    several = config(train={a: 3, b: 1}, eval={"small": b, "large": a}, **options)
    assert len(training_prompts(several, TOKENIZER)) == 7
    assert [(name, len(part)) for name, part in held_out_prompts(several, TOKENIZER).items()] == [
        ("small", 1),
        ("large", 6),
    ]
    rows = [{"q": "abc", "solution": None}]
    assert training_prompts(several, TOKENIZER, rows).next()[2].text == "abc"
    assert training_prompts(several, TOKENIZER, {b: 2}).next()[0].text == "b"
    given = held_out_prompts(several, TOKENIZER, {"mine": rows})
    assert [prompt.text for prompt in given["mine"].prompts] == ["abc"]


ROWS = [{"prompt": "a", "reward_model": {"ground_truth": str(i)}, "when": date(2026, 1, 2 + i)} for i in range(3)]


def test_columns_are_chosen_and_nested_ones_named():
    chosen = training_prompts(config(columns=["reward_model.ground_truth"]), TOKENIZER, ROWS)
    assert [p.columns for p in chosen.sets[0].prompts] == [{"reward_model.ground_truth": str(i)} for i in range(3)]
    options = {"rename_columns": {"reward_model.ground_truth": "answer"}, "columns": ["answer"]}
    named = training_prompts(config(**options), TOKENIZER, [*ROWS, ROWS[0] | {"more": 1}])
    assert named.sets[0].prompts[2].columns == {"answer": "2"} and named.columns == {"answer"}
    nested = config(prompt_column="x.q", columns=[])
    assert training_prompts(nested, TOKENIZER, [{"x": {"q": "ab", "r": 1}}]).sets[0].prompts[0].tokens == ids("ab")
    with pytest.raises(
        ValueError, match="data.columns: no column 'whem' .did you mean 'when'..; there are prompt, rew"
    ):
        training_prompts(config(columns=["when", "whem"]), TOKENIZER, ROWS)
    with pytest.raises(ValueError, match="row 1: no column 'x.q'"):
        training_prompts(config(prompt_column="x.q"), TOKENIZER, [{"x": {"q": "a"}}, {"x": {}}])
    mixed = {"a": [ROWS[0]], "b": [{"prompt": "a", "answer": 1}]}
    either = held_out_prompts(config(columns=["when", "answer"]), TOKENIZER, mixed)
    assert [part.columns for part in either.values()] == [{"when"}, {"answer"}]


def test_what_cannot_be_sampled_from_or_sent_is_said_by_its_row():
    part = PromptSet([{"prompt": "a", "x": 1}, {"prompt": "~", "x": {"image": object()}}], TOKENIZER, name="x.jsonl")
    part.check_tokens(101)
    with pytest.raises(ValueError, match="^x.jsonl: row 1: its prompt has the token 100, .*are 0 to 99"):
        part.check_tokens(100)
    with pytest.raises(ValueError, match="^x.jsonl: row 1, column 'x': cannot be sent .*a object has no.*data.columns"):
        part.check_columns_travel()
    PromptSet(ROWS, TOKENIZER).check_columns_travel()


def test_a_digest_tells_other_rows():
    def of(rows, tokenizer=TOKENIZER, **more):
        return PromptSet(rows, tokenizer, **more).digest()

    assert of(ROWS) == of([dict(reversed(row.items())) for row in ROWS]) == of(ROWS, make_tokenizer(bos=True))
    other = [ROWS[::-1], ROWS[:2], [*ROWS[:2], ROWS[2] | {"when": None}], [*ROWS[:2], ROWS[2] | {"prompt": "b"}]]
    assert len({of(rows) for rows in [ROWS, *other]}) == 5
    images = [{"prompt": "\N{SNOWMAN}", "image": object(), "half": "\ud83d"}]
    assert of(images) == of([images[0] | {"image": object()}])
    stream = training_prompts(config(), TOKENIZER, ROWS)
    assert stream.digest() == of(ROWS)


def test_tokens_that_double_or_end_a_prompt_are_said():
    rows = [{"prompt": text} for text in ("ab", "<s>ab", "ab</s>", "</s>")]
    said = PromptSet(rows, make_tokenizer(bos=True), name="x").reports
    assert [line.partition(":")[2][:60] for line in said] == [
        " 1 of 4 prompts begin with BOS (<s>) twice (row 1): the toke",
        " 2 of 4 prompts end with EOS (</s>) (rows 2, 3), so that com",
    ]
    assert len(PromptSet(rows, TOKENIZER).reports) == 1 and PromptSet(rows[:2], TOKENIZER).report == ""


def test_errors_name_the_dataset(tmp_path):
    good, bad = ({"prompt": "a"}, {"prompt": ""})
    file = write(tmp_path / "bad.jsonl", [good, bad])
    for read, source, says in [
        (training_prompts, [good, bad], "data.train: row 1: prompt '': has no tokens"),
        (training_prompts, {file: 1.0}, f"data.train '{file}': row 1: prompt"),
        (held_out_prompts, [bad], "data.eval: row 0: prompt"),
        (held_out_prompts, {"hard": [bad]}, "data.eval.hard: row 0: prompt"),
        (held_out_prompts, {"hard": [{"text": "a"}]}, "data.eval.hard: row 0: no column 'prompt'"),
    ]:
        with pytest.raises(ValueError) as caught:
            read(config(), TOKENIZER, source)
        assert str(caught.value).startswith(says)


def test_evaluation_takes_the_first_rows():
    rows = [{"prompt": "a" * n} for n in (1, 2, 3)]
    few = TrainConfig.from_tables({"eval": {"prompts": 2}})
    assert [p.text for p in held_out_prompts(few, TOKENIZER, rows)["eval"].prompts] == ["a", "aa"]


def test_the_prompt_may_be_made_of_columns():
    made = config(prompt_template="{a}+{b}=", as_messages=True)
    prompts = training_prompts(made, TOKENIZER, [{"a": 1, "b": 2, "answer": "3"}])
    prompt = prompts.next()[0]
    assert prompt.tokens == (3, *ids("1+2="), 4) and prompt.columns == {"a": 1, "b": 2, "answer": "3"}
    assert prompt.text == [{"role": "user", "content": "1+2="}]
