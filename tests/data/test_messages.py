"""Chat content in the forms that datasets have it in, and chat templates of strangers."""

import importlib.util
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import DataConfig
from grpo_jax.data import PromptFormat, PromptSet
from grpo_jax.data.template import ChatTemplate, TemplateFault, TemplateRefusal

from .cases import TOKENIZER, ids, make_tokenizer

TURN = "{% for m in messages %}<{{ m.role[0] }}>BODY{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
STRING = TURN.replace("BODY", "{{ m.content }}")
BOTH = TURN.replace(
    "BODY",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text | trim }}"
    "{% endfor %}{% endif %}",
)
KINDS = {
    "any": STRING,
    "a string, or nothing": TURN.replace("BODY", "{% if m.content is string %}{{ m.content }}{% endif %}"),
    "a string, or an error": TURN.replace("BODY", "{{ '' + m.content }}"),
    "parts, or nothing": TURN.replace(
        "BODY", "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    ),
    "both": BOTH,
    "JSON": TURN.replace(
        "BODY", "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content|tojson }}{% endif %}"
    ),
}


def user(content):
    return [{"role": "user", "content": content}]


def text(value):
    return {"type": "text", "text": value}


def prompt_of(template, messages, **form):
    return PromptFormat(**form).encode(make_tokenizer(template=template), messages)


@pytest.mark.parametrize("template", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "messages",
    [
        user("what?"),
        user([text("wh"), text("at?")]),
        user(["wh", "at?"]),
        user([text("what?") | {"image": None}]),  # as a table of all kinds of parts has it
        user([{"type": "input_text", "text": "what?"}]),
        user((text("what?"),)),
        np.array(user(np.array([text("what?")], object)), object),
        [{"role": np.str_("user"), "content": "what?", "tool_calls": None}],
    ],
    ids=range(8),
)
def test_text_in_any_form_is_the_same_prompt_whatever_kind_the_template_is_of(template, messages):
    assert prompt_of(template, messages) == (3, *ids("what?"), 4)


def test_a_template_that_reads_parts_gets_those_of_the_dataset():
    assert prompt_of(BOTH, user([text(" a "), text(" b ")])) == (3, *ids("ab"), 4)
    assert prompt_of(STRING, user([text(" a "), text(" b ")])) == (3, *ids(" a  b "), 4)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (user(None), r"prompt: message 0 \(user\) has no content"),
        (user([{"type": "image", "text": None}, text("x")]), "message 0 .user. holds a part of type 'image'"),
        (user([{"type": "image", "image": object()}]), "prompt: a object has no form .*read text alone"),
        (user(3), "message 0 .user. has a content of type int; give text"),
        (user({"text": "x"}), "has a content of type dict"),
        (user([["x"]]), "has a content of type list"),
        (user([]), "prompt has no text in any of its messages"),
        (user(" "), "prompt has no text in any of its messages"),
        ([{"role": None, "content": "x"}], "message 0 has the role None"),
        ([*user("x"), {"role": "assistant", "content": None}], r"message 1 \(assistant\) has no content"),
        ([*user("x"), {"role": "tool", "content": None}], r"message 1 \(tool\) has no content"),
        ([*user("x"), {"role": "assistant", "tool_calls": [1]}], "without a text that could be continued"),
        (user("1+1= \ud83d"), r"prompt '.*1\+1= .ud83d': '.ud83d' is half of a character"),
        ([user("a"), user("b")], "neither a string nor a list of messages"),
    ],
    ids=range(14),
)
def test_what_is_no_prompt_is_one_line_with_its_row_and_column(messages, says):
    with pytest.raises(ValueError, match=f"^row 1, column 'question': .*{says}") as caught:
        rows = [{"question": "fine"}, {"question": messages}]
        PromptSet(rows, make_tokenizer(template=STRING), prompt_column="question")
    assert "\n" not in str(caught.value) and str(caught.value).encode()


def test_half_a_character_in_a_string():
    with pytest.raises(ValueError, match=r"^row 0: prompt '1 .ud83d': '.ud83d' is half of a character"):
        PromptSet([{"prompt": "1 \ud83d"}], TOKENIZER)


@pytest.mark.parametrize(
    ("content", "written"),
    [("7", "7"), (7, "7"), ({"a": 1}, "{'a': 1}"), ([1, 2], "[1, 2]"), ([text("7")], "7"), (True, "True")],
)
def test_what_a_tool_returned_is_its_text(content, written):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [*user("x"), call, {"role": "tool", "content": content}]
    expected = (3, *ids("x"), 4, 5, *ids(written), 4)
    assert prompt_of(STRING, messages) == expected
    assert prompt_of(KINDS["a string, or an error"], messages) == expected, "a call without a text has the text ''"


def test_a_message_that_the_template_leaves_out_is_said():
    silent = TURN.replace("BODY", "{% if m.role != 'system' %}{{ m.content }}{% endif %}")
    messages = [{"role": "system", "content": "be"}, *user("be")]
    with pytest.raises(ValueError, match=r"^prompt .*: the chat template leaves out message 0 \(system\)"):
        prompt_of(silent, messages)


@pytest.mark.parametrize("template", [*KINDS.values(), STRING.replace("m.content", "m.content | trim")])
def test_an_assistants_turn_is_continued(template):
    closed = template.replace("{% endfor %}{% if add", "</s>{% endfor %}{% if add")
    turn = [*user("x"), {"role": "assistant", "content": "It is "}]
    expected = (3, *ids("x"), 2, 4, *ids("It is" if "trim" in template else "It is "))
    assert prompt_of(closed, turn) in (expected, (*expected, *ids(" ")))
    assert prompt_of(closed, turn, chat_template_kwargs={"add_generation_prompt": True})[-2:] == (2, 4)


