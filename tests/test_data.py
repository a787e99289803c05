import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_jax.data import (
    ASSETS,
    PromptSet,
    PromptStream,
    check_rows,
    decode,
    encode,
    load_rows,
    load_tokenizer,
    resolve_asset,
    stop_ids,
)

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'][0] }}>{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def make_tokenizer(bos=False, template=TEMPLATE):
    """One token a character; <s>, </s> and the three turn headers are one token each."""
    special = ["<pad>", "<s>", "</s>", "<u>", "<a>", "<t>"]
    letters = [chr(code) for code in range(32, 127)]
    vocab = {token: i for i, token in enumerate(special + letters)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template,
        extra_special_tokens=["<u>", "<a>", "<t>"],
    )  # fmt: skip


TOKENIZER = make_tokenizer()


def ids(text):
    return tuple(ord(letter) - 32 + 6 for letter in text)


def stream(count=7, per_step=3, **more):
    rows = [{"prompt": "x" * (1 + i), "number": i} for i in range(count)]
    return PromptStream(rows, TOKENIZER, **{"seed": 5, "prompts_per_step": per_step} | more)


def draw(prompts, steps):
    return [prompt.request_id for _ in range(steps) for prompt in prompts.next()]


# --- files


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [{"prompt": "1 + 1", "answer": "2"}, {"answer": None, "prompt": [{"role": "user", "content": "é\u2028🦀"}]}]
    file = tmp_path / "rows.jsonl"
    text = "\ufeff" + json.dumps(rows[0]) + "\r\n\n  \n" + json.dumps(rows[1], ensure_ascii=False)
    file.write_bytes(text.encode())
    assert load_rows(file) == rows


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"data file '.*rows.jsonl' does not exist \(looked from .*give the path of a JSONL file"),
        (b"", "is empty; it needs one JSON object a line with a 'prompt'"),
        (b"\n  \n", "is empty"),
        (b'{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        (b'\n\n{"prompt": "a"}\n["a"]\n', "line 4: a JSON list, not an object"),
        (b'{"prompt": "a"}\n"a"\n', "line 2: a JSON str, not an object"),
        (b'{"prompt": "\xff"}\n', "line 1: not UTF-8"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b'{"question": "a", "answer": 1}\n', r"line 1: no column 'prompt', it has \['answer', 'question'\]"),
        (b'{"prompt": "a"}\n{"question": "a"}\n', r"line 2: no column 'prompt', it has \['question'\]"),
        (b'{"prompt": "a", "x": 1}\n{"prompt": "a", "y": 1}\n', r"line 2: .*missing \['x'\], extra \['y'\]"),
    ],
)
def test_files_that_cannot_be_read_say_where_and_why(tmp_path, content, says):
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_rows(file)


def test_a_directory_and_another_column(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        load_rows(tmp_path)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "a"}\n')
    assert load_rows(file, "question") == [{"question": "a"}]


def test_rows_given_as_objects_are_checked_too():
    with pytest.raises(ValueError, match="got no rows"):
        check_rows([])
    with pytest.raises(ValueError, match="row 1: no column 'prompt'"):
        check_rows([{"prompt": "a"}, {"text": "a"}])


def test_a_path_is_itself_and_quickstart_is_the_shipped_one(tmp_path, monkeypatch):
    assert resolve_asset(tmp_path / "quickstart", "train") == tmp_path / "quickstart"
    assert resolve_asset("some/file.jsonl", "eval").parts == ("some", "file.jsonl")
    tokenizer = load_tokenizer(resolve_asset("quickstart", "model"))
    for kind in ("train", "eval"):
        shipped = PromptSet(load_rows(resolve_asset("quickstart", kind)), tokenizer)
        assert len(shipped) > 100 and all("answer" in prompt.columns for prompt in shipped.prompts)
        assert decode(tokenizer, shipped.prompts[0].tokens) == shipped.prompts[0].text
    monkeypatch.setitem(ASSETS, "eval", "absent.jsonl")
    with pytest.raises(ValueError, match="absent.jsonl is not there; install grpo_jax again"):
        resolve_asset("quickstart", "eval")


# --- tokens


