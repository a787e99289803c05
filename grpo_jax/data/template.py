"""A chat template at work: Jinja of strangers, in a sandbox, under a limit of time and one of size. Host only.

A template gets what transformers' ``apply_chat_template`` would give it and writes what it would write there
(a test compares the two). It is run here rather than there because there it may run for ever, fill the memory, and
read a clock that nobody recorded.
"""

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 1.0
"""Of computing that a template gets for one prompt; those of models in use take less than a thousandth of it."""
ROOM = 2**20
"""Characters that a template may write besides ten for each of the messages'."""
LONGEST = 2**17
"""Characters of a template's own text; those of models in use have up to 20,000."""

_WRITING = frozenset(
    {"batch", "capitalize", "e", "escape", "forceescape", "format", "glued", "indent", "join", "lower", "pprint"}
    | {"replace", "slice", "string", "striptags", "title", "tojson", "trim", "truncate", "upper", "urlencode"}
)
"""Filters that make a text, or a list as long as is asked for."""
_BY_THE_PLACE = frozenset({"batch", "expandtabs", "indent", "slice", "tojson", "translate"})
"""Filters and methods that put what they are given at many places."""

Message = Mapping[str, Any]


class TemplateFault(ValueError):
    """Wrong with the template whatever the messages are, so that no row is to blame."""


class TemplateRefusal(ValueError):
    """The template cannot write these messages."""


class _Stopped(Exception):
    """A limit was reached; says which."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template's text and what errors call it.

    Attributes:
        text: Jinja.
        name: such as "the tokenizer's chat template".
    """

    text: str
    name: str

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any], now: datetime) -> tuple[str, str]:
        """What the template writes, and the last date among it; "" where it asks for none.

        Args:
            messages: plain dicts, lists and scalars.
            variables: everything else that the template may read.
            now: the time that its ``strftime_now`` tells.

        Raises:
            TemplateFault: it does not parse.
            TemplateRefusal: it raises, does not end, or writes without end.
        """
        template = self.parsed()
        told = ""

        def strftime_now(form: str) -> str:
            nonlocal told
            told = now.strftime(form)
            return told

        given = {"tools": None, "documents": None, "strftime_now": strftime_now} | dict(variables)
        messages = [_with_reasoning(message) for message in messages]
        environment = template.environment
        environment.begin(ROOM + 10 * len(json.dumps(messages)))
        try:
            text = "".join(map(environment.counted, template.generate(messages=messages, **given)))
        except _Stopped as error:
            raise TemplateRefusal(f"{self.name} {error}; mend the template") from None
        except MemoryError as error:
            raise TemplateRefusal(f"{self.name} takes more memory than there is; mend the template") from error
        except Exception as error:  # whatever a template makes of what it is given
            said = printable(str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}")
            raise TemplateRefusal(f"the chat template refuses it ({said}); change the messages") from error
        return text, told

    def parsed(self) -> Any:
        """Jinja's template.

        Raises:
            TemplateFault: it is none.
        """
        if len(self.text) > LONGEST:
            raise TemplateFault(
                f"{self.name} is a text of {len(self.text)} characters, which is none of a chat template "
                f"({LONGEST} at most); name another as data.chat_template"
            )
        try:
            return _compiled(self.text)
        except TemplateSyntaxError as error:
            said = f"line {error.lineno}: {printable(error.message or '')}"
        except Exception as error:  # Jinja's parser and Python's compiler on any text
            said = printable(f"{type(error).__name__}: {error}")
        raise TemplateFault(f"{self.name} does not parse ({said}); mend it, or name another as data.chat_template")


def printable(text: str, most: int = 300) -> str:
    """Text of a stranger in one line, its control characters written out, so that none reaches the terminal."""
    line = " ".join(text[: 4 * most].split())
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    return line if len(line) <= most else f"{line[:most]}..."