def template(body, name="the tokenizer's chat template"):
    return ChatTemplate(body, name).render(user("x"), {}, datetime(2026, 1, 2))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "has not ended after 0.05 s",
        ),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}", "has not ended"),
        ("{{ 'x' * 10**10 }}", "makes a value of more than 10"),
        ("{{ 'x'.ljust(10**10) }}", "makes a value"),
        ("{{ '%10000000000d' % 1 }}", "makes a value"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "makes a value",
        ),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than"),
        *[
            (f"{{% set b = 'x' * 10**6 %}}{{% set many = [b] * 10**5 %}}{{{{ {makes} }}}}", "makes a value")
            for makes in (
                *("many", "many | join", "many | tojson", "many | string", "many ~ 'x'", "b.join(many)"),
                *(
                    "b | replace('x', b)",
                    "b.replace('x', b)",
                    "b.translate({120: b})",
                    "('\t' * 9999).expandtabs(10**6)",
                ),
                *(
                    "('{0}' * 9999).format(b)",
                    "('%s' * 9999) % ((b,) * 9999)",
                    "[] | slice(10**9) | list",
                    "b | indent(b)",
                ),
            )
        ],
    ],
)
def test_a_template_without_end_ends_with_its_name(body, says, monkeypatch):
    monkeypatch.setattr("grpo_jax.data.template.SECONDS", 0.05)
    with pytest.raises(TemplateRefusal, match=f"^own.jinja {says}"):
        template(body, "own.jinja")


@pytest.mark.parametrize("body", ["{% if %}", "{{ x | random }}", "{{ " * 5000, "x" * 10**6])
def test_a_template_that_is_none_is_blamed_itself(body, tmp_path):
    with pytest.raises(TemplateFault, match="^the tokenizer's chat template (does not parse|is a text of)"):
        PromptSet([{"prompt": user("x")}], make_tokenizer(template=body))
    (tmp_path / "own.jinja").write_text(body)
    with pytest.raises(ValueError, match="^data.chat_template: '.*own.jinja' (does not parse|is a text of)"):
        PromptFormat.from_config(DataConfig(chat_template=str(tmp_path / "own.jinja")))


def test_no_escape_sequence_of_a_template_reaches_the_terminal():
    body = "{{ raise_exception('a \x1b[31m\n\x07b\u202e' ~ 'c' * 5000) }}"
    with pytest.raises(TemplateRefusal) as caught:
        template(body)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    with pytest.raises(TemplateRefusal, match="refuses it .access to attribute '__class__' of 'str' object is unsafe"):
        template("{{ ''.__class__.mro }}")


def test_the_date_is_seen_and_the_same_for_a_whole_run():
    dated = make_tokenizer(template="{{ strftime_now('%d %b %Y %H:%M') }} " + STRING)
    rows = [{"prompt": user("x")}, {"prompt": user("y")}]
    found = [PromptSet(rows, dated, form=PromptFormat(now=datetime(2026, 1, day))) for day in (2, 2, 3)]
    tokens = [[prompt.tokens for prompt in each.prompts] for each in found]
    assert tokens[0] == tokens[1] != tokens[2]
    assert found[0].reports[0].startswith("the chat template writes the date into every prompt: '02 Jan 2026 00:00'")
    assert PromptSet(rows, TOKENIZER).reports == ()


REAL = [
    file
    for package in ("trl", "vllm")
    for place in (getattr(importlib.util.find_spec(package), "submodule_search_locations", None) or ())
    for file in sorted(Path(place).rglob("chat_templates/*.jinja"))
]
CHATS = [
    user("what?"),
    [{"role": "system", "content": "be"}, *user("hi"), {"role": "assistant", "content": "yo"}, *user("what?")],
    [
        *user("what?"),
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "name": "f", "content": "42"},
    ],
]


@pytest.mark.skipif(not REAL, reason="neither trl nor vllm is installed, whose templates this looks at")
@pytest.mark.parametrize("file", REAL, ids=lambda file: file.name)
def test_real_templates_write_what_transformers_has_them_write(file):
    """And text in parts is the prompt that the same text is, or a line; never Python's notation."""
    tokenizer = make_tokenizer(template=file.read_text())
    for chat in CHATS:
        try:
            expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except Exception:
            expected = None
        in_parts = [m | {"content": [text(m["content"])]} if m["content"] else m for m in chat]
        written = []
        for messages in (chat, in_parts):
            try:
                written.append(PromptFormat()._written(tokenizer, messages))
            except ValueError as error:
                written.append(None)
                assert str(error).startswith("prompt [")
        assert None in written or len({"".join(each.split()) for each in written}) == 1  # some trim a string, no part
        assert written[0] is None or "what?" in written[0] and "'type'" not in written[0]
        if expected is not None and "what?" in expected:
            assert written[0] in (expected, None)


def test_a_template_here_writes_what_transformers_has_it_write():
    for body in (TOKENIZER.chat_template, *KINDS.values()):
        tokenizer = make_tokenizer(template=body + "{{ bos_token }}{{ tools }}{{ documents }}{{ {'a': 'é'}|tojson }}\n")
        for chat in CHATS[:2] if "JSON" not in body else ():
            expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            variables = tokenizer.special_tokens_map | {"add_generation_prompt": True}
            assert ChatTemplate(tokenizer.chat_template, "").render(chat, variables, datetime.now())[0] == expected
