"""From the name of a user's own function, as a config writes it, to the function."""

import difflib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

MAIN = "__mp_main__"
"""What multiprocessing calls the main module in the processes it starts."""


@functools.cache
def load_function(spec: str) -> Callable[..., Any]:
    """As ``find_function``, but loaded once, so that it is the same object wherever it is asked for."""
    return find_function(spec)


def find_function(spec: str, kind: str = "function", as_main: bool = False) -> Callable[..., Any]:
    """The function that ``spec`` names.

    Args:
        spec: ``module:function``, or ``path/file.py:function`` relative to the working directory.
        kind: what errors call it.
        as_main: make a file's module the main one, so that processes of a pool which it has find its functions.

    Raises:
        ValueError: no such module, file or function, or it does not import.
    """
    place, _, name = spec.rpartition(":")
    subject = f"{kind} {spec!r}"
    module = _load_file(subject, Path(place), as_main) if place.endswith(".py") else _load_module(subject, place)
    function = getattr(module, name, None)  # not vars(module): a module may load its names when they are asked for
    if not callable(function):
        names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        known = ", ".join(names[:20]) + more if names else "none"
        raise ValueError(
            f"{subject}: {place} has no function {name!r}{nearest(name, names)}; use one of those it has: {known}"
        )
    return function


def hide_no_library() -> None:
    """Put the folder of the running script, which Python puts first on the path, behind all libraries.

    A script beside others would hide a library that one of them is called after, such as ``evaluate``, from what the
    user's own functions import, in their processes too.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script and sys.path and Path(sys.path[0]).resolve() == Path(script).resolve().parent:
        sys.path.append(sys.path.pop(0))


def nearest(word: str, words: Iterable[str]) -> str:
    """What to add to an error about a word that is none of ``words``: the nearest of them, or nothing."""
    close = difflib.get_close_matches(word, list(words), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def words_of(error: BaseException) -> str:
    """An error's message in one line of at most 1,000 characters."""
    try:
        return " ".join(str(error)[:1000].split())
    except Exception:
        return "(its message could not be made)"


def printable(text: str) -> str:
    """Text whose control characters, which could move the cursor or worse, are shown instead of sent."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _load_module(subject: str, place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except MemoryError:
        raise  # about the process, as in a call
    except Exception as error:
        raise ValueError(
            f"{subject}: importing {place!r} raised {type(error).__name__}: {words_of(error)}; "
            "install or repair it, or write path/file.py:function"
        ) from error


def _load_file(subject: str, path: Path, as_main: bool) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{subject}: no file {str(path)!r} under {Path.cwd()}; give the path from there, or all of it")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # at the end: a file may import its neighbours but not hide a library
    spec = importlib.util.spec_from_file_location(MAIN if as_main else f"_grpo_jax_own_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if as_main:
        sys.modules["__main__"] = module
        module.__spec__ = None  # as of a script: multiprocessing goes by the file then
    try:
        spec.loader.exec_module(module)
    except MemoryError:
        raise  # about the process, as in a call
    except Exception as error:
        raise ValueError(
            f"{subject}: running {path} raised {type(error).__name__}: {words_of(error)}; repair the file"
        ) from error
    return module