def test_a_string_is_encoded_as_the_tokenizer_does_by_default():
    assert encode(TOKENIZER, "ab </s>") == (*ids("ab "), 2)
    assert encode(make_tokenizer(bos=True), "ab") == (1, *ids("ab"))
    assert all(type(token) is int for token in encode(TOKENIZER, "ab"))


@pytest.mark.parametrize("bos", [False, True])
def test_messages_go_through_the_template_once(bos):
    tokenizer = make_tokenizer(bos)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": ""},
    ]
    assert encode(tokenizer, messages) == (3, *ids("hi"), 4, *ids("yo"), 3, 4)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "prompt '': has no tokens"),
        ([], r"prompt \[\]: has no tokens"),
        (3, "prompt 3: neither a string nor a list of messages"),
        (None, "neither a string nor"),
        (b"abc", "neither a string nor"),
        (["hello"], "neither a string nor"),
        ({"role": "user", "content": "x"}, "neither a string nor"),
        ([{"role": "user"}], "with role and content"),
        ([{"role": "tool", "content": "x"}], "the chat template refuses it .no tools here."),
    ],
)
def test_prompts_that_cannot_be_encoded(prompt, says):
    with pytest.raises(ValueError, match=says):
        encode(TOKENIZER, prompt)
    with pytest.raises(ValueError, match=f"row 1: .*{says}"):
        PromptSet([{"prompt": "fine"}, {"prompt": prompt}], TOKENIZER)


def test_messages_without_a_template():
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode(make_tokenizer(template=None), [{"role": "user", "content": "x"}])


def test_an_empty_prompt_is_refused_even_with_a_bos_token():
    with pytest.raises(ValueError, match="has no tokens"):
        encode(make_tokenizer(bos=True), "")


def test_a_completion_as_text():
    assert decode(TOKENIZER, [*ids("a b"), 2]) == "a b"
    assert decode(TOKENIZER, [3, *ids("a"), 0, 2]) == "a"
    assert decode(TOKENIZER, ids("a.b."), stop_ids={*ids(".")}) == "a.b"
    assert decode(TOKENIZER, ids("a.b"), stop_ids={*ids(".")}) == "a.b"
    assert decode(TOKENIZER, []) == ""


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        (None, {2}),
        ({}, {2}),
        ({"eos_token_id": None}, {2}),
        ({"eos_token_id": 4}, {2, 4}),
        ({"eos_token_id": [4, 5, 2]}, {2, 4, 5}),
    ],
)
def test_stop_ids_are_a_set_from_both_places(tmp_path, listed, wanted):
    if listed is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(listed))
    assert stop_ids(tmp_path, TOKENIZER) == frozenset(wanted)


@pytest.mark.parametrize(
    "listed", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [1, true]}', '{"eos_token_id": -1}', "[]", "{"]
)
def test_stop_ids_that_cannot_be(tmp_path, listed):
    (tmp_path / "generation_config.json").write_text(listed)
    with pytest.raises(ValueError, match="generation_config.json: "):
        stop_ids(tmp_path, TOKENIZER)


def test_a_tokenizer_without_eos_stops_nowhere_unless_told(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert stop_ids(tmp_path, tokenizer) == frozenset()


def test_load_tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "good")
    loaded = load_tokenizer(tmp_path / "good")
    assert encode(loaded, "ab") == ids("ab") and loaded.chat_template == TEMPLATE
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "qwen2"}')
    for name, says in [("none", "does not exist"), ("bare", r"no tokenizer can be loaded from \['config.json'\]")]:
        with pytest.raises(ValueError, match=says):
            load_tokenizer(tmp_path / name)


# --- order

GOLDEN = [3, 6, 2, 4, 5, 0, 1, 9, 7, 13, 8, 12, 11, 10]
"""Two epochs of 7 rows at seed 5: words of Philox4x64 keyed by SeedSequence([5, epoch]), ranked."""


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=40, deadline=None)
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
    second = PromptStream(rows, TOKENIZER, seed=0, prompts_per_step=2, prompt_column="question", shuffle=False)
    second.next()
    assert [(p.request_id, p.columns["answer"]) for p in second.next()] == [(2, 3), (3, None)]


def test_importing_data_loads_no_transformers():
    code = "import sys, grpo_jax.data; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