class _Limited(ImmutableSandboxedEnvironment):
    """Jinja that looks at the clock and at sizes wherever a template can go on or grow."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def begin(self, room: int) -> None:
        self.room, self.left, self.until = room, room, time.thread_time() + SECONDS

    def tick(self) -> None:
        if time.thread_time() > self.until:
            raise _Stopped(f"has not ended after {SECONDS:g} s of computing")

    def counted(self, part: str) -> str:
        self.left -= len(part)
        if self.left < 0:
            raise _Stopped(f"writes more than {self.room} characters")
        return part

    def call(self, context: Any, called: Any, /, *args: Any, **named: Any) -> Any:  # type: ignore[override]
        self.tick()
        method = getattr(called, "__wrapped__", called)  # Jinja wraps a text's format
        if isinstance(text := getattr(method, "__self__", None), str):
            args = tuple(map(_listed, args))
            self.fits(_size_made(method.__name__, text, [*args, *named.values()]))
        return self.sized(super().call(context, called, *args, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.tick()
        if operator != "+":
            self.fits(_size_of(operator, left, right))
        return self.sized(super().call_binop(context, operator, left, right))

    def limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # Jinja marks functions that take its context
        def call(*args: Any, **named: Any) -> Any:
            self.tick()
            if name in _WRITING:
                first = 1 if hasattr(function, "jinja_pass_arg") else 0
                value, *others = map(_listed, args[first:])
                self.fits(_size_made(name, value, [*others, *named.values()]))
                args = (*args[:first], value, *others)
            return self.sized(function(*args, **named))

        return call

    def written(self, value: Any) -> Any:
        """What a template writes as it is, which may be a list of one text many times."""
        self.fits(_size(value))
        return value

    def sized(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            self.fits(len(value))
        return value

    def fits(self, size: int) -> None:
        if size > self.room:
            raise _Stopped(f"makes a value of more than {self.room} characters")


def _size_of(operator: str, left: Any, right: Any) -> int:
    """How long a product, a power or a filled-in text will be: in characters, places of a list or bits."""
    if operator == "**":
        return left.bit_length() * abs(right) if isinstance(left, int) and isinstance(right, int) else 0
    if operator == "%":
        if not isinstance(left, str):
            return 0
        given = right if isinstance(right, tuple) else (right,)  # a width may be an argument, as in %*d
        sizes = [n if "*" in left and isinstance(n, int) else _size(n) for n in given]
        return left.count("%") * max([*map(int, re.findall(r"\d+", left)), *sizes], default=0)
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(times, int):
            return len(many) * times
    return 0


def _listed(value: Any) -> Any:
    """What can be read once only, so that it can be measured and then be read."""
    return list(value) if isinstance(value, Iterator) else value


def _size(value: Any) -> int:
    """Characters, about, that a value takes where it is written; a list that is a part of many is looked at once."""
    known: dict[int, int] = {}

    def size(part: Any) -> int:
        if isinstance(part, str | bytes):
            return len(part)
        if not isinstance(part, Collection):
            return 1
        if id(part) not in known:
            known[id(part)] = 0  # what holds itself is written once
            parts = [*part.keys(), *part.values()] if isinstance(part, Mapping) else part
            known[id(part)] = 1 + sum(map(size, parts))
        return known[id(part)]

    return size(value)


def _size_made(name: str, value: Any, given: Sequence[Any]) -> int:
    """How long at most is what a filter, or a method of a text, makes of a value and its other arguments."""
    whole, most = _size(value), max((arg if isinstance(arg, int) else _size(arg) for arg in given), default=0)
    if name == "join":  # the filter of a list is given a text, the method of a text is given a list
        parts = [part for part in (value, *given) if isinstance(part, Collection) and not isinstance(part, str)]
        texts = [part for part in (value, *given) if isinstance(part, str)]
        return whole + most + max(map(len, parts), default=0) * max(map(len, texts), default=0)
    if name == "replace" and isinstance(value, str) and given and isinstance(given[0], str):
        return whole + value.count(given[0]) * most
    if name in ("format", "format_map"):
        return whole + sum(map(str(value).count, "{%")) * most
    return whole * (1 + most) if name in _BY_THE_PLACE else whole + most


class _Watched(NodeTransformer):
    """A look at the clock in every round of a loop, and at the size of what ``~`` makes."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        tick = _filter("tick", nodes.Const(None), node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)  # in place
        return _filter("glued", nodes.List(node.nodes), node.lineno)


class _Generation(Extension):
    """The marks around the assistant's turns, for training on these alone; here they write nothing."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _compiled(text: str) -> Any:
    environment = _environment()
    code = environment.compile(_Watched().visit(environment.parse(text)))
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _environment() -> _Limited:
    """Jinja as transformers sets it up, but for what would make two prompts of the same messages."""
    extensions = [_Generation, loopcontrols]
    environment = _Limited(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
    environment.begin(ROOM)  # parsing computes what is constant
    own = {"tojson": _tojson, "tick": str, "glued": lambda parts: "".join(map(str, parts))}
    filters = {**environment.filters, **own}
    for name in ("random", "center", "wordwrap", "urlize", "xmlattr"):  # but for the first, as long as it is asked for
        del filters[name]
    environment.filters = {name: environment.limited(name, function) for name, function in filters.items()}
    environment.finalize = environment.written
    environment.globals["raise_exception"] = _raise
    del environment.globals["lipsum"]
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _filter(name: str, value: nodes.Expr, line: int) -> nodes.Filter:
    made = nodes.Filter(value, name, [], [], None, None)
    made.set_lineno(line)
    return made


def _with_reasoning(message: Message) -> Message:
    """A message's reasoning under the names that templates read it by, as transformers does it."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}
