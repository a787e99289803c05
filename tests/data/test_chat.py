"""Prompts to tokens and completions to text: TRL's habits, and what the options of data.* change."""

import json

import pytest

from grpo_jax.config import DataConfig
from grpo_jax.data import PromptFormat, PromptSet, decode, encode, load_tokenizer, stop_ids

from .cases import TEMPLATE, TOKENIZER, ids, make_tokenizer


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


def test_stop_ids_of_the_model_itself_are_among_them(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": [3, 4]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert stop_ids(tmp_path, TOKENIZER) == {2, 3, 4, 5}
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match="/config.json: eos_token_id holds '</s>'"):
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


def form(**data):
    return PromptFormat.from_config(DataConfig(**data))


USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "be"}


def test_strings_stay_raw_unless_they_are_to_be_messages():
    assert form().prompt({"prompt": "hi"}) == "hi"
    assert form(as_messages=True).prompt({"prompt": "hi"}) == [USER]
    assert form(as_messages=True, system_prompt="be").prompt({"q": "hi"}, "q") == [SYSTEM, USER]
    assert form(as_messages=True, system_prompt="be").prompt({"prompt": [USER]}) == [SYSTEM, USER]
    assert form(as_messages=True).prompt({"prompt": ""}) == []


@pytest.mark.parametrize("data", [{"system_prompt": "be"}, {"chat_template_kwargs": {"loud": True}}])
def test_what_needs_messages_is_refused_for_strings(data):
    with pytest.raises(ValueError, match=f"data.{next(iter(data))}: got one, but the prompt is a string.*as_messages"):
        form(**data).prompt({"prompt": "hi"})


def test_two_system_prompts_are_one_too_many():
    with pytest.raises(ValueError, match="data.system_prompt: got one, but the prompt begins with its own"):
        form(system_prompt="be").prompt({"prompt": [SYSTEM, USER]})


def test_arguments_of_the_template_and_a_template_of_ones_own(tmp_path):
    messages = [USER]
    assert form(chat_template_kwargs={"loud": True}).encode(TOKENIZER, messages) == (3, *ids("hi"), 4, *ids("!"))
    assert form(chat_template_kwargs={"loud": False}).encode(TOKENIZER, messages) == (3, *ids("hi"), 4)
    with pytest.raises(ValueError, match="data.chat_template_kwargs: got 'lout', which the chat template never reads"):
        form(chat_template_kwargs={"lout": True}).encode(TOKENIZER, messages)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m['content'] }}.{% endfor %}")
    own = form(chat_template=str(tmp_path / "own.jinja"), as_messages=True)
    for tokenizer in (TOKENIZER, make_tokenizer(template=None)):
        assert own.encode(tokenizer, own.prompt({"prompt": "ab"})) == ids("ab.")
    assert encode(TOKENIZER, messages) == (3, *ids("hi"), 4), "the tokenizer itself is as it was"
    with pytest.raises(ValueError, match="data.chat_template: no file '.*absent' .looked from"):
        form(chat_template=str(tmp_path / "absent"))
    (tmp_path / "own.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="data.chat_template: .* is not UTF-8"):
        form(chat_template=str(tmp_path / "own.jinja"))


@pytest.mark.parametrize(
    ("template", "made"),
    [
        ("{q} Put it in \\boxed{}.", "1+1? Put it in \\boxed{}."),
        ("{q} {{q}} {n} {numbers}", "1+1? {q} 2 [1, 2]"),
        ("{of.it} {.q}{nought}", "5 {.q}0"),
        ("plain { q }", "plain { q }"),
    ],
)
def test_a_prompt_made_of_columns(template, made):
    row = {"q": "1+1?", "n": 2, "numbers": [1, 2], "nought": 0, "of": {"it": 5}}
    assert form(prompt_template=template).prompt(row) == made


@pytest.mark.parametrize("name", ["answer", "none"])
def test_a_prompt_that_lacks_a_column(name):
    with pytest.raises(ValueError, match=rf"data.prompt_template: no value for {{{name}}}, .*\['none', 'q'\]"):
        form(prompt_template=f"{{{name}}}").prompt({"q": "a", "none": None})


def test_values_of_a_row_are_never_templates():
    assert form(prompt_template="{q}").prompt({"q": "{a} {{a}}", "a": "secret"}) == "{a} {{a}}"
