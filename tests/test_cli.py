"""The command's words: what each kind of field takes, what lies over what, and what it says of a wrong one."""

import os
import sys
from typing import Any

import pytest
from pydantic import Field

from grpo_jax.algo import PRESETS
from grpo_jax.cli import in_a_line, main, parse
from grpo_jax.config import Section, TrainConfig
from grpo_jax.config.arguments import merge, read_command
from grpo_jax.config.fields import ELSEWHERE, WHOLE, leaves
from grpo_jax.functions import find_function


class Inner(Section):
    """A table."""

    rate: float = 0.5
    """How fast."""
    names: tuple[str, ...] = ()
    """Which."""
    weights: tuple[float, ...] | None = None
    """How much."""
    texts: tuple[str, ...] = Field(default=(), json_schema_extra=WHOLE)
    """Said how."""
    on: bool = False
    """Whether."""


class Outer(Section):
    """The whole."""

    count: int = 1
    """How many."""
    source: str | dict[str, str] | None = "x"
    """From where."""
    shares: str | dict[str, float] = "x"
    """From which."""
    options: dict[str, dict[str, Any]] = {}
    """Of each."""
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("words", "tables"),
    [
        ("--count 3", {"count": 3}),
        ("--count=3 --count 4", {"count": 4}),
        ("--inner.rate 1e-3", {"inner": {"rate": 1e-3}}),
        ("--inner.rate -1", {"inner": {"rate": -1.0}}),
        ("--inner.names a b --count 2", {"inner": {"names": ("a", "b")}, "count": 2}),
        ("--inner.names a,b", {"inner": {"names": ("a", "b")}}),
        ('--inner.names ["a","b"]', {"inner": {"names": ("a", "b")}}),
        ("--inner.names=", {"inner": {"names": ()}}),
        ("--inner.texts a,b", {"inner": {"texts": ("a,b",)}}),
        ("--inner.texts=", {"inner": {"texts": ("",)}}),
        ("--inner.names [a]", {"inner": {"names": ("[a]",)}}),
        ("--inner.texts [/INST]", {"inner": {"texts": ("[/INST]",)}}),
        ('--inner.texts ["a","[b]"]', {"inner": {"texts": ("a", "[b]")}}),
        ("--source [a].jsonl", {"source": "[a].jsonl"}),
        ("--source {a}.jsonl", {"source": "{a}.jsonl"}),
        ("--options.regex.pattern [0-9]+", {"options": {"regex": {"pattern": "[0-9]+"}}}),
        ("--options.regex.pattern=a=b", {"options": {"regex": {"pattern": "a=b"}}}),
        ("--options.regex.pattern 2024-01-02", {"options": {"regex": {"pattern": "2024-01-02"}}}),
        ("--options.regex.pattern 1_000", {"options": {"regex": {"pattern": "1_000"}}}),
        ("--inner.weights 1,-0.5", {"inner": {"weights": (1.0, -0.5)}}),
        ("--inner.weights -1 0.5", {"inner": {"weights": (-1.0, 0.5)}}),
        ("--inner.weights none", {"inner": {"weights": None}}),
        ("--inner.on", {"inner": {"on": True}}),
        ("--inner.on false", {"inner": {"on": False}}),
        ("--inner.on=true --count 2", {"inner": {"on": True}, "count": 2}),
        ("--source none", {"source": None}),
        ("--source a/b.jsonl", {"source": "a/b.jsonl"}),
        ("--source.easy a.jsonl --source.hard 7", {"source": {"easy": "a.jsonl", "hard": "7"}}),
        ('--source {easy="a.jsonl"}', {"source": {"easy": "a.jsonl"}}),
        ("--shares.a/b.jsonl 2 --shares.c.csv 1", {"shares": {"a/b.jsonl": 2.0, "c.csv": 1.0}}),
        (
            "--options.cosine.max_len 300 --options.cosine.strict false --options.other.word yes",
            {"options": {"cosine": {"max_len": 300, "strict": False}, "other": {"word": "yes"}}},
        ),
    ],
)
def test_values_of_each_kind(words, tables):
    command = read_command(words.split(), Outer)
    assert command.file is None
    got = Outer.model_validate(command.tables).model_dump(exclude_unset=True)
    assert got == tables


STOPS = ["\n", ", ", "Hello, world", ": ", "[/INST]", "{", "[1]", "42", '"', "a=b", "==", "none", "0x2A", "[" * 5000]


@pytest.mark.parametrize("text", STOPS, ids=range(len(STOPS)))
def test_one_stop_string_is_taken_as_it_is(text):
    assert parse(["--rollout.stop_strings", text])[0].rollout.stop_strings == (text,)


def test_a_file_stands_anywhere_but_among_the_values_of_a_list():
    for words in ("mine.toml --count 2", "--count 2 mine.toml", "--inner.on mine.toml --count 2"):
        command = read_command(words.split(), Outer)
        assert command.file == "mine.toml" and command.tables["count"] == "2"


