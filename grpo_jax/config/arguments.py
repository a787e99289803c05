"""The words of a command -> nested tables of configuration values, and the help. No jax here.

    train.py [CONFIG.toml] [--dotted.field value ...]

A value is written as in TOML, without its quotes; a list is several words, one with commas, or TOML's own; what is no
TOML is the text itself, whatever it begins with; "none" is no value; a field that is true or false may stand alone for
true. The checks of a value are pydantic's, with the file's tables below, so that a file and a command fail alike; here
only the fields' names and the number of words are looked at.
"""

import datetime
import difflib
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grpo_jax.config.fields import Place, find, leaves, table_of, type_words

SHORT = {"--quiet": "log.quiet", "-q": "log.quiet", "--output-dir": "output_dir"}
"""Names by which a field may be called besides its own."""
TRUTHS = ("true", "false")


@dataclass
class Command:
    """What was asked for.

    Attributes:
        file: the config file; None: the quickstart's.
        tables: values over it, nested; None where "none" was said.
        help: show the help instead, of the tables whose path begins with one of ``topics``.
        topics: see ``help``.
        debug: show tracebacks.
    """

    file: str | None = None
    tables: dict[str, Any] = field(default_factory=dict)
    help: bool = False
    topics: list[str] = field(default_factory=list)
    debug: bool = False


def read_command(words: Sequence[str], model: type[BaseModel]) -> Command:
    """Take a command apart.

    Args:
        words: of the command, its own name left out.
        model: the configuration's.

    Raises:
        ValueError: an unknown field, a value too many or too few, or a second file.
    """
    command, rest = Command(), list(words)
    while rest:
        word = rest.pop(0)
        if word in ("--help", "-h"):
            command.help = True
        elif word == "--debug":
            command.debug = True
        elif word.startswith("--") or word in SHORT:
            _read_option(command, word, rest, model)
        elif command.help:
            command.topics.append(word)
        elif command.file is None:
            command.file = word
        else:
            raise ValueError(
                f"{word}: is a second config file beside {command.file}, or a value of no field; a run has one file, "
                "and a value follows its --dotted.field"
            )
    return command


def take_fields(words: Sequence[str], model: type[BaseModel]) -> tuple[dict[str, Any], list[str]]:
    """The ``--dotted.field value`` among the words of another command, as nested tables, and its other words.

    Raises:
        ValueError: an unknown field, or a value too few.
    """
    command, rest, others = Command(), list(words), list[str]()
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and "." in word.partition("=")[0]:
            _read_option(command, word, rest, model)
        else:
            others.append(word)
    return command.tables, others


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested tables over others; a table replaces what is no table."""
    out = dict(below)
    for key, value in above.items():
        under = out.get(key)
        out[key] = merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return out


def show_help(console: Console, usage: str, config: BaseModel, topics: Sequence[str] = ()) -> None:
    """Print every field, table by table, with what it takes, its value in ``config`` and its documentation.

    Raises:
        ValueError: a topic that is no table.
    """
    tables = dict(_tables(config))
    if not topics:
        console.print(escape(usage), highlight=False)
    for topic in topics:
        if topic not in tables:
            near = difflib.get_close_matches(topic, tables, 1)
            advice = f"did you mean {near[0]}?" if near else f"the tables are {', '.join(filter(None, tables))}"
            raise ValueError(f"--help: there is no table {topic!r}; {advice}")
    for path, table in tables.items():
        if topics and not any(path == topic or path.startswith(f"{topic}.") for topic in topics):
            continue
        console.print()
        console.print(f"[bold]{path or 'the run'}[/bold]: {escape(' '.join((type(table).__doc__ or '').split()))}")
        rows = Table(box=None, show_header=False, padding=(0, 2, 0, 2), expand=True)
        named = max(len(f"--{path}.{name}") for name in type(table).model_fields)
        rows.add_column(width=max(named, console.width * 2 // 5), overflow="fold")  # a name is never broken
        rows.add_column(ratio=1)
        for name, info in type(table).model_fields.items():
            if table_of(info.annotation) is None:
                option = f"[cyan]--{f'{path}.{name}'.lstrip('.')}[/cyan]"
                takes = escape(f"{type_words(info.annotation).replace('|', ' | ')}  ({_written(getattr(table, name))})")
                rows.add_row(f"{option}\n  [dim]{takes}[/dim]", escape(" ".join((info.description or "").split())))
        console.print(rows)


def _tables(config: BaseModel, path: str = "") -> Iterator[tuple[str, BaseModel]]:
    yield path, config
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from _tables(value, f"{path}.{name}".lstrip("."))


def _written(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(_written, value)) or "empty"
    words = {"None": "none", "True": "true", "False": "false", "{}": "empty"}
    return words.get(str(value), str(value))


def _read_option(command: Command, word: str, rest: list[str], model: type[BaseModel]) -> None:
    name, equals, value = word.partition("=")
    path = SHORT.get(name, name.removeprefix("--"))
    place = find(model, path)
    if equals:
        values = [value]
    elif place.several:
        values = list(_until_option(rest))
    elif place.kinds == (bool,):
        values = [rest.pop(0)] if rest and rest[0].lower() in TRUTHS else ["true"]
    else:
        values = [rest.pop(0)] if rest and not rest[0].startswith("--") else []
    if not values:
        raise ValueError(f"{path}: got no value; write --{path} {type_words(_annotation(model, path))}")
    _put(command.tables, place.keys, _value(place, values))


def _until_option(rest: list[str]) -> Iterator[str]:
    while rest and not rest[0].startswith("--") and rest[0] not in SHORT:
        yield rest.pop(0)


def _value(place: Place, words: list[str]) -> Any:
    word, text = words[0], place.kinds == (str,)
    if words == ["none"] and (place.optional or not (text or place.whole)):
        return None
    if len(words) == 1 and not text:
        value = _toml(word)
        if place.free or (isinstance(value, list) and place.several and _is_list_for(place, value)):
            return value
        if isinstance(value, dict) and not place.several:
            return value
    if place.several and (len(words) > 1 or place.whole):
        return words
    if place.several:
        return [part.strip() for part in word.split(",") if part.strip()]
    return word


def _is_list_for(place: Place, value: list[Any]) -> bool:
    """Whether a list is meant: for a list of any text "[1]" is a text, and only ["[1]"] a list."""
    return not place.whole or all(isinstance(item, str) for item in value)


def _toml(word: str) -> Any:
    """A value as TOML has it (a number, true, a list), else the text itself.

    A text too where another spelling of the number would be lost (0x2A, 1_000), or JSON has no such value (a date).
    """
    try:
        value = tomllib.loads(f"value = {word}")
    except (ValueError, RecursionError):
        return word
    kept = value.get("value")
    odd = isinstance(kept, datetime.date | datetime.time) or (type(kept) is int and str(kept) != word)
    return word if odd or len(value) > 1 else kept


def _put(tables: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tables.get(key), dict):  # as in `merge`, a table replaces what is no table
            tables[key] = {}
        tables = tables[key]
    tables[keys[-1]] = value


def _annotation(model: type[BaseModel], path: str) -> Any:
    return next((info.annotation for name, info in leaves(model) if name == path), str)