def test_flags_of_the_command_itself():
    command = read_command(["--debug", "c.toml", "--help", "inner", "options"], Outer)
    assert (command.debug, command.help, command.topics, command.file) == (True, True, ["inner", "options"], "c.toml")
    assert parse(["--quiet"])[0].log.quiet


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--cuont 3", "cuont: there is no such field; did you mean count?"),
        ("--rate 3", "rate: there is no such field; did you mean inner.rate?"),
        ("--inner.rates 3", "inner.rates: there is no such field; did you mean inner.rate?"),
        ("--iner.rate 3", "iner.rate: there is no such field; did you mean inner.rate?"),
        ("--count.x 3", "count.x: there is no such field; did you mean count?"),
        ("--zzz 3", "zzz: there is no such field; --help shows all fields."),
        ("--inner 3", "inner: is a table of fields and has no value itself; set a field of it, such as inner.rate"),
        ("--count", "count: got no value; write --count INTEGER"),
        ("--inner.names", "inner.names: got no value; write --inner.names TEXT ..."),
        ("--source.a --count 3", "source.a: got no value; write --source.a TEXT"),
        (
            "a.toml --count 3 b.toml",
            "b.toml: is a second config file beside a.toml, or a value of no field; a run has one file, and a value "
            "follows its --dotted.field",
        ),
    ],
)
def test_words_that_mean_nothing(words, said):
    with pytest.raises(ValueError) as caught:
        read_command(words.split(), Outer)
    assert str(caught.value) == said


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_other_trainers_lead_to_a_field(name):
    assert ELSEWHERE[name] in dict(leaves(TrainConfig))
    with pytest.raises(ValueError, match=f"did you mean {ELSEWHERE[name]}"):
        read_command([f"--{name}", "1"], TrainConfig)


def test_a_table_lies_over_a_table_and_replaces_anything_else():
    below = {"a": 1, "b": {"c": 1, "d": {"e": 1}}, "f": "x"}
    above = {"b": {"d": {"g": 2}}, "f": {"h": 3}, "a": None}
    assert merge(below, above) == {"a": None, "b": {"c": 1, "d": {"e": 1, "g": 2}}, "f": {"h": 3}}
    assert below == {"a": 1, "b": {"c": 1, "d": {"e": 1}}, "f": "x"}


def test_a_preset_over_the_quickstart_has_no_kl_in_the_reward_either():
    config, _ = parse(["--algorithm.preset", "rloo"])
    assert config.algorithm.advantage == "rloo" and config.loss.kl_coef == 0 and not config.loss.kl_in_reward
    with pytest.raises(ValueError, match=r"kl_coef is 0, .* Give kl_coef a value, or set it false\.$"):
        parse(["--algorithm.preset", "rloo", "--algorithm.loss.kl_in_reward", "true"])


@pytest.mark.parametrize("before", ["none", "one.jsonl", '{"a.jsonl" = 3}'])
def test_a_table_key_by_key_after_another_value_of_it(before):
    tables = read_command(["--data.train", before, "--data.train.b.jsonl", "1"], TrainConfig).tables
    kept = {"a.jsonl": 3} if before.startswith("{") else {}
    assert tables == {"data": {"train": kept | {"b.jsonl": 1}}}


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(monkeypatch, capfd):
    moved = []

    def work():
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(os, "dup2", lambda *files: moved.append(files))
        assert in_a_line(work) == 141
    assert capfd.readouterr() == ("", "") and [to for _, to in moved] == [sys.stdout.fileno()]
    os.close(moved[0][0])


def test_no_escape_sequence_of_an_errors_words_reaches_the_terminal(capfd):
    assert in_a_line(lambda: find_function("no\x1b[31mred:f")) == 2
    assert "\x1b" not in (said := capfd.readouterr().err) and "\\x1b[31mred" in said


def test_help_breaks_no_name_and_no_value_of_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    words = capsys.readouterr().out.split()
    assert {f"--{path}" for path, _ in leaves(TrainConfig)} <= set(words)
    assert set(PRESETS) <= set(words)


def test_help_of_one_table_shows_the_values_of_a_config(tmp_path, capsys):
    (tmp_path / "mine.toml").write_text("[optim]\nlearning_rate = 0.125\n")
    assert main([str(tmp_path / "mine.toml"), "--help", "optim"]) == 0
    out = capsys.readouterr().out
    assert "--optim.learning_rate" in out and "0.125" in out and "--model.path" not in out
    assert main(["--help", "optin"]) == 2
    assert capsys.readouterr().err == "error: --help: there is no table 'optin'; did you mean optim?\n"


def test_what_lies_beside_a_script_hides_no_library(tmp_path, monkeypatch):
    for folder in ("scripts", "site"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "evaluate.py").write_text(f"place = {folder!r}\n")
    (tmp_path / "mine.py").write_text("import evaluate\n\n\ndef place():\n    return evaluate.place\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "scripts"), str(tmp_path / "site"), *sys.path])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "scripts" / "train.py"), raising=False)
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)
    for begin in (lambda: main(["--version"]), lambda: in_a_line(lambda: None)):
        assert begin() == 0
        assert sys.path[0] == str(tmp_path / "site") and sys.path.count(str(tmp_path / "scripts")) == 1
    assert find_function(f"{tmp_path}/mine.py:place")() == "site"
    monkeypatch.delitem(sys.modules, "evaluate")
